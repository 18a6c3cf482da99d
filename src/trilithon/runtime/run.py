"""One generation under way, a token a step: what its rows hold, and which of them go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trilithon.runtime.agree import group_of_ranks, require_same_request
from trilithon.runtime.choose import Chooser
from trilithon.runtime.protocol import Decoder, Follower
from trilithon.runtime.request import Request

EXTEND_TOKENS = 64  # taken in at once behind what is held: the logits of each of them are made


@dataclass(frozen=True, eq=False)
class Generated:
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: `[b, s + n]` int64, prompt included.
        scores: with `output_scores`, for each new token what it was taken from, `[b v]` float32, processed.
        logits: with `output_logits`, for each new token the model's own, `[b v]` float32.
        drafted: with `prompt_lookup_num_tokens`, how many drafts were tried, in all rows together.
        accepted: how many of them were kept: each is a step less.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    drafted: int = 0
    accepted: int = 0


class Run(Protocol):
    """One generation under way.

    Attributes:
        cached: tokens of a row, with its padding, that the decoder holds.
    """

    @property
    def cached(self) -> int: ...

    def steps(self, decoder: Decoder) -> Iterator[Tensor]:
        """Yield the new tokens `[b n]` of each step that all rows have now, finished ones filled."""
        ...

    def is_finished(self) -> bool:
        """Whether every row is; may wait for the device."""
        ...

    def as_streamed(self, tokens: Tensor) -> Tensor:
        """Tokens `[1 n]` of a step, as Hugging Face hands them to a streamer."""
        ...

    def sequences(self) -> Tensor:
        """`[b, s + n]`, see `generate`."""
        ...

    def generated(self) -> Generated: ...


def take_prompts(decoder: Decoder, request: Request) -> tuple[Tensor, Tensor]:
    """Take in what the decoder does not hold yet of the prompts; the logits `[b v]` behind them, and the best tokens `[b]`."""
    require_same_request(request, group_of_ranks(decoder))
    if request.given:
        decoder.take_context(request.given, len(request.input_ids))
    if not request.held:
        return decoder.prefill(request.input_ids, request.pad), decoder.best
    fresh = request.input_ids[:, request.held :]
    if fresh.shape[1] == 1:
        return decoder.decode(fresh[:, 0]), decoder.best
    logits = fresh
    for piece in fresh.split(EXTEND_TOKENS, 1):
        logits = decoder.extend(piece)
    return logits[:, -1], decoder.best[:, -1]


class TokenRun:
    """A `Run` that makes one token a row in each step; without stops and processors the host never waits for the device.

    Args:
        by_the_token: each token is looked at when it is made; else a decoder may make several greedy ones at once.
    """

    def __init__(self, request: Request, by_the_token: bool = True) -> None:
        self.request, self.cached, self._columns, self._by_the_token = request, 0, request.input_ids.shape[1], by_the_token
        self._scores: list[Tensor] = []
        self._logits: list[Tensor] = []

    def _begin(self) -> None:
        """Behind the start of the prompt, for which the device would wait else."""
        ids = self.request.input_ids
        self._ids = torch.cat([ids, ids.new_zeros(len(ids), self.request.new_tokens)], 1)
        self._unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)

    @torch.no_grad()
    def steps(self, decoder: Decoder) -> Iterator[Tensor]:
        """See `Run`."""
        request = self.request
        logits, best = take_prompts(decoder, request)
        self._begin()
        self.cached = self._columns
        chooser = Chooser(request, logits.shape[-1], group_of_ranks(decoder))
        tokens = self._take(logits, best, chooser)[:, None]
        while True:
            yield tokens
            chooser.add(tokens)
            left, last = request.new_tokens - self._made, tokens[:, -1]
            if not left:
                return
            if isinstance(decoder, Follower) and 1 < decoder.at_once <= left and self._is_greedy(chooser):
                tokens = self._note(decoder.follow(last).clone())  # the next steps overwrite it
            else:
                logits, best = decoder.decode(last), decoder.best
                tokens = self._take(logits, best, chooser)[:, None]
            self.cached += tokens.shape[1]

    def _is_greedy(self, chooser: Chooser) -> bool:
        """Is nothing asked between one token and the next?"""
        return not (self._by_the_token or chooser.changes_scores or self.request.output_logits or self.request.stops)

    def _take(self, logits: Tensor, best: Tensor, chooser: Chooser) -> Tensor:
        """Choose the next token `[b]` of each row, and note which rows it finishes."""
        request = self.request
        if request.output_logits:
            self._logits.append(logits.to(torch.float32, copy=True))
        if chooser.changes_scores:
            made = self._columns - request.input_ids.shape[1]
            scores = chooser.scores(logits, made, lambda: self._ids[:, : self._columns].clone())
            tokens = chooser.pick(scores)
            if request.output_scores:
                self._scores.append(scores.clone())
        else:
            tokens = best.clone()  # the next step overwrites it
        tokens = self._note(tokens[:, None])[:, 0]
        if request.stops:
            scores_so_far = tuple(self._scores) if request.output_scores else None
            ids = self._ids[:, : self._columns].clone()
            self._unfinished = self._unfinished & ~chooser.agreed(request.stops.finished(ids, request.pad, scores_so_far))
        return tokens

    def _note(self, tokens: Tensor) -> Tensor:
        """Keep new tokens `[b n]`, and note which rows they finish; filled where a row is."""
        request = self.request
        if request.eos is not None and request.pad_token_id is not None:
            ends, goes_on = torch.isin(tokens, request.eos), self._unfinished[:, None]
            if tokens.shape[1] > 1:
                goes_on = goes_on & (ends.cumsum(1) - ends.long() == 0)
            tokens = torch.where(goes_on, tokens, request.pad_token_id)
            self._unfinished = self._unfinished & ~ends.any(1)
        new = tokens.shape[1]
        self._ids[:, self._columns : self._columns + new] = tokens
        self._columns += new
        return tokens

    def is_finished(self) -> bool:
        return not bool(self._unfinished.any())

    def as_streamed(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0].cpu()

    def sequences(self) -> Tensor:
        """See `Run`."""
        ids = self._ids[:, : self._columns]
        if self.request.eos is None or self.request.asks_host:
            return ids
        return ids[:, : self.request.input_ids.shape[1] + _steps_to_finish(ids[:, -self._made :], self.request.eos)]

    @property
    def _made(self) -> int:
        return self._columns - self.request.input_ids.shape[1]

    def generated(self) -> Generated:
        """See `Run`."""
        request, sequences = self.request, self.sequences()
        steps = sequences.shape[1] - request.input_ids.shape[1]
        return Generated(
            sequences,
            tuple(self._scores[:steps]) if request.output_scores else None,
            tuple(self._logits[:steps]) if request.output_logits else None,
        )


def _steps_to_finish(new: Tensor, eos: Tensor) -> int:
    """Of the steps `[b n]`, those up to the one in which the last row finished."""
    finished = torch.isin(new, eos).cumsum(1) > 0
    return min(int((~finished.all(0)).sum()) + 1, new.shape[1])
