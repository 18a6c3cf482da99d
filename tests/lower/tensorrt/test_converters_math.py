"""Converters that calculate: each against PyTorch, in each floating type, at several sizes, and built.

The rows of a table are the outputs of one program: it is exported and converted once for each type, then interpreted on
random data with edge values and compared with eager. The error against float64 may be twice that of eager, plus a quarter
of the type's last digit; integers, bools, NaN and infinities agree exactly.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule
from torch.nn import functional

from trilithon.errors import CannotLower
from trilithon.lower.inputs import Axis, Input
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.engine import build
from trilithon.lower.tensorrt.interpret import interpret
from trilithon.lower.tensorrt.network import Network
from trilithon.rewrite.unlift import unlift

aten = torch.ops.aten
B, S = Dim("b", min=2, max=8), Dim("s", min=4, max=16)
SIZES = ((2, 6), (3, 7), (5, 4))
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EDGES = (math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, 1.5, -2.5, 1e-4, -1e-4, 3.0, -7.0)
HALF, FLOAT, INT, LONG = torch.float16, torch.float32, torch.int32, torch.int64


class Data(NamedTuple):
    """Tensors `[b s 6]`, edge values `[b 12]`, and a vector and a matrix of known sizes."""

    x: Tensor
    y: Tensor
    p: Tensor  # positive
    i: Tensor
    k: Tensor  # not 0
    m: Tensor
    n: Tensor
    e: Tensor
    f: Tensor
    w: Tensor  # [6]
    z: Tensor  # [6 6]

    @property
    def wide(self) -> torch.dtype:
        """The type of what is asked for in float32; float64 where the truth is calculated."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


Rows = dict[str, Callable[[Data], Any]]
AXES: tuple[dict[int, Any], ...] = (*[{0: B, 1: S}] * 7, {0: B}, {0: B}, {}, {})


def data(b: int, s: int, dtype: torch.dtype) -> Data:
    torch.manual_seed(b)
    x, y = (2 * torch.randn(b, s, 6)).to(dtype), torch.randn(b, s, 6).to(dtype)
    i, k = torch.randint(-9, 10, (b, s, 6)), torch.randint(1, 5, (b, s, 6)) * (2 * torch.randint(0, 2, (b, s, 6)) - 1)
    e = torch.tensor(EDGES).expand(b, 12)
    f = torch.stack([row[torch.randperm(12)] for row in e])
    m, n = torch.rand(b, s, 6) > 0.5, torch.rand(b, s, 6) > 0.3
    w, z = torch.randn(6).to(dtype), torch.randn(6, 6).to(dtype)
    return Data(x, y, (y.abs() + 0.25).to(dtype), i, k, m, n, e.to(dtype).contiguous(), f.to(dtype), w, z)


ARITHMETIC: Rows = {
    "add": lambda d: (d.x + d.y, d.x + 1, d.x + 0.1, d.i + 1, d.i + d.k, d.i + d.k.int(), d.k.int() + 7, d.e + d.f),
    "add of two kinds": lambda d: (d.x + d.i, d.i + 0.5, d.m + 1, d.m + 0.5, d.m + d.n, d.x + d.m, d.m + True, d.i + d.m),
    "add without axes": lambda d: (
        d.x + d.z[0, 0],
        d.i + d.z[0, 0],
        d.z[0, 0] + 1,
        d.x + d.z[0, 0].float(),
        d.i[0, 0, 0] + d.x,
    ),
    "add alpha": lambda d: (
        torch.add(d.x, d.y, alpha=0.3),
        torch.add(d.i, d.k, alpha=-2),
        torch.add(d.x, 0.7, alpha=3),
        torch.add(d.x, d.i, alpha=2),
    ),
    "sub": lambda d: (
        d.x - d.y,
        d.i - 3,
        1 - d.x,
        0.1 - d.x,
        5 - d.i,
        torch.sub(d.x, d.y, alpha=2),
        d.x - d.i,
        d.i - d.k.int(),
    ),
    "rsub": lambda d: (
        torch.rsub(d.x, d.y, alpha=0.5),
        torch.rsub(d.i, 3, alpha=2),
        torch.rsub(d.i, 2.5),
        torch.rsub(d.x, d.i),
    ),
    "mul": lambda d: (
        d.x * d.y,
        d.x * 0.1,
        d.x * 0.01 * 70000.0,
        d.i * 3,
        d.m * d.x,
        d.m * d.n,
        d.i * 0.3,
        d.e * d.f,
        d.i * d.k.int(),
    ),
    "div": lambda d: (
        d.x / d.p,
        d.x / 3,
        d.i / 4,
        d.i / d.k,
        1 / d.p,
        d.m / 2,
        d.x / 0.1,
        d.i / d.p,
        d.e / d.f,
        d.i / d.x.sign(),
    ),
    "with a size": lambda d: (
        d.x + d.x.shape[0],
        d.x * d.x.shape[1],
        d.x / d.x.shape[1],
        d.x.shape[0] - d.x,
        d.i // d.x.shape[1],
        d.i.int() * d.x.shape[0],
        d.i % (d.x.shape[0] + 1),
        d.m + d.x.shape[0],
        d.x > d.x.shape[0] - d.x.shape[1],
    ),
    "addcmul": lambda d: (torch.addcmul(d.x, d.y, d.p), torch.addcmul(d.x, d.y, d.w, value=0.3), torch.addcmul(d.i, d.k, d.k)),
    "addcdiv": lambda d: torch.addcdiv(d.x, d.y, d.p, value=0.7),
    "lerp": lambda d: (
        torch.lerp(d.x, d.y, 0.3),
        torch.lerp(d.x, d.y, 0.9),
        torch.lerp(d.x, d.y, d.p),
        torch.lerp(d.x, d.y, d.w),
    ),
    "pow": lambda d: (d.x**2, d.x**3, d.x**4, d.p**0.5, d.p**-0.5, d.p**-1, d.p**1.7, d.x**1, d.x**0, d.x.square(), d.e**2),
    "pow of integers": lambda d: (d.i**2, d.i**3, d.i.int() ** 7, d.i**2.0, d.i.square(), d.k**-1.0),
    "pow of a number": lambda d: (2**d.x, 0.3**d.x, 10000.0**d.y, 2.0**d.i),
    "pow of two": lambda d: (d.p**d.y, d.p**d.i, torch.pow(d.p.float(), d.y)),
}

