"""Each layer that calculates agrees with PyTorch on random data, and differs from its neighbour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from one_layer import F32, FLOATS, I32, I64, INF, Emit, Meaning, Row, added, check, check_row, error, flags, integers, run, trt
from trilithon.lower.tensorrt.library import dtypes
from trilithon.lower.tensorrt.network import Network, bits

# ------------------------------------------------------------ calculation

NONE, TRANSPOSE, VECTOR = (getattr(trt.MatrixOperation, name) for name in ("NONE", "TRANSPOSE", "VECTOR"))


def product(one: Any, two: Any) -> Emit:
    return lambda net, a, b: net.out("matrix_multiply", a, one, b, two)


def cumulated(axis: int, exclusive: bool, reverse: bool) -> Emit:
    def emit(net: Network, x: Any) -> Any:
        return net.out("cumulative", x, net.constant(torch.tensor(axis)), trt.CumulativeOperation.SUM, exclusive, reverse)

    return emit


def triangle(lower: bool, strict: bool) -> Meaning:
    """A running sum along axis 1 as a product with a triangle of ones."""

    def meaning(x: Tensor) -> Tensor:
        ones = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype)
        kept = ones.tril(-int(strict)) if lower else ones.triu(int(strict))
        return torch.einsum("jk,bkd->bjd", kept, x)

    return meaning


def normalized(axes: Sequence[int], groups: int = 1, kind: str = "normalization_v2", epsilon: float = 0.125) -> Emit:
    def emit(net: Network, x: Any, scale: Any, bias: Any) -> Any:
        settings = {"epsilon": epsilon} if groups == 1 else {"epsilon": epsilon, "num_groups": groups}
        return net.out(kind, x, scale, bias, bits(axes, len(x.shape)), **settings)

    return emit


def group_norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.group_norm(x, 2, scale.flatten(), bias.flatten(), 0.125)


def group_norm_of_groups(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return group_norm(x, scale.repeat_interleave(3, 1), bias.repeat_interleave(3, 1))


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(x, weight=scale.flatten(), bias=bias.flatten(), eps=0.125)


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], scale.flatten(), bias.flatten(), 0.125)


def convolved(maps: int, window: tuple[int, ...], **settings: Any) -> Emit:
    def emit(net: Network, x: Any, kernel: Any, bias: Any) -> Any:
        empty = trt.Weights(x.dtype)
        return added(net, "convolution_nd", x, maps, window, empty, empty, inputs={1: kernel, 2: bias}, **settings)

    return emit


CALCULATIONS = {
    "matmul": Row(product(NONE, NONE), torch.matmul, ([2, 3, 4], [1, 4, 5])),
    "matmul_transposed_left": Row(product(TRANSPOSE, NONE), lambda a, b: a.mT @ b, ([2, 4, 4], [2, 4, 5]), torch.matmul),
    "matmul_transposed_right": Row(product(NONE, TRANSPOSE), lambda a, b: a @ b.mT, ([2, 3, 4], [2, 4, 4]), torch.matmul),
    "matmul_vector_right": Row(product(NONE, VECTOR), lambda a, b: (a * b[:, None]).sum(-1), ([2, 3, 4], [2, 4])),
    "matmul_vector_left": Row(product(VECTOR, NONE), lambda a, b: torch.einsum("bi,bij->bj", a, b), ([2, 4], [2, 4, 5])),
    "matmul_vectors": Row(product(VECTOR, VECTOR), lambda a, b: (a * b).sum(-1), ([2, 4], [2, 4])),
    "einsum": Row(
        lambda net, a, b: net.out("einsum", [a, b], "bhsd,btd->bsht"),
        lambda a, b: (a @ b[:, None].mT).transpose(1, 2),
        ([2, 3, 4, 5], [2, 6, 5]),
    ),
    "softmax": Row(
        lambda net, x: net.softmax(x, 1), lambda x: x.exp() / x.exp().sum(1, keepdim=True), ([2, 3, 4],), lambda x: x.softmax(2)
    ),
    "sum": Row(lambda net, x: net.reduce("SUM", x, [0, 2], False), lambda x: x.sum((0, 2)), ([3, 4, 5],)),
    "sum_keep": Row(lambda net, x: net.reduce("SUM", x, [-1], True), lambda x: x.sum(-1, keepdim=True), ([3, 4, 5],)),
    "average": Row(lambda net, x: net.reduce("AVG", x, [1, 2], True), lambda x: x.mean((1, 2), keepdim=True), ([3, 4, 5],)),
    "largest": Row(lambda net, x: net.reduce("MAX", x, [1], False), lambda x: x.amax(1), ([3, 4, 5],), lambda x: x.amin(1)),
    "smallest": Row(lambda net, x: net.reduce("MIN", x, [1], False), lambda x: x.amin(1), ([3, 4, 5],)),
    "product": Row(lambda net, x: net.reduce("PROD", x, [0, 2], False), lambda x: x.prod(2).prod(0), ([2, 4, 3],)),
    "running_sum": Row(cumulated(1, False, False), triangle(True, False), ([2, 5, 3],), triangle(True, True)),
    "running_sum_exclusive": Row(cumulated(1, True, False), triangle(True, True), ([2, 5, 3],), triangle(False, True)),
    "running_sum_reverse": Row(cumulated(-2, False, True), triangle(False, False), ([2, 5, 3],), triangle(False, True)),
    "running_sum_both": Row(cumulated(1, True, True), triangle(False, True), ([2, 5, 3],), triangle(True, True)),
    "layer_norm": Row(normalized([2]), layer_norm, ([2, 3, 8], [1, 1, 8], [1, 1, 8])),
    "layer_norm_v1": Row(normalized([2], kind="normalization"), layer_norm, ([2, 3, 8], [1, 1, 8], [1, 1, 8])),
    "instance_norm": Row(normalized([2, 3]), instance_norm, ([2, 6, 3, 4], [1, 6, 1, 1], [1, 6, 1, 1]), group_norm),
    "group_norm": Row(normalized([2, 3], 2), group_norm, ([2, 6, 3, 4], [1, 6, 1, 1], [1, 6, 1, 1]), instance_norm, free=False),
    "group_norm_v1": Row(
        normalized([2, 3], 2, "normalization"), group_norm_of_groups, ([2, 6, 3, 4], [1, 2, 1, 1], [1, 2, 1, 1]), free=False
    ),
    "convolution": Row(
        convolved(4, (2, 3), stride_nd=(2, 1), padding_nd=(1, 2), dilation_nd=(1, 2)),
        lambda x, w, b: functional.conv2d(x, w, b, (2, 1), (1, 2), (1, 2)),
        ([2, 3, 6, 7], [4, 3, 2, 3], [4]),
        lambda x, w, b: functional.conv2d(x, w.flip(-1), b, (2, 1), (1, 2), (1, 2)),
        free=False,
    ),
    "convolution_groups": Row(
        convolved(6, (1, 3), num_groups=3),
        lambda x, w, b: functional.conv2d(x, w, b, groups=3),
        ([2, 3, 1, 7], [6, 1, 1, 3], [6]),
        free=False,
    ),
    "convolution_one_sided": Row(  # a causal one, as recurrent models have it
        convolved(3, (1, 4), num_groups=3, pre_padding=(0, 3), post_padding=(0, 0)),
        lambda x, w, b: functional.conv2d(functional.pad(x, (3, 0)), w, b, groups=3),
        ([2, 3, 1, 7], [3, 1, 1, 4], [3]),
        lambda x, w, b: functional.conv2d(functional.pad(x, (0, 3)), w, b, groups=3),
        free=False,
    ),
    "convolution_3d": Row(
        convolved(2, (2, 1, 3), padding_nd=(1, 0, 2)),
        lambda x, w, b: functional.conv3d(x, w, b, padding=(1, 0, 2)),
        ([1, 3, 4, 2, 5], [2, 3, 2, 1, 3], [2]),
        free=False,
    ),
    "parametric_relu": Row(
        lambda net, x, slope: net.out("parametric_relu", x, slope),
        lambda x, slope: functional.prelu(x, slope.flatten()),
        ([2, 3, 4], [1, 3, 1]),
    ),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("row", CALCULATIONS.values(), ids=CALCULATIONS)
def test_calculation(row, dtype):
    check_row(row, dtype)


# ------------------------------------------------------------ element by element

UNARY = {  # operation: (its meaning, where it is tried)
    "EXP": (torch.exp, (-3, 3)),
    "LOG": (torch.log, (0.1, 4)),
    "SQRT": (torch.sqrt, (0, 4)),
    "RECIP": (lambda x: 1 / x, (0.2, 4)),
    "ABS": (torch.abs, (-3, 3)),
    "NEG": (lambda x: 0 - x, (-3, 3)),
    "SIN": (torch.sin, (-3, 3)),
    "COS": (torch.cos, (-3, 3)),
    "TAN": (torch.tan, (-1, 1)),
    "SINH": (torch.sinh, (-2, 2)),
    "COSH": (torch.cosh, (-2, 2)),
    "ASIN": (torch.asin, (-1, 1)),
    "ACOS": (torch.acos, (-1, 1)),
    "ATAN": (torch.atan, (-3, 3)),
    "ASINH": (torch.asinh, (-3, 3)),
    "ACOSH": (torch.acosh, (1, 4)),
    "ATANH": (torch.atanh, (-0.9, 0.9)),
    "CEIL": (torch.ceil, (-4, 4)),
    "FLOOR": (torch.floor, (-4, 4)),
    "ERF": (torch.erf, (-2, 2)),
    "SIGN": (torch.sign, (-3, 3)),
    "ROUND": (torch.round, (-4, 4)),
    "ISINF": (torch.isinf, (-3, 3)),
    "ISNAN": (torch.isnan, (-3, 3)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unary(dtype):
    """All float operations in one network."""
    inputs = [
        (torch.rand(2, 9) * (high - low) + low).to(dtype).double().clamp(low, high).to(dtype)
        for _, (low, high) in UNARY.values()
    ]
    inputs[list(UNARY).index("ROUND")][0] = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 0, -0.0]).to(dtype)
    inputs[list(UNARY).index("ISINF")][0, :3] = inputs[list(UNARY).index("ISNAN")][0, :3] = torch.tensor([INF, -INF, math.nan])
    emit = lambda net, *xs: [net.unary(op, x) for op, x in zip(UNARY, xs, strict=True)]  # noqa: E731
    check(emit, lambda *xs: [f(x) for (f, _), x in zip(UNARY.values(), xs, strict=True)], *inputs, free=True)


ACTIVATIONS = {  # with alpha 0.3 and beta 0.7, where it has them
    "RELU": functional.relu,
    "SIGMOID": lambda x: 1 / (1 + torch.exp(-x)),
    "TANH": torch.tanh,
    "LEAKY_RELU": lambda x: functional.leaky_relu(x, 0.3),
    "ELU": lambda x: functional.elu(x, 0.3),
    "SELU": lambda x: 0.7 * functional.elu(x, 0.3),
    "SOFTSIGN": functional.softsign,
    "SOFTPLUS": lambda x: 0.3 * torch.log1p(torch.exp(0.7 * x)),
    "CLIP": lambda x: torch.clip(x, 0.3, 0.7),
    "HARD_SIGMOID": lambda x: torch.clip(0.3 * x + 0.7, 0, 1),
    "SCALED_TANH": lambda x: 0.3 * torch.tanh(0.7 * x),
    "THRESHOLDED_RELU": lambda x: functional.threshold(x, 0.3, 0),
    "GELU_ERF": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "GELU_TANH": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activation(dtype):
    single = {name: float(torch.tensor(value)) for name, value in (("alpha", 0.3), ("beta", 0.7))}  # as TensorRT keeps them
    x = torch.randn(5, 11).to(dtype) * 3
    for op, meaning in ACTIVATIONS.items():
        emit = lambda net, x, op=op: net.out("activation", x, getattr(trt.ActivationType, op), **single)  # noqa: E731
        (got,), (exact,), true = run(emit, [x]), run(emit, [x], dtype=torch.float64), meaning(x.double())
        assert error(exact, true) <= 1e-7 * float(true.abs().max()), op  # alpha and beta are float32
        assert error(got, true) <= 2 * error(meaning(x), true) + 3e-7 * float(true.abs().max()), op


BINARY = {
    "SUM": torch.add,
    "SUB": torch.sub,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "DIV": torch.div,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
    "FLOOR_DIV": lambda a, b: torch.floor(a / b),
}


def binary(*ops: str) -> Emit:
    return lambda net, a, b: [net.elementwise(op, a, b) for op in ops]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_elementwise_floats(dtype):
    a, b = torch.randn(3, 1, 5).to(dtype), torch.randn(1, 4, 5).to(dtype)
    b[0, 0] = a[0, 0]
    for op, meaning in BINARY.items():
        if op != "FLOOR_DIV":
            check(binary(op), meaning, a, b, free=True)
    check(binary("FLOOR_DIV"), lambda a, b: torch.floor(a / b), a, b, free=True)
    one, tenth = torch.ones(9, dtype=dtype), torch.arange(1, 10).to(dtype) / 10
    assert torch.equal(run(binary("FLOOR_DIV"), [one, tenth])[0], torch.floor(one / tenth))
    check(binary("POW"), torch.pow, a.abs() + 0.5, b, free=True)


@pytest.mark.parametrize("dtype", [I32, I64], ids=str)
def test_elementwise_integers(dtype):
    a, b = integers(6, 5, dtype=dtype), integers(5, low=1, dtype=dtype) * torch.tensor([1, -1, 1, -1, 1], dtype=dtype)
    down, cut = (lambda a, b: (a.double() / b).floor().to(dtype)), (lambda a, b: (a.double() / b).trunc().to(dtype))
    meanings = {**BINARY, "DIV": cut, "FLOOR_DIV": down}
    emit = lambda net, a, b: binary(*meanings)(net, a, net.ranked(b, 2))  # noqa: E731
    check(emit, lambda a, b: [f(a, b) for f in meanings.values()], a, b, free=True)
    assert not torch.equal(down(a, b), cut(a, b)), "the two divisions were not told apart"
    check(binary("POW"), torch.pow, a, integers(6, 5, low=0, high=6, dtype=dtype))
    signs = lambda net, x: [net.unary(op, x) for op in ("ABS", "NEG", "SIGN")]  # noqa: E731
    check(signs, lambda x: [x.abs(), -x, x.sign()], a)
    reductions = lambda net, x: [net.reduce(op, x, [1], False) for op in ("SUM", "PROD", "MAX", "MIN")]  # noqa: E731
    check(reductions, lambda x: [x.sum(1, dtype=dtype), x.prod(1, dtype=dtype), x.amax(1), x.amin(1)], a, free=True)
    check(cumulated(1, False, True), lambda x: x.flip(1).cumsum(1).flip(1).to(dtype), a, free=True)
    check(lambda net, x: net.activation("RELU", x), torch.relu, a)


def test_logic():
    a, b = flags(4, 1, 5), ~flags(1, 3, 5)
    emit = lambda net, a, b: [*binary("AND", "OR", "XOR", "EQUAL")(net, a, b), net.unary("NOT", a)]  # noqa: E731
    check(emit, lambda a, b: [a & b, a | b, a ^ b, a == b, ~a], a, b, free=True)
    check(lambda net, c, a, b: net.select(c, a, b), torch.where, a, torch.randn(4, 3, 5), torch.randn(1, 3, 1), free=True)


@pytest.mark.parametrize("dtype", [*FLOATS, I32, I64, torch.bool], ids=str)
def test_cast(dtype):
    x = torch.tensor([-2.75, -1.0, -0.5, 0, 0.5, 1.0, 2.75, 100.3])
    values = [x.to(source) for source in (*FLOATS, I32, I64, torch.bool)]
    emit = lambda net, *xs: [net.out("cast", x, dtypes()[dtype]) for x in xs]  # noqa: E731
    for got, x in zip(run(emit, values, free=True), values, strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, x.to(dtype))


def test_precise_mode_drops_roundings_of_casts():
    x = torch.randn(50)
    emit = lambda net, x: net.cast(net.cast(x, torch.bfloat16), F32)  # noqa: E731
    assert torch.equal(run(emit, [x])[0], x.bfloat16().float())
    assert torch.equal(run(emit, [x], dtype=torch.float64)[0], x.double())


# ------------------------------------------------------------ attention and its companions

SOFTMAX, NO_MASK = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE


def attention(kind: str = "NONE", **settings: Any) -> Emit:
    def emit(net: Network, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        given = {**settings, **({} if mask is None else {"mask": mask})}
        return net.out("attention_v2", q, k, v, SOFTMAX, getattr(trt.CausalMaskKind, kind), **given)

    return emit


def sdpa(allowed: Callable[[int, int], Tensor] | None = None, tiled: bool = False) -> Meaning:
    """PyTorch's attention without a scale; `tiled`: query head i reads key head i % g."""

    def meaning(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = allowed(q.shape[2], k.shape[2]) if allowed is not None else mask
        count = q.shape[1] // k.shape[1]
        k, v = (x.repeat(1, count, 1, 1) if tiled else x for x in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, mask, scale=1.0, enable_gqa=not tiled)

    return meaning


def upper_left(s: int, t: int) -> Tensor:
    return torch.ones(s, t, dtype=torch.bool).tril()


def lower_right(s: int, t: int) -> Tensor:
    return torch.ones(s, t, dtype=torch.bool).tril(t - s)


def rotated(interleaved: bool, turned: int, positions: bool) -> Emit:
    def emit(net: Network, x: Any, cos: Any, sin: Any, ids: Any = None) -> Any:
        return added(net, "rotary_embedding", x, cos, sin, interleaved, turned, inputs={3: ids} if positions else {})

    return emit


def rotate(interleaved: bool, turned: int) -> Meaning:
    """Pairs as complex numbers, times cos + i sin."""

    def meaning(x: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None = None) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else F32
        cos, sin = (c if ids is None else c[ids.long()] for c in (cos, sin))
        turn, head = torch.complex(cos.to(dtype), sin.to(dtype))[:, None], x[..., :turned].to(dtype)
        pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).mT
        result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        result = result.flatten(-2) if interleaved else result.mT.flatten(-2)
        return torch.cat([result.to(x.dtype), x[..., turned:]], -1)

    return meaning


