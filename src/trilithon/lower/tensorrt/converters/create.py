"""Tensors made of numbers and sizes, and triangles cut out of a matrix.

Whole numbers in a row stay a layer also where all sizes are known: the builder finds the bounds of a mask in those, not
in a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trilithon.lower.tensorrt.converters.promote import Operand, cast, tensor
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor

aten = torch.ops.aten
Ignored = Any  # layout, device and the like: where a tensor lies in memory


@converts(aten.arange.default)
def convert_arange(
    net: Network, end: Operand, dtype: torch.dtype | None, layout: Ignored, device: Ignored, pin_memory: Ignored
) -> ITensor:
    return _range(net, 0, end, 1, dtype)


@converts(aten.arange.start)
def convert_arange_start(
    net: Network,
    start: Operand,
    end: Operand,
    dtype: torch.dtype | None,
    layout: Ignored,
    device: Ignored,
    pin_memory: Ignored,
) -> ITensor:
    return _range(net, start, end, 1, dtype)


@converts(aten.arange.start_step)
def convert_arange_step(
    net: Network,
    start: Operand,
    end: Operand,
    step: Operand,
    dtype: torch.dtype | None,
    layout: Ignored,
    device: Ignored,
    pin_memory: Ignored,
) -> ITensor:
    return _range(net, start, end, step, dtype)


def _range(net: Network, start: Operand, end: Operand, step: Operand, dtype: torch.dtype | None) -> ITensor:
    if any(isinstance(value, float) for value in (start, end, step)):
        return _float_range(net, start, end, step, dtype or torch.get_default_dtype())
    dtype = dtype or torch.int64
    if is_tensor(step):
        raise net.refuse("a range whose step is known at run time")
    first, last = (net.reshape(value, [1]) if is_tensor(value) else value for value in (start, end))
    distance = net.calculate("SUB", last, first) if step > 0 else net.calculate("SUB", first, last)
    count = net.calculate("FLOOR_DIV", net.calculate("SUM", distance, abs(step) - 1), abs(step)) if abs(step) > 1 else distance
    if dtype in (torch.int32, torch.int64) and step == 1 and not is_tensor(first):
        return net.iota(count, dtype=dtype, start=first)
    places = net.iota(count)
    if step != 1:
        places = net.elementwise("PROD", places, net.number(step, torch.int64, 1))
    shifted = places if not is_tensor(first) and first == 0 else net.calculate("SUM", places, first)
    return cast(net, shifted, dtype)


def _float_range(net: Network, start: Operand, end: Operand, step: Operand, dtype: torch.dtype) -> ITensor:
    if is_tensor(start) or is_tensor(end) or is_tensor(step):
        raise net.refuse("a range of fractions whose ends are known at run time")
    return net.constant(torch.arange(start, end, step, dtype=dtype))


def filled(net: Network, sizes: Sequence[Size], value: Operand, dtype: torch.dtype | None) -> ITensor:
    """One value everywhere; of the value's own type if none is told."""
    if dtype is None and is_tensor(value):
        dtype = net.dtype(value)
    one = tensor(net, value, dtype or torch.tensor(value).dtype)
    return net.expand(one, list(sizes)) if sizes else one


@converts(aten.full.default)
def convert_full(
    net: Network,
    size: Sequence[Size],
    fill_value: Operand,
    dtype: torch.dtype | None,
    layout: Ignored,
    device: Ignored,
    pin_memory: Ignored,
) -> ITensor:
    return filled(net, size, fill_value, dtype)


@converts(aten.zeros.default)
def convert_zeros(
    net: Network, size: Sequence[Size], dtype: torch.dtype | None, layout: Ignored, device: Ignored, pin_memory: Ignored
) -> ITensor:
    return filled(net, size, 0, dtype or torch.get_default_dtype())


@converts(aten.ones.default)
def convert_ones(
    net: Network, size: Sequence[Size], dtype: torch.dtype | None, layout: Ignored, device: Ignored, pin_memory: Ignored
) -> ITensor:
    return filled(net, size, 1, dtype or torch.get_default_dtype())


