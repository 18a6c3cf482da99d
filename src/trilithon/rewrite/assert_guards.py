"""Put the guards of a rewritten program into it, as assertions: it then fails instead of giving a wrong answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.passes import Outcome
from trilithon.spec.assumption import KINDS, Assumption


@torch.library.custom_op("trilithon::holds", mutates_args=())
def holds(table: Tensor, kind: str) -> Tensor:
    """Does the assumption `kind` (a key of `KINDS`) hold for this input? A bool scalar on the table's device."""
    return KINDS[kind].holds(table).clone()


@holds.register_fake
def _(table: Tensor, kind: str) -> Tensor:
    return table.new_empty((), dtype=torch.bool)


@dataclass(frozen=True)
class AssertGuards:
    """Assert each guard at the head of the graph.

    (nothing)   =>   %ok = trilithon.holds(%position_ids, "consecutive")
                     _assert_async(%ok, "each row of position_ids is consecutive does not hold ...")
    """

    guards: tuple[Assumption, ...]
    name: ClassVar[str] = "assert-guards"

    def __call__(self, gm: GraphModule) -> Outcome:
        inputs = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
        last = list(inputs.values())[-1]
        with gm.graph.inserting_after(last):
            for guard in self.guards:
                table = inputs[guard.table]
                ok = gm.graph.call_function(torch.ops.trilithon.holds.default, (table, guard.kind))
                ok.meta["val"] = table.meta["val"].new_empty((), dtype=torch.bool)
                text = f"{guard.text} does not hold, and this program was rewritten under that assumption"
                with gm.graph.inserting_after(ok):
                    gm.graph.call_function(torch.ops.aten._assert_async.msg, (ok, text))
        return Outcome(len(self.guards))
