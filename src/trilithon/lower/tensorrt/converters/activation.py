"""Activations and softmax, calculated in float32: of halves TensorRT rounds each step inside a GELU or a softmax."""

from __future__ import annotations

import torch

from trilithon.lower.tensorrt.converters.choose import clamped
from trilithon.lower.tensorrt.converters.promote import FLOATS, in_float32, tensor
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.converters.unary import expm1, log1p
from trilithon.lower.tensorrt.network import ITensor, Network

aten = torch.ops.aten
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _times(net: Network, a: ITensor, b: ITensor | float) -> ITensor:
    return net.elementwise("PROD", a, tensor(net, b, torch.float32))


def _is_positive(net: Network, x: ITensor) -> ITensor:
    return net.elementwise("GREATER", x, net.number(0.0, net.dtype(x)))


@converts(aten.relu.default)
def convert_relu(net: Network, self: ITensor) -> ITensor:
    return net.activation("RELU", tensor(net, self, net.dtype(self)))


@converts(aten.sigmoid.default)
def convert_sigmoid(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.activation("SIGMOID", x))


@converts(aten.tanh.default)
def convert_tanh(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: net.activation("TANH", x))


@converts(aten.silu.default)
def convert_silu(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: _times(net, x, net.activation("SIGMOID", x)))


@converts(aten.gelu.default)
def convert_gelu(net: Network, self: ITensor, approximate: str) -> ITensor:
    kinds = {"none": "GELU_ERF", "tanh": "GELU_TANH"}
    if approximate not in kinds:
        raise net.refuse(f"approximate is {approximate!r}")
    return in_float32(net, self, lambda x: net.activation(kinds[approximate], x))


@converts(aten.leaky_relu.default)
def convert_leaky_relu(net: Network, self: ITensor, negative_slope: float) -> ITensor:
    return in_float32(net, self, lambda x: net.select(_is_positive(net, x), x, _times(net, x, negative_slope)))


@converts(aten.elu.default)
def convert_elu(net: Network, self: ITensor, alpha: float, scale: float, input_scale: float) -> ITensor:
    return in_float32(net, self, lambda x: _elu(net, x, alpha * scale, scale, input_scale))


@converts(aten.celu.default)
def convert_celu(net: Network, self: ITensor, alpha: float) -> ITensor:
    return in_float32(net, self, lambda x: _elu(net, x, alpha, 1.0, 1.0 / alpha))


@converts(aten.selu.default)
def convert_selu(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: _elu(net, x, SELU_ALPHA * SELU_SCALE, SELU_SCALE, 1.0))


def _elu(net: Network, x: ITensor, below: float, above: float, inside: float) -> ITensor:
    """`above * x` for positive x, else `below * (exp(inside * x) - 1)`."""
    return net.select(_is_positive(net, x), _times(net, x, above), _times(net, expm1(net, _times(net, x, inside)), below))


@converts(aten.softplus.default)
def convert_softplus(net: Network, self: ITensor, beta: float, threshold: float) -> ITensor:
    return in_float32(net, self, lambda x: _softplus(net, x, beta, threshold))


def _softplus(net: Network, x: ITensor, beta: float, threshold: float) -> ITensor:
    """`log(1 + exp(beta * x)) / beta`; `x` itself above the threshold."""
    scaled = _times(net, x, beta)
    is_above = net.elementwise("GREATER", scaled, tensor(net, threshold, torch.float32))
    curve = net.elementwise("DIV", log1p(net, net.unary("EXP", scaled)), tensor(net, beta, torch.float32))
    return net.select(is_above, x, curve)


@converts(aten.mish.default)
def convert_mish(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: _times(net, x, net.activation("TANH", _softplus(net, x, 1.0, 20.0))))


@converts(aten.log_sigmoid.default)
def convert_log_sigmoid(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: _log_sigmoid(net, x))


def _log_sigmoid(net: Network, x: ITensor) -> ITensor:
    """`min(x, 0) - log(1 + exp(-|x|))`, which does not overflow."""
    tail = log1p(net, net.unary("EXP", net.unary("NEG", net.unary("ABS", x))))
    return net.elementwise("SUB", clamped(net, x, None, 0.0), tail)


@converts(aten.hardtanh.default)
def convert_hardtanh(net: Network, self: ITensor, min_val: float, max_val: float) -> ITensor:
    return clamped(net, self, min_val, max_val)


@converts(aten.relu6.default)
def convert_relu6(net: Network, self: ITensor) -> ITensor:
    return clamped(net, self, 0, 6)


@converts(aten.hardsigmoid.default)
def convert_hardsigmoid(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: _hardsigmoid(net, x))


@converts(aten.hardswish.default)
def convert_hardswish(net: Network, self: ITensor) -> ITensor:
    return in_float32(net, self, lambda x: _times(net, x, _hardsigmoid(net, x)))


def _hardsigmoid(net: Network, x: ITensor) -> ITensor:
    raised = net.elementwise("SUM", x, net.number(3.0, torch.float32))
    return net.elementwise("DIV", clamped(net, raised, 0.0, 6.0), net.number(6.0, torch.float32))


@converts(aten.softmax.int)
def convert_softmax(net: Network, self: ITensor, dim: int, dtype: torch.dtype | None) -> ITensor:
    return _softmax(net, self, dim, dtype, is_log=False)


@converts(aten._softmax.default)
def convert_inner_softmax(net: Network, self: ITensor, dim: int, half_to_float: bool) -> ITensor:
    return _softmax(net, self, dim, torch.float32 if half_to_float else None, is_log=False)


@converts(aten.log_softmax.int)
def convert_log_softmax(net: Network, self: ITensor, dim: int, dtype: torch.dtype | None) -> ITensor:
    return _softmax(net, self, dim, dtype, is_log=True)


@converts(aten._log_softmax.default)
def convert_inner_log_softmax(net: Network, self: ITensor, dim: int, half_to_float: bool) -> ITensor:
    return _softmax(net, self, dim, torch.float32 if half_to_float else None, is_log=True)


def _softmax(net: Network, x: ITensor, dim: int, dtype: torch.dtype | None, *, is_log: bool) -> ITensor:
    """Of `x` as `dtype`, if given. TensorRT's layer takes two axes or more."""
    x = tensor(net, x, dtype or net.dtype(x))
    if net.dtype(x) not in FLOATS:
        raise net.refuse(f"a softmax of {net.dtype(x)}")
    if not x.shape:
        raise net.refuse("a softmax of a tensor without axes")
    if is_log:
        return in_float32(net, x, lambda y: _log_softmax(net, y, dim))
    if len(x.shape) == 1:
        return in_float32(net, x, lambda y: net.reshape(net.softmax(net.ranked(y, 2)), net.sizes(y)))
    return in_float32(net, x, lambda y: net.softmax(y, dim))


def _log_softmax(net: Network, x: ITensor, dim: int) -> ITensor:
    lowered = net.elementwise("SUB", x, net.reduce("MAX", x, [dim], keep=True))
    total = net.reduce("SUM", net.unary("EXP", lowered), [dim], keep=True)
    return net.elementwise("SUB", lowered, net.unary("LOG", total))
