"""Whole models as TensorRT engines on a GPU: tokens in float32, logits in half precision, windows and chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trilithon
from trilithon import Compiled, Options
from trilithon.runtime.verify import relative_error
from zoo.families import FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PRESETS = ("qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b")
LENGTHS = (1, 17, 512, 2048, 2175)


def steps(llm: Compiled, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of the last prompt token and of those behind it, `[b n v]`."""
    pad = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    found = [llm.decoder.prefill(ids[:, :prompt], pad).clone()]
    for i in range(prompt, ids.shape[1]):
        found.append(llm.decoder.decode(ids[:, i]).clone())
        assert torch.equal(found[-1].gather(1, llm.decoder.best[:, None])[:, 0], found[-1].amax(1))
    return torch.stack(found, 1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_tokens_equal_eager(preset: str, tmp_path: Path) -> None:
    """Also after the engines were saved and loaded."""
    model = trilithon.load_model(preset, device="cuda", layers=2)
    llm = trilithon.compile(model, max_tokens=96, backend="tensorrt", options=Options(max_batch=3))
    ids = torch.randint(3, 1000, (3, 24), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :13] = 0
    again = trilithon.load(llm.save(tmp_path / "engines"))
    for given in (None, mask):
        want = model.generate(ids, attention_mask=given, max_new_tokens=32, do_sample=False, min_new_tokens=32, pad_token_id=0)
        for compiled in (llm, again):
            got = compiled.generate(ids, attention_mask=given, max_new_tokens=32, eos_token_id=None, pad_token_id=0)
            assert torch.equal(got, want)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_logits_are_as_close_to_float64_as_eager(preset: str, dtype: torch.dtype) -> None:
    """Error against float64 is at most three times that of eager in the same precision, at every length."""
    exact = trilithon.load_model(preset, device="cuda", layers=2, dtype=torch.float64)
    model = trilithon.load_model(preset, device="cuda", layers=2, dtype=dtype)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    llm = trilithon.compile(model, max_tokens=max(LENGTHS) + 3, backend="tensorrt")
    ids = torch.randint(3, 1000, (1, max(LENGTHS) + 3), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    with torch.no_grad():
        truth, eager = exact(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    for length in LENGTHS:
        part = slice(length - 1, length + 3)
        allowed = 3 * relative_error(eager[:, part], truth[:, part])
        assert relative_error(steps(llm, ids[:, : length + 3], length), truth[:, part]) <= allowed, length


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["mistral", "gemma3", "phi3-window", "olmo3"])
def test_past_the_window(name: str) -> None:
    """The window is 5; the prompt and what is generated run past it."""
    model = FAMILIES[name].make("sdpa").to("cuda")
    llm = trilithon.compile(model, max_tokens=64, backend="tensorrt")
    ids = torch.randint(3, 60, (1, 40), device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    torch.testing.assert_close(steps(llm, ids, 19), want[:, 18:], rtol=1e-3, atol=1e-4)
