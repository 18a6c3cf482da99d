"""Functions of one number."""

from __future__ import annotations

import torch

from trilithon.lower.tensorrt.converters.division import truncated
from trilithon.lower.tensorrt.converters.promote import common, in_float32, tensor
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network

aten = torch.ops.aten


@converts(aten.exp.default)
def convert_exp(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.unary("EXP", x))


@converts(aten.log.default)
def convert_log(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.unary("LOG", x))


@converts(aten.sqrt.default)
def convert_sqrt(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.unary("SQRT", x))


@converts(aten.rsqrt.default)
def convert_rsqrt(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.unary("RECIP", net.unary("SQRT", x)))


@converts(aten.reciprocal.default)
def convert_reciprocal(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.unary("RECIP", x))


@converts(aten.sin.default)
def convert_sin(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.unary("SIN", x))


@converts(aten.cos.default)
def convert_cos(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.unary("COS", x))


@converts(aten.tan.default)
def convert_tan(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.unary("TAN", x))


@converts(aten.atan.default)
def convert_atan(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.unary("ATAN", x))


@converts(aten.erf.default)
def convert_erf(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.unary("ERF", x))


@converts(aten.log1p.default)
def convert_log1p(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: log1p(net, x))


def log1p(net: Network, x: ITensor) -> ITensor:
    """log(1 + x) of float32, near 0 as 2 atanh(x / (2 + x)), which keeps the digits that the sum would lose."""
    near = net.elementwise("LESS", net.unary("ABS", x), net.number(0.5, torch.float32))
    ratio = net.elementwise("DIV", x, net.elementwise("SUM", x, net.number(2.0, torch.float32)))
    exact = net.elementwise("PROD", net.unary("ATANH", ratio), net.number(2.0, torch.float32))
    return net.select(near, exact, net.unary("LOG", net.elementwise("SUM", x, net.number(1.0, torch.float32))))


@converts(aten.expm1.default)
def convert_expm1(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: expm1(net, x))


def expm1(net: Network, x: ITensor) -> ITensor:
    """exp(x) - 1 of float32, near 0 as 2 exp(x / 2) sinh(x / 2), which keeps the digits that the difference would lose."""
    near = net.elementwise("LESS", net.unary("ABS", x), net.number(1.0, torch.float32))
    half = net.elementwise("PROD", x, net.number(0.5, torch.float32))
    product = net.elementwise("PROD", net.unary("EXP", half), net.unary("SINH", half))
    exact = net.elementwise("PROD", product, net.number(2.0, torch.float32))
    return net.select(near, exact, net.elementwise("SUB", net.unary("EXP", x), net.number(1.0, torch.float32)))


@converts(aten.abs.default)
def convert_abs(net: Network, self: ITensor) -> ITensor:
    return net.unary("ABS", _number(net, self))


@converts(aten.neg.default)
def convert_neg(net: Network, self: ITensor) -> ITensor:
    return net.unary("NEG", _number(net, self))


@converts(aten.sign.default, aten.sgn.default)
def convert_sign(net: Network, self: ITensor) -> ITensor:
    """1, 0 or -1; 0 for NaN, which TensorRT's SIGN keeps."""
    dtype = net.dtype(self)
    if dtype == torch.bool:
        return self
    x, zero = tensor(net, self, dtype), net.number(0, dtype)
    is_above, is_below = net.elementwise("GREATER", x, zero), net.elementwise("LESS", x, zero)
    return net.elementwise("SUB", net.cast(is_above, dtype), net.cast(is_below, dtype))


@converts(aten.floor.default)
def convert_floor(net: Network, self: ITensor) -> ITensor:
    return net.unary("FLOOR", self) if net.dtype(self).is_floating_point else self


@converts(aten.ceil.default)
def convert_ceil(net: Network, self: ITensor) -> ITensor:
    return net.unary("CEIL", self) if net.dtype(self).is_floating_point else self


@converts(aten.round.default)
def convert_round(net: Network, self: ITensor) -> ITensor:
    """To the nearest whole number, the even one of two."""
    return net.unary("ROUND", self) if net.dtype(self).is_floating_point else self


@converts(aten.trunc.default)
def convert_trunc(net: Network, self: ITensor) -> ITensor:
    return truncated(net, self) if net.dtype(self).is_floating_point else self


@converts(aten.frac.default)
def convert_frac(net: Network, self: ITensor) -> ITensor:
    return net.elementwise("SUB", self, truncated(net, self))


def _number(net: Network, x: ITensor) -> ITensor:
    if net.dtype(x) == torch.bool:
        raise net.refuse("it takes a bool for a number")
    return tensor(net, x, common(net, x))
