"""Comparisons and logic. TensorRT has EQUAL, GREATER and LESS; the rest is made of these, and right for NaN."""

from __future__ import annotations

import torch

from trilithon.lower.tensorrt.converters.promote import Operand, common, tensor
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network

aten = torch.ops.aten
OPPOSITE = {"GREATER": "LESS", "LESS": "GREATER"}


def compare(net: Network, op: str, a: Operand, b: Operand) -> ITensor:
    """`a <op> b` with PyTorch's rules for types; of bools, false is less than true."""
    dtype = common(net, a, b)
    if dtype == torch.bool and op != "EQUAL":
        dtype = torch.int32
    return net.elementwise(op, tensor(net, a, dtype), tensor(net, b, dtype))


def _or_equal(net: Network, op: str, a: Operand, b: Operand) -> ITensor:
    """`a <op> b` or equal; of floats not the opposite's negation, which holds for NaN."""
    if common(net, a, b).is_floating_point:
        return net.elementwise("OR", compare(net, op, a, b), compare(net, "EQUAL", a, b))
    return net.unary("NOT", compare(net, OPPOSITE[op], a, b))


@converts(aten.eq.Tensor, aten.eq.Scalar)
def convert_eq(net: Network, self: Operand, other: Operand) -> ITensor:
    return compare(net, "EQUAL", self, other)


@converts(aten.ne.Tensor, aten.ne.Scalar)
def convert_ne(net: Network, self: Operand, other: Operand) -> ITensor:
    return net.unary("NOT", compare(net, "EQUAL", self, other))


@converts(aten.lt.Tensor, aten.lt.Scalar)
def convert_lt(net: Network, self: Operand, other: Operand) -> ITensor:
    return compare(net, "LESS", self, other)


@converts(aten.gt.Tensor, aten.gt.Scalar)
def convert_gt(net: Network, self: Operand, other: Operand) -> ITensor:
    return compare(net, "GREATER", self, other)


@converts(aten.le.Tensor, aten.le.Scalar)
def convert_le(net: Network, self: Operand, other: Operand) -> ITensor:
    return _or_equal(net, "LESS", self, other)


@converts(aten.ge.Tensor, aten.ge.Scalar)
def convert_ge(net: Network, self: Operand, other: Operand) -> ITensor:
    return _or_equal(net, "GREATER", self, other)


@converts(aten.logical_and.default)
def convert_logical_and(net: Network, self: ITensor, other: ITensor) -> ITensor:
    return _logic(net, "AND", self, other)


@converts(aten.logical_or.default)
def convert_logical_or(net: Network, self: ITensor, other: ITensor) -> ITensor:
    return _logic(net, "OR", self, other)


@converts(aten.logical_xor.default)
def convert_logical_xor(net: Network, self: ITensor, other: ITensor) -> ITensor:
    return _logic(net, "XOR", self, other)


@converts(aten.logical_not.default)
def convert_logical_not(net: Network, self: ITensor) -> ITensor:
    return net.unary("NOT", tensor(net, self, torch.bool))


@converts(aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.__and__.Tensor, aten.__and__.Scalar)
def convert_and(net: Network, self: Operand, other: Operand) -> ITensor:
    return _bits(net, "AND", self, other)


@converts(aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.__or__.Tensor, aten.__or__.Scalar)
def convert_or(net: Network, self: Operand, other: Operand) -> ITensor:
    return _bits(net, "OR", self, other)


@converts(aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar, aten.__xor__.Tensor, aten.__xor__.Scalar)
def convert_xor(net: Network, self: Operand, other: Operand) -> ITensor:
    return _bits(net, "XOR", self, other)


@converts(aten.bitwise_not.default)
def convert_not(net: Network, self: ITensor) -> ITensor:
    """Of a whole number -1 - x, for two's complement has no sign bit of its own."""
    dtype = common(net, self)
    if dtype == torch.bool:
        return net.unary("NOT", self)
    return net.elementwise("SUB", tensor(net, -1, dtype), tensor(net, self, dtype))


def _logic(net: Network, op: str, a: Operand, b: Operand) -> ITensor:
    return net.elementwise(op, tensor(net, a, torch.bool), tensor(net, b, torch.bool))


def _bits(net: Network, op: str, a: Operand, b: Operand) -> ITensor:
    dtype = common(net, a, b)
    if dtype != torch.bool:
        raise net.refuse(f"TensorRT has no bitwise {op} of {dtype}")
    return _logic(net, op, a, b)


@converts(aten.isnan.default)
def convert_isnan(net: Network, self: ITensor) -> ITensor:
    return net.unary("NOT", compare(net, "EQUAL", self, self))


@converts(aten.isinf.default)
def convert_isinf(net: Network, self: ITensor) -> ITensor:
    if net.dtype(self).is_floating_point:
        return net.unary("ISINF", self)
    return convert_isnan(net, self)


@converts(aten.isfinite.default)
def convert_isfinite(net: Network, self: ITensor) -> ITensor:
    if not net.dtype(self).is_floating_point:
        return compare(net, "EQUAL", self, self)
    return net.unary("NOT", net.elementwise("OR", net.unary("ISINF", self), net.unary("ISNAN", self)))
