"""Operations that keep every index: copies and conversions of the dtype."""

from __future__ import annotations

import torch

from trilithon.lift.handlers.operand import convert, element
from trilithon.lift.registry import Call, lifts
from trilithon.lift.symtensor import SymTensor

aten = torch.ops.aten


@lifts(
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)
def lift_same(call: Call, x: SymTensor) -> SymTensor:
    """same(x)[i] = x[i]."""
    return call.result(x.at)


@lifts(aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout)
def lift_to(call: Call, x: SymTensor, dtype: torch.dtype | None = None) -> SymTensor:
    """to(x)[i] = x[i] in the result's dtype, which restates `dtype`."""
    return call.result(lambda i: convert(call, x.at(i), x.dtype, call.dtype))


@lifts(aten.to.other, aten.type_as.default)
def lift_to_other(call: Call, x: SymTensor, other: SymTensor) -> SymTensor:
    """to(x, other)[i] = x[i] in the dtype of `other`."""
    return call.result(lambda i: convert(call, x.at(i), x.dtype, other.dtype))


@lifts(aten.copy.default)
def lift_copy(call: Call, x: SymTensor, src: SymTensor) -> SymTensor:
    """copy(x, src)[i] = src[i], broadcast to the shape of `x` and in its dtype."""
    return call.result(lambda i: element(call, src, i, x.dtype))
