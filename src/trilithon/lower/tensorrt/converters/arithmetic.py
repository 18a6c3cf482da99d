"""Sums, products, quotients and powers."""

from __future__ import annotations

import torch

from trilithon.lower.tensorrt.converters.promote import Operand, common, enough, floating, tensor, wide
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network, is_tensor

aten = torch.ops.aten
LARGEST_POWER = 64  # of a whole number by repeated multiplication


def calculate(net: Network, op: str, a: Operand, b: Operand, dtype: torch.dtype | None = None) -> ITensor:
    """`a <op> b` with PyTorch's rules for types, given as `dtype` (if None, that which the operands have in common)."""
    dtype = dtype or common(net, a, b)
    inside = enough(net, dtype, a, b)
    return net.cast(net.elementwise(op, tensor(net, a, inside), tensor(net, b, inside)), dtype)


@converts(aten.add.Tensor, aten.add.Scalar)
def convert_add(net: Network, self: Operand, other: Operand, alpha: Operand) -> ITensor:
    return _sum(net, "SUM", self, other, alpha)


@converts(aten.sub.Tensor, aten.sub.Scalar)
def convert_sub(net: Network, self: Operand, other: Operand, alpha: Operand) -> ITensor:
    return _sum(net, "SUB", self, other, alpha)


@converts(aten.rsub.Tensor, aten.rsub.Scalar)
def convert_rsub(net: Network, self: Operand, other: Operand, alpha: Operand) -> ITensor:
    return _sum(net, "SUB", other, self, alpha)


def _sum(net: Network, op: str, a: Operand, b: Operand, alpha: Operand) -> ITensor:
    """`a <op> alpha * b`; of bools a sum is an OR."""
    dtype = common(net, a, b)
    if dtype == torch.bool:
        if op != "SUM" or alpha != 1:
            raise net.refuse("it subtracts or scales bools")
        return calculate(net, "OR", a, b, dtype)
    if not is_tensor(alpha) and alpha == 1:
        return calculate(net, op, a, b, dtype)
    inside = wide(dtype)
    scaled = net.elementwise("PROD", tensor(net, b, inside), tensor(net, alpha, inside))
    return net.cast(net.elementwise(op, tensor(net, a, inside), scaled), dtype)


@converts(aten.mul.Tensor, aten.mul.Scalar)
def convert_mul(net: Network, self: Operand, other: Operand) -> ITensor:
    return calculate(net, "AND" if common(net, self, other) == torch.bool else "PROD", self, other)


@converts(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def convert_div(net: Network, self: Operand, other: Operand) -> ITensor:
    return calculate(net, "DIV", self, other, floating(common(net, self, other)))


@converts(aten.addcmul.default)
def convert_addcmul(net: Network, self: ITensor, tensor1: ITensor, tensor2: ITensor, value: Operand) -> ITensor:
    return _add_scaled(net, "PROD", self, tensor1, tensor2, value)


@converts(aten.addcdiv.default)
def convert_addcdiv(net: Network, self: ITensor, tensor1: ITensor, tensor2: ITensor, value: Operand) -> ITensor:
    if not common(net, self, tensor1, tensor2).is_floating_point:
        raise net.refuse("it divides whole numbers")
    return _add_scaled(net, "DIV", self, tensor1, tensor2, value)


def _add_scaled(net: Network, op: str, x: ITensor, a: ITensor, b: ITensor, value: Operand) -> ITensor:
    """`x + value * (a <op> b)`."""
    dtype = common(net, x, a, b)
    if dtype == torch.bool:
        raise net.refuse("it scales bools")
    inside = wide(dtype)
    x, a, b, scale = (tensor(net, part, inside) for part in (x, a, b, value))
    scaled = net.elementwise("PROD", net.elementwise(op, a, b), scale)
    return net.cast(net.elementwise("SUM", x, scaled), dtype)


@converts(aten.lerp.Scalar, aten.lerp.Tensor)
def convert_lerp(net: Network, self: ITensor, end: ITensor, weight: Operand) -> ITensor:
    """From the nearer end, as PyTorch does: `self + weight * (end - self)`, or `end - (end - self) * (1 - weight)`."""
    dtype, inside = net.dtype(self), wide(net.dtype(self))
    a, b, w = (tensor(net, part, inside) for part in (self, end, weight))
    one, half = net.number(1.0, inside), net.number(0.5, inside)
    way = net.elementwise("SUB", b, a)
    early = net.elementwise("SUM", a, net.elementwise("PROD", w, way))
    late = net.elementwise("SUB", b, net.elementwise("PROD", way, net.elementwise("SUB", one, w)))
    is_early = net.elementwise("LESS", net.unary("ABS", w), half)
    return net.cast(net.select(is_early, early, late), dtype)


@converts(aten.square.default)
def convert_square(net: Network, self: ITensor) -> ITensor:
    return _power(net, self, 2, common(net, self, 2))


@converts(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def convert_pow(net: Network, self: Operand, exponent: Operand) -> ITensor:
    dtype = common(net, self, exponent)
    if is_tensor(self) and not is_tensor(exponent):
        return _power(net, self, exponent, dtype)
    if not dtype.is_floating_point:
        raise net.refuse("it raises whole numbers to powers known at run time, which TensorRT does in float32")
    return _any_power(net, self, exponent, dtype)


def _any_power(net: Network, base: Operand, exponent: Operand, dtype: torch.dtype) -> ITensor:
    inside = wide(dtype)
    return net.cast(net.elementwise("POW", tensor(net, base, inside), tensor(net, exponent, inside)), dtype)


def _power(net: Network, base: ITensor, exponent: float, dtype: torch.dtype) -> ITensor:
    """A power with a known exponent; by multiplication or roots where that is exact."""
    inside = wide(dtype)
    x = tensor(net, base, inside)
    if exponent == 0.5:
        return net.cast(net.unary("SQRT", x), dtype)
    if exponent == -0.5:
        return net.cast(net.unary("RECIP", net.unary("SQRT", x)), dtype)
    if exponent == -1 and dtype.is_floating_point:
        return net.cast(net.unary("RECIP", x), dtype)
    if exponent in (1, 2, 3) or (not dtype.is_floating_point and 1 <= exponent <= LARGEST_POWER):
        return net.cast(_repeated(net, x, int(exponent)), dtype)
    if not dtype.is_floating_point:
        raise net.refuse(f"it raises whole numbers to the power {exponent}")
    return _any_power(net, base, exponent, dtype)


def _repeated(net: Network, x: ITensor, exponent: int) -> ITensor:
    """`x` multiplied with itself, by squaring."""
    if exponent == 1:
        return x
    half = _repeated(net, x, exponent // 2)
    squared = net.elementwise("PROD", half, half)
    return net.elementwise("PROD", squared, x) if exponent % 2 else squared
