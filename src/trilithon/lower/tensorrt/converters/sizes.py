"""Sizes and arithmetic on them: numbers where they are known, int64 tensors of shape [1] where they are not."""

from __future__ import annotations

import operator
from typing import Any

import torch

from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network, Size

aten = torch.ops.aten


@converts(aten.sym_size.int)
def convert_size(net: Network, self: ITensor, dim: int) -> Size:
    return net.size(self, dim)


@converts(operator.add)
def convert_add(net: Network, a: Size, b: Size) -> Size:
    return net.calculate("SUM", a, b)


@converts(operator.sub)
def convert_sub(net: Network, a: Size, b: Size) -> Size:
    return net.calculate("SUB", a, b)


@converts(operator.mul)
def convert_mul(net: Network, a: Size, b: Size) -> Size:
    return net.calculate("PROD", a, b)


@converts(operator.floordiv)
def convert_floordiv(net: Network, a: Size, b: Size) -> Size:
    return net.calculate("FLOOR_DIV", a, b)


@converts(operator.mod)
def convert_mod(net: Network, a: Size, b: Size) -> Size:
    return net.calculate("SUB", a, net.calculate("PROD", net.calculate("FLOOR_DIV", a, b), b))


@converts(operator.neg)
def convert_neg(net: Network, a: Size) -> Size:
    return net.calculate("SUB", 0, a)


@converts(torch.sym_min)
def convert_min(net: Network, a: Size, b: Size) -> Size:
    return net.calculate("MIN", a, b)


@converts(torch.sym_max)
def convert_max(net: Network, a: Size, b: Size) -> Size:
    return net.calculate("MAX", a, b)


@converts(operator.getitem)
def convert_getitem(net: Network, values: Any, index: int) -> Any:
    """One of several results."""
    if not isinstance(values, (tuple, list)):
        raise net.refuse(f"it indexes a {type(values).__name__}")
    return values[index]
