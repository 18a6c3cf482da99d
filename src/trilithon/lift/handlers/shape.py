"""Shape operations: they only move the index."""

from __future__ import annotations

import torch

from trilithon.lift.registry import Call, lifts
from trilithon.lift.symtensor import SymTensor
from trilithon.spec import term as t

aten = torch.ops.aten


@lifts(aten.unsqueeze.default)
def lift_unsqueeze(call: Call, x: SymTensor, dim: int) -> SymTensor:
    """A new axis of size 1 at `dim`."""
    d = dim + len(call.shape) if dim < 0 else dim
    return call.result(lambda i: x.at(i[:d] + i[d + 1 :]))


@lifts(aten.expand.default)
def lift_expand(call: Call, x: SymTensor, size: list[t.Term]) -> SymTensor:
    """Broadcasting to a larger shape; `size` is restated by the result's own shape."""
    return call.result(x.broadcast_at)