DIVISION: Rows = {
    "floor of integers": lambda d: (
        d.i // 3,
        d.i // -4,
        d.i // d.k,
        torch.div(d.i, d.k, rounding_mode="floor"),
        d.i.int() // d.k,
    ),
    "trunc": lambda d: (torch.div(d.i, d.k, rounding_mode="trunc"), torch.div(d.x, d.p, rounding_mode="trunc")),
    "floor by a power of two": lambda d: (
        d.x // 2,
        d.x // 0.5,
        d.x // -4,
        torch.div(d.x, 1.0, rounding_mode="floor"),
        d.i // 2.0,
    ),
    "no mode": lambda d: torch.div(d.i, d.k, rounding_mode=None),
    "remainder": lambda d: (d.i % 3, d.i % -4, d.i % d.k, 7 % d.k, d.x % 1, d.x % 2, d.x % -0.25, d.i.int() % 5, d.i % 0.5),
    "fmod": lambda d: (torch.fmod(d.i, 3), torch.fmod(d.i, d.k), torch.fmod(d.x, 0.5), torch.fmod(d.x, -2)),
}


def comparisons(a: Any, b: Any) -> tuple[Tensor, ...]:
    return a == b, a != b, a < b, a <= b, a > b, a >= b


COMPARE: Rows = {
    "floats": lambda d: (*comparisons(d.x, d.y), *comparisons(d.x, 0.1), d.x < 1e9, d.x >= 1),
    "edges": lambda d: (*comparisons(d.e, d.f), *comparisons(d.e, math.inf), d.e <= 3, d.e == 0.0),
    "integers": lambda d: (*comparisons(d.i, d.k), d.i.int() >= d.k, d.i <= 3, d.i > 2.5, d.i != 2.5),
    "two kinds": lambda d: (d.i <= d.x, d.m >= d.i, d.m != d.x, d.m > 0, d.m == 1),
    "bools": lambda d: comparisons(d.m, d.n),
    "logical": lambda d: (
        torch.logical_and(d.m, d.n),
        torch.logical_and(d.i, d.m),
        torch.logical_or(d.e, d.f),
        torch.logical_xor(d.i, d.x),
        torch.logical_not(d.m),
        torch.logical_not(d.i),
        torch.logical_not(d.e),
    ),
    "bitwise": lambda d: (d.m & d.n, d.m | d.n, d.m ^ d.n, ~d.m, ~d.i, ~d.i.int(), d.m & True, d.m | False),
    "named bitwise": lambda d: (torch.bitwise_and(d.m, d.n), torch.bitwise_or(d.m, d.n), torch.bitwise_xor(d.m, d.n)),
    "finite": lambda d: (torch.isnan(d.e), torch.isinf(d.e), torch.isfinite(d.e)),
    "finite integers": lambda d: (torch.isnan(d.i), torch.isinf(d.i), torch.isfinite(d.i)),
}

