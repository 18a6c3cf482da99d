"""Normalisation, calculated in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trilithon.lower.tensorrt.converters.promote import FLOATS, tensor
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network, Size, bits, is_tensor

aten = torch.ops.aten


@converts(aten.layer_norm.default)
def convert_layer_norm(
    net: Network,
    input: ITensor,
    normalized_shape: Sequence[Size],
    weight: ITensor | None,
    bias: ITensor | None,
    eps: float,
    cudnn_enable: bool,
) -> ITensor:
    return _layer_norm(net, input, normalized_shape, weight, bias, eps)


@converts(aten.native_layer_norm.default)
def convert_native_layer_norm(
    net: Network,
    input: ITensor,
    normalized_shape: Sequence[Size],
    weight: ITensor | None,
    bias: ITensor | None,
    eps: float,
) -> tuple[ITensor, None, None]:
    _refuse_statistics(net)
    return _layer_norm(net, input, normalized_shape, weight, bias, eps), None, None


def _layer_norm(
    net: Network, x: ITensor, shape: Sequence[Size], weight: ITensor | None, bias: ITensor | None, eps: float
) -> ITensor:
    dtype, rank = _float_type(net, x), len(x.shape)
    known = _known(net, shape)
    scale = _affine(net, weight, torch.ones(known), rank)
    shift = _affine(net, bias, torch.zeros(known), rank)
    axes = bits(range(rank - len(known), rank), rank)
    normal = net.out("normalization_v2", tensor(net, x, torch.float32), scale, shift, axes, epsilon=eps)
    return net.cast(normal, dtype)


def _affine(net: Network, value: ITensor | None, missing: torch.Tensor, rank: int) -> ITensor:
    held = net.constant(missing) if value is None else tensor(net, value, torch.float32)
    return net.ranked(held, rank)


@converts(aten.rms_norm.default)
def convert_rms_norm(
    net: Network, input: ITensor, normalized_shape: Sequence[Size], weight: ITensor | None, eps: float | None
) -> ITensor:
    return _rms_norm(net, input, normalized_shape, weight, eps)


@converts(aten._fused_rms_norm.default)
def convert_fused_rms_norm(
    net: Network, input: ITensor, normalized_shape: Sequence[Size], weight: ITensor | None, eps: float | None
) -> tuple[ITensor, None]:
    _refuse_statistics(net)
    return _rms_norm(net, input, normalized_shape, weight, eps), None


def _rms_norm(net: Network, x: ITensor, shape: Sequence[Size], weight: ITensor | None, eps: float | None) -> ITensor:
    """`x / sqrt(mean(x^2) + eps) * weight`; the default eps is float32's for all types."""
    dtype, rank = _float_type(net, x), len(x.shape)
    axes = range(rank - len(shape), rank)
    wide = tensor(net, x, torch.float32)
    square = net.reduce("AVG", net.elementwise("PROD", wide, wide), axes, keep=True)
    normal = net.elementwise("PROD", wide, _inverse_root(net, square, torch.finfo(torch.float32).eps if eps is None else eps))
    if weight is not None:
        normal = net.elementwise("PROD", normal, tensor(net, weight, torch.float32))
    return net.cast(normal, dtype)


def _inverse_root(net: Network, x: ITensor, eps: float) -> ITensor:
    return net.unary("RECIP", net.unary("SQRT", net.elementwise("SUM", x, tensor(net, eps, torch.float32))))


def standardised(net: Network, x: ITensor, axes: Sequence[int], eps: float) -> ITensor:
    """Float32 `x` less its mean over these axes, over the root of its variance."""
    apart = net.elementwise("SUB", x, net.reduce("AVG", x, axes, keep=True))
    variance = net.reduce("AVG", net.elementwise("PROD", apart, apart), axes, keep=True)
    return net.elementwise("PROD", apart, _inverse_root(net, variance, eps))


