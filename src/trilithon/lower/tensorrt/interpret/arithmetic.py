"""Layers that calculate element by element, or over whole axes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trilithon.lower.tensorrt.interpret.read import Layer, evaluates, wide
from trilithon.lower.tensorrt.library import torch_dtypes

BLOCK = 1 << 22  # numbers of a matrix that are converted at a time


@evaluates("ELEMENTWISE", "IElementWiseLayer")
def elementwise(layer: Layer) -> Tensor:
    a, b = layer.wide(0), layer.wide(1)
    op = layer.own.op.name
    if op in ("DIV", "FLOOR_DIV") and not a.is_floating_point() and bool((b == 0).any()):
        raise layer.refuse("it divides an integer by zero", todo="check the inputs")
    if op == "FLOOR_DIV" and a.is_floating_point():  # the quotient is rounded first, unlike PyTorch's: 1 / 0.1 gives 10
        return torch.floor((a / b).to(layer.x(0).dtype))
    return BINARY[op](a, b)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """The quotient; of integers it is cut towards zero, as in C++."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def power(a: Tensor, b: Tensor) -> Tensor:
    """The power; of integers it is calculated in float32 and cut towards zero."""
    return a**b if a.is_floating_point() else torch.trunc(a.float() ** b.float()).to(a.dtype)


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "SUB": torch.sub,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "DIV": divide,
    "FLOOR_DIV": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "POW": power,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}


@evaluates("UNARY", "IUnaryLayer")
def unary(layer: Layer) -> Tensor:
    return UNARY[layer.own.op.name](layer.wide())


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "TAN": torch.tan,
    "SINH": torch.sinh,
    "COSH": torch.cosh,
    "ASIN": torch.asin,
    "ACOS": torch.acos,
    "ATAN": torch.atan,
    "ASINH": torch.asinh,
    "ACOSH": torch.acosh,
    "ATANH": torch.atanh,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ERF": torch.erf,
    "NOT": torch.logical_not,
    "SIGN": torch.sign,
    "ROUND": torch.round,  # to even
    "ISINF": torch.isinf,
    "ISNAN": torch.isnan,
}


@evaluates("ACTIVATION", "IActivationLayer")
def activation(layer: Layer) -> Tensor:
    own = layer.own
    return ACTIVATIONS[own.type.name](layer.wide(), own.alpha, own.beta)


ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "RELU": lambda x, a, b: torch.relu(x),
    "SIGMOID": lambda x, a, b: torch.sigmoid(x),
    "TANH": lambda x, a, b: torch.tanh(x),
    "LEAKY_RELU": lambda x, a, b: torch.where(x >= 0, x, a * x),
    "ELU": lambda x, a, b: torch.where(x >= 0, x, a * torch.expm1(x)),
    "SELU": lambda x, a, b: b * torch.where(x > 0, x, a * torch.expm1(x)),
    "SOFTSIGN": lambda x, a, b: x / (1 + x.abs()),
    "SOFTPLUS": lambda x, a, b: a * torch.logaddexp(b * x, torch.zeros_like(x)),
    "CLIP": lambda x, a, b: x.clamp(max=b).clamp(min=a),
    "HARD_SIGMOID": lambda x, a, b: (a * x + b).clamp(0, 1),
    "SCALED_TANH": lambda x, a, b: a * torch.tanh(b * x),
    "THRESHOLDED_RELU": lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)),
    "GELU_ERF": lambda x, a, b: functional.gelu(x),
    "GELU_TANH": lambda x, a, b: functional.gelu(x, approximate="tanh"),
}


@evaluates("PARAMETRIC_RELU", "IParametricReLULayer")
def parametric_relu(layer: Layer) -> Tensor:
    x = layer.wide()
    return torch.where(x >= 0, x, layer.wide(1) * x)


@evaluates("SELECT", "ISelectLayer")
def select(layer: Layer) -> Tensor:
    return torch.where(layer.x(0), layer.x(1), layer.x(2))


@evaluates("CAST", "ICastLayer")
def cast(layer: Layer) -> Tensor:
    return layer.x().to(layer.mode.held(torch_dtypes()[layer.own.to_type]))


@evaluates("IDENTITY", "IIdentityLayer")
def identity(layer: Layer) -> Tensor:
    return layer.x()


@evaluates("MATRIX_MULTIPLY", "IMatrixMultiplyLayer")
def matrix_multiply(layer: Layer) -> Tensor:
    """The matrix product; a VECTOR has no axis for the rows (left) or the columns (right), and gives the result none."""
    kinds = layer.own.op0.name, layer.own.op1.name
    a, b = (x.transpose(-1, -2) if kind == "TRANSPOSE" else x for x, kind in zip((layer.x(0), layer.x(1)), kinds, strict=True))
    a = a.unsqueeze(-2) if kinds[0] == "VECTOR" else a
    b = b.unsqueeze(-1) if kinds[1] == "VECTOR" else b
    made = product(wide(a), b)
    made = made.squeeze(-1) if kinds[1] == "VECTOR" else made
    return made.squeeze(-1 if kinds[1] == "VECTOR" else -2) if kinds[0] == "VECTOR" else made


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, in the type of `a`; a large `b` is converted block by block, since that takes twice its memory."""
    blocks = max(1, b.numel() // BLOCK)
    return torch.cat([a @ part.to(a.dtype) for part in b.chunk(blocks, -1)], -1)


@evaluates("EINSUM", "IEinsumLayer")
def einsum(layer: Layer) -> Tensor:
    return torch.einsum(layer.own.equation, *layer.wides())


@evaluates("SOFTMAX", "ISoftMaxLayer")
def softmax(layer: Layer) -> Tensor:
    (axis,) = layer.axes()
    return torch.softmax(layer.wide(), axis)


@evaluates("REDUCE", "IReduceLayer")
def reduce(layer: Layer) -> Tensor:
    """A sum or the like over axes, in the type of the input: int32 stays int32."""
    x, op, axes = layer.wide(), layer.own.op.name, layer.axes()
    if op not in REDUCTIONS:
        raise layer.refuse(f"the reduction {op} is not modelled")
    if op == "AVG" and not x.is_floating_point():
        raise layer.refuse("it is an average of integers, whose rounding TensorRT does not state")
    count = math.prod(x.shape[axis] for axis in axes)
    rest = [axis for axis in range(x.dim()) if axis not in axes]
    flat = x.permute(*rest, *axes).reshape(*(x.shape[axis] for axis in rest), count)
    result = REDUCTIONS[op](flat).to(x.dtype)
    return result.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)]) if layer.own.keep_dims else result


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # over the last axis
    "SUM": lambda x: x.sum(-1),
    "PROD": lambda x: x.prod(-1),
    "MAX": lambda x: x.amax(-1),
    "MIN": lambda x: x.amin(-1),
    "AVG": lambda x: x.mean(-1),
}


@evaluates("CUMULATIVE", "ICumulativeLayer")
def cumulative(layer: Layer) -> Tensor:
    """The running sum; an exclusive one begins with 0 and leaves each element itself out."""
    own, x, axis = layer.own, layer.x(), int(layer.x(1))
    if own.op.name != "SUM":
        raise layer.refuse(f"the running {own.op.name} is not modelled")
    x = wide(x.flip(axis) if own.reverse else x)
    if own.exclusive:
        x = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    total = x.cumsum(axis).to(x.dtype)
    return total.flip(axis) if own.reverse else total
