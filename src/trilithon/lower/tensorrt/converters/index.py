"""Elements at the places that integer tensors say, and elements written there.

TensorRT counts a negative index from the end, in each of its modes, and takes 0 for one outside: its kernels say
`if (i < 0) i = i + n; if (i < 0 || i >= n) value = 0`. PyTorch does the first where it indexes, and raises on the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trilithon.lower.tensorrt.converters.known import INDEX, axis_of, same_size
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.converters.slice import cut
from trilithon.lower.tensorrt.converters.view import permuted
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor

aten = torch.ops.aten


@converts(aten.index.Tensor)
def convert_index(net: Network, self: ITensor, indices: Sequence[ITensor | None]) -> ITensor:
    """One index tensor takes the place of its axis; several broadcast, and take the place of theirs, or the front.

    The front it is where their axes do not lie next to each other.
    """
    given = {axis: _integer(net, index) for axis, index in enumerate(indices) if index is not None}
    axes = list(given)
    if len(axes) == 1:
        return net.gather(self, given[axes[0]], axes[0])
    place = axes[0] if axes == list(range(axes[0], axes[0] + len(axes))) else 0
    rest = [axis for axis in range(len(self.shape)) if axis not in given]
    x = permuted(net, self, [*rest[:place], *axes, *rest[place:]])
    sizes = net.sizes(x)
    count = len(axes)
    flat = net.reshape(x, [*sizes[:place], net.product(sizes[place : place + count]), *sizes[place + count :]])
    return net.gather(flat, _flat_index(net, list(given.values()), sizes[place : place + count]), place)


def _integer(net: Network, index: ITensor) -> ITensor:
    if net.dtype(index) not in INDEX:
        raise net.refuse(f"it is indexed by a tensor of {net.dtype(index)}: how much it gives is known only at run time")
    return index


def _flat_index(net: Network, indices: Sequence[ITensor], sizes: Sequence[Size]) -> ITensor:
    """Places in axes of these sizes as places in one axis that has all of them."""
    total: ITensor | None = None
    for index, size in zip(indices, sizes, strict=True):
        place = _from_front(net, net.cast(index, torch.int64), size)
        total = place if total is None else net.elementwise("SUM", net.elementwise("PROD", total, _one(net, size)), place)
    return total


def _from_front(net: Network, index: ITensor, size: Size) -> ITensor:
    is_negative = net.elementwise("LESS", index, net.number(0, torch.int64))
    return net.select(is_negative, net.elementwise("SUM", index, _one(net, size)), index)


def _one(net: Network, size: Size) -> ITensor:
    """A size as a tensor without axes."""
    return net.reshape(size, []) if is_tensor(size) else net.number(size, torch.int64)


@converts(aten.index_select.default)
def convert_index_select(net: Network, self: ITensor, dim: int, index: ITensor) -> ITensor:
    if not len(self.shape):
        raise net.refuse("it selects from a tensor without axes")
    places = index if len(index.shape) else net.reshape(index, [1])
    return net.gather(self, places, axis_of(net, self, dim))


@converts(aten.gather.default)
def convert_gather(net: Network, self: ITensor, dim: int, index: ITensor, sparse_grad: bool) -> ITensor:
    """Along the other axes the index may be shorter."""
    axis = axis_of(net, self, dim)
    for other, size in enumerate(net.sizes(index)):
        if other != axis and not same_size(net, "self", other, "index"):
            self = cut(net, self, other, 0, size)
    return _gather_elements(net, self, index, axis)


def _gather_elements(net: Network, x: ITensor, index: ITensor, axis: int) -> ITensor:
    if not len(x.shape):
        raise net.refuse("it gathers from a tensor without axes")
    return net.out("gather_v2", x, index, library().GatherMode.ELEMENT, axis=axis)


@converts(aten.scatter.src)
def convert_scatter(net: Network, self: ITensor, dim: int, index: ITensor, src: ITensor) -> ITensor:
    """Only the part of `src` that is as large as the index is written. Of equal indices any one wins."""
    for axis, size in enumerate(net.sizes(index)):
        if not same_size(net, "src", axis, "index"):
            src = cut(net, src, axis, 0, size)
    return _scattered(net, self, dim, index, src)


@converts(aten.scatter.value)
def convert_scatter_value(net: Network, self: ITensor, dim: int, index: ITensor, value: float) -> ITensor:
    if is_tensor(value):
        raise net.refuse("the value that it scatters is known only at run time")
    filled = net.expand(net.number(value, net.dtype(self), len(index.shape)), net.sizes(index))
    return _scattered(net, self, dim, index, filled)


def _scattered(net: Network, x: ITensor, dim: int, index: ITensor, source: ITensor) -> ITensor:
    if not len(x.shape):
        raise net.refuse("it scatters into a tensor without axes")
    return net.out("scatter", x, index, source, library().ScatterMode.ELEMENT, axis=axis_of(net, x, dim))


@converts(aten.index_put.default)
def convert_index_put(
    net: Network, self: ITensor, indices: Sequence[ITensor | None], values: ITensor, accumulate: bool
) -> ITensor:
    """Rows of `self` replaced by `values`, which broadcast. Of equal indices any one wins."""
    index = indices[0]
    if accumulate or len(indices) > 1 or index is None:
        raise net.refuse("it adds to what is there" if accumulate else "it writes to other places than whole rows")
    places = net.sizes(_integer(net, index))
    rows = net.expand(values, [*places, *net.sizes(self)[1:]])
    return net.out("scatter", self, net.reshape(index, [*places, 1]), rows, library().ScatterMode.ND)