@converts(aten.group_norm.default)
def convert_group_norm(
    net: Network,
    input: ITensor,
    num_groups: int,
    weight: ITensor | None,
    bias: ITensor | None,
    eps: float,
    cudnn_enabled: bool,
) -> ITensor:
    return _group_norm(net, input, num_groups, weight, bias, eps)


@converts(aten.native_group_norm.default)
def convert_native_group_norm(
    net: Network,
    input: ITensor,
    weight: ITensor | None,
    bias: ITensor | None,
    N: Size,
    C: Size,
    HxW: Size,
    group: int,
    eps: float,
) -> tuple[ITensor, None, None]:
    _refuse_statistics(net)
    return _group_norm(net, input, group, weight, bias, eps), None, None


def _group_norm(net: Network, x: ITensor, groups: int, weight: ITensor | None, bias: ITensor | None, eps: float) -> ITensor:
    dtype, sizes = _float_type(net, x), net.sizes(x)
    (channels,) = _known(net, sizes[1:2])
    grouped = net.reshape(tensor(net, x, torch.float32), [sizes[0], groups, channels // groups, *sizes[2:]])
    normal = standardised(net, grouped, range(2, len(sizes) + 1), eps)
    return net.cast(_scaled(net, net.reshape(normal, sizes), weight, bias), dtype)


def _scaled(net: Network, x: ITensor, weight: ITensor | None, bias: ITensor | None) -> ITensor:
    """Times a weight for each channel, which is axis 1, plus a bias."""
    if weight is not None:
        x = net.elementwise("PROD", x, _by_channel(net, weight, len(x.shape)))
    return x if bias is None else net.elementwise("SUM", x, _by_channel(net, bias, len(x.shape)))


def _by_channel(net: Network, value: ITensor, rank: int) -> ITensor:
    return net.reshape(tensor(net, value, torch.float32), [1, net.size(value, 0), *[1] * (rank - 2)])


@converts(aten.batch_norm.default)
def convert_batch_norm(
    net: Network,
    input: ITensor,
    weight: ITensor | None,
    bias: ITensor | None,
    running_mean: ITensor | None,
    running_var: ITensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> ITensor:
    if training or running_mean is None or running_var is None:
        raise net.refuse("it normalises over the batch", todo="export the model in eval mode")
    return _batch_norm(net, input, weight, bias, running_mean, running_var, eps)


@converts(aten._native_batch_norm_legit_no_training.default)
def convert_native_batch_norm(
    net: Network,
    input: ITensor,
    weight: ITensor | None,
    bias: ITensor | None,
    running_mean: ITensor,
    running_var: ITensor,
    momentum: float,
    eps: float,
) -> tuple[ITensor, None, None]:
    _refuse_statistics(net)
    return _batch_norm(net, input, weight, bias, running_mean, running_var, eps), None, None


def _batch_norm(
    net: Network, x: ITensor, weight: ITensor | None, bias: ITensor | None, mean: ITensor, variance: ITensor, eps: float
) -> ITensor:
    dtype, rank = _float_type(net, x), len(x.shape)
    apart = net.elementwise("SUB", tensor(net, x, torch.float32), _by_channel(net, mean, rank))
    normal = net.elementwise("PROD", apart, _inverse_root(net, _by_channel(net, variance, rank), eps))
    return net.cast(_scaled(net, normal, weight, bias), dtype)


def _float_type(net: Network, x: ITensor) -> torch.dtype:
    dtype: torch.dtype = net.dtype(x)
    if dtype not in FLOATS:
        raise net.refuse(f"it normalises {dtype}")
    return dtype


def _known(net: Network, sizes: Sequence[Size]) -> list[int]:
    if any(is_tensor(size) for size in sizes):
        raise net.refuse("it normalises over a size known only at run time")
    return [int(size) for size in sizes]


def _refuse_statistics(net: Network) -> None:
    """The node's first result is the normal tensor; of the mean and the deviation behind it nothing is emitted."""
    users: Any = net.node.users if net.node is not None else ()
    if any(user.args[1] != 0 and user.users for user in users):
        raise net.refuse("its mean or deviation is used", todo="use its first result alone")