CHOOSE: Rows = {
    "where": lambda d: (
        torch.where(d.m, d.x, d.y),
        torch.where(d.m, d.x, 0.1),
        torch.where(d.m, -math.inf, d.x),
        torch.where(d.m, 1.0, 0.0),
        torch.where(d.m, 1, 0),
        torch.where(d.m, d.i, d.x),
        torch.where(d.m, d.i, 0.5),
        torch.where(d.m, d.x, d.z[0, 0]),
        torch.where(d.m, d.n, False),
    ),
    "masked_fill": lambda d: (
        d.x.masked_fill(d.m, -math.inf),
        d.x.masked_fill(d.m, 0.1),
        d.i.masked_fill(d.m, 7),
        d.n.masked_fill(d.m, True),
        d.x.masked_fill(d.m, d.z[0, 0]),
        d.w.masked_fill(d.m, 0),
        d.i.masked_fill(d.m, 2.7),
    ),
    "maximum": lambda d: (torch.maximum(d.e, d.f), torch.max(d.x, d.y), torch.maximum(d.i, d.k), torch.maximum(d.m, d.n)),
    "minimum": lambda d: (torch.minimum(d.e, d.f), torch.min(d.x, d.y), torch.minimum(d.i, d.k), torch.minimum(d.m, d.n)),
    "maximum of two kinds": lambda d: (torch.maximum(d.i, d.x), torch.minimum(d.k.int(), d.i)),
    "clamp": lambda d: (
        d.e.clamp(-1, 1),
        d.x.clamp(min=0.1),
        d.x.clamp(max=0.1),
        d.x.clamp(2, -2),
        d.i.clamp(-3, 5),
        d.i.clamp(0.5),
        d.x.clamp(min=d.y),
        d.e.clamp(d.f, d.f),
        d.x.clamp(max=d.w),
    ),
    "clamp one side": lambda d: (d.e.clamp_min(0), d.i.clamp_max(2), torch.clamp_min(d.x, d.y), torch.clamp_max(d.x, d.y)),
    "nan_to_num": lambda d: (torch.nan_to_num(d.e), torch.nan_to_num(d.e, 0.5, 2.0, -3.0), torch.nan_to_num(d.i)),
}

UNARY: Rows = {
    "exp": lambda d: (
        d.x.exp(),
        d.e.exp(),
        d.i.exp(),
        d.m.exp(),
        d.x.expm1(),
        (d.x * 1e-3).expm1(),
        d.e.expm1(),
        (d.x * 9).expm1(),
    ),
    "log": lambda d: (d.p.log(), d.e.log(), d.p.log1p(), (d.x * 1e-3).log1p(), d.e.log1p(), d.k.abs().log()),
    "roots": lambda d: (d.p.sqrt(), d.p.rsqrt(), d.e.sqrt(), d.e.rsqrt(), d.k.abs().sqrt()),
    "reciprocal": lambda d: (d.p.reciprocal(), d.e.reciprocal(), d.k.reciprocal()),
    "sine": lambda d: (d.x.sin(), d.x.cos(), d.y.tan(), d.x.atan(), d.i.sin(), d.m.cos(), d.e.sin()),
    "erf": lambda d: (d.x.erf(), d.e.erf(), d.i.erf()),
    "sign": lambda d: (d.x.abs(), d.e.abs(), d.i.abs(), -d.x, -d.i, d.x.sign(), d.e.sign(), d.i.sign(), d.m.sign(), d.x.sgn()),
    "rounding": lambda d: (
        d.x.floor(),
        d.x.ceil(),
        d.x.round(),
        d.x.trunc(),
        d.x.frac(),
        d.e.floor(),
        d.e.round(),
        d.e.trunc(),
    ),
    "rounding integers": lambda d: (d.i.floor(), d.i.ceil(), d.i.round(), d.i.trunc()),
    "without axes": lambda d: (d.z[0, 0].exp(), d.z[0, 0].abs(), d.z[0, 0].tanh(), ~d.m[0, 0, 0]),
}

ACTIVATION: Rows = {
    "relu": lambda d: (functional.relu(d.x), functional.relu(d.e), functional.relu(d.i), functional.relu6(d.x * 4)),
    "sigmoid": lambda d: (d.x.sigmoid(), d.e.sigmoid(), d.i.sigmoid(), d.x.tanh(), d.e.tanh(), d.i.tanh()),
    "silu": lambda d: (functional.silu(d.x), functional.silu(d.e)),
    "gelu": lambda d: (functional.gelu(d.x), functional.gelu(d.x, approximate="tanh"), functional.gelu(d.x * 3)),
    "leaky_relu": lambda d: (functional.leaky_relu(d.x), functional.leaky_relu(d.e, 0.3)),
    "elu": lambda d: (functional.elu(d.x), functional.elu(d.e, 0.7), functional.celu(d.x, 0.5), functional.selu(d.x)),
    "softplus": lambda d: (functional.softplus(d.x * 9), functional.softplus(d.x, 0.5, 1.0), functional.softplus(d.e)),
    "mish": lambda d: (functional.mish(d.x), functional.logsigmoid(d.x * 9)),
    "hard": lambda d: (
        functional.hardtanh(d.x),
        functional.hardtanh(d.e, -0.1, 0.3),
        functional.hardsigmoid(d.x * 2),
        functional.hardswish(d.x * 2),
    ),
    "softmax": lambda d: (
        d.x.softmax(-1),
        d.x.softmax(1),
        d.x.softmax(0),
        d.w.softmax(0),
        d.x.softmax(-1, dtype=d.wide),
        d.i.softmax(-1, dtype=d.wide),
        d.x.masked_fill(d.m, -math.inf).softmax(-1),
        aten._softmax(d.x, 2, False),
    ),
    "log_softmax": lambda d: (
        d.x.log_softmax(-1),
        d.x.log_softmax(1, dtype=d.wide),
        d.w.log_softmax(-1),
        aten._log_softmax(d.x, 0, False),
    ),
}

