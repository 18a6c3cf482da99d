"""Labels of collectives: each rank has the same tokens at the same places, so sums over ranks keep them apart."""

from __future__ import annotations

from torch.fx import Node

from trilithon.capture.collectives import ALL_GATHER, ALL_REDUCE, WAIT
from trilithon.prove.axes import Label, Scope, is_free, merged, refuse
from trilithon.prove.local_values import Rule


def same(node: Node, scope: Scope) -> Label:
    """Element by element."""
    return scope.label(node.args[0])


def reduced(node: Node, scope: Scope) -> Label:
    return scope.plain(node, node.args[0])


def gathered(node: Node, scope: Scope) -> Label:
    """One rank's behind another's, along the first axis."""
    x = scope.plain(node, node.args[0])
    if not x.axes or not is_free(x.axes[0]):
        raise refuse(node, "it joins what ranks have along tokens, or along rows of the batch")
    size = scope.sizes.axis(node.meta["val"].shape[0])
    return Label((merged(size or ()), *x.axes[1:]), x.source, x.last)


NAMED: dict[str, Rule] = {ALL_REDUCE: reduced, ALL_GATHER: gathered, WAIT: same}
