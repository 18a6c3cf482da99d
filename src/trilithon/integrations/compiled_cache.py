"""A cache as transformers' `generate` knows it, of which the keys and values are inside a compiled decoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from trilithon.errors import CapacityExceeded, InputError
from trilithon.runtime.memory import Memory, Tenant
from trilithon.runtime.protocol import Decoder
from trilithon.runtime.run import EXTEND_TOKENS


class CompiledCache(Cache, Tenant):
    """What one `model.generate(...)` of an accelerated model has taken in.

    Attributes:
        ids: `[b n]` int64, left padded: the tokens that it holds.
        pad: `[b]` int64, left padding tokens of each row.
        is_padded: whether a row has some.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__(layers=[])
        self.memory = memory
        self.reset()

    def __repr__(self) -> str:
        return f"<CompiledCache: {self.ids.shape[0]} rows of {self.ids.shape[1]} tokens>"

    def __copy__(self) -> CompiledCache:
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledCache:
        other = CompiledCache(self.memory)
        other.ids, other.pad, other.is_padded = self.ids, self.pad, self.is_padded
        other.snapshot = self.memory.snapshot_of(self)
        return other

    def reset(self) -> None:
        """Forget everything."""
        device = self.memory.decoder.device
        self.ids = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self.pad = torch.zeros(0, dtype=torch.int64, device=device)
        self.is_padded = False
        self.memory.forget(self)

    # ---------------------------------------------------------------- what the accelerated forward calls

    def take_in(self, ids: Tensor, pad: Tensor | None, keep: int) -> Tensor:
        """Take in tokens, and return the logits `[b keep v]` behind the last of them.

        Args:
            ids: `[b s]` int64; left padded if they are the first.
            pad: `[b]`, of the first tokens; None = they have no padding.
            keep: 1 to s.

        Raises:
            InputError, CapacityExceeded: they do not fit. What was held before stays.
        """
        self._check_room(ids.shape[1])
        is_first = not self.get_seq_length()
        padding = torch.zeros(len(ids), dtype=torch.int64, device=ids.device) if pad is None else pad
        try:
            with self._turn() as decoder:
                logits = _start(decoder, ids, padding, keep) if is_first else _extend(decoder, ids, keep)
        except BaseException:
            self.memory.forget(self)  # taken in again when it is needed
            raise
        if is_first:
            self.ids, self.pad, self.is_padded = ids, padding, pad is not None
        else:
            self.ids = torch.cat([self.ids, ids], 1)
        return logits

    def _check_room(self, tokens: int) -> None:
        total, most = self.get_seq_length() + tokens, self.memory.decoder.cache_tokens
        if total > most:
            raise CapacityExceeded(
                f"{total} tokens do not fit a cache of {most}",
                why="past_key_values of an accelerated model is as long as it was compiled for",
                todo=f"accelerate with max_tokens={total} or more",
            )

    @contextmanager
    def _turn(self) -> Iterator[Decoder]:
        """The decoder, with these tokens in it."""
        is_lost = self.get_seq_length() > 0 and not self.memory.holds(self)
        with self.memory.turn(self) as decoder:
            if is_lost:
                decoder.prefill(self.ids, self.pad)
            yield decoder

    # ---------------------------------------------------------------- what transformers calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.ids.shape[1])

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.memory.decoder.cache_tokens

    @property
    def batch_size(self) -> int:
        return len(self.ids)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row `beam_idx[i]` holds."""
        rows = beam_idx.to(self.ids.device, torch.int64)
        with self._turn() as decoder:
            decoder.select(rows)
        self.ids, self.pad = self.ids[rows], self.pad[rows]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.ids)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of every row."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.get_seq_length():
            raise InputError(
                f"cannot crop {self!r} by {tokens_to_remove}",
                why="crop takes minus the number of tokens to forget",
                todo="pass a number from minus the cache's length up to 0",
            )
        if tokens_to_remove == 0:
            return
        if tokens_to_remove == -self.get_seq_length():
            self.reset()
            return
        with self._turn() as decoder:
            self.ids = self.ids[:, :tokens_to_remove]
            try:
                decoder.rewind(self.ids.shape[1] - self.pad)
            except InputError:  # more than a ring can take back: they are taken in again
                decoder.prefill(self.ids, self.pad)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # HF's own
        raise _of_another_model()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        raise _of_another_model()


def _of_another_model() -> InputError:
    return InputError(
        "this cache cannot be read by a model",
        why="its keys and values are inside a compiled decoder; only the accelerated model that made it can go on from it",
        todo="pass it to that model while it is accelerated, or pass past_key_values=None",
    )


def _start(decoder: Decoder, ids: Tensor, pad: Tensor, keep: int) -> Tensor:
    head = ids.shape[1] - keep + 1
    if keep > 1 and bool((pad >= head).any()):
        raise InputError(
            f"logits of the last {keep} tokens were asked for, and some of those are padding",
            why="padding is not computed",
            todo=f"pass logits_to_keep={ids.shape[1] - int(pad.max())} or less, but not 0",
        )
    first = decoder.prefill(ids[:, :head], pad)[:, None].clone()
    return first if keep == 1 else torch.cat([first, _extend(decoder, ids[:, head:], keep - 1)], 1)


def _extend(decoder: Decoder, ids: Tensor, keep: int) -> Tensor:
    if ids.shape[1] == 1:
        return decoder.decode(ids[:, 0])[:, None].clone()
    pieces, left = [], ids.shape[1]
    for piece in ids.split(EXTEND_TOKENS, 1):
        logits = decoder.extend(piece)
        left -= piece.shape[1]
        wanted = min(keep - left, piece.shape[1])
        if wanted > 0:
            pieces.append(logits[:, -wanted:].clone())
    return torch.cat(pieces, 1)
