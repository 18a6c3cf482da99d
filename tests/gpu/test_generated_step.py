"""Generated kernels on a GPU: whole models against the step they are made of, and equal replays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import trilithon
from trilithon.lower.native.step import NativeStep
from trilithon.runtime.original import widened
from trilithon.runtime.step import AT_ONCE
from trilithon.runtime.verify import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PRESETS = ("llama-3.2-1b", "qwen3-0.6b", "qwen2.5-0.5b")
SLOTS = 4097
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 511, 513, 1000, 1023, 1024, 1025)
LENGTHS += (1537, 2047, 2048, 2049, 2175, 2816, 3001, 3072, 4000, 4095, 4096, 4097)  # with the token at hand


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


def test_tokens_made_several_at_once_are_those_made_one_by_one(compiled: trilithon.Compiled) -> None:
    """To the last bit, over a cache that grows on the way."""
    decoder = compiled.decoder
    assert decoder.at_once == AT_ONCE
    for length in (5, 700):
        ids = torch.randint(3, 1000, (1, length), device="cuda", generator=torch.Generator("cuda").manual_seed(length))
        found = []
        for at_once in (AT_ONCE, 1, AT_ONCE):
            decoder.at_once = at_once
            tokens = compiled.generate(ids, max_new_tokens=60, eos_token_id=None)
            found.append((tokens, decoder.lengths, decoder.decode(tokens[:, -1]).clone()))
        decoder.at_once = AT_ONCE
        for mine, first in zip((x for each in found[1:] for x in each), found[0] * 2, strict=True):
            assert torch.equal(mine, first)


def errors(module: GraphModule, exact: GraphModule, start: int, caches: list[Tensor], seed: int) -> list[float]:
    """Relative errors of a step's logits, and of the keys and values that it writes, against the same step in float64."""
    token = torch.randint(3, 30, (1, 1), generator=torch.Generator().manual_seed(seed)).to(caches[0].device)
    one = torch.ones(1, dtype=torch.int64, device=token.device)
    own, true = [x.clone() for x in caches], [x.double() for x in caches]
    got, want = module(token, one * start, one, *own)[0], exact(token, one * start, one, *true)[0]
    written = zip(own, true, strict=True)
    return [relative_error(got, want), *(relative_error(x[:, :, start], y[:, :, start]) for x, y in written)]


def random_caches(caches: list[Tensor], slots: int, seed: int) -> list[Tensor]:
    generator = torch.Generator(caches[0].device).manual_seed(seed)
    sizes = [(1, x.shape[1], slots, x.shape[3]) for x in caches]
    return [torch.randn(size, generator=generator, device=x.device).to(x.dtype) for size, x in zip(sizes, caches, strict=True)]


@pytest.mark.timeout(600)
@torch.no_grad()
def test_a_step_is_as_near_to_float64_as_op_by_op(compiled: trilithon.Compiled) -> None:
    """At most twice the error, on fresh random caches of each length."""
    step = compiled.decoder.modules.decode
    assert isinstance(step, NativeStep) and step.one_row is not None, step.note
    plain = step.general.compiled._orig_mod  # type: ignore[attr-defined]
    exact = widened(widened(plain))
    for length in LENGTHS:
        caches = random_caches(compiled.decoder.caches, SLOTS, length)
        mine, theirs = (errors(module, exact, length - 1, caches, length) for module in (step.one_row, plain))
        assert all(x <= 2 * y + 1e-6 for x, y in zip(mine, theirs, strict=True)), (length, mine, theirs)
