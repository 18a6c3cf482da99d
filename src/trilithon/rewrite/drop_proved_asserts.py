"""Remove assertions about sizes that always hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from trilithon.lift.sizes import condition_from_sympy
from trilithon.passes import Outcome
from trilithon.rewrite.fold_grouped_heads import Proves

ASSERT = torch.ops.aten._assert_scalar.default


@dataclass(frozen=True)
class DropProvedAsserts:
    """Erase `_assert_scalar` where its condition is proved for every size in the export's range.

    %ok = eq(sym_min(64 * %s, 448 * %s), 64 * %s)   =>   (nothing)
    _assert_scalar(%ok, ...)

    Deferred export leaves such assertions about strides; Dynamo cannot trace them. One that is not proved stays.
    """

    proves: Proves
    name: ClassVar[str] = "drop-proved-asserts"

    def __call__(self, gm: GraphModule) -> Outcome:
        asserts = [n for n in gm.graph.nodes if n.target is ASSERT]
        proved = [n for n in asserts if self._always_holds(n)]
        for node in proved:
            gm.graph.erase_node(node)
        return Outcome(len(proved))

    def _always_holds(self, node: Node) -> bool:
        checked: Any = node.args[0]
        held = checked.meta.get("val") if isinstance(checked, Node) else checked
        if isinstance(held, bool):
            return held
        if not isinstance(held, torch.SymBool):
            return False
        goal = condition_from_sympy(held.node.expr)
        return goal is not None and self.proves(goal, {})
