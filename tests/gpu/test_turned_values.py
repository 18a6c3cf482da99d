"""Values that are kept turned, on a GPU: engines write prompts and steps into them, and a step attends over them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from trilithon.lower.inputs import Axis, Input, fixed
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.engine import build, resolve_target
from trilithon.lower.tensorrt.module import TensorRTModule
from trilithon.rewrite.cache_ops import turn, turn_back, write_cache
from trilithon.rewrite.op import ATTENTION
from trilithon.runtime.verify import relative_error
from trilithon.spec.masks import parse
from trilithon.spec.reference import allowed_keys, reference_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE, GPU = torch.device("cuda"), None  # the one at hand
SLOTS, ROWS, LENGTHS = 520, 2, (1, 17, 300, 511)
HEADS = {"grouped": (32, 8, 64), "single": (8, 1, 80), "equal": (12, 12, 64)}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def program(g: int, d: int, mask: str, is_step: bool) -> GraphModule:
    """A prompt writes; a step writes and attends."""
    graph = Graph()
    names = ("q", "k", "v", "start", "counts", "cache_k", "cache_v")
    q, k, v, start, counts, cache_k, cache_v = (graph.placeholder(name) for name in names)
    fresh = graph.call_function(turn, (v,))
    keys = graph.call_function(write_cache, (cache_k, k, start, counts))
    kept = graph.call_function(write_cache, (cache_v, fresh, start, counts))
    if is_step:
        values = graph.call_function(turn_back, (kept, g))
        graph.output((graph.call_function(ATTENTION, (q, keys, values, mask, d**-0.5, start, None)),))
    else:
        graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (q, q)),))
    return GraphModule(nn.Module(), graph)


def engine(dtype: torch.dtype, heads: tuple[int, int, int], mask: str, is_step: bool, folder: Path) -> TensorRTModule:
    (h, g, d), b = heads, Axis(1, ROWS, 4)
    s = fixed(1) if is_step else Axis(1, 256, SLOTS)
    inputs = [Input(n, dtype, (b, fixed(x), s, fixed(d))) for n, x in (("q", h), ("k", g), ("v", g))]
    inputs += [Input(n, torch.int64, (b,)) for n in ("start", "counts")]
    inputs.append(Input("cache_k", dtype, (b, fixed(g), fixed(SLOTS), fixed(d))))
    inputs.append(Input("cache_v", dtype, (b, fixed(g * d), fixed(SLOTS), fixed(1))))
    net = convert(program(g, d, mask, is_step), inputs)
    assert [site.form for site in net.sites] == ["summed"] * is_step
    return TensorRTModule(build(net, inputs, resolve_target(GPU), folder / f"{is_step}.plan"), net)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mask", ["causal", "window(64)"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_and_steps(dtype: torch.dtype, heads: tuple[int, int, int], mask: str, tmp_path: Path) -> None:
    prompt, step = (engine(dtype, heads, mask, is_step, tmp_path) for is_step in (False, True))
    generator, (h, g, d) = torch.Generator().manual_seed(0), heads

    def random(n: int, tokens: int) -> Tensor:
        return torch.randn(ROWS, n, tokens, d, generator=generator).to(DEVICE, dtype)

    for length in LENGTHS:
        keys, values = (torch.zeros(ROWS, g, SLOTS, d, dtype=dtype, device=DEVICE) for _ in range(2))
        kept = torch.zeros_like(keys), turn(torch.zeros_like(values)).contiguous()  # of one key head it is a view
        start = torch.zeros(ROWS, dtype=torch.int64, device=DEVICE)
        for tokens, module in ((length, prompt), (1, step), (1, step), (1, step)):
            q, k, v = random(h, tokens), random(g, tokens), random(g, tokens)
            write_cache(keys, k, start, start * 0 + tokens)
            write_cache(values, v, start, start * 0 + tokens)
            got = module(q, k, v, start, start * 0 + tokens, *kept)
            assert torch.equal(kept[0], keys) and torch.equal(turn_back(kept[1], g), values)
            if module is step:
                allowed = allowed_keys(parse(mask), 1, SLOTS, q_start=start, key_mask=None, device=DEVICE)
                site = (q, keys, values, allowed, d**-0.5)
                truth, wide = (reference_attention(*(x.double() for x in site[:3]), *site[3:], torch.float64), torch.float32)
                limit = 4 * max(relative_error(reference_attention(*site, wide), truth), torch.finfo(dtype).eps / 8)
                assert relative_error(got, truth) <= limit
            start = start + tokens