CREATE: Rows = {
    "arange": lambda d: (
        torch.arange(d.x.shape[1]),
        torch.arange(2, d.x.shape[1]),
        torch.arange(d.x.shape[0], d.x.shape[0] + d.x.shape[1]),
        torch.arange(1, d.x.shape[1] * 3, 2),
        torch.arange(d.x.shape[1], -2, -2),
        torch.arange(7),
        torch.arange(-3, 9, 4, dtype=INT),
    ),
    "arange in a type": lambda d: (
        torch.arange(d.x.shape[1], dtype=INT),
        torch.arange(d.x.shape[1], dtype=FLOAT),
        torch.arange(0, d.x.shape[1], 2, dtype=HALF),
        torch.arange(0, 6, 2, dtype=FLOAT),
        torch.arange(0.5, 4, 0.25),
        torch.arange(4.0),
    ),
    "full": lambda d: (
        torch.full((d.x.shape[0], 3), -math.inf),
        torch.full((2, 3), 7),
        torch.full((d.x.shape[1],), True),
        torch.full((), 2.5, dtype=HALF),
        torch.full((2,), d.x.shape[0]),
        torch.full((3,), 0.1, dtype=torch.bfloat16),
    ),
    "zeros and ones": lambda d: (
        torch.zeros(d.x.shape[0], 2),
        torch.ones(2, d.x.shape[1], dtype=torch.bool),
        torch.zeros(3, dtype=LONG),
        torch.ones(()),
    ),
    "like": lambda d: (
        torch.full_like(d.x, 0.1),
        torch.full_like(d.i, 3, dtype=FLOAT),
        torch.zeros_like(d.x),
        torch.zeros_like(d.m),
        torch.ones_like(d.i),
        torch.ones_like(d.x, dtype=torch.bool),
    ),
    "new": lambda d: (
        d.x.new_full((2, d.x.shape[1]), 0.1),
        d.i.new_zeros(3),
        d.x.new_zeros((2,), dtype=LONG),
        d.m.new_ones(d.x.shape[0]),
        d.x.new_ones(()),
    ),
    "scalar_tensor": lambda d: (aten.scalar_tensor(2.5), aten.scalar_tensor(3, dtype=LONG), torch.tensor(1.5) * 2),
    "tril": lambda d: (
        d.x.tril(),
        d.x.tril(2),
        d.i.tril(-1),
        d.m.tril(1),
        torch.ones(d.x.shape[1], d.x.shape[1], dtype=torch.bool).tril(),
        torch.full((d.x.shape[1], d.x.shape[1]), -math.inf).triu(1),
        d.z.tril(d.x.shape[0] - 3),
    ),
    "triu": lambda d: (d.x.triu(), d.x.triu(1), d.i.triu(-2), d.m.triu(3), d.z.triu(d.x.shape[0] - 3)),
    "one_hot": lambda d: functional.one_hot(d.k.abs(), 5),
}

CAST: Rows = {
    "to": lambda d: (
        *(d.x.to(t) for t in (FLOAT, HALF, torch.bfloat16, INT, LONG, torch.bool)),
        *(d.i.to(t) for t in (FLOAT, HALF, torch.bfloat16, INT, torch.bool)),
        *(d.m.to(t) for t in (FLOAT, HALF, torch.bfloat16, INT, LONG)),
        d.e.bool(),
    ),
    "aten.to": lambda d: (
        aten.to.dtype(d.x, LONG),
        aten.to.dtype_layout(d.x, dtype=FLOAT),
        aten.to.device(d.i, torch.device("cpu"), FLOAT),
        aten.to.other(d.i, d.m),
    ),
    "type_as": lambda d: (d.i.type_as(d.x), d.x.type_as(d.m), d.x.type_as(d.y)),
    "copies": lambda d: (d.x.clone(), d.x.detach() * 1, d.x.contiguous() * 1, aten.alias(d.i) + 0, aten.lift_fresh_copy(d.x)),
    "copy without a type": lambda d: aten._to_copy(d.x),
    "dropout": lambda d: (functional.dropout(d.x, 0.5, training=False), aten.dropout(d.x, 0.5, False)),
    "in place": lambda d: d.x.clone().add_(1).mul_(2).masked_fill_(d.m, 0),
}

