"""Generated kernels on a GPU: whole models against the step they are made of, and equal replays."""

from __future__ import annotations

import pytest
import torch

import trilithon
from trilithon.lower.native.step import NativeStep
from trilithon.runtime.verify import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PRESETS = ("llama-3.2-1b", "qwen3-0.6b", "qwen2.5-0.5b")
SLOTS = 4097


@pytest.fixture(scope="module", params=PRESETS)
def compiled(request: pytest.FixtureRequest) -> trilithon.Compiled:
    model = trilithon.load_model(request.param, device="cuda", layers=2, dtype=torch.float16)
    return trilithon.compile(model, max_tokens=SLOTS)


@pytest.mark.timeout(600)
def test_logits_are_those_of_the_step_by_inductor(compiled: trilithon.Compiled) -> None:
    """Logits of 40 steps behind prompts of several lengths, against the step that Inductor compiles."""
    decoder = compiled.decoder
    step = decoder.modules.decode
    assert isinstance(step, NativeStep) and step.one_row is not None, step.note
    for length in (1, 500, 2048):
        ids = torch.randint(3, 1000, (1, length), device="cuda", generator=torch.Generator("cuda").manual_seed(length))
        runs = []
        for chosen in (step.one_row, None):
            kept, step.one_row = step.one_row, chosen
            decoder.drop_graphs()
            logits = [decoder.prefill(ids, torch.zeros(1, dtype=torch.int64, device="cuda")).clone()]
            for token in range(40):
                logits.append(decoder.decode(torch.tensor([token + 5], device="cuda")).clone())
            runs.append(torch.cat(logits))
            step.one_row = kept
        decoder.drop_graphs()
        assert relative_error(runs[0], runs[1].double()) < 5e-3


def test_replays_give_the_same_bits(compiled: trilithon.Compiled) -> None:
    decoder = compiled.decoder
    ids = torch.arange(700, device="cuda")[None] % 997
    decoder.prefill(ids, torch.zeros(1, dtype=torch.int64, device="cuda"))
    start, seen = decoder.lengths, []
    for _ in range(20):
        seen.append(decoder.decode(torch.tensor([7], device="cuda")).clone())
        decoder.rewind(start)
    assert all(torch.equal(x, seen[0]) for x in seen)
