"""One of two values at each place: by a condition, or the larger or smaller."""

from __future__ import annotations

import torch

from trilithon.lower.tensorrt.converters.promote import Operand, common, tensor
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network, is_tensor

aten = torch.ops.aten


@converts(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def convert_where(net: Network, condition: ITensor, self: Operand, other: Operand) -> ITensor:
    dtype = common(net, self, other)
    return net.select(tensor(net, condition, torch.bool), tensor(net, self, dtype), tensor(net, other, dtype))


@converts(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def convert_masked_fill(net: Network, self: ITensor, mask: ITensor, value: Operand) -> ITensor:
    return net.select(tensor(net, mask, torch.bool), tensor(net, value, net.dtype(self)), self)


@converts(aten.maximum.default, aten.max.other)
def convert_maximum(net: Network, self: ITensor, other: ITensor) -> ITensor:
    return _extreme(net, "GREATER", self, other)


@converts(aten.minimum.default, aten.min.other)
def convert_minimum(net: Network, self: ITensor, other: ITensor) -> ITensor:
    return _extreme(net, "LESS", self, other)


def _extreme(net: Network, better: str, a: ITensor, b: ITensor) -> ITensor:
    """The better of the two; NaN where one is NaN, which TensorRT's MAX and MIN drop on one side."""
    dtype = common(net, a, b)
    a, b = tensor(net, a, dtype), tensor(net, b, dtype)
    if dtype == torch.bool:
        return net.elementwise("OR" if better == "GREATER" else "AND", a, b)
    if not dtype.is_floating_point:
        return net.elementwise("MAX" if better == "GREATER" else "MIN", a, b)
    is_a = net.elementwise("OR", net.elementwise(better, a, b), net.unary("ISNAN", a))
    return net.select(is_a, a, b)


@converts(aten.clamp.default, aten.clamp.Tensor)
def convert_clamp(net: Network, self: ITensor, min: Operand | None, max: Operand | None) -> ITensor:
    return clamped(net, self, min, max)


@converts(aten.clamp_min.default, aten.clamp_min.Tensor)
def convert_clamp_min(net: Network, self: ITensor, min: Operand) -> ITensor:
    return clamped(net, self, min, None)


@converts(aten.clamp_max.default, aten.clamp_max.Tensor)
def convert_clamp_max(net: Network, self: ITensor, max: Operand) -> ITensor:
    return clamped(net, self, None, max)


def clamped(net: Network, x: ITensor, low: Operand | None, high: Operand | None) -> ITensor:
    """`x` within these bounds; `high` where they cross, NaN where one of the three is."""
    dtype = common(net, *(part for part in (x, low, high) if part is not None))
    x = tensor(net, x, dtype)
    for bound, better in ((low, "GREATER"), (high, "LESS")):
        if is_tensor(bound):
            x = _extreme(net, better, x, tensor(net, bound, dtype))
        elif bound is not None:
            x = _bounded(net, x, tensor(net, bound, dtype), better)
    return x


def _bounded(net: Network, x: ITensor, bound: ITensor, better: str) -> ITensor:
    """The better of `x` and a bound that is known not to be NaN."""
    if not net.dtype(x).is_floating_point:
        return net.elementwise("MAX" if better == "GREATER" else "MIN", x, bound)
    return net.select(net.elementwise(better, bound, x), bound, x)


@converts(aten.nan_to_num.default)
def convert_nan_to_num(net: Network, self: ITensor, nan: float | None, posinf: float | None, neginf: float | None) -> ITensor:
    """NaN becomes 0 and an infinity the largest number, if not told otherwise."""
    dtype = net.dtype(self)
    if not dtype.is_floating_point:
        return self
    zero, limits = net.number(0.0, dtype), torch.finfo(dtype)
    is_inf, is_positive = net.unary("ISINF", self), net.elementwise("GREATER", self, zero)
    positive = tensor(net, limits.max if posinf is None else posinf, dtype)
    negative = tensor(net, limits.min if neginf is None else neginf, dtype)
    finite = net.select(is_inf, net.select(is_positive, positive, negative), self)
    return net.select(net.unary("ISNAN", self), tensor(net, 0.0 if nan is None else nan, dtype), finite)