QKV = ([2, 4, 3, 8], [2, 2, 5, 8], [2, 2, 5, 8])
LONG = ([1, 2, 5, 8], [1, 2, 5, 8], [1, 2, 5, 8])
SOME = flags(2, 4, 3, 5).index_fill(3, torch.tensor(2), True)  # no row without a key
BLOCKS = {
    "attention": Row(attention(), sdpa(), QKV, sdpa(tiled=True), free=False),
    "attention_one_head": Row(attention(), sdpa(), ([2, 4, 3, 8], [2, 1, 5, 8], [2, 1, 5, 8]), free=False),
    "attention_upper_left": Row(attention("UPPER_LEFT"), sdpa(upper_left), QKV, sdpa(lower_right), free=False),
    "attention_lower_right": Row(attention("LOWER_RIGHT"), sdpa(lower_right), QKV, sdpa(upper_left), free=False),
    "attention_square": Row(attention("LOWER_RIGHT"), sdpa(upper_left), LONG, sdpa(), free=False),
    "attention_bool_mask": Row(attention(), sdpa(), (*QKV, SOME), lambda q, k, v, m: sdpa()(q, k, v), free=False),
    "attention_key_mask": Row(attention(), sdpa(), (*QKV, SOME[:, :1, :1]), free=False),
    "attention_bias": Row(attention(), sdpa(), (*QKV, [1, 4, 3, 5]), lambda q, k, v, m: sdpa()(q, k, v), free=False),
    "rotary_halves": Row(
        rotated(False, 0, False), rotate(False, 8), ([2, 3, 5, 8], [2, 5, 4], [2, 5, 4]), rotate(True, 8), free=False
    ),
    "rotary_pairs": Row(
        rotated(True, 0, False), rotate(True, 8), ([2, 3, 5, 8], [2, 5, 4], [2, 5, 4]), rotate(False, 8), free=False
    ),
    "rotary_partial": Row(rotated(False, 4, False), rotate(False, 4), ([2, 3, 5, 8], [2, 5, 2], [2, 5, 2]), free=False),
    "rotary_positions": Row(
        rotated(False, 0, True),
        rotate(False, 8),
        ([2, 3, 5, 8], [9, 4], [9, 4], integers(2, 5, low=0, high=9)),
        free=False,
    ),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("row", BLOCKS.values(), ids=BLOCKS)
def test_block(row, dtype):
    check_row(row, dtype)


def test_attention_of_a_query_without_keys_is_what_the_caller_says():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, s, 8) for s in (5, 3, 3))
    (got,) = run(attention("LOWER_RIGHT"), [q, k, v])  # the first two queries see no key
    assert got[:, :, :2].isnan().all()
    assert got[:, :, 2:].isfinite().all()
    (zeros,) = run(attention("LOWER_RIGHT"), [q, k, v], empty_row=0.0)
    assert error(zeros, sdpa(lower_right)(q, k, v)) < 1e-6
    for mask in (flags(1, 1, 5, 3), flags(1, 1, 5, 3).float().log()):
        mask[:, :, 1] = False if mask.dtype == torch.bool else -INF
        (got,) = run(attention(), [q, k, v, mask])
        assert got[:, :, 1].isnan().all()
        assert got[:, :, 2:].isfinite().all() or not mask[:, :, 2:].any(-1).all()
    finite = torch.zeros(1, 1, 5, 3)
    finite[:, :, 1] = -1e30  # finite: equal weights, as in PyTorch
    assert error(run(attention(), [q, k, v, finite])[0][:, :, 1], v.mean(2)) < 1e-6


def cached(net: Network, cache: Any, update: Any, begin: Any) -> Any:
    return net.out("kv_cache_update", cache, update, begin, trt.KVCacheMode.LINEAR)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_cache(dtype):
    cache, update = torch.randn(4, 2, 6, 3).to(dtype), torch.randn(4, 2, 3, 3).to(dtype)
    begin = torch.tensor([1, 4, 9, -2], dtype=I32)
    expected = cache.clone()
    expected[0, :, 1:4] = update[0]
    expected[1, :, 4:6] = update[1, :, :2]  # the third would stand behind the capacity
    expected[3, :, 4:6], expected[3, :, 0] = update[3, :, :2], update[3, :, 2]  # -2, -1, 0
    before = cache.clone()
    assert torch.equal(run(cached, [cache, update, begin])[0], expected)
    assert torch.equal(cache, before), "the caller's cache was changed"
