"""Attention engines on a GPU against the float64 reference: types, masks, heads, lengths, static and dynamic sizes.

An error is measured against float64, in units of that of PyTorch's own attention in the same type: at most 2 in bfloat16, and 8
in float16, where attention kernels of TensorRT add up in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention as sdpa

from trilithon.lower.inputs import Axis, Input, fixed
from trilithon.lower.tensorrt.lower import lower_tensorrt
from trilithon.lower.tensorrt.module import TensorRTModule
from trilithon.options import Options
from trilithon.rewrite.op import ATTENTION
from trilithon.rewrite.unlift import unlift
from trilithon.runtime.verify import relative_error
from trilithon.spec.masks import Padding, parse, parts
from trilithon.spec.reference import allowed_keys, reference_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
GPU = None  # the one at hand
TOKENS = 257  # past each window and chunk, and no multiple of a tile
MOST = 512
TIMES = {torch.bfloat16: 2, torch.float16: 8}


class Heads(NamedTuple):
    h: int
    g: int
    d: int


class Engine(NamedTuple):
    """What one engine is built for."""

    dtype: torch.dtype
    heads: Heads
    sizes: str  # "static", "dynamic": as many queries as keys; "cross": not; "step": one query at some place of a cache

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-{self.heads.h}/{self.heads.g}x{self.heads.d}-{self.sizes}"


Call = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
HALVES = (torch.float16, torch.bfloat16)
HEADS = (Heads(8, 8, 64), Heads(14, 2, 64), Heads(16, 8, 128), Heads(32, 8, 64), Heads(4, 1, 80))
MASKS = ("full", "causal", "window(64)", "window(1)", "chunked(100)", "local(20, 30)", "padding(keys)")
MASKS += ("causal & padding(keys)", "padding(keys) & window(64)")
STEPS = ("causal & padding(keys)", "padding(keys) & window(64)")


def canonical(mask: str, step: bool) -> Call:
    padded = any(isinstance(part, Padding) for part in parts(parse(mask)))
    return lambda q, k, v, keys, start, bias: ATTENTION(
        q, k, v, mask, q.shape[-1] ** -0.5, start if step else None, keys if padded else None
    )


def below(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()


RAW: dict[str, tuple[Call, Callable[..., Tensor | None]]] = {  # PyTorch's own call, and what it adds to or takes from scores
    "no mask": (lambda q, k, v, m, n, x: sdpa(q, k, v, enable_gqa=True), lambda q, k, m, x: None),
    "is_causal": (lambda q, k, v, m, n, x: sdpa(q, k, v, is_causal=True, enable_gqa=True), lambda q, k, m, x: below(q, k)),
    "bool (b, 1, 1, t)": (
        lambda q, k, v, m, n, x: sdpa(q, k, v, m[:, None, None], enable_gqa=True),
        lambda q, k, m, x: m[:, None, None],
    ),
    "bool (1, 1, s, t)": (
        lambda q, k, v, m, n, x: sdpa(q, k, v, x[:1, :1] < 1, enable_gqa=True),
        lambda q, k, m, x: x[:1, :1] < 1,
    ),
    "bias (b, h, s, t)": (lambda q, k, v, m, n, x: sdpa(q, k, v, x, enable_gqa=True), lambda q, k, m, x: x),
    "bias (b, 1, s, t)": (lambda q, k, v, m, n, x: sdpa(q, k, v, x[:, :1], enable_gqa=True), lambda q, k, m, x: x[:, :1]),
    "bias (1, h, s, t)": (lambda q, k, v, m, n, x: sdpa(q, k, v, x[:1], enable_gqa=True), lambda q, k, m, x: x[:1]),
    "bias (s, t)": (lambda q, k, v, m, n, x: sdpa(q, k, v, x[0, 0], enable_gqa=True), lambda q, k, m, x: x[0, 0]),
}
ENGINES = [Engine(dtype, heads, sizes) for dtype in HALVES for heads in HEADS for sizes in ("static", "dynamic")]
CASES = [
    (engine, mask, rows, tokens)
    for engine in ENGINES
    for mask in MASKS
    for rows, tokens in ([(2, TOKENS)] if engine.sizes == "static" else [(1, 1), (3, 64), (2, TOKENS)])
]
DECODES = [(Engine(dtype, heads, "step"), mask) for dtype in HALVES for heads in HEADS for mask in STEPS]
CROSS = [
    (Engine(dtype, heads, "cross"), name, queries, keys)
    for dtype in HALVES
    for heads in HEADS[:2]
    for name in RAW
    for queries, keys in ((100, 300), (300, 100), (1, 300))
]


class Site(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, start: Tensor, bias: Tensor) -> Tensor:
        return self.call(q, k, v, keys, start, bias)


@lru_cache(maxsize=2)  # each holds memory of the GPU
def built(engine: Engine, name: str, attention: str = "auto") -> TensorRTModule:
    """An engine of one attention over `q k v`, `keys`, `start` and `bias`."""
    h, g, d = engine.heads
    same, step = engine.sizes != "cross", engine.sizes == "step"
    call = RAW[name][0] if engine.sizes == "cross" else canonical(name, step)
    rows, queries, keys = (Dim(x, min=1, max=most) for x, most in (("b", 64), ("s", MOST), ("t", MOST)))
    s, t = 1 if step else 5, 5 if same else 7
    shapes = [(2, h, s, d), (2, g, t, d), (2, g, t, d)]
    example = [torch.randn(*shape, dtype=engine.dtype) for shape in shapes]
    example += [torch.ones(2, t, dtype=torch.bool), torch.tensor(0), torch.zeros(2, h, s, t, dtype=engine.dtype)]
    long = keys if step or not same else queries
    axes = ({0: rows} if step else {0: rows, 2: queries}, {0: rows, 2: long}, {0: rows, 2: long}, {0: rows, 1: long}, {})
    last = {0: rows, 3: long} | ({} if step else {2: queries})
    program = torch.export.export(Site(call), tuple(example), dynamic_shapes=(*axes, last))
    free = engine.sizes in ("dynamic", "cross")
    b, n = (Axis(1, 2, 16), Axis(1, TOKENS, MOST)) if free else (fixed(32 if step else 2), fixed(TOKENS))
    m = fixed(1) if step else n
    sizes = [(b, fixed(h), m, fixed(d)), *[(b, fixed(g), n, fixed(d))] * 2, (b, n), (), (b, fixed(h), m, n)]
    named = zip(("q", "k", "v", "keys", "start", "bias"), sizes, example, strict=True)
    inputs = tuple(Input(label, x.dtype, own) for label, own, x in named)
    label = f"{engine}-{name}".replace("/", "_").replace(" ", "")
    module = lower_tensorrt(unlift(program), inputs, label, Options(gpu=GPU, attention=attention))  # type: ignore[arg-type]
    assert isinstance(module, TensorRTModule)
    return module


def made(engine: Engine, rows: int, queries: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h, g, d = engine.heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, engine.dtype)

    keys = torch.rand(rows, tokens, generator=generator) < 0.7
    keys[:, 0] = True
    given = {"q": random(rows, h, queries, d), "k": random(rows, g, tokens, d), "v": random(rows, g, tokens, d)}
    start = torch.tensor(tokens // 2, device=DEVICE)
    return {**given, "keys": keys.to(DEVICE), "start": start, "bias": random(rows, h, queries, tokens)}


def close(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    floor = torch.finfo(got.dtype).eps / 8
    assert relative_error(got, truth) <= TIMES[got.dtype] * max(relative_error(eager, truth), floor)


def check(engine: Engine, mask: str, given: dict[str, Tensor], attention: str = "auto") -> None:
    got = built(engine, mask, attention)(*given.values())
    q, k, v = given["q"], given["k"], given["v"]
    start = given["start"] if engine.sizes == "step" else None
    allowed = allowed_keys(parse(mask), q.shape[2], k.shape[2], q_start=start, key_mask=given["keys"], device=DEVICE)
    scale = engine.heads.d**-0.5
    truth = reference_attention(q.double(), k.double(), v.double(), allowed, scale, torch.float64)
    eager = sdpa(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True)
    kept = allowed.any(-1).expand(*q.shape[:3])  # eager gives a row without keys in its own way
    close(got[kept], eager[kept], truth[kept])
    assert not bool(got[~kept].any())  # a row without keys is 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("engine", "mask", "rows", "tokens"), CASES, ids=str)
def test_prompt(engine: Engine, mask: str, rows: int, tokens: int) -> None:
    check(engine, mask, made(engine, rows, tokens, tokens))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mask", [m for m in MASKS if m != "local(20, 30)"])
@pytest.mark.parametrize("engine", [e for e in ENGINES if e.sizes == "dynamic" and e.heads in HEADS[:2]], ids=str)
def test_fused(engine: Engine, mask: str) -> None:
    """IAttention for every mask, also where the builder's own kernel is the better choice."""
    check(engine, mask, made(engine, 2, TOKENS, TOKENS), "fused")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("engine", "mask"), DECODES, ids=str)
def test_step(engine: Engine, mask: str) -> None:
    """Many rows: the error of one query over a few keys is a matter of luck."""
    check(engine, mask, made(engine, 32, 1, TOKENS))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("engine", "name", "queries", "keys"), CROSS, ids=str)
def test_pytorch_call(engine: Engine, name: str, queries: int, keys: int) -> None:
    """PyTorch's own call, its mask not proved, with other numbers of queries than of keys."""
    given = made(engine, 4 if queries > 1 else 16, queries, keys)
    got = built(engine, name)(*given.values())
    q, k, v = given["q"], given["k"], given["v"]
    own = RAW[name][1](q, k, given["keys"], given["bias"])
    groups = engine.heads.h // engine.heads.g
    wide = [x.double().repeat_interleave(n, 1) for x, n in ((q, 1), (k, groups), (v, groups))]
    truth = sdpa(*wide, None if own is None else own if own.dtype == torch.bool else own.double())
    eager = sdpa(q, k, v, own, enable_gqa=True)
    close(got, eager, truth)
