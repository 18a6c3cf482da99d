"""What the token loops ask of a decoder, and of those who watch them."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Snapshot: TypeAlias = Any  # a decoder's own copy of what it holds; nobody else looks into it


class Decoder(Protocol):
    """A model over a KV cache, of which each row counts its own tokens from 0.

    Logits that a method returns may stand in a buffer that the next call overwrites.

    Attributes:
        cache_tokens: capacity of a row, prompt and generated tokens together.
        max_batch: rows that the cache holds.
        device: where ids go in and logits come out.
        lengths: `[b]` int64 on the device, tokens that each row holds.
        best: int64 on the device, `[b]`, behind `extend` `[b s]`: the token of the highest of all logits that the last call
            returned. Of equal ones it is the first, or one that was higher before it was rounded. It may stand in a buffer,
            as logits may.
    """

    @property
    def cache_tokens(self) -> int: ...

    @property
    def max_batch(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def lengths(self) -> Tensor: ...

    @property
    def best(self) -> Tensor: ...

    def take_context(self, given: tuple[Tensor, ...], rows: int) -> None:
        """Read what the next prompts are about: the inputs of an encoder, by position; a decoder without one reads nothing.

        Args:
            given: each of as many rows as there are prompts.
            rows: a multiple of that; each prompt is repeated.
        """
        ...

    def prefill(self, input_ids: Tensor, pad: Tensor) -> Tensor:
        """Forget everything, take in the prompts and return the logits `[b v]` of their last tokens.

        Args:
            input_ids: `[b s]` int64, left padded.
            pad: `[b]` int64, left padding tokens of each row, each less than s.
        """
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Take in one token `[b]` int64 a row, and return the logits `[b v]` behind it."""
        ...

    def extend(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """Take in several tokens a row, and return the logits `[b s v]` behind each.

        Args:
            tokens: `[b s]` int64.
            counts: `[b]` int64, 1 to s: how many of the tokens are real, the first ones; None = all. Logits at the others
                mean nothing.
        """
        ...

    def rewind(self, lengths: Tensor) -> None:
        """Forget what each row holds behind its first `lengths [b]` tokens.

        Raises:
            InputError: so much cannot be taken back (15 tokens can always).
        """
        ...

    def save(self) -> Snapshot:
        """A copy of all that the rows hold."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Hold what was held when `snapshot` was made; it can be restored again."""
        ...

    def select(self, rows: Tensor) -> None:
        """Make row i a copy of what row `rows[i]` is; `rows` is `[n]` int64."""
        ...


@runtime_checkable
class Follower(Protocol):
    """A decoder that can take in several greedy tokens without the host between them.

    Attributes:
        at_once: how many; 1 = it cannot.
    """

    @property
    def at_once(self) -> int: ...

    def follow(self, tokens: Tensor) -> Tensor:
        """The tokens `[b at_once]` behind `tokens [b]`, each the best behind the one before; all but the last are taken in.

        What `decode` gives as the best token, called so many times; the last is `best` then. They may stand in a buffer.
        """
        ...


class Streamer(Protocol):
    """What receives tokens while they are made; transformers' `TextStreamer` is one."""

    def put(self, value: Tensor, /) -> None: ...

    def end(self) -> None: ...


class LogitsProcessor(Protocol):
    """What changes scores `[b v]` before a token is chosen; transformers' `LogitsProcessor` is one."""

    def __call__(self, input_ids: Tensor, scores: Tensor, /) -> Tensor: ...


class StoppingCriterion(Protocol):
    """What says of each row whether it is finished, `[b]` bool; transformers' `StoppingCriteria` is one."""

    def __call__(self, input_ids: Tensor, scores: Any, /) -> Tensor | bool: ...


class Tokenizer(Protocol):
    """What turns ids into text; transformers' tokenizers are such."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any: ...
