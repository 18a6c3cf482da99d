"""The presets on a GPU: same tokens as eager in float32, and logits within rounding of eager in half precision."""

from __future__ import annotations

import pytest
import torch

import trilithon
from trilithon.runtime.verify import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PRESETS = ("qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("inductor", [False, True], ids=["aten", "inductor"])
@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_tokens_equal_eager(preset: str, inductor: bool) -> None:
    model = trilithon.load_model(preset, device="cuda", layers=2)
    llm = trilithon.compile(model, max_tokens=96, options=trilithon.Options(max_batch=3, inductor=inductor))
    ids = torch.randint(3, 1000, (3, 24), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :13] = 0
    for given in (None, mask):
        want = model.generate(ids, attention_mask=given, max_new_tokens=32, do_sample=False, min_new_tokens=32, pad_token_id=0)
        got = llm.generate(ids, attention_mask=given, max_new_tokens=32, eos_token_id=None, pad_token_id=0)
        assert torch.equal(got, want)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_is_as_close_to_float64_as_eager(preset: str) -> None:
    """Error against float64 is at most twice that of eager in the same precision."""
    exact = trilithon.load_model(preset, device="cuda", layers=2, dtype=torch.float64)
    model = trilithon.load_model(preset, device="cuda", layers=2, dtype=torch.float16)
    model.load_state_dict({name: value.half() for name, value in exact.state_dict().items()})
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    ids = torch.randint(3, 1000, (1, 65), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    with torch.no_grad():
        truth = exact(ids, use_cache=False).logits
        eager = relative_error(model(ids, use_cache=False).logits, truth)
    llm = trilithon.compile(model, max_tokens=80)
    pad = torch.zeros(1, dtype=torch.int64, device="cuda")
    steps = [llm.decoder.prefill(ids[:, :60], pad).clone()]
    for i in range(60, 65):
        steps.append(llm.decoder.decode(ids[:, i]).clone())
        assert torch.equal(steps[-1].gather(1, llm.decoder.best[:, None])[:, 0], steps[-1].amax(1))
    assert relative_error(torch.stack(steps, 1), truth[:, 59:]) <= 2 * eager
    assert relative_error(llm(ids), truth) <= 2 * eager
