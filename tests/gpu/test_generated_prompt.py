"""Prompts of one row on a GPU: generated kernels, causal attention, and the product of gate and up with its activation."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers
from torch import Tensor

import trilithon
from trilithon import Options
from trilithon.lower.native import causal, gated
from trilithon.lower.native.prompt import Prompt
from trilithon.spec.masks import Causal, Chunked, Mask, SlidingWindow

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = [(896, 4864), (1024, 3072), (2048, 8192), (136, 264)]


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gated_products_are_as_exact_as_pytorchs(dtype: torch.dtype, act: str, caplog: pytest.LogCaptureFixture) -> None:
    for seed, (k, n) in enumerate(SIZES):
        for tokens in (512, 777, 2048):
            generator = torch.Generator("cuda").manual_seed(seed)
            x = torch.randn(1, tokens, k, generator=generator, device="cuda").to(dtype)
            weight = (torch.randn(2 * n, k, generator=generator, device="cuda") / k**0.5).to(dtype)
            exact = gated._plain(x.double(), weight.double(), act)
            plain, found = gated._plain(x, weight, act), gated.gated_by_kernel(x, weight, act)
            assert off(found, exact) <= 2 * off(plain, exact)
            assert torch.equal(found, gated.gated_by_kernel(x, weight, act))
    if torch.cuda.get_device_capability()[0] == 9:
        assert torch.equal(found, gated.gated_product(x, weight, act)), "the op does not use the kernel"
    assert not caplog.records


MASKS = [
    Causal(),
    *(SlidingWindow(n) for n in (1, 2, 63, 64, 65, 128, 129, 300, 5000)),
    *(Causal() & Chunked(n) for n in (1, 64, 100, 128, 300, 5000)),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_causal_attention_is_as_exact_as_pytorchs(dtype: torch.dtype, mask: Mask, caplog: pytest.LogCaptureFixture) -> None:
    """Of every layout of heads, lengths that fill no tile, and values that are a part of wider rows."""
    for seed, (heads, groups, width) in enumerate([(16, 8, 128), (14, 2, 64), (4, 1, 128), (3, 3, 64)]):
        for tokens in (1, 2, 63, 64, 65, 127, 128, 129, 257, 512, 545, 1000, 2048, 4097):
            generator = torch.Generator("cuda").manual_seed(seed)
            sizes = [heads * width, groups * width, groups * width]
            rows = torch.randn(1, tokens, sum(sizes), generator=generator, device="cuda").to(dtype)
            q, k, v = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in rows.split(sizes, -1))
            exact = causal._through_sdpa(q.double(), k.double(), v.double(), mask, 0.1)
            plain, found = causal._through_sdpa(q, k, v, mask, 0.1), causal.attend_by_kernel(q, k, v, mask, 0.1)
            assert off(found, exact) <= 2 * off(plain, exact), (heads, groups, width, tokens)
            assert torch.equal(found, causal.attend_by_kernel(q, k, v, mask, 0.1))
    if torch.cuda.get_device_capability()[0] == 9:
        assert torch.equal(found, causal.attend_causal(q, k, v, str(mask), 0.1)), "the op does not use the kernel"
    assert not caplog.records


@pytest.mark.timeout(600)
@pytest.mark.parametrize("window", [100, 700])
def test_prompts_with_windows_are_generated(window: int, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond the window, where the cache is a ring; the kernel is used from 512 tokens on."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = transformers.MistralConfig(**sizes, vocab_size=1000, num_hidden_layers=3, sliding_window=window)
    torch.manual_seed(0)
    exact = transformers.AutoModelForCausalLM.from_config(config).cuda().eval()
    model = copy.deepcopy(exact).half()
    as_exact_as_eager(model, exact.double(), (1, 99, 101, 511, 600, 1300), caplog)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("preset", ["llama-3.2-1b", "qwen3-0.6b", "qwen2.5-0.5b"])
def test_logits_are_as_exact_as_aten(preset: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of prompts of many lengths, with padding behind them where they are brought to a size that a graph is kept for."""
    exact = trilithon.load_model(preset, device="cuda", layers=3, dtype=torch.float32)
    model = trilithon.load_model(preset, device="cuda", layers=3, dtype=torch.float16)
    model.load_state_dict(exact.state_dict())
    as_exact_as_eager(model, exact.double(), (1, 2, 17, 63, 64, 500, 513, 1000), caplog)


def as_exact_as_eager(
    model: torch.nn.Module, exact: torch.nn.Module, lengths: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Generated prompts of so many tokens, against the model in float64, and without a warning."""
    llm = trilithon.compile(model, max_tokens=max(lengths) + 100, options=Options(verify=False))
    prompt = llm.decoder.modules.prefill
    assert isinstance(prompt, Prompt) and prompt.one_row is not None, llm.report.notes
    for length in lengths:
        ids = torch.randint(3, 1000, (1, length), device="cuda", generator=torch.Generator("cuda").manual_seed(length))
        with torch.no_grad():
            want, eager = exact(ids).logits[:, -1], model(ids).logits[:, -1]
        for _ in range(3):  # as it is, captured, replayed
            found = llm.decoder.prefill(ids, torch.zeros(1, dtype=torch.int64, device="cuda"))
            assert off(found.view_as(want), want) <= 2 * off(eager, want) + 1e-4, length
    assert not [r for r in caplog.records if r.name.startswith("trilithon") and r.levelno >= logging.WARNING]
