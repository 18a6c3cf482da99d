"""Layers that read or write at places which are data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trilithon.lower.tensorrt.interpret.read import Layer, evaluates
from trilithon.lower.tensorrt.library import torch_dtypes


def places(index: Tensor, sizes: Tensor | int) -> tuple[Tensor, Tensor]:
    """An index tensor as int64 with negative ones counted from the end, and which of them are inside.

    Those outside are 0. A kernel, unlike PyTorch, does not fail on them: a gather reads 0, a scatter drops the element.
    """
    index = index.long()
    index = torch.where(index < 0, index + sizes, index)
    inside = (index >= 0) & (index < sizes)
    return torch.where(inside, index, 0), inside


def grid(sizes: Sequence[int], rank: int) -> list[Tensor]:
    """The index of each of the first axes, shaped to broadcast over `rank` axes."""
    return [torch.arange(n).reshape([-1 if i == axis else 1 for i in range(rank)]) for axis, n in enumerate(sizes)]


@evaluates("GATHER", "IGatherLayer")
def gather(layer: Layer) -> Tensor:
    """Elements of slot 0 at the places in slot 1: along an axis (DEFAULT, ELEMENT) or at whole coordinates (ND)."""
    own, x, index = layer.own, layer.x(0), layer.x(1)
    batch, mode = own.num_elementwise_dims, own.mode.name
    if mode == "ND":
        at, inside = places(index, torch.tensor(x.shape[batch : batch + index.shape[-1]]))
        found, inside = x[(*grid(index.shape[:batch], index.dim() - 1), *at.unbind(-1))], inside.all(-1)
        return found.masked_fill(~inside.reshape(*inside.shape, *[1] * (found.dim() - inside.dim())), 0)
    axis = own.axis % x.dim()
    at, inside = places(index, x.shape[axis])
    if mode == "ELEMENT":
        return torch.gather(x, axis, at).masked_fill(~inside, 0)
    if batch > min(axis, 1):
        raise layer.refuse(f"its {batch} elementwise axes along axis {axis} are not modelled")
    if batch == 1:
        return torch.stack([_take(*row, axis - 1) for row in zip(x, at, inside, strict=True)])
    return _take(x, at, inside, axis)


def _take(x: Tensor, at: Tensor, inside: Tensor, axis: int) -> Tensor:
    """The slices of `x` at these places of an axis, whose axes take the place of that one."""
    found = x.index_select(axis, at.reshape(-1)).reshape(*x.shape[:axis], *at.shape, *x.shape[axis + 1 :])
    return found.masked_fill(~inside.reshape(*inside.shape, *[1] * (x.dim() - axis - 1)), 0)


@evaluates("SCATTER", "IScatterLayer")
def scatter(layer: Layer) -> Tensor:
    """Slot 0 with the elements of slot 2 put at the places in slot 1."""
    x, index, updates = layer.x(0), layer.x(1), layer.x(2)
    if layer.own.mode.name == "ELEMENT":
        axis = layer.own.axis % x.dim()
        at, inside = places(index, x.shape[axis])
        coordinates = [at if i == axis else own for i, own in enumerate(grid(at.shape, at.dim()))]
    else:
        at, inside = places(index, torch.tensor(x.shape[: index.shape[-1]]))
        coordinates, inside = list(at.unbind(-1)), inside.all(-1)
    kept = [axis.expand(inside.shape)[inside] for axis in coordinates]
    return x.index_put(tuple(kept), updates[inside])


@evaluates("ONE_HOT", "IOneHotLayer")
def one_hot(layer: Layer) -> Tensor:
    """The second of two values at the place that is given, the first at all others, along a new axis."""
    (off, on), depth = layer.x(1).reshape(-1), int(layer.x(2))
    at, inside = places(layer.x(0), depth)
    axis = layer.own.axis % (at.dim() + 1)
    line = torch.arange(depth).reshape([-1 if i == axis else 1 for i in range(at.dim() + 1)])
    return torch.where((at.unsqueeze(axis) == line) & inside.unsqueeze(axis), on, off)


@evaluates("NON_ZERO", "INonZeroLayer")
def non_zero(layer: Layer) -> Tensor:
    """The coordinates of the elements that are not 0, `[axes, elements]`."""
    return torch.nonzero(layer.x()).T.to(torch_dtypes()[layer.own.indices_type])


@evaluates("TOPK", "ITopKLayer")
def topk(layer: Layer) -> tuple[Tensor, Tensor]:
    """The largest or smallest elements in order, and their places; of equal ones the first comes first."""
    (axis,) = layer.axes()
    count = layer.maybe(1)
    k = layer.own.k if count is None else int(count)
    values, index = torch.sort(layer.x(), dim=axis, descending=layer.own.op.name == "MAX", stable=True)
    if k > values.shape[axis]:
        raise layer.refuse(f"it takes {k} of {values.shape[axis]} elements", todo="check the inputs")
    return values.narrow(axis, 0, k), index.narrow(axis, 0, k).to(torch_dtypes()[layer.own.indices_type])


@evaluates("KV_CACHE_UPDATE", "IKVCacheUpdateLayer")
def kv_cache_update(layer: Layer) -> Tensor:
    """The cache `[b h capacity d]` with the update `[b h s d]` from a position on.

    A position behind the capacity is dropped; a negative one counts from the end.
    """
    if layer.own.update_form.name != "PADDED_BHND" or layer.own.cache_mode.name != "LINEAR":
        raise layer.refuse(f"its form {layer.own.update_form.name} {layer.own.cache_mode.name} is not modelled")
    cache, update, begin = layer.x(0).clone(), layer.x(1), layer.x(2).long()
    capacity = cache.shape[2]
    for row in range(update.shape[0]):
        position = begin[row] + torch.arange(update.shape[2])
        position = torch.where(position < 0, position + capacity, position)
        inside = (position >= 0) & (position < capacity)
        cache[row, :, position[inside]] = update[row, :, inside]
    return cache
