"""Division with a whole result, and what remains.

TensorRT rounds a quotient of floats before it takes its floor; PyTorch does not: 1.0 // 0.1 is 9, and the floor of the
rounded 1.0 / 0.1 is 10. So a floor of floats is lowered only where the quotient is exact: for a power of two.
"""

from __future__ import annotations

import math

import torch

from trilithon.lower.tensorrt.converters.arithmetic import calculate, convert_div
from trilithon.lower.tensorrt.converters.promote import Operand, common, tensor, wide
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network, is_tensor

aten = torch.ops.aten


@converts(aten.div.Tensor_mode, aten.div.Scalar_mode)
def convert_div_mode(net: Network, self: Operand, other: Operand, rounding_mode: str | None) -> ITensor:
    if rounding_mode is None:
        return convert_div(net, self, other)
    return _whole(net, self, other, rounding_mode)


@converts(aten.floor_divide.default, aten.floor_divide.Scalar)
def convert_floor_divide(net: Network, self: Operand, other: Operand) -> ITensor:
    return _whole(net, self, other, "floor")


@converts(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def convert_remainder(net: Network, self: Operand, other: Operand) -> ITensor:
    """What the floor leaves; it has the divisor's sign."""
    return _rest(net, self, other, "floor")


@converts(aten.fmod.Tensor, aten.fmod.Scalar)
def convert_fmod(net: Network, self: Operand, other: Operand) -> ITensor:
    """What truncation leaves; it has the dividend's sign."""
    return _rest(net, self, other, "trunc")


def _whole(net: Network, a: Operand, b: Operand, mode: str) -> ITensor:
    dtype = common(net, a, b)
    if mode == "floor" and dtype.is_floating_point:
        _require_power_of_two(net, b)
    inside = wide(dtype)
    return net.cast(_quotient(net, tensor(net, a, inside), tensor(net, b, inside), mode), dtype)


def _quotient(net: Network, a: ITensor, b: ITensor, mode: str) -> ITensor:
    dtype = net.dtype(a)
    if dtype == torch.bool:
        raise net.refuse("it divides bools")
    if mode not in ("floor", "trunc"):
        raise net.refuse(f"rounding_mode is {mode!r}")
    if not dtype.is_floating_point:
        return net.elementwise("FLOOR_DIV" if mode == "floor" else "DIV", a, b)
    quotient = net.elementwise("DIV", a, b)
    return net.unary("FLOOR", quotient) if mode == "floor" else truncated(net, quotient)


def truncated(net: Network, x: ITensor) -> ITensor:
    """`x`, floating, without what follows the point."""
    is_negative = net.elementwise("LESS", x, net.number(0.0, net.dtype(x)))
    return net.select(is_negative, net.unary("CEIL", x), net.unary("FLOOR", x))


def _rest(net: Network, a: Operand, b: Operand, mode: str) -> ITensor:
    dtype = common(net, a, b)
    if dtype.is_floating_point:
        _require_power_of_two(net, b)
    inside = wide(dtype)
    a, b = tensor(net, a, inside), tensor(net, b, inside)
    taken = net.elementwise("PROD", _quotient(net, a, b, mode), b)
    return calculate(net, "SUB", a, taken, dtype)


def _require_power_of_two(net: Network, divisor: Operand) -> None:
    if is_tensor(divisor) or divisor == 0 or not math.isfinite(divisor) or abs(math.frexp(divisor)[0]) != 0.5:
        shown = "known at run time" if is_tensor(divisor) else str(divisor)
        raise net.refuse(f"it takes the floor of a quotient of floats, which TensorRT rounds first; the divisor is {shown}")
