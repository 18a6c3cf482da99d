"""Rows that come and go one by one give, at every token, the logits of the model without a cache."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.test_decoder import FAMILIES, ROWS, TOKENS, Rows, compiled, fresh
from trilithon import caching
from trilithon.errors import CapacityExceeded
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.slots import Slots


def check(rows: Rows, row: int, logits: Any, best: Any) -> None:
    torch.testing.assert_close(logits, rows.logits(row)[-1], rtol=1e-4, atol=1e-4)
    assert int(best) == int(logits.argmax())


@cache
def compiled_once(family: str) -> CachedDecoder:
    """Its cache would grow at the 17th token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "LEAST_SLOTS", 16)
        return compiled(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_schedules(family: str) -> None:
    """Rows begin, end and stay empty at random; two of the families keep rings, which are passed more than once.

    The cache stays where it is: what is recorded of steps is of addresses.
    """
    decoder, generator = compiled_once(family), random.Random(family)
    slots, rows = Slots(decoder, ROWS), Rows(family)
    places = [x.data_ptr() for x in slots.decoder.caches]
    rows.rows = [[] for _ in range(ROWS)]
    for _ in range(30):
        for row, held in enumerate(rows.rows):
            if len(held) >= TOKENS - 1 or (held and generator.random() < 0.1):
                held.clear()
                slots.free(row)
            if not held and generator.random() < 0.3:
                held.extend(fresh(generator, generator.choice([1, 7, 40, 100])))
                logits, best = slots.fill(row, torch.tensor([held]))
                check(rows, row, logits[0], best[0])
        new = fresh(generator, ROWS)
        logits, best = slots.step(torch.tensor(new))
        for row, held in enumerate(rows.rows):
            if held:
                held.append(new[row])
        row = generator.randrange(ROWS)
        if rows.rows[row]:
            check(rows, row, logits[row], best[row])
        assert torch.isfinite(logits).all()  # of empty rows too
    assert [x.data_ptr() for x in slots.decoder.caches] == places and decoder.cache_bytes == decoder.most_cache_bytes


def test_what_does_not_fit_is_refused() -> None:
    decoder = compiled_once("llama-3.2")
    with pytest.raises(CapacityExceeded, match="4 rows do not fit a cache of 3"):
        Slots(decoder, 4)
    slots = Slots(decoder, 2)
    with pytest.raises(CapacityExceeded, match="121 tokens do not fit a cache of 120"):
        slots.fill(0, torch.ones(1, TOKENS + 1, dtype=torch.int64))


def test_an_empty_row_may_take_part_for_ever() -> None:
    """It stays where it is, beyond the number of tokens that the cache takes."""
    decoder, rows = compiled_once("llama-3.2"), Rows("llama-3.2")
    slots = Slots(decoder, 2)
    for _ in range(TOKENS + 5):
        slots.step(torch.tensor([1, 2]))
    rows.rows = [[5, 6, 7]]
    slots.fill(0, torch.tensor(rows.rows))
    logits, best = slots.step(torch.tensor([8, 9]))
    rows.rows[0].append(8)
    check(rows, 0, logits[0], best[0])


def test_prompts_that_are_replayed_are_padded_to_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; and they are always of the same tensors."""
    sizes, places = list[tuple[int, ...]](), set[tuple[int, ...]]()

    def graphs(prefill: Any) -> Any:
        def run(tokens: Tensor, start: Tensor, counts: Tensor, *caches: Tensor) -> Tensor:
            sizes.append(tuple(tokens.shape))
            places.add(tuple(x.data_ptr() for x in caches))
            return prefill(tokens, start, counts, *caches)

        return run

    monkeypatch.setattr("trilithon.runtime.slots.PromptGraphs", graphs)
    decoder, rows = compiled_once("gemma3"), Rows("gemma3")
    monkeypatch.setattr(decoder, "prompts", graphs(decoder.modules.prefill))
    slots = Slots(decoder, 2)
    rows.rows = [[5] * 3 + [6], [7] * 66]
    for row, held in enumerate(rows.rows):
        logits, best = slots.fill(row, torch.tensor([held]))
        check(rows, row, logits[0], best[0])
    assert sizes == [(1, 64), (1, 66)] and len(places) == 1, "128 would not fit"
    logits, best = slots.step(torch.tensor([8, 9]))
    for row, token in enumerate([8, 9]):
        rows.rows[row].append(token)
        check(rows, row, logits[row], best[row])


def test_rows_of_8_bits_hold_their_scales() -> None:
    decoder = compiled("llama-3.2", cache_dtype="int8")
    ids = torch.tensor([[5, 6, 7, 8]])
    decoder.prefill(ids, torch.tensor([0]))
    wanted = decoder.decode(torch.tensor([9])).clone()
    slots = Slots(decoder, ROWS)
    slots.fill(2, ids)
    logits, _ = slots.step(torch.tensor([1, 1, 9]))
    torch.testing.assert_close(logits[2:], wanted, rtol=1e-4, atol=1e-4)