REDUCE: Rows = {
    "sum": lambda d: (
        d.x.sum(),
        d.x.sum(-1),
        d.x.sum((0, 1), keepdim=True),
        d.x.sum(1, keepdim=True),
        d.x.sum(-1, dtype=d.wide),
        d.i.sum(),
        d.i.int().sum(0),
        d.m.sum(-1),
        d.i.sum(-1, dtype=d.wide),
        d.z[0, 0].sum(),
        d.m.sum(dtype=INT),
    ),
    "mean": lambda d: (d.x.mean(), d.x.mean(-1), d.x.mean((-1, 0)), d.x.mean(1, keepdim=True), d.i.mean(0, dtype=d.wide)),
    "prod": lambda d: (d.y.prod(-1), d.k.prod(1, keepdim=True), d.w.prod(), d.m.prod(-1), d.k.int().prod(-1)),
    "extremes": lambda d: (
        d.x.amax(),
        d.x.amax(-1),
        d.x.amin((0, 1), keepdim=True),
        d.i.amin(0),
        d.m.amax(-1),
        d.x.max(),
        d.i.min(),
        torch.amax(d.x, ()),
        d.z[0, 0].amax(0),
    ),
    "with places": lambda d: (*d.x.max(-1), *d.x.min(1, keepdim=True), *d.i.max(0), *d.i.min(-1), *d.m.max(1), *d.x.max(0)),
    "argmax": lambda d: (d.x.argmax(-1), d.x.argmax(), d.i.argmin(1, keepdim=True), d.i.argmax(0), d.i.argmin(), d.w.argmax(0)),
    "argmax kept": lambda d: (d.x.argmax(keepdim=True), d.i.argmax(None, True), d.x.argmin(0, keepdim=True)),
    "any": lambda d: (d.m.any(), d.m.any(-1), d.i.any(0, keepdim=True), d.x.any(), d.m.any((0, 2)), d.e.any(1)),
    "all": lambda d: (d.m.all(), d.n.all(-1), d.i.all(1, keepdim=True), d.k.all(), d.n.all((0, 2), keepdim=True), d.e.all(0)),
}

SPREAD: Rows = {
    "var": lambda d: (d.x.var(), d.x.var(-1), d.x.var(1), d.x.var((0, 2), keepdim=True), d.x.var(-1, correction=0)),
    "var of few": lambda d: (d.x.var(-1, unbiased=False), d.x.var((0, 1), correction=2), d.x.var(-1, correction=0.5)),
    "std": lambda d: (d.x.std(), d.x.std(-1), d.x.std(1, keepdim=True), d.x.std(-1, correction=0)),
    "var_mean": lambda d: (*torch.var_mean(d.x, -1), *torch.var_mean(d.x, 1, correction=0, keepdim=True)),
    "normalize": lambda d: d.x / d.x.norm(dim=-1, keepdim=True).clamp_min(1e-12),
    "norm": lambda d: (
        d.x.norm(dim=-1),
        d.x.norm(),
        torch.linalg.norm(d.x, dim=-1, keepdim=True),
        torch.linalg.norm(d.x),
        torch.linalg.vector_norm(d.x, math.inf, (0, 1)),
        torch.linalg.vector_norm(d.x, -math.inf, -1),
        torch.linalg.vector_norm(d.x, 1, -1, keepdim=True),
        aten.norm.ScalarOpt_dim(d.x, 2, [1], True),
    ),
    "logsumexp": lambda d: (
        d.x.logsumexp(-1),
        d.x.logsumexp((0, 1)),
        d.x.masked_fill(d.m, -math.inf).logsumexp(1, keepdim=True),
    ),
}

NORMALISE: Rows = {
    "layer_norm": lambda d: (
        functional.layer_norm(d.x, (6,), d.w, d.z[0]),
        functional.layer_norm(d.x, (6,)),
        functional.layer_norm(d.x, (6,), d.w),
        functional.layer_norm(d.x + 50, (6,), d.w, d.z[0], 1e-3),
        functional.layer_norm(d.x[..., None] * d.w, (6, 6)),
        functional.layer_norm(d.w, (6,)),
    ),
    "native_layer_norm": lambda d: torch.native_layer_norm(d.x, (6,), d.w, None, 1e-5)[0],
    "rms_norm": lambda d: (
        functional.rms_norm(d.x, (6,), d.w),
        functional.rms_norm(d.x, (6,)),
        functional.rms_norm(d.x * 1e-3, (6,), d.w),
        functional.rms_norm(d.x, (6,), d.w, 1e-2),
        torch._fused_rms_norm(d.x, (6,), d.w, 1e-5)[0],
    ),
    "written out": lambda d: (
        d.w * (d.x.to(d.wide) * torch.rsqrt(d.x.to(d.wide).pow(2).mean(-1, keepdim=True) + 1e-6)).to(d.x.dtype)
    ),
    "group_norm": lambda d: (
        functional.group_norm(d.x.transpose(1, 2), 2, d.w, d.z[0]),
        functional.group_norm(d.x.transpose(1, 2), 6),
        functional.group_norm(d.x.transpose(1, 2)[..., None].expand(-1, -1, -1, 2), 3, d.w),
        functional.group_norm(d.x[:, 0], 3, d.w, d.z[0]),
    ),
    "batch_norm": lambda d: (
        functional.batch_norm(d.x.transpose(1, 2), d.w, d.w.abs() + 0.5, d.z[0], d.z[1]),
        functional.batch_norm(d.x[:, 0], d.w, d.w.abs() + 0.5),
        aten.batch_norm(d.x[:, 0], d.z[0], None, d.w, d.w.abs() + 0.5, False, 0.1, 1e-3, False),
    ),
}

