"""Sorted values and where they were."""

from __future__ import annotations

import torch

from trilithon.lower.tensorrt.converters.known import axis_of, certain, fake, fake_shape
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor

aten = torch.ops.aten
MOST = 3840  # values that the layer gives, from its documentation; the builder lets pass more if their number is dynamic


@converts(aten.topk.default)
def convert_topk(net: Network, self: ITensor, k: Size, dim: int, largest: bool, sorted: bool) -> tuple[ITensor, ITensor]:
    """Of equal values any comes first, as in PyTorch."""
    return _best(net, self, k, fake(net, "k"), axis_of(net, self, dim), largest)


@converts(aten.sort.default)
def convert_sort(net: Network, self: ITensor, dim: int, descending: bool) -> tuple[ITensor, ITensor]:
    axis = axis_of(net, self, dim)
    if not len(self.shape):
        raise net.refuse("it sorts a tensor without axes")
    shape = fake_shape(net, "self")
    return _best(net, self, net.size(self, axis), None if shape is None else shape[axis], axis, descending)


@converts(aten.argsort.default)
def convert_argsort(net: Network, self: ITensor, dim: int, descending: bool) -> ITensor:
    return convert_sort(net, self, dim, descending)[1]


def _best(net: Network, x: ITensor, k: Size, known: object, axis: int, largest: bool) -> tuple[ITensor, ITensor]:
    """The `k` first values of an axis and their places; the layer wants two axes, and its k is bounded."""
    rank = len(x.shape)
    if is_tensor(k) and not (isinstance(known, torch.SymInt) and certain(known <= MOST)):
        raise net.refuse(f"it may give more than {MOST} values: {known}")
    if rank < 2:
        x, axis = net.reshape(x, [1, *net.sizes(x)] if rank else [1, 1]), 1
    trt = library()
    op = trt.TopKOperation.MAX if largest else trt.TopKOperation.MIN
    layer = net.add("topk", x, op, 1 if is_tensor(k) else k, 1 << axis, trt.int64)
    if is_tensor(k):
        layer.set_input(1, net.reshape(k, []))
        net.checked(layer)
    results = [layer.get_output(i) for i in range(2)]
    if rank < 2:
        results = [net.reshape(y, [k] if rank else []) for y in results]
    return results[0], results[1]
