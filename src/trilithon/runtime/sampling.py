"""From logits to the next token, in Hugging Face's order: repetition penalty, temperature, top-k, top-p, min-p, draw."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trilithon.errors import InputError

_BLOCKED = -math.inf


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Names, defaults and meanings are Hugging Face's.

    Attributes:
        do_sample: draw from the distribution; False takes the most likely token.
        temperature: logits are divided by it; > 0. Used only with `do_sample`.
        top_k: tokens kept before drawing; 0 keeps all. Used only with `do_sample`.
        top_p: probability mass kept before drawing, in [0, 1]; 1 keeps all. Used only with `do_sample`.
        min_p: tokens less probable than this part of the likeliest token's probability are removed, in [0, 1]; 0 keeps all.
            Used only with `do_sample`.
        repetition_penalty: logits of tokens already seen are divided by it if positive, multiplied if negative;
            > 0, 1 changes nothing. Used with and without `do_sample`; left padding does not count as seen.

    Raises:
        InputError: a value is outside its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, ok, accepted in (
            ("temperature", self.temperature > 0, "a number above 0; do_sample=False takes the most likely token"),
            ("top_k", self.top_k == int(self.top_k) and self.top_k >= 0, "a whole number of tokens; 0 keeps all of them"),
            ("top_p", 0 <= self.top_p <= 1, "a probability between 0 and 1; 1 keeps all tokens"),
            ("min_p", 0 <= self.min_p <= 1, "a part between 0 and 1 of the likeliest token's probability; 0 keeps all tokens"),
            ("repetition_penalty", self.repetition_penalty > 0, "a number above 0; 1 changes nothing"),
        ):
            if not ok:
                raise InputError(
                    f"cannot generate with {name}={getattr(self, name)}", why="it is outside its range", todo=f"pass {accepted}"
                )
        if not self.do_sample:
            self._warn_of_unused()

    def _warn_of_unused(self) -> None:
        unused = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if field.name in ("temperature", "top_k", "top_p", "min_p") and getattr(self, field.name) != field.default
        ]
        if unused:
            warnings.warn(
                f"{', '.join(unused)} has no effect with do_sample=False; pass do_sample=True to sample", stacklevel=2
            )

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1


def process_logits(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The scores that the next token is taken from; `logits` itself is left as it is.

    Args:
        logits: `[b v]`, any float dtype.
        seen: `[b v]` bool, the tokens that the repetition penalty applies to (see `SeenTokens`); None = none.

    Returns:
        `[b v]` float32; -inf where top-k, top-p or min-p removed a token.
    """
    return warp(penalise(logits.float(), sampling, seen), sampling)


def penalise(scores: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """The repetition penalty on scores `[b v]` float32."""
    if seen is None or not sampling.penalises:
        return scores
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def warp(scores: Tensor, sampling: Sampling) -> Tensor:
    """What sampling does to scores `[b v]` float32; nothing without `do_sample`.

    Source: transformers `generation/logits_process.py`, the same operations in the same order, so that ties at the
    border of top-k and top-p fall alike.
    """
    if not sampling.do_sample:
        return scores
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    if sampling.top_k:
        scores = _keep_top_k(scores, sampling.top_k)
    if sampling.top_p < 1:
        scores = _keep_top_p(scores, sampling.top_p)
    return _keep_min_p(scores, sampling.min_p) if sampling.min_p else scores


def pick(scores: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The token `[b]` int64 that processed scores `[b v]` give, without waiting for the device.

    A draw is the one that `torch.multinomial(probabilities, 1)` makes with the same generator state.
    """
    return _draw(scores.softmax(-1), generator) if sampling.do_sample else scores.argmax(-1)


def next_tokens(
    logits: Tensor, sampling: Sampling, seen: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Choose one token a row, without waiting for the device.

    Args:
        logits: `[b v]`, any float dtype.
        seen: `[b v]` bool, see `process_logits`.
        generator: source of randomness on the device of `logits`; None = torch's own.

    Returns:
        `[b]` int64, see `pick`.
    """
    if not sampling.do_sample and not sampling.penalises:
        return logits.argmax(-1)
    return pick(process_logits(logits, sampling, seen), sampling, generator)


class SeenTokens:
    """The tokens that each row has seen, for the repetition penalty; it stays on the device.

    Args:
        rows: b.
        vocabulary: v, the number of logits a row has.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._with_bin = torch.zeros(rows, vocabulary + 1, dtype=torch.bool, device=device)  # last column: not counted

    @property
    def mask(self) -> Tensor:
        """`[b v]` bool."""
        return self._with_bin[:, :-1]

    def copy(self) -> SeenTokens:
        other = SeenTokens(len(self._with_bin), self._vocabulary, self._with_bin.device)
        other._with_bin.copy_(self._with_bin)
        return other

    def add(self, tokens: Tensor, valid: Tensor | None = None) -> None:
        """Mark tokens as seen.

        Args:
            tokens: `[b n]` int64; an id of v or more (an embedding table larger than the output) does not count.
            valid: `[b n]` bool, which of them count; None = all.
        """
        if valid is not None:
            tokens = tokens.masked_fill(~valid, self._vocabulary)
        self._with_bin.scatter_(1, tokens.clamp(max=self._vocabulary), True)


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    smallest_kept = scores.topk(min(top_k, scores.shape[-1]))[0][..., -1, None]
    return scores.masked_fill(scores < smallest_kept, _BLOCKED)


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    ascending, order = scores.sort(descending=False)
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    removed[..., -1] = False
    return scores.masked_fill(removed.scatter(1, order, removed), _BLOCKED)


def _keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    probabilities = scores.softmax(-1)
    removed = probabilities < min_p * probabilities.amax(-1, keepdim=True)
    kept = probabilities.topk(1, dim=-1).indices
    return scores.masked_fill(removed.scatter(-1, kept, False), _BLOCKED)


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    # torch.multinomial draws by this race of exponentials too, but first reads a check of its input on the host.
    times = torch.empty_like(probabilities).exponential_(1, generator=generator)
    return (probabilities / times).argmax(-1)