MATMUL: Rows = {
    "linear": lambda d: (
        functional.linear(d.x, d.z, d.w),
        functional.linear(d.x, d.z),
        functional.linear(d.x[0], d.z, d.w),
        functional.linear(d.w, d.z),
        functional.linear(d.w, d.z, d.w),
    ),
    "matmul": lambda d: (
        d.x @ d.z,
        d.x @ d.y.transpose(1, 2),
        d.z @ d.x.transpose(1, 2),
        d.x[0] @ d.z,
        d.x[:, None] @ d.y[None].transpose(-1, -2),
        d.x.unsqueeze(0) @ d.z,
    ),
    "matmul of vectors": lambda d: (d.x @ d.w, d.z @ d.w, d.w @ d.z, d.w @ d.x.transpose(1, 2), d.w @ d.w, d.x[:, None] @ d.w),
    "mm": lambda d: (torch.mm(d.x[0], d.z), torch.bmm(d.x, d.y.transpose(1, 2)), torch.mv(d.z, d.w), torch.dot(d.w, d.w)),
    "outer": lambda d: (torch.outer(d.w, d.x[0, :, 0]), torch.outer(d.i[0, 0], d.w)),
    "addmm": lambda d: (
        torch.addmm(d.w, d.x[0], d.z),
        torch.addmm(d.y[0], d.x[0], d.z, beta=0.5, alpha=0.3),
        torch.addmm(d.y[0], d.x[0], d.z, beta=0, alpha=2),
        torch.baddbmm(d.y, d.x, d.z.expand(d.x.shape[0], 6, 6)),
        torch.baddbmm(d.y, d.x, d.z.expand(d.x.shape[0], 6, 6), beta=0, alpha=0.125),
    ),
    "einsum": lambda d: (
        torch.einsum("bsi,ji->bsj", d.x, d.z),
        torch.einsum("bsi,bti->bst", d.x, d.y),
        torch.einsum("b s i, b t i -> t b s", d.x, d.y),
        torch.einsum("bsi,bsi->bs", d.x, d.y),
        torch.einsum("bsi,bsi->i", d.x, d.y),
        torch.einsum("i,j->ji", d.w, d.z[0]),
        torch.einsum("bsi,i->bs", d.x, d.w),
    ),
}

TABLES: dict[str, Rows] = {
    "arithmetic": ARITHMETIC,
    "division": DIVISION,
    "compare": COMPARE,
    "choose": CHOOSE,
    "unary": UNARY,
    "activation": ACTIVATION,
    "create": CREATE,
    "cast": CAST,
    "reduce": REDUCE,
    "spread": SPREAD,
    "normalise": NORMALISE,
    "matmul": MATMUL,
}
POINTWISE = ("arithmetic", "division", "compare", "choose", "unary", "activation", "cast")  # one free axis tells all
EXACT = ("create", "cast")  # nothing is rounded that PyTorch does not round in the same way
LEFT_OUT = {(table, dtype) for table in EXACT for dtype in FLOATS} | {("compare", torch.bfloat16), ("choose", torch.bfloat16)}
SLACK = {"spread": torch.finfo(torch.float32).eps}  # PyTorch adds up variances in float64 on a CPU, in float32 on a GPU
SLACK["matmul"] = torch.finfo(torch.float32).eps  # and products in another order on every processor
FREE = HALF  # in this type programs are exported with free sizes, in the others as they are at the first size
CASES = [(table, dtype) for table in TABLES for dtype in FLOATS if dtype == FREE or (table, dtype) not in LEFT_OUT]


class Table(nn.Module):
    """All rows of a table on the same inputs."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for _, value in results(self.rows, Data(*inputs)))


def results(rows: Rows, inputs: Data) -> Iterator[tuple[str, Tensor]]:
    """Each tensor that a row gives, with the row's name."""
    for name, row in rows.items():
        values = row(inputs)
        for place, value in enumerate([values] if isinstance(values, Tensor) else values):
            yield f"{name} {place}", value


