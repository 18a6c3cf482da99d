"""A compiled model that answers lines: as one ends, the next takes its row, and the others go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trilithon.batch.jobs import Answer, Id, Job, Refusal, Result
from trilithon.errors import InputError, TrilithonError
from trilithon.runtime.choose import Chooser
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.request import Request, make_request
from trilithon.runtime.slots import Slots


@dataclass
class Row:
    """A line under way.

    Attributes:
        tokens: of the prompt, then new ones.
        prompt: how many of them are the prompt's.
    """

    job: Job
    request: Request
    chooser: Chooser
    eos: frozenset[int]
    tokens: list[int]
    prompt: int

    @property
    def made(self) -> int:
        return len(self.tokens) - self.prompt

    def finish(self) -> str | None:
        """Why it ends with the last token; None = it goes on."""
        strings = self.request.stops.strings
        if self.tokens[-1] in self.eos or (strings is not None and strings.completed_by_last(self.tokens)):
            return "stop"
        return "length" if self.made == self.request.new_tokens else None

    def choose(self, logits: Tensor) -> Tensor:
        """The next token `[1]`, of logits `[1 v]`."""
        scores = self.chooser.scores(logits, self.made, lambda: torch.tensor([self.tokens], device=logits.device))
        return self.chooser.pick(scores)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        if self.chooser.seen is not None:
            self.chooser.add(torch.tensor([[token]], device=self.request.input_ids.device))


class Worker:
    """Rows of a cache and the lines in them.

    A line that fails where it is alone (its text, its prompt, its choice of a token) is refused, and the others go on.

    The tokens of a line are those that `generate` gives for it alone. What it draws, when sampling, follows from `seed` and
    its id: not from when, where, or beside which lines it is answered.

    Args:
        decoder: nobody else uses it in the meantime.
        tokenizer: None = lines give token ids, and answers have no text.
        arguments: of `generate`, for all lines.
        rows: how many lines at once; None = as many as the cache has rows.
    """

    def __init__(
        self, decoder: CachedDecoder, tokenizer: Any | None, arguments: Mapping[str, Any], seed: int, rows: int | None
    ) -> None:
        self.slots = Slots(decoder, rows or decoder.max_batch)
        self.tokenizer, self.arguments, self.seed = tokenizer, arguments, seed
        self.rows: list[Row | None] = [None] * self.slots.rows
        self._last = [0] * self.slots.rows  # the token that each row takes in next
        self._ended: list[Result] = []
        first, _ = self.slots.fill(0, torch.zeros(1, 1, dtype=torch.int64, device=decoder.device))
        self.slots.free(0)
        self.vocabulary = first.shape[-1]

    @property
    def free(self) -> int:
        """How many lines can be added now."""
        return self.rows.count(None)

    @property
    def is_busy(self) -> bool:
        """Whether `step` has something to give, now or later."""
        return bool(self._ended) or self.free < len(self.rows)

    def add(self, job: Job) -> None:
        """Begin a line in a free row. One that is refused is a result of the next step."""
        place = self.rows.index(None)
        with self._refusing(place, job):
            self._begin(place, job, self._request(job))

    def _begin(self, place: int, job: Job, request: Request) -> None:
        logits, best = self.slots.fill(place, request.input_ids)
        eos = frozenset[int]() if request.eos is None else frozenset(request.eos.tolist())
        tokens = request.input_ids[0].tolist()
        row = self.rows[place] = Row(job, request, Chooser(request, self.vocabulary), eos, tokens, len(tokens))
        self._take(place, row, int(row.choose(logits) if row.chooser.changes_scores else best))

    def step(self) -> list[Result]:
        """Make a token in each row that is taken; the lines that have ended since the last step."""
        if self.free < len(self.rows):
            logits, best = self.slots.step(torch.tensor(self._last, device=self.slots.decoder.device))
            rows = [(place, row) for place, row in enumerate(self.rows) if row is not None]
            chosen = best.clone()
            for place, row in rows:
                if row.chooser.changes_scores:
                    with self._refusing(place, row.job):
                        chosen[place : place + 1] = row.choose(logits[place : place + 1])
            tokens = chosen.tolist()
            for place, row in rows:
                if self.rows[place] is row:
                    with self._refusing(place, row.job):
                        self._take(place, row, tokens[place])
        ended, self._ended = self._ended, []
        return ended

    def _take(self, place: int, row: Row, token: int) -> None:
        row.add(token)
        self._last[place] = token
        finish = row.finish()
        if finish is not None:
            new = row.tokens[row.prompt :]
            text = None if self.tokenizer is None else str(self.tokenizer.decode(new, skip_special_tokens=True))
            self._ended.append(Answer(row.job.line, row.job.id, tuple(new), text, finish))  # type: ignore[arg-type]
            self._free(place)

    def _free(self, place: int) -> None:
        self.rows[place] = None
        self.slots.free(place)

    @contextmanager
    def _refusing(self, place: int, job: Job) -> Iterator[None]:
        """Refuse the line of a row where anything fails, but a GPU that serves no other line either."""
        try:
            yield
        except torch.AcceleratorError:
            raise
        except TrilithonError as error:
            self._refuse(place, job, f"{error.what}: {error.why}" if error.why else error.what)
        except Exception as error:  # a tokenizer may raise anything
            self._refuse(place, job, f"it failed with {type(error).__name__}: {error}")

    def _refuse(self, place: int, job: Job, reason: str) -> None:
        self._ended.append(Refusal(job.line, job.id, reason))
        self._free(place)

    def _request(self, job: Job) -> Request:
        """The line as a call of `generate`.

        Raises:
            InputError, CapacityExceeded: it cannot be answered.
        """
        decoder, given = self.slots.decoder, dict(self.arguments)
        given["seed"] = seed_of(self.seed, job.id)
        ids = torch.tensor([self._ids(job)], dtype=torch.int64, device=decoder.device)
        if job.max_new_tokens is not None:
            given["max_new_tokens"] = job.max_new_tokens
        if ids.numel():
            given["attention_mask"] = torch.ones_like(ids)
        return make_request(decoder.cache_tokens, decoder.device, ids, **given)

    def _ids(self, job: Job) -> list[int]:
        if isinstance(job.prompt, str) and self.tokenizer is None:
            raise InputError("it gives a prompt", why="the model has no tokenizer, so that lines must give input_ids")
        ids = list(self.tokenizer(job.prompt).input_ids) if isinstance(job.prompt, str) else list(job.prompt)  # type: ignore[misc]
        if max(ids, default=0) >= self.vocabulary:
            raise InputError(f"its input_ids holds {max(ids)}", why=f"the model has {self.vocabulary} tokens")
        return ids


def seed_of(seed: int, id: Id) -> int:
    """The seed of a line: 63 bits, the same wherever and whenever the line is answered."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, id]).encode()).digest()[:8], "big") >> 1
