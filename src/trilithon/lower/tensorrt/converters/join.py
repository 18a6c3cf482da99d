"""Tensors put together along an axis: joined, stacked, padded, rolled; and the differences along one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from trilithon.lower.tensorrt.converters.known import axis_of
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.converters.slice import cut
from trilithon.lower.tensorrt.converters.view import unsqueezed
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor

aten = torch.ops.aten


@converts(aten.cat.default)
def convert_cat(net: Network, tensors: Sequence[ITensor], dim: int) -> ITensor:
    return joined(net, tensors, axis_of(net, tensors[0], dim))


def joined(net: Network, parts: Sequence[ITensor], axis: int) -> ITensor:
    """The parts one behind the other, in the data type that holds them all."""
    if len({len(x.shape) for x in parts}) > 1:
        raise net.refuse("it joins an empty tensor of one axis with tensors of more")
    dtype = reduce(torch.promote_types, (net.dtype(x) for x in parts))
    return net.cast(parts[0], dtype) if len(parts) == 1 else net.concat([net.cast(x, dtype) for x in parts], axis)


@converts(aten.stack.default)
def convert_stack(net: Network, tensors: Sequence[ITensor], dim: int) -> ITensor:
    axis = dim % (len(tensors[0].shape) + 1)
    return joined(net, [unsqueezed(net, x, axis) for x in tensors], axis)


@converts(aten.constant_pad_nd.default)
def convert_constant_pad(net: Network, self: ITensor, pad: Sequence[Size], value: float) -> ITensor:
    return padded(net, self, pad, value)


@converts(aten.pad.default)
def convert_pad(net: Network, self: ITensor, pad: Sequence[Size], mode: str, value: float | None) -> ITensor:
    if mode != "constant":
        raise net.refuse(f"padding with mode={mode!r}")
    return padded(net, self, pad, 0 if value is None else value)


def padded(net: Network, x: ITensor, pad: Sequence[Size], value: float) -> ITensor:
    """`x` with `value` around it: `pad` has what to put in front and behind, the last axis first; less than 0 cuts off."""
    if any(is_tensor(size) for size in pad) or is_tensor(value):
        raise net.refuse("by how much or with what it pads is known only at run time")
    for i in range(0, len(pad), 2):
        axis, front, back = len(x.shape) - 1 - i // 2, int(pad[i]), int(pad[i + 1])
        lost = min(front, 0) + min(back, 0)
        x = cut(net, x, axis, max(-front, 0), net.calculate("SUM", net.size(x, axis), lost)) if lost else x
        parts = [_filled(net, x, axis, front, value), x, _filled(net, x, axis, back, value)]
        x = joined(net, [part for part in parts if part is not None], axis)
    return x


def _filled(net: Network, x: ITensor, axis: int, size: int, value: float) -> ITensor | None:
    """`value` as often as `x` is large, but `size` along the axis."""
    if size <= 0:
        return None
    sizes = net.sizes(x)
    sizes[axis] = size
    return net.expand(net.number(value, net.dtype(x), len(sizes)), sizes)


@converts(aten.roll.default)
def convert_roll(net: Network, self: ITensor, shifts: Sequence[Size], dims: Sequence[int]) -> ITensor:
    if not dims or any(is_tensor(shift) for shift in shifts):
        raise net.refuse("it rolls without dims, or by a size known only at run time")
    for shift, dim in zip(shifts, dims, strict=True):
        axis = axis_of(net, self, dim)
        size, far = net.size(self, axis), abs(shift)
        turned = net.calculate("SUB", far, net.calculate("PROD", net.calculate("FLOOR_DIV", far, size), size))
        front = turned if shift < 0 else net.calculate("SUB", size, turned)
        back = net.calculate("SUB", size, front)
        self = net.concat([cut(net, self, axis, front, back), cut(net, self, axis, 0, front)], axis)
    return self


@converts(aten.diff.default)
def convert_diff(net: Network, self: ITensor, n: int, dim: int, prepend: ITensor | None, append: ITensor | None) -> ITensor:
    """Each element less the one before it, `n` times; of truth values, whether they differ."""
    axis = axis_of(net, self, dim)
    parts = [part for part in (prepend, self, append) if part is not None]
    x = joined(net, parts, axis) if n else self
    kind = "XOR" if net.dtype(x) == torch.bool else "SUB"
    for _ in range(n):
        less = net.calculate("SUB", net.size(x, axis), 1)
        x = net.elementwise(kind, cut(net, x, axis, 1, less), cut(net, x, axis, 0, less))
    return x