@cache
def converted(table: str, dtype: torch.dtype) -> tuple[Network, list[Input]]:
    inputs = data(*SIZES[0], dtype)
    if dtype != FREE:
        return lowered(Table(TABLES[table]), inputs, None)
    axes = AXES if table not in POINTWISE else tuple({1: S} if 0 in free and 1 in free else {} for free in AXES)
    return lowered(Table(TABLES[table]), inputs, axes)


def lowered(
    module: nn.Module, inputs: tuple[Tensor, ...], axes: tuple[dict[int, Any], ...] | None
) -> tuple[Network, list[Input]]:
    """The network of a program, exported with these axes free and decomposed, or with none and as export leaves it."""
    program = torch.export.export(module.eval(), tuple(inputs), dynamic_shapes=None if axes is None else (axes,), strict=False)
    if axes is not None:
        program = program.run_decompositions({})
    free = axes or [{}] * len(inputs)
    specs = [
        Input(f"in_{n}", x.dtype, tuple(axis_of(size, free[n].get(a)) for a, size in enumerate(x.shape)))
        for n, x in enumerate(inputs)
    ]
    return convert(unlift(program), specs), specs


def axis_of(size: int, dim: Any) -> Axis:
    return Axis(size, size, size) if dim is None else Axis(dim.min, dim.min + 1, dim.max)


def error(got: Tensor, true: Tensor, among: Tensor) -> float:
    """Largest difference at these places; infinite where there `got` is not finite and `true` is."""
    apart = (got.double() - true.double())[among].abs()
    return float(apart.nan_to_num(math.inf).max()) if apart.numel() else 0.0


def difference(got: Tensor, eager: Tensor, true: Tensor, slack: float) -> str:
    """Why `got` is not what PyTorch means, or nothing. `slack` is what else it may be off, of the largest value."""
    if got.dtype != eager.dtype or got.shape != eager.shape:
        return f"it is {got.dtype} {list(got.shape)}, not {eager.dtype} {list(eager.shape)}"
    if not got.is_floating_point():
        return "" if torch.equal(got, eager) else f"{int((got != eager).sum())} of {got.numel()} differ"
    finite = eager.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got[~finite].nan_to_num(), eager[~finite].nan_to_num()):
        return f"NaN or an infinity at other places: {got[~finite | ~got.isfinite()]}, not {eager[~finite | ~got.isfinite()]}"
    judged = finite & true.isfinite()
    largest = float(true[judged].abs().max()) if judged.any() else 0.0
    limit = 2 * error(eager, true, judged) + (torch.finfo(got.dtype).eps / 4 + slack) * largest
    found = error(got, true, judged)
    return "" if found <= limit else f"error {found:.3g}, limit {limit:.3g}"


def sizes(table: str, dtype: torch.dtype) -> list[tuple[int, int]]:
    if dtype != FREE:
        return [SIZES[0]]
    return [(SIZES[0][0], s) for _, s in SIZES] if table in POINTWISE else list(SIZES)


