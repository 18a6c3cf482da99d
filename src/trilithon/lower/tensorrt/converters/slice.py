"""Parts of a tensor along one axis, and parts put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trilithon.lower.tensorrt.converters.known import axis_of, certain, fake, fake_shape, is_number
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.converters.view import unsqueezed, without
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor

aten = torch.ops.aten


def cut(net: Network, x: ITensor, axis: int, start: Size, size: Size, step: int = 1) -> ITensor:
    """`size` elements of an axis from `start` on, `step` apart; `x` itself where that is all of it."""
    sizes = net.sizes(x)
    whole = size is sizes[axis] or (is_number(size) and size == x.shape[axis])
    if whole and is_number(start) and start == 0 and step == 1:
        return x
    starts: list[Size] = [0] * len(sizes)
    strides: list[Size] = [1] * len(sizes)
    starts[axis], sizes[axis], strides[axis] = start, size, step
    return net.slice(x, starts, sizes, strides)


def position(net: Network, value: Size, size: Size, symbol: Any, known: Any) -> Size:
    """A bound of a slice as a place from 0 to `size`: a negative one counts from the end, one outside is moved inside.

    `symbol` and `known` are the export's bound and size; what it knows of them saves layers.
    """
    if is_tensor(value) and known is not None and certain(symbol == known):
        return size
    if is_number(value):
        if value < 0:
            return net.calculate("MAX", net.calculate("SUM", size, value), 0)
        return 0 if value == 0 else size if value == torch.iinfo(torch.int64).max else net.calculate("MIN", value, size)
    if symbol is None or not certain(symbol >= 0):
        value = wrapped(net, value, size)
        return net.calculate("MIN", net.calculate("MAX", value, 0), size)
    return value if known is not None and certain(symbol <= known) else net.calculate("MIN", value, size)


def wrapped(net: Network, value: Size, size: Size) -> Size:
    """A place that counts from the end if it is negative, counted from the front."""
    if is_number(value):
        return value if value >= 0 else net.calculate("SUM", size, value)
    is_negative = net.calculate("MIN", net.calculate("MAX", net.calculate("SUB", 0, value), 0), 1)
    return net.calculate("SUM", value, net.calculate("PROD", size, is_negative))


def bounds(net: Network, x: ITensor, axis: int, start: Size | None, end: Size | None) -> tuple[Size, Size]:
    """First and last place of a slice of `x`, the argument `self` of the node; the last is not before the first."""
    size, shape = net.size(x, axis), fake_shape(net, "self")
    known = None if shape is None else shape[axis]
    first = 0 if start is None else position(net, start, size, fake(net, "start"), known)
    last = size if end is None else position(net, end, size, fake(net, "end"), known)
    return first, last if is_number(first) and first == 0 else net.calculate("MAX", first, last)


@converts(aten.slice.Tensor)
def convert_slice(net: Network, self: ITensor, dim: int, start: Size | None, end: Size | None, step: Size) -> ITensor:
    if is_tensor(step):
        raise net.refuse("the step of a slice is known only at run time")
    axis = axis_of(net, self, dim)
    shape = fake_shape(net)
    if shape is not None and isinstance(shape[axis], int):
        return cut(net, self, axis, bounds(net, self, axis, start, None)[0], shape[axis], step)
    first, last = bounds(net, self, axis, start, end)
    size = last if is_number(first) and first == 0 else net.calculate("SUB", last, first)
    if step != 1:
        size = net.calculate("FLOOR_DIV", net.calculate("SUM", size, step - 1), step)
    return cut(net, self, axis, first, size, step)


@converts(aten.select.int)
def convert_select(net: Network, self: ITensor, dim: int, index: Size) -> ITensor:
    axis = axis_of(net, self, dim)
    place = wrapped(net, index, net.size(self, axis))
    return without(net, cut(net, self, axis, place, 1), [axis])


@converts(aten.slice_scatter.default)
def convert_slice_scatter(
    net: Network, self: ITensor, src: ITensor, dim: int, start: Size | None, end: Size | None, step: Size
) -> ITensor:
    if is_tensor(step) or step != 1:
        raise net.refuse("it writes to a slice with a step")
    axis = axis_of(net, self, dim)
    return replaced(net, self, net.cast(src, net.dtype(self)), axis, *bounds(net, self, axis, start, end))


@converts(aten.select_scatter.default)
def convert_select_scatter(net: Network, self: ITensor, src: ITensor, dim: int, index: Size) -> ITensor:
    axis = axis_of(net, self, dim)
    part = unsqueezed(net, net.cast(src, net.dtype(self)), axis)
    first = wrapped(net, index, net.size(self, axis))
    return replaced(net, self, part, axis, first, net.calculate("SUM", first, 1))


def replaced(net: Network, x: ITensor, part: ITensor, axis: int, first: Size, last: Size) -> ITensor:
    """`x` with `part` in place of what lies from `first` to before `last`."""
    size = net.size(x, axis)
    parts = [part]
    if is_tensor(first) or first != 0:
        parts.insert(0, cut(net, x, axis, 0, first))
    if last is not size and (is_tensor(last) or last != size):
        parts.append(cut(net, x, axis, last, net.calculate("SUB", size, last)))
    return parts[0] if len(parts) == 1 else net.concat(parts, axis)


@converts(aten.split.Tensor)
def convert_split(net: Network, self: ITensor, split_size: Size, dim: int) -> tuple[ITensor, ...]:
    """The last part has what is left. How many there are is known from the export."""
    made = fake(net)
    if not isinstance(made, (list, tuple)):
        raise net.refuse("in how many parts it splits is not known")
    axis = axis_of(net, self, dim)
    starts = [net.calculate("PROD", split_size, i) for i in range(len(made))]
    rest = net.calculate("SUB", net.size(self, axis), starts[-1])
    sizes = [split_size] * (len(made) - 1) + [rest]
    return _parts(net, self, axis, starts, sizes, made)


@converts(aten.split_with_sizes.default)
def convert_split_with_sizes(net: Network, self: ITensor, split_sizes: Sequence[Size], dim: int) -> tuple[ITensor, ...]:
    starts: list[Size] = [0]
    for size in split_sizes[:-1]:
        starts.append(net.calculate("SUM", starts[-1], size))
    return _parts(net, self, axis_of(net, self, dim), starts, split_sizes, fake(net))


def _parts(
    net: Network, x: ITensor, axis: int, starts: Sequence[Size], sizes: Sequence[Size], made: Any
) -> tuple[ITensor, ...]:
    """Parts of an axis; a size that is a number in the export is one here too."""
    known = [t.shape[axis] for t in made] if isinstance(made, (list, tuple)) else [None] * len(sizes)
    sizes = [number if isinstance(number, int) else size for number, size in zip(known, sizes, strict=True)]
    return tuple(cut(net, x, axis, start, size) for start, size in zip(starts, sizes, strict=True))


@converts(aten.unbind.int)
def convert_unbind(net: Network, self: ITensor, dim: int) -> tuple[ITensor, ...]:
    made, axis = fake(net), axis_of(net, self, dim)
    count = len(made) if isinstance(made, (list, tuple)) else self.shape[axis]
    if count < 0:
        raise net.refuse("in how many parts it splits is not known")
    return tuple(without(net, cut(net, self, axis, i, 1), [axis]) for i in range(count))


@converts(aten.flip.default)
def convert_flip(net: Network, self: ITensor, dims: Sequence[int]) -> ITensor:
    axes, sizes = {axis_of(net, self, dim) for dim in dims}, net.sizes(self)
    starts = [net.calculate("SUB", size, 1) if i in axes else 0 for i, size in enumerate(sizes)]
    return net.slice(self, starts, sizes, [-1 if i in axes else 1 for i in range(len(sizes))])
