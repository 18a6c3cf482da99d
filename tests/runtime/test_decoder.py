"""The decoder over a KV cache: random schedules of all that it can do give the logits of the model without a cache."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trilithon
from models.configs import tiny
from trilithon import InputError, Options, caching
from trilithon.errors import CapacityExceeded
from trilithon.rewrite.cache_shape import SPARE
from trilithon.runtime.decoder import CachedDecoder
from zoo.families import FAMILIES as ZOO

FAMILIES = ("llama-3.2", "mistral", "gemma3")  # the last two keep rings
ROWS, TOKENS = 3, 120


@cache
def model(family: str) -> nn.Module:
    if family in ("llama-3.2", "mistral"):
        return tiny(family)
    return ZOO[family].make("eager" if ZOO[family].eager_only else "sdpa")


def compiled(family: str, **options: Any) -> CachedDecoder:
    made = trilithon.compile(model(family), max_tokens=TOKENS, options=Options(max_batch=ROWS, verify=False, **options))
    return made.decoder


class Rows:
    """What the rows of a decoder should hold, and the logits that follow from it."""

    def __init__(self, family: str) -> None:
        self.model, self.rows = model(family), list[list[int]]()
        self.most: list[int] = []  # tokens that a row held

    @torch.no_grad()
    def logits(self, row: int) -> Tensor:
        """Behind each token of a row, `[n v]`."""
        return self.model(torch.tensor([self.rows[row]]), use_cache=False).logits[0]

    def check(self, got: Tensor, best: Tensor) -> None:
        """`got [b v]` stands behind the last token of each row, and `best [b]` is its highest."""
        assert torch.equal(best, got.argmax(-1)) and best.dtype == torch.int64
        for row, mine in enumerate(got):
            torch.testing.assert_close(mine, self.logits(row)[-1], rtol=1e-4, atol=1e-4)


def fresh(generator: random.Random, count: int) -> list[int]:
    return [generator.randrange(3, 60) for _ in range(count)]


def note(rows: Rows) -> list[int]:
    now = [len(row) for row in rows.rows]
    rows.most = [max(pair) for pair in zip(now, rows.most or now, strict=True)]
    return rows.most


def prompt(decoder: CachedDecoder, rows: Rows, generator: random.Random) -> None:
    lengths = [generator.randint(1, 40) for _ in range(ROWS)]
    width = max(lengths) + generator.randint(0, 2)
    rows.rows, rows.most = [fresh(generator, n) for n in lengths], []
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows.rows])
    rows.check(decoder.prefill(ids, torch.tensor([width - n for n in lengths])), decoder.best)


def one(decoder: CachedDecoder, rows: Rows, generator: random.Random) -> None:
    new = fresh(generator, len(rows.rows))
    for row, token in zip(rows.rows, new, strict=True):
        row.append(token)
    rows.check(decoder.decode(torch.tensor(new)), decoder.best)


def several(decoder: CachedDecoder, rows: Rows, generator: random.Random) -> None:
    """Rows take in unlike numbers of tokens."""
    width = generator.randint(2, 16)
    tokens = [fresh(generator, width) for _ in rows.rows]
    counts = [generator.randint(1, width) for _ in rows.rows]
    got = decoder.extend(torch.tensor(tokens), torch.tensor(counts))
    assert torch.equal(decoder.best, got.argmax(-1))
    for i, (row, new, n) in enumerate(zip(rows.rows, tokens, counts, strict=True)):
        row.extend(new[:n])
        torch.testing.assert_close(got[i, :n], rows.logits(i)[-n:], rtol=1e-4, atol=1e-4)


def greedy(decoder: CachedDecoder, rows: Rows, generator: random.Random) -> None:
    """Several tokens, each the best behind the one before."""
    new = fresh(generator, len(rows.rows))
    made = decoder.follow(torch.tensor(new))
    assert torch.equal(decoder.best, made[:, -1])
    for i, (row, token, best) in enumerate(zip(rows.rows, new, made.tolist(), strict=True)):
        row.extend([token, *best[:-1]])
        assert rows.logits(i)[-len(best) :].argmax(-1).tolist() == best


def back(decoder: CachedDecoder, rows: Rows, generator: random.Random) -> None:
    least = [max(1, most - SPARE) for most in note(rows)]
    rows.rows = [row[: generator.randint(min(n, len(row)), len(row))] for row, n in zip(rows.rows, least, strict=True)]
    decoder.rewind(torch.tensor([len(row) for row in rows.rows]))


def fork(decoder: CachedDecoder, rows: Rows, generator: random.Random) -> None:
    """Save, go on, and come back."""
    saved, held, most = decoder.save(), [list(row) for row in rows.rows], note(rows)
    for _ in range(generator.randint(1, 3)):
        one(decoder, rows, generator)
    decoder.restore(saved)
    rows.rows, rows.most = held, most


def choose(decoder: CachedDecoder, rows: Rows, generator: random.Random) -> None:
    picked = [generator.randrange(len(rows.rows)) for _ in range(generator.randint(1, ROWS))]
    decoder.select(torch.tensor(picked))
    rows.rows, rows.most = [list(rows.rows[i]) for i in picked], [note(rows)[i] for i in picked]


@pytest.mark.parametrize("family", FAMILIES)
def test_schedules(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "LEAST_SLOTS", 16)  # so that it grows
    decoder, generator = compiled(family), random.Random(family)
    for _ in range(4):
        rows = Rows(family)
        prompt(decoder, rows, generator)
        for _ in range(8):
            if max(len(row) for row in rows.rows) > TOKENS - 24:
                break
            generator.choice((one, several, greedy, back, fork, choose))(decoder, rows, generator)
            one(decoder, rows, generator)
        assert decoder.lengths.tolist() == [len(row) for row in rows.rows]


def test_a_decoder_of_single_steps_extends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one made of TensorRT engines does."""
    decoder, rows, generator = compiled("llama-3.2"), Rows("llama-3.2"), random.Random(0)
    object.__setattr__(decoder.modules, "extend", None)
    prompt(decoder, rows, generator)
    for _ in range(3):
        several(decoder, rows, generator)
        back(decoder, rows, generator)
        one(decoder, rows, generator)


