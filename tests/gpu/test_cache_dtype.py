"""Caches of 8 bits on a GPU: the kernels against float64 of what the caches hold, and whole models."""

from __future__ import annotations

import pytest
import torch

import trilithon
from trilithon.lower.native.attention import attend_cache
from trilithon.lower.native.split_kv import ATTEND_SPLIT
from trilithon.rewrite.cache_ops import quantise, read_cache, slot_positions
from trilithon.runtime.verify import CACHE_TOLERANCE, relative_error
from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import parse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STORED = (torch.int8, torch.float8_e4m3fn)


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, start: torch.Tensor, places: torch.Tensor, cap: float
):
    """Attention written out in the type of `q`."""
    queries = start[:, None] + torch.arange(q.shape[2], device=q.device)
    env = {"q": queries[:, None, :, None], "k": places[:, None, None, :]}
    allowed = evaluate(parse(mask).term(), env) & (env["k"] >= 0)
    return attend_cache(q, k, v, q.shape[3] ** -0.5, allowed, None, cap)


@pytest.mark.parametrize("stored", STORED, ids=["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("mask", "ring", "cap"), [("causal", False, 0.0), ("causal", False, 20.0), ("window(100)", True, 0.0)])
def test_attention_over_8_bits_is_as_close_to_float64_as_pytorch(
    stored: torch.dtype, dtype: torch.dtype, queries: int, mask: str, ring: bool, cap: float
) -> None:
    """At most twice the error of attention written out over the dequantised values in the type of q."""
    torch.manual_seed(0)
    b, h, g, d, e, t = 3, 8, 2, 64, 128, 115 if ring else 700
    start = torch.tensor([0, 117, 690], device="cuda")
    places = slot_positions(start + queries, t) if ring else torch.arange(t, device="cuda").expand(b, -1)
    q = torch.randn(b, h, queries, d, device="cuda", dtype=dtype)
    spread = torch.rand(b, g, t, 1, device="cuda") + 0.01  # each token has a scale of its own
    (k, k_scales), (v, v_scales) = (quantise(torch.randn(b, g, t, n, device="cuda") * spread, stored) for n in (d, e))
    got = ATTEND_SPLIT(q, k, v, mask, d**-0.5, start, places if ring else None, cap, k_scales, v_scales)
    wide = [read_cache(k, k_scales, torch.float64), read_cache(v, v_scales, torch.float64)]
    truth = attended(q.double(), *wide, mask, start, places, cap)
    eager = attended(q, *(x.to(dtype) for x in wide), mask, start, places, cap)
    assert got.dtype == dtype
    assert relative_error(got, truth) <= 2 * max(relative_error(eager, truth), torch.finfo(dtype).eps)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("inductor", [False, True], ids=["aten", "inductor"])
@pytest.mark.parametrize("cache_dtype", ["int8", "fp8"])
def test_a_model_decodes_within_the_tolerance(cache_dtype: str, inductor: bool) -> None:
    model = trilithon.load_model("qwen3-0.6b", device="cuda", layers=2, dtype=torch.float16)
    options = trilithon.Options(max_batch=2, inductor=inductor, cache_dtype=cache_dtype)
    llm = trilithon.compile(model, max_tokens=160, options=options)
    ids = torch.randint(3, 1000, (2, 140), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    llm.decoder.prefill(ids[:, :120], torch.zeros(2, dtype=torch.int64, device="cuda"))
    got = torch.stack([llm.decoder.decode(ids[:, i]).clone() for i in range(120, 140)], 1)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[:, 120:]
    stored = torch.int8 if cache_dtype == "int8" else torch.float8_e4m3fn
    assert relative_error(got, want) < CACHE_TOLERANCE[stored] + 3e-2
