"""Sums, means, extremes and their places along axes. TensorRT adds up halves in float32, as PyTorch does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trilithon.lower.tensorrt.converters.promote import FLOATS, cast, tensor
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network

aten = torch.ops.aten
Dims = int | Sequence[int] | None


def axes_of(x: ITensor, dim: Dims) -> list[int]:
    """The axes that `dim` names, from 0 on; all of them where it names none."""
    rank = len(x.shape)
    named = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return sorted(axis % rank for axis in named) if rank else []


def reduced(net: Network, op: str, x: ITensor, dim: Dims, keep: bool) -> ITensor:
    """`trt.ReduceOperation.<op>`; a tensor without axes is its own result."""
    axes = axes_of(x, dim)
    return net.reduce(op, x, axes, keep) if axes else x


def _accumulated(net: Network, op: str, x: ITensor, dim: Dims, keep: bool, dtype: torch.dtype | None) -> ITensor:
    """A sum or product; of whole numbers and bools it is int64."""
    dtype = dtype or (net.dtype(x) if net.dtype(x).is_floating_point else torch.int64)
    if dtype == torch.bool:
        raise net.refuse("it sums up in bool")
    return reduced(net, op, tensor(net, x, dtype), dim, keep)


@converts(aten.sum.default)
def convert_sum_all(net: Network, self: ITensor, dtype: torch.dtype | None) -> ITensor:
    return _accumulated(net, "SUM", self, None, False, dtype)


@converts(aten.sum.dim_IntList)
def convert_sum(net: Network, self: ITensor, dim: Dims, keepdim: bool, dtype: torch.dtype | None) -> ITensor:
    return _accumulated(net, "SUM", self, dim, keepdim, dtype)


@converts(aten.prod.default)
def convert_prod_all(net: Network, self: ITensor, dtype: torch.dtype | None) -> ITensor:
    return _accumulated(net, "PROD", self, None, False, dtype)


@converts(aten.prod.dim_int)
def convert_prod(net: Network, self: ITensor, dim: int, keepdim: bool, dtype: torch.dtype | None) -> ITensor:
    return _accumulated(net, "PROD", self, dim, keepdim, dtype)


@converts(aten.mean.default)
def convert_mean_all(net: Network, self: ITensor, dtype: torch.dtype | None) -> ITensor:
    return _mean(net, self, None, False, dtype)


@converts(aten.mean.dim)
def convert_mean(net: Network, self: ITensor, dim: Dims, keepdim: bool, dtype: torch.dtype | None) -> ITensor:
    return _mean(net, self, dim, keepdim, dtype)


def _mean(net: Network, x: ITensor, dim: Dims, keep: bool, dtype: torch.dtype | None) -> ITensor:
    dtype = dtype or net.dtype(x)
    if dtype not in FLOATS:
        raise net.refuse(f"a mean in {dtype}")
    return _accumulated(net, "AVG", x, dim, keep, dtype)


@converts(aten.amax.default)
def convert_amax(net: Network, self: ITensor, dim: Dims, keepdim: bool) -> ITensor:
    return _extreme(net, "MAX", self, dim, keepdim)


@converts(aten.amin.default)
def convert_amin(net: Network, self: ITensor, dim: Dims, keepdim: bool) -> ITensor:
    return _extreme(net, "MIN", self, dim, keepdim)


@converts(aten.max.default)
def convert_max_all(net: Network, self: ITensor) -> ITensor:
    return _extreme(net, "MAX", self, None, False)


@converts(aten.min.default)
def convert_min_all(net: Network, self: ITensor) -> ITensor:
    return _extreme(net, "MIN", self, None, False)


def _extreme(net: Network, op: str, x: ITensor, dim: Dims, keep: bool) -> ITensor:
    dtype = net.dtype(x)
    if dtype == torch.bool:
        return cast(net, reduced(net, op, net.cast(x, torch.int32), dim, keep), dtype)
    return reduced(net, op, tensor(net, x, dtype), dim, keep)


@converts(aten.max.dim)
def convert_max(net: Network, self: ITensor, dim: int, keepdim: bool) -> tuple[ITensor, ITensor]:
    return _extreme(net, "MAX", self, dim, keepdim), _place(net, "MAX", self, dim, keepdim)


@converts(aten.min.dim)
def convert_min(net: Network, self: ITensor, dim: int, keepdim: bool) -> tuple[ITensor, ITensor]:
    return _extreme(net, "MIN", self, dim, keepdim), _place(net, "MIN", self, dim, keepdim)


@converts(aten.argmax.default)
def convert_argmax(net: Network, self: ITensor, dim: int | None, keepdim: bool) -> ITensor:
    return _place_or_flat(net, "MAX", self, dim, keepdim)


@converts(aten.argmin.default)
def convert_argmin(net: Network, self: ITensor, dim: int | None, keepdim: bool) -> ITensor:
    return _place_or_flat(net, "MIN", self, dim, keepdim)


def _place_or_flat(net: Network, op: str, x: ITensor, dim: int | None, keep: bool) -> ITensor:
    if dim is not None:
        return _place(net, op, x, dim, keep)
    place = _place(net, op, net.reshape(x, [-1]), 0, False)
    return net.reshape(place, [1] * len(x.shape)) if keep else place


def _place(net: Network, op: str, x: ITensor, dim: int, keep: bool) -> ITensor:
    """The first place of the extreme, as in PyTorch; TopK promises no order among equals, and has a limit on axes."""
    dtype, rank = net.dtype(x), len(x.shape)
    if not rank:
        return net.number(0, torch.int64)
    x = net.cast(x, torch.int32) if dtype == torch.bool else tensor(net, x, dtype)
    axis = dim % rank
    is_short = net.elementwise("LESS" if op == "MAX" else "GREATER", x, net.reduce(op, x, [axis], keep=True))
    places = net.iota(net.size(x, axis), axis, rank)
    nowhere = net.number(torch.iinfo(torch.int64).max, torch.int64)
    return net.reduce("MIN", net.select(is_short, nowhere, places), [axis], keep)


@converts(aten.any.default)
def convert_any_all(net: Network, self: ITensor) -> ITensor:
    return _truth(net, "MAX", self, None, False)


@converts(aten.any.dim)
def convert_any(net: Network, self: ITensor, dim: int, keepdim: bool) -> ITensor:
    return _truth(net, "MAX", self, dim, keepdim)


@converts(aten.all.default)
def convert_all_all(net: Network, self: ITensor) -> ITensor:
    return _truth(net, "MIN", self, None, False)


@converts(aten.all.dim)
def convert_all(net: Network, self: ITensor, dim: int, keepdim: bool) -> ITensor:
    return _truth(net, "MIN", self, dim, keepdim)


@converts(aten.any.dims)
def convert_any_dims(net: Network, self: ITensor, dim: Dims, keepdim: bool) -> ITensor:
    return _truth(net, "MAX", self, _named(net, dim), keepdim)


@converts(aten.all.dims)
def convert_all_dims(net: Network, self: ITensor, dim: Dims, keepdim: bool) -> ITensor:
    return _truth(net, "MIN", self, _named(net, dim), keepdim)


def _named(net: Network, dim: Dims) -> Dims:
    if dim is not None and not dim:
        raise net.refuse("it is told to go along no axes")
    return dim


def _truth(net: Network, op: str, x: ITensor, dim: Dims, keep: bool) -> ITensor:
    """Of bools as 0 and 1, `any` is the largest and `all` the least."""
    return _extreme(net, op, tensor(net, x, torch.bool), dim, keep)
