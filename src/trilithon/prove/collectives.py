"""Labels of collectives: each rank has the same tokens at the same places, so sums over ranks keep them apart.

That holds in one group of ranks alone, whose prompts are compared; nobody knows what tokens ranks of others have.
"""

from __future__ import annotations

from torch.fx import Node

from trilithon.capture.collectives import ALL_GATHER, ALL_REDUCE, WAIT, group_of
from trilithon.prove.axes import Label, Scope, is_free, merged, refuse
from trilithon.prove.local_values import Rule


def same(node: Node, scope: Scope) -> Label:
    """Element by element."""
    return scope.label(node.args[0])


def reduced(node: Node, scope: Scope) -> Label:
    _require_one_group(node)
    if node.args[1] != "sum":
        raise refuse(node, f"over ranks it takes the {node.args[1]}, where sums alone are known")
    return scope.plain(node, node.args[0])


def gathered(node: Node, scope: Scope) -> Label:
    """One rank's behind another's, along the first axis."""
    _require_one_group(node)
    x = scope.plain(node, node.args[0])
    if not x.axes or not is_free(x.axes[0]):
        raise refuse(node, "it joins what ranks have along tokens, or along rows of the batch")
    size = scope.sizes.axis(node.meta["val"].shape[0])
    if size is None:
        raise refuse(node, "how many numbers it joins is not known")
    return Label((merged(size), *x.axes[1:]), x.source, x.last)


def _require_one_group(node: Node) -> None:
    if node.args[-1] != group_of(node.graph):
        raise refuse(node, "its ranks are others than those that meet before it, and may have other tokens")


NAMED: dict[str, Rule] = {ALL_REDUCE: reduced, ALL_GATHER: gathered, WAIT: same}
