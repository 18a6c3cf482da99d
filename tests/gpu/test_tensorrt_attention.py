"""Attention engines on a GPU against the float64 reference: types, masks, heads, lengths, static and dynamic sizes.

A table of masks is one engine, with an output for each. An error is measured against float64, in units of that of PyTorch's
own attention in the same type: at most 2, and 8 for IAttention in float16, which adds up in float16.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.nn.functional import scaled_dot_product_attention as sdpa

from trilithon.lower.inputs import Axis, Input, fixed
from trilithon.lower.tensorrt.lower import lower_tensorrt
from trilithon.lower.tensorrt.module import TensorRTModule
from trilithon.options import Options
from trilithon.rewrite.op import ATTENTION
from trilithon.runtime.verify import relative_error
from trilithon.spec.masks import Padding, parse, parts
from trilithon.spec.reference import allowed_keys, reference_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
GPU = None  # the one at hand
TOKENS = 257  # past each window and chunk, and no multiple of a tile


class Heads(NamedTuple):
    h: int
    g: int
    d: int


class Engine(NamedTuple):
    """What one engine is built for."""

    dtype: torch.dtype
    heads: Heads
    sizes: str  # "static", "dynamic": as many queries as keys; "step": one query at some place of a cache

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}-{self.heads.h}/{self.heads.g}x{self.heads.d}-{self.sizes}"


HEADS = (Heads(8, 8, 64), Heads(14, 2, 64), Heads(16, 8, 128), Heads(32, 8, 64), Heads(4, 1, 80))
MASKS = ("full", "causal", "window(64)", "window(1)", "chunked(100)", "local(20, 30)", "padding(keys)")
MASKS += ("causal & padding(keys)", "padding(keys) & window(64)")
STEPS = ("causal & padding(keys)", "padding(keys) & window(64)")
ENGINES = [
    Engine(dtype, heads, sizes)
    for dtype in (torch.float16, torch.bfloat16)
    for heads in HEADS
    for sizes in ("static", "dynamic")
]
CASES = [
    (engine, mask, rows, tokens)
    for engine in ENGINES
    for mask in MASKS
    for rows, tokens in ([(2, TOKENS)] if engine.sizes == "static" else [(1, 1), (3, 64), (2, TOKENS)])
]
DECODES = [
    (Engine(dtype, heads, "step"), mask) for dtype in (torch.float16, torch.bfloat16) for heads in HEADS for mask in STEPS
]


@cache
def built(engine: Engine, attention: str = "auto") -> TensorRTModule:
    """An engine of `q k v` for each mask, then `keys` and `start`, with an output for each mask."""
    step = engine.sizes == "step"
    masks, graph = STEPS if step else MASKS, Graph()
    operands = [[graph.placeholder(f"{name}_{i}") for name in "qkv"] for i in range(len(masks))]
    keys, start = graph.placeholder("keys"), graph.placeholder("start")
    outputs = []
    for mask, qkv in zip(masks, operands, strict=True):
        padded = any(isinstance(part, Padding) for part in parts(parse(mask)))
        arguments = (*qkv, mask, engine.heads.d**-0.5, start if step else None, keys if padded else None)
        outputs.append(graph.call_function(ATTENTION, arguments))
    graph.output(tuple(outputs))
    rows = fixed(2) if engine.sizes != "dynamic" else Axis(1, 2, 4)
    tokens = fixed(TOKENS) if engine.sizes != "dynamic" else Axis(1, TOKENS, 512)
    queries = fixed(1) if step else tokens
    h, g, d = (fixed(n) for n in engine.heads)
    own = {"q": (rows, h, queries, d), "k": (rows, g, tokens, d), "v": (rows, g, tokens, d)}
    inputs = [Input(f"{name}_{i}", engine.dtype, axes) for i in range(len(masks)) for name, axes in own.items()]
    inputs += [Input("keys", torch.bool, (rows, tokens)), Input("start", torch.int64, ())]
    module = lower_tensorrt(
        GraphModule({}, graph), inputs, str(engine).replace("/", "_"), Options(gpu=GPU, attention=attention)
    )  # type: ignore[arg-type]
    assert isinstance(module, TensorRTModule)
    return module


def made(engine: Engine, rows: int, queries: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    h, g, d = engine.heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, engine.dtype)

    keys = torch.rand(rows, tokens, generator=generator) < 0.7
    keys[:, 0] = True
    q, k, v = random(rows, h, queries, d), random(rows, g, tokens, d), random(rows, g, tokens, d)
    return {"q": q, "k": k, "v": v, "keys": keys.to(DEVICE), "start": torch.tensor(tokens // 2, device=DEVICE)}


def check(engine: Engine, mask: str, given: dict[str, Tensor], attention: str = "auto") -> None:
    module = built(engine, attention)
    site = (STEPS if engine.sizes == "step" else MASKS).index(mask)
    q, k, v = given["q"], given["k"], given["v"]
    got = module(*[q, k, v] * len(STEPS if engine.sizes == "step" else MASKS), given["keys"], given["start"])[site]
    start = given["start"] if engine.sizes == "step" else None
    allowed = allowed_keys(parse(mask), q.shape[2], k.shape[2], q_start=start, key_mask=given["keys"], device=DEVICE)
    scale = engine.heads.d**-0.5
    truth = reference_attention(q.double(), k.double(), v.double(), allowed, scale, torch.float64)
    eager = sdpa(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True)
    kept = allowed.any(-1).expand(*q.shape[:3])  # eager gives a row without keys in its own way
    times = 8 if (engine.dtype, module.engine.sites[site].form) == (torch.float16, "fused") else 2
    floor = torch.finfo(engine.dtype).eps / 8
    assert relative_error(got[kept], truth[kept]) <= times * max(relative_error(eager[kept], truth[kept]), floor)
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
    check(engine, mask, made(engine, 2, 1, TOKENS))
