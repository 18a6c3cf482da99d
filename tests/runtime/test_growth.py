"""Caches that grow: Inductor compiles a step once for all their sizes, the tokens stay, and nothing copies a cache."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from runtime.tiny_llama import tiny_llama
from trilithon import Options, caching
from trilithon.capture import hf
from trilithon.compiler import _source, analyse
from trilithon.runtime.decoder import CachedDecoder
from zoo.families import FAMILIES as ZOO

ROWS, TOKENS, FIRST = 2, 100, 16
# Dynamo decides which sizes a graph is for; where what Inductor makes of it is not at issue, `aot_eager` saves the time.
CASES = {"full": "inductor", "rings in 8 bits": "aot_eager"}


@cache
def source_of(case: str) -> caching.Source:
    """One layer of Llama; of Gemma 3 one with a ring, which does not grow, and one that does."""
    model = tiny_llama(num_hidden_layers=1, max_position_embeddings=4096) if case == "full" else ZOO["gemma3"].make("sdpa")
    example, shapes = hf.example_for(model, ("input_ids", "position_ids"))
    return _source(model, None, analyse(model, example, shapes, (), Options()))


def made(case: str, max_tokens: int, inductor: bool) -> CachedDecoder:
    options = Options(max_batch=ROWS, verify=False, inductor=inductor, cache_dtype="int8" if "8 bits" in case else None)
    decoder, _ = caching.make_decoder(source_of(case), max_tokens, "native", options)
    assert isinstance(decoder, CachedDecoder)
    return decoder


@cache
def decoders(case: str) -> tuple[CachedDecoder, CachedDecoder]:
    """One whose step is compiled, and one that is not; both grow from `FIRST` tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "LEAST_SLOTS", FIRST)
        patch.setattr(torch, "compile", partial(torch.compile, backend=CASES[case]))
        compiled, plain = made(case, TOKENS, inductor=True), made(case, TOKENS, inductor=False)
    compiled.modules = replace(plain.modules, decode=compiled.modules.decode)
    return compiled, plain


def graphs() -> int:
    """How many graphs were compiled so far."""
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_compiled_once_for_all_sizes(case: str) -> None:
    compiled, plain = decoders(case)
    ids = torch.randint(3, 60, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    for decoder in (compiled, plain):
        decoder.prefill(ids[:, :10], torch.zeros(ROWS, dtype=torch.int64))
    before, seen = graphs(), set()
    for i in range(10, TOKENS):
        got, want = compiled.decode(ids[:, i]), plain.decode(ids[:, i])
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        assert torch.equal(got.argmax(-1), want.argmax(-1))
        seen.add(compiled.cache_bytes)
    assert len(seen) == 4  # for 16, 32, 64 and 100 tokens
    assert compiled.cache_bytes == compiled.most_cache_bytes == max(seen)
    assert graphs() - before == 1
    for decoder in (compiled, plain):
        decoder.prefill(ids[:1, :20], torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(compiled.decode(ids[:1, 20]), plain.decode(ids[:1, 20]), rtol=1e-3, atol=1e-3)
    assert graphs() - before == 2  # another number of rows is another compilation


@pytest.mark.timeout(300)
def test_a_compiled_step_copies_no_cache() -> None:
    """With a cache for 65536 tokens the largest are scores, 4 to the 16 numbers of a key."""
    made, _ = decoders("full")
    large = CachedDecoder(made.modules, made.shapes, 65536, ROWS, made.device)
    large.prefill(torch.ones(ROWS, 10, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64))
    large.decode(torch.ones(ROWS, dtype=torch.int64))
    addresses = [x.data_ptr() for x in large.caches]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        large.decode(torch.ones(ROWS, dtype=torch.int64))
    assert [x.data_ptr() for x in large.caches] == addresses
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert 0 < largest < max(x.nbytes for x in large.caches) / 2


@pytest.mark.parametrize("inductor", [False, True])
def test_what_grows(inductor: bool) -> None:
    """A short cache is allocated at once; else it starts small, in whatever way the step is compiled."""
    short, long = (made("full", n, inductor) for n in (120, 4096))
    assert short.cache_bytes == short.most_cache_bytes
    assert long.cache_bytes == long.most_cache_bytes * caching.LEAST_SLOTS // 4096
