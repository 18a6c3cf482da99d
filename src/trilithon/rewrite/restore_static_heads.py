"""Give the head axis its number where export left it dynamic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from trilithon.passes import Outcome
from trilithon.rewrite.program import refresh_shapes

aten = torch.ops.aten
VIEW = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class RestoreStaticHeads:
    """A view that splits a projection of static width into heads has `width // head_dim` of them.

        %q = view(%proj, [%b, %s, %n, 64])   =>   %q = view(%proj, [%b, %s, 32, 64])      %proj: [b, s, 2048]

    Sound because a view keeps the number of elements, the leading sizes are the projection's own, and the
    other trailing sizes are static.
    """

    name: ClassVar[str] = "restore-static-heads"

    def __call__(self, gm: GraphModule) -> Outcome:
        changed: list[Node] = []
        for node in gm.graph.nodes:
            if node.target in VIEW and (sizes := _static_sizes(node)) is not None:
                node.args = (node.args[0], sizes)
                changed.append(node)
                refresh_shapes(gm, node.prev)
        return Outcome(len(changed))


def _static_sizes(node: Node) -> list[Any] | None:
    """The view's sizes with its one dynamic trailing size replaced by a number, or None if there is none."""
    source: Any = node.args[0]
    old, new = source.meta["val"].shape, node.meta["val"].shape
    lead = len(old) - 1
    if len(new) <= len(old) or not isinstance(old[-1], int) or list(map(str, old[:lead])) != list(map(str, new[:lead])):
        return None
    trailing = new[lead:]
    unknown = [i for i, size in enumerate(trailing) if not isinstance(size, int)]
    known = 1
    for size in trailing:
        known *= size if isinstance(size, int) else 1
    if len(unknown) != 1 or old[-1] % known:
        return None
    sizes = list(node.args[1])  # type: ignore[arg-type]
    sizes[lead + unknown[0]] = old[-1] // known
    return sizes
