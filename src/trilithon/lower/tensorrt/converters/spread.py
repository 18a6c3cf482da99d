"""Variance, standard deviation, norms of vectors, and sums of exponentials."""

from __future__ import annotations

import math

import torch

from trilithon.lower.tensorrt.converters.promote import FLOATS, tensor, wide
from trilithon.lower.tensorrt.converters.reduce import Dims, axes_of, reduced
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network, is_tensor

aten = torch.ops.aten


@converts(aten.var.default)
def convert_var_all(net: Network, self: ITensor, unbiased: bool) -> ITensor:
    return net.cast(_variance(net, self, None, float(unbiased), False), net.dtype(self))


@converts(aten.var.dim)
def convert_var_dim(net: Network, self: ITensor, dim: Dims, unbiased: bool, keepdim: bool) -> ITensor:
    return net.cast(_variance(net, self, dim, float(unbiased), keepdim), net.dtype(self))


@converts(aten.var.correction)
def convert_var(net: Network, self: ITensor, dim: Dims, correction: float | None, keepdim: bool) -> ITensor:
    return net.cast(_variance(net, self, dim, correction, keepdim), net.dtype(self))


@converts(aten.std.default)
def convert_std_all(net: Network, self: ITensor, unbiased: bool) -> ITensor:
    return _deviation(net, self, None, float(unbiased), False)


@converts(aten.std.dim)
def convert_std_dim(net: Network, self: ITensor, dim: Dims, unbiased: bool, keepdim: bool) -> ITensor:
    return _deviation(net, self, dim, float(unbiased), keepdim)


@converts(aten.std.correction)
def convert_std(net: Network, self: ITensor, dim: Dims, correction: float | None, keepdim: bool) -> ITensor:
    return _deviation(net, self, dim, correction, keepdim)


@converts(aten.var_mean.dim)
def convert_var_mean_dim(net: Network, self: ITensor, dim: Dims, unbiased: bool, keepdim: bool) -> tuple[ITensor, ITensor]:
    return _variance_and_mean(net, self, dim, float(unbiased), keepdim)


@converts(aten.var_mean.correction)
def convert_var_mean(
    net: Network, self: ITensor, dim: Dims, correction: float | None, keepdim: bool
) -> tuple[ITensor, ITensor]:
    return _variance_and_mean(net, self, dim, correction, keepdim)


def _variance_and_mean(net: Network, x: ITensor, dim: Dims, correction: float | None, keep: bool) -> tuple[ITensor, ITensor]:
    variance = _variance(net, x, dim, correction, keep)
    mean = reduced(net, "AVG", tensor(net, x, torch.float32), dim, keep)
    return net.cast(variance, net.dtype(x)), net.cast(mean, net.dtype(x))


def _deviation(net: Network, x: ITensor, dim: Dims, correction: float | None, keep: bool) -> ITensor:
    return net.cast(net.unary("SQRT", _variance(net, x, dim, correction, keep)), net.dtype(x))


def _variance(net: Network, x: ITensor, dim: Dims, correction: float | None, keep: bool) -> ITensor:
    """Float32. The mean square distance from the mean, over the count less `correction` (1 if None), which is at least 0."""
    if net.dtype(x) not in FLOATS:
        raise net.refuse(f"a variance of {net.dtype(x)}")
    if not x.shape:
        raise net.refuse("a variance of a tensor without axes")
    x, axes = tensor(net, x, torch.float32), axes_of(x, dim)
    apart = net.elementwise("SUB", x, net.reduce("AVG", x, axes, keep=True))
    total = net.reduce("SUM", net.elementwise("PROD", apart, apart), axes, keep)
    count = net.product([net.size(x, axis) for axis in axes])
    less = 1.0 if correction is None else float(correction)
    if not is_tensor(count):
        return net.elementwise("DIV", total, net.number(max(count - less, 0.0), torch.float32))
    degrees = net.elementwise("SUB", net.cast(net.reshape(count, []), torch.float32), net.number(less, torch.float32))
    return net.elementwise("DIV", total, net.elementwise("MAX", degrees, net.number(0.0, torch.float32)))


@converts(aten.linalg_vector_norm.default)
def convert_vector_norm(
    net: Network, self: ITensor, ord: float, dim: Dims, keepdim: bool, dtype: torch.dtype | None
) -> ITensor:
    return _norm(net, self, ord, dim, keepdim, dtype)


@converts(aten.linalg_norm.default)
def convert_linalg_norm(
    net: Network, self: ITensor, ord: float | None, dim: Dims, keepdim: bool, dtype: torch.dtype | None
) -> ITensor:
    """Along one axis the norm of a vector; of all axes too where no order is told."""
    if ord is not None and len(axes_of(self, dim)) != 1:
        raise net.refuse("a norm of matrices")
    return _norm(net, self, 2.0 if ord is None else ord, dim, keepdim, dtype)


@converts(aten.norm.ScalarOpt_dim)
def convert_norm(net: Network, self: ITensor, p: float | None, dim: Dims, keepdim: bool) -> ITensor:
    return _norm(net, self, 2.0 if p is None else p, dim, keepdim, None)


def _norm(net: Network, x: ITensor, order: float, dim: Dims, keep: bool, dtype: torch.dtype | None) -> ITensor:
    dtype = dtype or net.dtype(x)
    if dtype not in FLOATS:
        raise net.refuse(f"a norm in {dtype}")
    x = tensor(net, tensor(net, x, dtype), wide(dtype))
    if order == 2:
        result = net.unary("SQRT", reduced(net, "SUM", net.elementwise("PROD", x, x), dim, keep))
    elif order in (1, math.inf, -math.inf):
        ops = {1: "SUM", math.inf: "MAX", -math.inf: "MIN"}
        result = reduced(net, ops[order], net.unary("ABS", x), dim, keep)
    else:
        raise net.refuse(f"a norm of order {order}")
    return net.cast(result, dtype)


@converts(aten.logsumexp.default)
def convert_logsumexp(net: Network, self: ITensor, dim: Dims, keepdim: bool) -> ITensor:
    """`m + log(sum(exp(x - m)))` for the largest m; for infinite m without it, which would give NaN."""
    dtype = net.dtype(self)
    if dtype not in FLOATS or not self.shape:
        raise net.refuse(f"a sum of exponentials of {dtype} over {len(self.shape)} axes")
    x, axes = tensor(net, self, torch.float32), axes_of(self, dim)
    largest = net.reduce("MAX", x, axes, keep=True)
    m = net.select(net.unary("ISINF", largest), net.number(0.0, torch.float32), largest)
    total = net.reduce("SUM", net.unary("EXP", net.elementwise("SUB", x, m)), axes, keep=True)
    result = net.elementwise("SUM", net.unary("LOG", total), m)
    kept = [size for axis, size in enumerate(net.sizes(result)) if axis not in axes]
    return net.cast(result if keepdim else net.reshape(result, kept), dtype)
