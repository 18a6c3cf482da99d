"""Undo `repeat_kv`: give attention the key and value heads that exist, not their copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from trilithon.capture.program import Program
from trilithon.errors import CannotLift
from trilithon.lift.lifter import Lifter
from trilithon.passes import Outcome
from trilithon.rewrite.op import ATTENTION
from trilithon.spec import term as t
from trilithon.spec.masks import B, H, K
from trilithon.spec.term import Term

aten = torch.ops.aten
D = t.var("d")
VIEWS = {
    aten.expand.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.permute.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.slice.Tensor,
}
Proves = Callable[[Term, dict[str, Term]], bool]


@dataclass(frozen=True)
class FoldGroupedHeads:
    """Replace K and V by the tensor they were repeated from, when element (b, h, t, d) is proved to be its (b, h // n, t, d).

        %r = reshape(expand(unsqueeze(%k, 2)), [b, h, t, d])   =>   attention(%q, %k, ...)     %k: [b g t d]
        attention(%q, %r, ...)

    Q that was flattened and put in shape again is taken as it was before.
    `proves(goal, bounds)` is the prover: does `goal` hold for all indices within the bounds?
    """

    program: Program
    proves: Proves
    name: ClassVar[str] = "fold-grouped-heads"

    def __call__(self, gm: GraphModule) -> Outcome:
        changed = 0
        for node in gm.graph.nodes:
            if node.target is not ATTENTION:
                continue
            q, k, v = node.args[:3]
            new_q, new_k, new_v = self._base(q), self._base(k), self._base(v)
            if new_q.meta["val"].shape[1] != q.meta["val"].shape[1]:
                new_q = q
            if new_k.meta["val"].shape[1] != new_v.meta["val"].shape[1]:
                new_k, new_v = k, v
            if (new_q, new_k, new_v) != (q, k, v):
                node.args = (new_q, new_k, new_v, *node.args[3:])
                changed += 1
        return Outcome(changed)

    def _base(self, repeated: Node) -> Node:
        for base in reversed(list(_views(repeated))):
            if self._is_repeat_of(repeated, base):
                return base
        return repeated

    def _is_repeat_of(self, repeated: Node, base: Node) -> bool:
        if base.meta["val"].dim() != 4:
            return False
        lifter = Lifter(self.program, {base: "base"})
        b, h, tokens, d = (lifter.size(x) for x in repeated.meta["val"].shape)
        sizes = [lifter.size(x) for x in base.meta["val"].shape]
        g = sizes[1]
        if g.op != "int" or h.op != "int" or h.value % g.value or (sizes[0], *sizes[2:]) != (b, tokens, d):
            return False
        try:
            element = lifter.lift(repeated).at((B, H, K, D))
        except CannotLift:
            return False
        if element.op != "read" or element.args[0] != "base":
            return False
        wanted = (B, t.floor_div(H, t.integer(h.value // g.value)), K, D)
        goal = t.conj(*(t.eq(x, y) for x, y in zip(element.args[1:], wanted, strict=True)))
        return self.proves(goal, {"b": b, "h": h, "k": tokens, "d": d})


def _views(node: Node) -> Iterator[Node]:
    """The node and what it is a view of, nearest first."""
    while True:
        yield node
        if node.target not in VIEWS or not isinstance(node.args[0], Node):
            return
        node = node.args[0]