def test_errors_leave_the_cache_usable() -> None:
    decoder, rows, generator = compiled("mistral"), Rows("mistral"), random.Random(1)
    prompt(decoder, rows, generator)
    with pytest.raises(CapacityExceeded, match="tokens do not fit a cache of 120"):
        decoder.extend(torch.zeros(ROWS, 119, dtype=torch.int64))
    with pytest.raises(CapacityExceeded, match="4 rows do not fit a cache of 3"):
        decoder.prefill(torch.ones(4, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InputError, match="cannot go back"):
        decoder.rewind(decoder.lengths + 1)
    while min(len(row) for row in rows.rows) < 2 * SPARE + 10:
        one(decoder, rows, generator)
    with pytest.raises(InputError, match="layers with a window keep"):
        decoder.rewind(decoder.lengths - SPARE - 1)
    one(decoder, rows, generator)


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that an operation made, views and writes in place left out."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in held:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("family", ["llama-3.2", "gemma3"])
def test_a_step_copies_no_cache_and_reads_what_is_in_use(family: str) -> None:
    """With a cache for 65536 tokens, a step at token 10 makes no tensor as large as a thousandth of one."""
    made = trilithon.compile(model(family), max_tokens=120, options=Options(verify=False)).decoder
    large = CachedDecoder(made.modules, made.shapes, 65536, 1, made.device)
    large.prefill(torch.ones(1, 10, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    addresses = [x.data_ptr() for x in large.caches]
    with Allocations() as seen:
        large.decode(torch.ones(1, dtype=torch.int64))
        large.extend(torch.ones(1, 4, dtype=torch.int64))
    assert [x.data_ptr() for x in large.caches] == addresses
    full = max(x.nbytes for x in large.caches)
    assert 0 < seen.largest < full / 1000


def test_windowed_layers_keep_their_window() -> None:
    """Bytes of a Gemma 3: `g * (d + e) * itemsize` a slot; `window + 15` slots in windowed layers, all in the others."""
    decoder = compiled("gemma3")
    config: Any = model("gemma3").config
    per_slot = config.num_key_value_heads * 2 * config.head_dim * 4
    kinds = config.layer_types
    slots = [config.sliding_window + 15 if kind == "sliding_attention" else TOKENS for kind in kinds]
    assert {"sliding_attention", "full_attention"} <= set(kinds)
    assert decoder.most_cache_bytes == ROWS * per_slot * sum(slots)
    assert decoder.cache_bytes == sum(x.nbytes for x in decoder.caches) == decoder.most_cache_bytes


def test_the_first_and_the_last_token_can_be_best() -> None:
    """Their logits are opposite and all others 0; then all are 0, and the first is best."""
    ends = tiny("llama-3.2", layers=1)
    head = nn.Linear(64, 300, bias=False)
    ends.lm_head = head
    head.weight.data.zero_()
    head.weight.data[299] = torch.randn(64, generator=torch.Generator().manual_seed(0))
    head.weight.data[0] = -head.weight.data[299]
    decoder = trilithon.compile(ends, max_tokens=32, options=Options(verify=False)).decoder
    seen = []
    for token in range(3, 30):
        decoder.prefill(torch.tensor([[token]]), torch.tensor([0]))
        logits = decoder.decode(torch.tensor([token]))
        assert decoder.best.tolist() == [0 if logits[0, 0] > 0 else 299]
        seen += decoder.best.tolist()
    assert set(seen) == {0, 299}
    head.weight.data.zero_()
    decoder = trilithon.compile(ends, max_tokens=32, options=Options(verify=False)).decoder
    decoder.prefill(torch.tensor([[5]]), torch.tensor([0]))
    assert float(decoder.decode(torch.tensor([5])).abs().max()) == 0 and decoder.best.tolist() == [0]


def test_a_ring_is_not_taken_back_piece_by_piece() -> None:
    """What a row held before counts, however few tokens it holds now."""
    decoder, rows, generator = compiled("mistral"), Rows("mistral"), random.Random(2)
    rows.rows = [fresh(generator, 40)]
    decoder.prefill(torch.tensor(rows.rows), torch.tensor([0]))
    decoder.rewind(torch.tensor([30]))
    saved = decoder.save()
    for _ in range(2):
        with pytest.raises(InputError, match="cannot take back 16 tokens"):
            decoder.rewind(torch.tensor([24]))
        decoder.restore(saved)  # it is no younger
    decoder.select(torch.tensor([0, 0]))
    with pytest.raises(InputError, match="cannot take back 16 tokens"):
        decoder.rewind(torch.tensor([30, 24]))
    decoder.rewind(torch.tensor([25, 30]))
    rows.rows = [rows.rows[0][:25], rows.rows[0][:30]]
    one(decoder, rows, generator)
    decoder.prefill(torch.tensor([[5] * 24]), torch.tensor([0]))
    decoder.rewind(torch.tensor([9]))


def test_what_single_steps_write_past_a_row_counts_too() -> None:
    """Of one token among 16, fifteen more were written into the ring."""
    decoder = compiled("mistral")
    object.__setattr__(decoder.modules, "extend", None)
    decoder.prefill(torch.tensor([fresh(random.Random(3), 40)]), torch.tensor([0]))
    decoder.extend(torch.full((1, 16), 5), torch.tensor([1]))
    assert decoder.lengths.tolist() == [41]
    with pytest.raises(InputError, match="cannot take back 16 tokens"):
        decoder.rewind(torch.tensor([40]))
    decoder.rewind(torch.tensor([41]))
