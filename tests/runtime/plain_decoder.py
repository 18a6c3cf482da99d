"""The decoder protocol by plain means: rows of tokens, and the whole model run on them in each call. No cache, no tricks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilithon.errors import CapacityExceeded, InputError

RING_TOKENS = 15  # so many can be taken back where a cache keeps only the last keys


class PlainDecoder:
    """Exact semantics of `trilithon.runtime.protocol.Decoder`; what means nothing is NaN, and so are old buffers.

    Args:
        model: a Hugging Face causal LM.
        ring: refuse to take back more than 15 tokens, as decoders with rings do.
    """

    def __init__(self, model: Any, cache_tokens: int = 64, max_batch: int = 16, ring: bool = False) -> None:
        self.model, self.cache_tokens, self.max_batch, self.ring = model, cache_tokens, max_batch, ring
        self.device = torch.device("cpu")
        self.rows: list[Tensor] = []
        self.calls: list[tuple[str, int]] = []  # name, and tokens a row
        self.buffer = torch.empty(0)
        self.best = torch.empty(0, dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(row) for row in self.rows])

    @property
    def steps(self) -> int:
        """Calls of the model that a generation took."""
        return sum(name in ("prefill", "decode", "extend") for name, _ in self.calls)

    @property
    def tokens_taken(self) -> int:
        return sum(tokens for name, tokens in self.calls if name in ("prefill", "decode", "extend"))

    def prefill(self, input_ids: Tensor, pad: Tensor) -> Tensor:
        rows, tokens = input_ids.shape
        assert input_ids.dtype == pad.dtype == torch.int64 and pad.shape == (rows,)
        assert bool((pad >= 0).all()) and bool((pad < tokens).all())
        if rows > self.max_batch:
            raise CapacityExceeded(f"{rows} rows do not fit a cache of {self.max_batch}")
        self.rows = [row[p:] for row, p in zip(input_ids, pad.tolist(), strict=True)]
        return self._answer("prefill", tokens, torch.stack([x[-1] for x in self._logits([1] * rows)]))

    def decode(self, tokens: Tensor) -> Tensor:
        assert tokens.dtype == torch.int64 and tokens.shape == (len(self.rows),)
        self._append(tokens[:, None], [1] * len(tokens))
        return self._answer("decode", 1, torch.stack([x[-1] for x in self._logits([1] * len(tokens))]))

    def extend(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        rows, width = tokens.shape
        assert tokens.dtype == torch.int64 and rows == len(self.rows) and width >= 1
        real = [width] * rows if counts is None else counts.tolist()
        assert len(real) == rows and all(1 <= n <= width for n in real)
        if max(len(row) for row in self.rows) + width > self.cache_tokens:
            raise CapacityExceeded(f"a window of {width} tokens does not fit a cache of {self.cache_tokens}")
        self._append(tokens, real)
        logits = torch.full((rows, width, self.model.config.vocab_size), torch.nan)
        for row, got in enumerate(self._logits(real)):
            logits[row, : len(got)] = got
        return self._answer("extend", width, logits)

    def rewind(self, lengths: Tensor) -> None:
        assert lengths.dtype == torch.int64 and lengths.shape == (len(self.rows),)
        back = [len(row) - n for row, n in zip(self.rows, lengths.tolist(), strict=True)]
        assert all(n >= 0 for n in back)
        if self.ring and max(back) > RING_TOKENS:
            raise InputError(f"cannot take back {max(back)} tokens", why="the ring has lost them")
        self.rows = [row[:n] for row, n in zip(self.rows, lengths.tolist(), strict=True)]
        self.calls.append(("rewind", max(back)))

    def save(self) -> list[Tensor]:
        self.calls.append(("save", 0))
        return [row.clone() for row in self.rows]

    def restore(self, snapshot: list[Tensor]) -> None:
        self.calls.append(("restore", 0))
        self.rows = [row.clone() for row in snapshot]

    def select(self, rows: Tensor) -> None:
        assert rows.dtype == torch.int64
        if len(rows) > self.max_batch:
            raise CapacityExceeded(f"{len(rows)} rows do not fit a cache of {self.max_batch}")
        self.rows = [self.rows[i] for i in rows.tolist()]

    def _append(self, tokens: Tensor, counts: list[int]) -> None:
        self.rows = [torch.cat([row, new[:n]]) for row, new, n in zip(self.rows, tokens, counts, strict=True)]
        longest = max(len(row) for row in self.rows)
        if longest > self.cache_tokens:
            raise CapacityExceeded(f"{longest} tokens do not fit a cache of {self.cache_tokens}")

    def _logits(self, last: list[int]) -> list[Tensor]:
        """The logits `[n v]` at the last n tokens of each row, from a right-padded batch."""
        with torch.no_grad():
            ids = torch.nn.utils.rnn.pad_sequence(self.rows, batch_first=True)
            out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return [x[len(row) - n : len(row)] for x, row, n in zip(out, self.rows, last, strict=True)]

    def _answer(self, name: str, tokens: int, logits: Tensor) -> Tensor:
        with torch.inference_mode(False):  # a buffer that can be written to whatever mode the next call is made in
            self.buffer.fill_(torch.nan)
            self.best.fill_(-1)
            self.buffer, self.best = logits.clone(), logits.argmax(-1)
        self.calls.append((name, tokens))
        return self.buffer