@converts(aten.scalar_tensor.default)
def convert_scalar_tensor(
    net: Network, s: Operand, dtype: torch.dtype | None, layout: Ignored, device: Ignored, pin_memory: Ignored
) -> ITensor:
    return filled(net, [], s, dtype or torch.get_default_dtype())


@converts(aten.full_like.default)
def convert_full_like(
    net: Network,
    self: ITensor,
    fill_value: Operand,
    dtype: torch.dtype | None,
    layout: Ignored,
    device: Ignored,
    pin_memory: Ignored,
    memory_format: Ignored,
) -> ITensor:
    return filled(net, net.sizes(self), fill_value, dtype or net.dtype(self))


@converts(aten.zeros_like.default)
def convert_zeros_like(
    net: Network,
    self: ITensor,
    dtype: torch.dtype | None,
    layout: Ignored,
    device: Ignored,
    pin_memory: Ignored,
    memory_format: Ignored,
) -> ITensor:
    return filled(net, net.sizes(self), 0, dtype or net.dtype(self))


@converts(aten.ones_like.default)
def convert_ones_like(
    net: Network,
    self: ITensor,
    dtype: torch.dtype | None,
    layout: Ignored,
    device: Ignored,
    pin_memory: Ignored,
    memory_format: Ignored,
) -> ITensor:
    return filled(net, net.sizes(self), 1, dtype or net.dtype(self))


@converts(aten.new_full.default)
def convert_new_full(
    net: Network,
    self: ITensor,
    size: Sequence[Size],
    fill_value: Operand,
    dtype: torch.dtype | None,
    layout: Ignored,
    device: Ignored,
    pin_memory: Ignored,
) -> ITensor:
    return filled(net, size, fill_value, dtype or net.dtype(self))


@converts(aten.new_zeros.default)
def convert_new_zeros(
    net: Network,
    self: ITensor,
    size: Sequence[Size],
    dtype: torch.dtype | None,
    layout: Ignored,
    device: Ignored,
    pin_memory: Ignored,
) -> ITensor:
    return filled(net, size, 0, dtype or net.dtype(self))


@converts(aten.new_ones.default)
def convert_new_ones(
    net: Network,
    self: ITensor,
    size: Sequence[Size],
    dtype: torch.dtype | None,
    layout: Ignored,
    device: Ignored,
    pin_memory: Ignored,
) -> ITensor:
    return filled(net, size, 1, dtype or net.dtype(self))


@converts(aten.tril.default)
def convert_tril(net: Network, self: ITensor, diagonal: Size) -> ITensor:
    """Keeps column <= row + diagonal, that is column < row + (diagonal + 1)."""
    return _triangle(net, self, "LESS", net.calculate("SUM", diagonal, 1))


@converts(aten.triu.default)
def convert_triu(net: Network, self: ITensor, diagonal: Size) -> ITensor:
    """Keeps column >= row + diagonal, that is column > row + (diagonal - 1)."""
    return _triangle(net, self, "GREATER", net.calculate("SUB", diagonal, 1))


def _triangle(net: Network, x: ITensor, op: str, offset: Size) -> ITensor:
    """`x` where `column <op> row + offset`, 0 elsewhere."""
    rank = len(x.shape)
    rows, columns = (net.iota(net.size(x, axis), axis, rank) for axis in (rank - 2, rank - 1))
    if is_tensor(offset) or offset != 0:
        rows = net.elementwise("SUM", rows, tensor(net, offset, torch.int64))
    is_kept = net.elementwise(op, columns, rows)
    if net.dtype(x) == torch.bool:
        return net.elementwise("AND", is_kept, x)
    return net.select(is_kept, x, tensor(net, 0, net.dtype(x)))


@converts(aten.one_hot.default)
def convert_one_hot(net: Network, self: ITensor, num_classes: int) -> ITensor:
    if num_classes < 0:
        raise net.refuse("the number of classes is the largest index, known only at run time")
    rank = len(self.shape)
    classes = net.iota(num_classes, rank, rank + 1)
    places = net.reshape(net.cast(self, torch.int64), [*net.sizes(self), 1])
    return net.cast(net.elementwise("EQUAL", places, classes), torch.int64)
