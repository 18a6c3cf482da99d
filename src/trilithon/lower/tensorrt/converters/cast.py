"""Changes of type; copies, which need no layer; and assertions, which state what export has proved or checks on entry."""

from __future__ import annotations

import operator
from typing import Any

import torch

from trilithon.lower.tensorrt.converters.promote import cast
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor

aten = torch.ops.aten
Ignored = Any  # layout, device and the like: where a tensor lies in memory


@converts(aten._to_copy.default)
def convert_to_copy(
    net: Network,
    self: ITensor,
    dtype: torch.dtype | None,
    layout: Ignored,
    device: Ignored,
    pin_memory: Ignored,
    non_blocking: Ignored,
    memory_format: Ignored,
) -> ITensor:
    return self if dtype is None else cast(net, self, dtype)


@converts(aten.to.dtype)
def convert_to_dtype(
    net: Network, self: ITensor, dtype: torch.dtype, non_blocking: Ignored, copy: Ignored, memory_format: Ignored
) -> ITensor:
    return cast(net, self, dtype)


@converts(aten.to.dtype_layout)
def convert_to_layout(
    net: Network,
    self: ITensor,
    dtype: torch.dtype | None,
    layout: Ignored,
    device: Ignored,
    pin_memory: Ignored,
    non_blocking: Ignored,
    copy: Ignored,
    memory_format: Ignored,
) -> ITensor:
    return self if dtype is None else cast(net, self, dtype)


@converts(aten.to.device)
def convert_to_device(
    net: Network,
    self: ITensor,
    device: Ignored,
    dtype: torch.dtype,
    non_blocking: Ignored,
    copy: Ignored,
    memory_format: Ignored,
) -> ITensor:
    return cast(net, self, dtype)


@converts(aten.to.other)
def convert_to_other(
    net: Network, self: ITensor, other: ITensor, non_blocking: Ignored, copy: Ignored, memory_format: Ignored
) -> ITensor:
    return cast(net, self, net.dtype(other))


@converts(aten.type_as.default)
def convert_type_as(net: Network, self: ITensor, other: ITensor) -> ITensor:
    return cast(net, self, net.dtype(other))


@converts(aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def convert_alias(net: Network, self: ITensor) -> ITensor:
    return self


@converts(aten.clone.default, aten.contiguous.default)
def convert_clone(net: Network, self: ITensor, memory_format: Ignored) -> ITensor:
    return self


@converts(aten.dropout.default)
def convert_dropout(net: Network, input: ITensor, p: float, train: bool) -> ITensor:
    if train and p != 0:
        raise net.refuse(f"it drops values at random, p={p}", todo="export the model in eval mode")
    return input


@converts(aten._assert_tensor_metadata.default)
def convert_assert_metadata(
    net: Network, a: Ignored, size: Ignored, stride: Ignored, dtype: Ignored, device: Ignored, layout: Ignored
) -> None:
    return None


@converts(aten._assert_scalar.default, aten._assert_async.msg)
def convert_assert_scalar(net: Network, self: Ignored, assert_msg: str) -> None:
    return None


@converts(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default)
def convert_constrain_range(net: Network, size: Ignored, min: int | None, max: int | None) -> None:
    return None


@converts(operator.eq)
def convert_size_eq(net: Network, a: Size, b: Size) -> bool | ITensor:
    return a == b if _are_known(a, b) else net.calculate("EQUAL", a, b)


@converts(operator.ne)
def convert_size_ne(net: Network, a: Size, b: Size) -> bool | ITensor:
    return a != b if _are_known(a, b) else net.unary("NOT", net.calculate("EQUAL", a, b))


@converts(operator.lt)
def convert_size_lt(net: Network, a: Size, b: Size) -> bool | ITensor:
    return a < b if _are_known(a, b) else net.calculate("LESS", a, b)


@converts(operator.gt)
def convert_size_gt(net: Network, a: Size, b: Size) -> bool | ITensor:
    return a > b if _are_known(a, b) else net.calculate("GREATER", a, b)


@converts(operator.le)
def convert_size_le(net: Network, a: Size, b: Size) -> bool | ITensor:
    return a <= b if _are_known(a, b) else net.unary("NOT", net.calculate("GREATER", a, b))


@converts(operator.ge)
def convert_size_ge(net: Network, a: Size, b: Size) -> bool | ITensor:
    return a >= b if _are_known(a, b) else net.unary("NOT", net.calculate("LESS", a, b))


def _are_known(a: Size, b: Size) -> bool:
    return not is_tensor(a) and not is_tensor(b)
