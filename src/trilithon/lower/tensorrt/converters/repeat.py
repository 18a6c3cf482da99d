"""Elements that are repeated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trilithon.lower.tensorrt.converters.known import axis_of, certain, fake_shape, is_number, known_sizes
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor

aten = torch.ops.aten


@converts(aten.expand.default)
def convert_expand(net: Network, self: ITensor, size: Sequence[Size], implicit: bool) -> ITensor:
    """An axis is repeated or kept: the export knows which, mostly; else it is found out at run time."""
    x = net.ranked(self, len(size))
    own, before, after = net.sizes(x), fake_shape(net, "self"), fake_shape(net)
    if before is None or after is None:
        return net.expand(x, size)
    before = (1,) * (len(size) - len(before)) + before
    wanted = known_sizes(net, size)
    strides: list[Size] = [0 if isinstance(b, int) and b == 1 else 1 for b in before]
    if not all(stride == 0 or certain(b == a) for stride, b, a in zip(strides, before, after, strict=True)):
        return net.expand(x, wanted)
    kept = [stride == 1 and not (is_number(size) and size >= 0) for stride, size in zip(strides, wanted, strict=True)]
    sizes = [o if keep else size for keep, o, size in zip(kept, own, wanted, strict=True)]
    if all(w is o or (is_number(w) and is_number(o) and w == o) for w, o in zip(sizes, own, strict=True)):
        return x
    return net.slice(x, [0] * len(sizes), sizes, strides)


@converts(aten.repeat.default)
def convert_repeat(net: Network, self: ITensor, repeats: Sequence[Size]) -> ITensor:
    return repeated(net, self, repeats)


@converts(aten.tile.default)
def convert_tile(net: Network, self: ITensor, dims: Sequence[Size]) -> ITensor:
    return repeated(net, self, [1] * (len(self.shape) - len(dims)) + list(dims))


def repeated(net: Network, x: ITensor, repeats: Sequence[Size]) -> ITensor:
    """The whole of `x` many times along each axis: an axis in front of each says which time it is."""
    x = net.ranked(x, len(repeats))
    sizes = net.sizes(x)
    start: list[Size] = []
    end: list[Size] = []
    for size, times in zip(sizes, repeats, strict=True):
        if is_tensor(times) or times != 1:
            start.append(1)
            end.append(times)
        start.append(size)
        end.append(size)
    if len(start) == len(sizes):
        return x
    total = [net.calculate("PROD", times, size) for size, times in zip(sizes, repeats, strict=True)]
    return net.reshape(net.expand(net.reshape(x, start), end), known_sizes(net, total))


@converts(aten.repeat_interleave.self_int)
def convert_repeat_interleave(net: Network, self: ITensor, repeats: Size, dim: int | None, output_size: Size | None) -> ITensor:
    """Each element many times in a row: an axis behind it says which time it is."""
    x, axis = (net.reshape(self, [-1]), 0) if dim is None else (self, axis_of(net, self, dim))
    sizes = net.sizes(x)
    once = net.reshape(x, [*sizes[: axis + 1], 1, *sizes[axis + 1 :]])
    many = net.expand(once, [*sizes[: axis + 1], repeats, *sizes[axis + 1 :]])
    sizes[axis] = net.calculate("PROD", sizes[axis], repeats)
    return net.reshape(many, known_sizes(net, sizes))