@pytest.mark.parametrize(("table", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_agrees_with_pytorch(table, dtype):
    net, _ = converted(table, dtype)
    wrong = []
    for size in sizes(table, dtype):
        inputs = data(*size, dtype)
        wide = Data(*(x.double() if x.is_floating_point() else x for x in inputs))
        used = {net.definition.get_input(n).name for n in range(net.definition.num_inputs)}
        found = interpret(net, {f"in_{n}": x for n, x in enumerate(inputs) if f"in_{n}" in used})
        eager = list(results(TABLES[table], inputs))
        true = eager if table in EXACT else list(results(TABLES[table], wide))
        for n, ((name, theirs), (_, meant)) in enumerate(zip(eager, true, strict=True)):
            why = difference(found[f"output_{n}"], theirs, meant, SLACK.get(table, 0.0))
            wrong += [f"{name} at {size}: {why}"] if why else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("table", TABLES)
def test_builds(table, tmp_path):
    net, specs = converted(table, FREE)
    engine = build(net, specs, "sm80", tmp_path / "plan")
    assert len(engine.outputs) == len(list(results(TABLES[table], data(*SIZES[0], FREE))))


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


X, Y, IX, M, BYTES = (
    torch.rand(2, 6),
    torch.rand(2, 6),
    torch.ones(2, 6, dtype=LONG),
    torch.ones(2, 6).bool(),
    torch.ones(2).byte(),
)

REFUSALS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "float64 input": (lambda x: x + 1, (X.double(),), "float64"),
    "to float64": (lambda x: x.double() + 1, (X,), "float64"),
    "made in float64": (lambda x: x + torch.full((6,), 0.1, dtype=torch.float64), (X,), "float64"),
    "bytes": (lambda b: b + 1, (BYTES,), "calculates in torch.uint8"),
    "floor of any quotient": (lambda x, y: x // y, (X, Y), "known at run time"),
    "floor by 0.3": (lambda x: x // 0.3, (X,), "the divisor is 0.3"),
    "remainder of any quotient": (lambda x, y: x % y, (X, Y), "which TensorRT rounds first"),
    "fmod by 3": (lambda x: torch.fmod(x, 3), (X,), "the divisor is 3"),
    "power of integers": (lambda i: i**i, (IX,), "which TensorRT does in float32"),
    "large power": (lambda i: i**99, (IX,), "to the power 99"),
    "bits of integers": (lambda i: i & 3, (IX,), "no bitwise AND of torch.int64"),
    "bits of two": (lambda i: torch.bitwise_xor(i, i), (IX,), "no bitwise XOR"),
    "dropout": (lambda x: aten.dropout(x, 0.5, True), (X,), "drops values at random"),
    "batch statistics": (lambda x: aten.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False), (X,), "over the batch"),
    "mean of layer_norm": (lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[1], (X,), "mean or deviation is used"),
    "norm of order 3": (lambda x: torch.linalg.vector_norm(x, 3), (X,), "a norm of order 3"),
    "norm of a matrix": (lambda x: torch.linalg.norm(x, 1), (X,), "a norm of matrices"),
    "mean of integers": (lambda i: i.float().mean(dtype=torch.float64), (IX,), "float64"),
    "product of integers": (lambda i: i @ i.t(), (IX,), "a matrix product of torch.int64"),
    "einsum of three": (lambda x: torch.einsum("bi,bi,bi->b", x, x, x), (X,), "only two inputs"),
    "einsum with dots": (lambda x: torch.einsum("...i,bi->b", x[0], x), (X,), "without dots"),
    "einsum of a diagonal": (lambda x: torch.einsum("ii,bi->b", x[:, :2], x[:, :2]), (X,), "takes a diagonal"),
    "einsum of one axis": (lambda x: torch.einsum("bi,bj->bj", x, x), (X,), "over an axis of one tensor alone"),
    "einsum of one row": (lambda x: torch.einsum("bi,bi->b", x, x[:1]), (X,), "has size 1 in one tensor alone"),
    "empty": (lambda x: torch.empty_like(x).fill_(1), (X,), "has no converter"),
    "random": (lambda x: x + torch.rand_like(x), (X,), "has no converter"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name):
    function, inputs, why = REFUSALS[name]
    program = torch.export.export(Function(function), inputs, strict=False)
    specs = [Input(f"in_{n}", x.dtype, tuple(axis_of(size, None) for size in x.shape)) for n, x in enumerate(inputs)]
    with pytest.raises(CannotLower, match=why):
        convert(unlift(program), specs)


def graph_of_asserts() -> GraphModule:
    """`x + 1`, behind assertions on the size of `x` that export would leave."""
    graph = Graph()
    x = graph.placeholder("x")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    for compare in (operator.ge, operator.le, operator.gt, operator.lt, operator.eq, operator.ne):
        graph.call_function(aten._assert_scalar.default, (graph.call_function(compare, (size, 2)), "size"))
    graph.call_function(aten.sym_constrain_range_for_size.default, (size,), {"min": 2, "max": 9})
    graph.call_function(aten._assert_tensor_metadata.default, (x, None, None, torch.float32))
    graph.output(graph.call_function(aten.add.Tensor, (x, 1)))
    return GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("axis", [Axis(4, 4, 4), Axis(2, 4, 9)], ids=["fixed", "free"])
def test_asserts_emit_nothing_that_is_used(axis, tmp_path):
    specs = [Input("x", FLOAT, (axis,))]
    net = convert(graph_of_asserts(), specs)
    assert torch.equal(interpret(net, {"x": torch.zeros(4)})["output_0"], torch.ones(4))
    assert len(build(net, specs, "sm80", tmp_path / "plan").outputs) == 1


def kernel_calls(plan: Path) -> str:
    """The text of the kernels in an engine, without the functions that stand before them."""
    text = plan.read_bytes().decode("latin-1")
    return text[text.index('extern "C" __global__') :]


IN_HALVES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Network, Any], Any], str]] = {
    # PyTorch's function; TensorRT's layer; what its kernel does with halves
    "gelu": (functional.gelu, lambda net, x: net.activation("GELU_ERF", x), "= __myln_add___myln_(half|bf16)"),
    "softmax": (lambda x: x.softmax(-1), lambda net, x: net.softmax(x), "MaxOp<__myln_(half|bf16)>"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IN_HALVES)
def test_halves_are_calculated_in_float32(name, dtype, tmp_path):
    """TensorRT's own layer rounds each of its steps to a half; the kernel shows it, the interpreter does not."""
    function, emit, sign = IN_HALVES[name]
    ours, inputs = lowered(Function(function), (torch.ones(8, 600, dtype=dtype),), None)
    theirs = Network()
    theirs.output(emit(theirs, theirs.input("in_0", dtype, [8, 600])), "output_0")
    kernels = [kernel_calls(build(net, inputs, "sm80", tmp_path / "plan").plan) for net in (ours, theirs)]
    assert [bool(re.search(sign, kernel)) for kernel in kernels] == [False, True]
