"""Convolutions. One along a single axis runs as one along two, the first of size 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trilithon.lower.tensorrt.converters.known import fake_shape
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.converters.view import unsqueezed, without
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import ITensor, Network, is_tensor

aten = torch.ops.aten
Sizes = Sequence[int] | int


@converts(aten.conv1d.default, aten.conv2d.default)
def convert_conv(
    net: Network,
    input: ITensor,
    weight: ITensor,
    bias: ITensor | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> ITensor:
    around = _each(net, weight, padding)
    return _convolved(net, input, weight, bias, stride, (around, around), dilation, groups)


@converts(aten.conv1d.padding, aten.conv2d.padding)
def convert_conv_padding(
    net: Network,
    input: ITensor,
    weight: ITensor,
    bias: ITensor | None,
    stride: Sizes,
    padding: str,
    dilation: Sizes,
    groups: int,
) -> ITensor:
    """Padding "same" puts what a window lacks around the input, behind it one more if that is odd."""
    window = list(weight.shape)[2:]
    reach = [d * (w - 1) if padding == "same" else 0 for d, w in zip(_each(net, weight, dilation), window, strict=True)]
    around = [n // 2 for n in reach], [n - n // 2 for n in reach]
    return _convolved(net, input, weight, bias, stride, around, dilation, groups)


@converts(aten.convolution.default)
def convert_convolution(
    net: Network,
    input: ITensor,
    weight: ITensor,
    bias: ITensor | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    transposed: bool,
    output_padding: Sizes,
    groups: int,
) -> ITensor:
    if transposed:
        raise net.refuse("it is a transposed convolution")
    around = _each(net, weight, padding)
    return _convolved(net, input, weight, bias, stride, (around, around), dilation, groups)


def _convolved(
    net: Network,
    x: ITensor,
    weight: ITensor,
    bias: ITensor | None,
    stride: Sizes,
    padding: tuple[list[int], list[int]],
    dilation: Sizes,
    groups: int,
) -> ITensor:
    """The convolution of `x`, the argument `input` of the node, padded by this much in front and behind."""
    window = list(weight.shape)[2:]
    if len(window) not in (1, 2):
        raise net.refuse(f"it is a convolution along {len(window)} axes")
    x, is_single = _with_channels(net, x), len(x.shape) == len(weight.shape) - 1
    x = unsqueezed(net, x, 0) if is_single else x
    parts = {
        "stride_nd": _each(net, weight, stride),
        "pre_padding": padding[0],
        "post_padding": padding[1],
        "dilation_nd": _each(net, weight, dilation),
    }
    is_line = len(window) == 1
    if is_line:
        x, window = unsqueezed(net, x, 2), [1, *window]
        parts = {name: [int(not name.endswith("padding")), *values] for name, values in parts.items()}
        weight = unsqueezed(net, weight, 2)
    inputs = {1: weight} if bias is None else {1: weight, 2: bias}
    settings: dict[str, Any] = {name: tuple(values) for name, values in parts.items()}
    none = library().Weights()
    maps = weight.shape[0], tuple(window), none, none
    result = net.out("convolution_nd", x, *maps, inputs=inputs, num_groups=groups, **settings)
    result = without(net, result, [2]) if is_line else result
    return without(net, result, [0]) if is_single else result


def _with_channels(net: Network, x: ITensor) -> ITensor:
    """`x` with each size as a number that the export knows: the layer wants the number of channels."""
    known = fake_shape(net, "input")
    if known is None or len(known) != len(x.shape):
        return x
    sizes = [number if isinstance(number, int) else size for number, size in zip(known, net.sizes(x), strict=True)]
    lost = any(not is_tensor(size) and own < 0 for size, own in zip(sizes, x.shape, strict=True))
    return net.reshape(x, sizes) if lost else x


def _each(net: Network, weight: ITensor, values: Sizes) -> list[int]:
    """One value for each axis of the window; a single one stands for all."""
    given = [values] if isinstance(values, int) else list(values)
    if any(is_tensor(value) for value in given):
        raise net.refuse("a stride, padding or dilation is known only at run time")
    return given * (len(weight.shape) - 2) if len(given) == 1 else given
