"""Remove what only dead masks used."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from trilithon.passes import Outcome

PURE = {  # Python's own functions of sizes and of several results
    operator.getitem,
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.pow, operator.neg),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_),
}


@dataclass(frozen=True)
class EraseDeadMasks:
    """Erase every node that nothing reads.

    %gt = gt(%k, %q)              =>   (nothing: the attention that read %m takes no mask now)
    %m = where(%gt, 0, -inf)
    """

    name: ClassVar[str] = "erase-dead-masks"

    def __call__(self, gm: GraphModule) -> Outcome:
        before = len(gm.graph.nodes)
        gm.graph.eliminate_dead_code(_has_effect)
        return Outcome(before - len(gm.graph.nodes))


def _has_effect(node: Node) -> bool:
    """Must stay although nothing reads it. A random op has no effect here: unused attention counts as one (dropout)."""
    if node.op in ("placeholder", "output"):
        return True
    if node.target in PURE:
        return False
    schema = getattr(node.target, "_schema", None)
    return schema is None or schema.is_mutable or not schema.returns
