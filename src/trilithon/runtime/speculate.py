"""One generation under way, several tokens a step: drafts are looked up in the rows, and checked in one call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trilithon.runtime.agree import agreed, group_of_ranks
from trilithon.runtime.choose import Chooser
from trilithon.runtime.lookup import Lookup, find_drafts
from trilithon.runtime.protocol import Decoder
from trilithon.runtime.request import Request
from trilithon.runtime.run import Generated, take_prompts


@dataclass
class _Window:
    """What a step takes in: the last token of each row, then its drafts.

    Attributes:
        tokens: `[b w]`.
        counts: `[b]`, how many of them are real, 1 at least.
        offered: drafts of each row, on the host.
    """

    tokens: Tensor
    counts: Tensor
    offered: list[int]

    @property
    def drafts(self) -> Tensor:
        return self.tokens[:, 1:]


@dataclass
class _Step:
    """What a step gave, on the host, for each row.

    Attributes:
        tokens: those chosen behind each token of the window.
        new: how many of them count.
        kept: how many of these were drafts.
        finished: whether the row is.
        found: drafts that the next step may try.
        made: new tokens before the step.
        scores, logits: `[b w v]`, kept only where they are asked for.
    """

    tokens: list[list[int]]
    new: list[int]
    kept: list[int]
    finished: list[bool]
    found: list[int]
    made: list[int]
    scores: Tensor | None
    logits: Tensor | None


class LookupRun:
    """A `Run` with prompt lookup: the rows accept different numbers of drafts. The host reads the device once a step.

    Between steps the decoder holds all tokens of each row but the last.
    """

    def __init__(self, request: Request, lookup: Lookup) -> None:
        rows, tokens = request.input_ids.shape
        device = request.input_ids.device
        self.request, self.lookup, self.drafted, self.accepted = request, lookup, 0, 0
        self._prompt = tokens - request.pad
        self._prompts: list[int] = self._prompt.tolist()  # the same on the host, as `_made` and `_done` are
        ids = torch.nn.functional.pad(request.input_ids, (0, request.new_tokens + 1))
        place = torch.arange(ids.shape[1], device=device)  # the last column takes what does not count
        self._rows = ids.gather(1, (place + request.pad[:, None]).clamp_max(ids.shape[1] - 1))
        self._lengths = self._prompt
        self._finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self._made, self._done = [0] * rows, [False] * rows
        self._blocks: list[Tensor] = []
        self._group: str | None = None
        self._steps: list[_Step] = []  # only where outputs are asked for
        ids_of_rows = request.input_ids.tolist() if request.stops.strings else []
        self._texts = [row[tokens - n :] for row, n in zip(ids_of_rows, self._prompts, strict=False)]

    @property
    def cached(self) -> int:
        return self.request.input_ids.shape[1] + max(self._made) - 1

    @torch.no_grad()
    def steps(self, decoder: Decoder) -> Iterator[Tensor]:
        """See `Run`."""
        self._group = group_of_ranks(decoder)
        logits, best = (x[:, None] for x in take_prompts(decoder, self.request))
        chooser = Chooser(self.request, logits.shape[-1], self._group)
        ones = torch.ones_like(self._lengths)
        window = _Window(self._rows[:, :1], ones, [0] * len(ones))
        while True:
            step, drafts, found = self._accept(logits, best, window, chooser)
            if any(o + 1 != n for o, n in zip(window.offered, step.new, strict=True)):
                decoder.rewind(self._lengths - 1)
            block = self._complete_columns()
            if block.shape[1]:
                yield block
            if all(self._done):
                return
            window = self._next_window(drafts, found, step, decoder.cache_tokens)
            if window.tokens.shape[1] == 1:
                logits, best = decoder.decode(window.tokens[:, 0])[:, None], decoder.best[:, None]
            else:
                logits, best = decoder.extend(window.tokens, window.counts), decoder.best

    def _accept(self, logits: Tensor, best: Tensor, window: _Window, chooser: Chooser) -> tuple[_Step, Tensor, Tensor]:
        """Append to each row the drafts that are right and one token more.

        Returns:
            What happened; the next drafts `[b n]`, and how many of them there are `[b]`.
        """
        request, width = self.request, window.tokens.shape[1]
        made = (self._lengths - self._prompt)[:, None]
        tokens, scores = chooser.window(logits, best, window.drafts, made, self._ids_of_one_row(self._made[0]))
        place = torch.arange(width, device=tokens.device)
        right = (window.drafts == tokens[:, :-1]) & (place[1:] < window.counts[:, None])
        kept = right.long().cumprod(1).sum(1)
        new = torch.minimum(kept + 1, request.new_tokens - made[:, 0])
        new, ended = _cut_at_eos(tokens, new, request.eos)
        new = torch.where(self._finished, 0, new)
        valid = place < new[:, None]
        self._rows.scatter_(1, torch.where(valid, self._lengths[:, None] + place, self._rows.shape[1] - 1), tokens)
        chooser.add(tokens, valid)
        self._lengths = self._lengths + new
        self._finished = self._finished | ended | (self._lengths - self._prompt >= request.new_tokens)
        drafts, found = find_drafts(self._rows[:, :-1], self._lengths, self.lookup)
        columns = torch.stack([new, torch.minimum(kept, new), self._finished.long(), found], 1)
        step = self._read(torch.cat([tokens, columns], 1), scores, logits)
        return step, drafts, found

    def _read(self, packed: Tensor, scores: list[Tensor], logits: Tensor) -> _Step:
        """Note what happened. Here the host waits for the device, once a step; then it says what it has to of the tokens."""
        rows = packed.tolist()
        step = _Step(
            tokens=[row[:-4] for row in rows],
            new=[row[-4] for row in rows],
            kept=[row[-3] for row in rows],
            finished=[bool(row[-2]) for row in rows],
            found=[row[-1] for row in rows],
            made=list(self._made),
            scores=torch.stack(scores, 1) if self.request.output_scores else None,
            logits=logits.to(torch.float32, copy=True) if self.request.output_logits else None,
        )
        if self.request.output_scores or self.request.output_logits:
            self._steps.append(step)
        if self.request.stops:
            self._stop(step)
        self._made = [made + new for made, new in zip(self._made, step.new, strict=True)]
        self._done = step.finished
        self.accepted += sum(step.kept)
        return step

    def _stop(self, step: _Step) -> None:
        """Cut what stands behind a token that a stop string or a criterion ends a row with."""
        cut = [self._tokens_to_stop(row, step) for row in range(len(step.new))]
        excess = [0 if n is None else step.new[row] - n for row, n in enumerate(cut)]
        stopped = [n is not None for n in cut]
        if not any(stopped):
            return
        self._lengths = self._lengths - torch.tensor(excess, device=self._lengths.device)
        self._finished = self._finished | torch.tensor(stopped, device=self._lengths.device)
        step.new = [new - n for new, n in zip(step.new, excess, strict=True)]
        step.kept = [min(kept, new) for kept, new in zip(step.kept, step.new, strict=True)]
        step.finished = [a or b for a, b in zip(step.finished, stopped, strict=True)]

    def _tokens_to_stop(self, row: int, step: _Step) -> int | None:
        """How many of a row's new tokens there are up to one that ends it; None = none does."""
        stops, new = self.request.stops, step.new[row]
        for n in range(1, new + 1):
            if stops.strings is not None:
                self._texts[row].append(step.tokens[row][n - 1])
                if stops.strings.completed_by_last(self._texts[row]):
                    return n
            if stops.criteria:  # of one row
                scores = self._outputs("scores", step.made[0] + n) if self.request.output_scores else None
                ended = stops.finished_by_criteria(self._ids_of_one_row(step.made[0] + n), scores)
                if bool(agreed(ended, self._group)):
                    return n
        return None

    def _ids_of_one_row(self, made: int) -> Tensor:
        """Prompt and so many new tokens `[1 n]`, with padding, for processors and criteria; of several rows none reads it."""
        ids = self.request.input_ids
        if len(ids) > 1 or not self.request.asks_host:
            return ids[:, :0]
        return torch.cat([ids, self._rows[:, self._prompts[0] : self._prompts[0] + made]], 1)

    def _next_window(self, drafts: Tensor, found: Tensor, step: _Step, cache_tokens: int) -> _Window:
        """The next tokens to take in: as wide as drafts are allowed to be, or one token where there are none."""
        held = [prompt + made - 1 for prompt, made in zip(self._prompts, self._made, strict=True)]
        room = min(self.lookup.drafts, cache_tokens - max(held) - 1)
        left = [self.request.new_tokens - made - 1 for made in self._made]
        offered = [0 if done else min(n, rest, room) for n, rest, done in zip(step.found, left, self._done, strict=True)]
        self.drafted += sum(offered)
        last = self._rows.gather(1, (self._lengths - 1)[:, None])
        rest = self.request.new_tokens - (self._lengths - self._prompt) - 1
        counts = 1 + torch.where(self._finished, 0, torch.minimum(found, rest).clamp_max(room))
        tokens = torch.cat([last, drafts[:, :room]], 1) if any(offered) else last
        return _Window(tokens, counts, offered)

    def _complete_columns(self) -> Tensor:
        """The new columns `[b n]` that every row has now."""
        start = sum(block.shape[1] for block in self._blocks)
        running = [made for made, done in zip(self._made, self._done, strict=True) if not done]
        place = torch.arange(start, min(running) if running else max(self._made), device=self._rows.device)
        at = self._prompt[:, None] + place
        filler = self.request.pad_token_id or 0
        block = torch.where(at < self._lengths[:, None], self._rows.gather(1, at.clamp_max(self._rows.shape[1] - 1)), filler)
        self._blocks.append(block)
        return block

    def is_finished(self) -> bool:
        return all(self._done)

    def as_streamed(self, tokens: Tensor) -> Tensor:
        return tokens.cpu()

    def sequences(self) -> Tensor:
        """See `Run`."""
        return torch.cat([self.request.input_ids, *self._blocks], 1)

    def generated(self) -> Generated:
        """See `Run`."""
        request, made = self.request, max(self._made)
        return Generated(
            self.sequences(),
            self._outputs("scores", made) if request.output_scores else None,
            self._outputs("logits", made) if request.output_logits else None,
            self.drafted,
            self.accepted,
        )

    def _outputs(self, name: str, made: int) -> tuple[Tensor, ...]:
        """The scores or logits `[b v]` of the first `made` tokens; zeros where a row has fewer."""
        cells: dict[tuple[int, int], Tensor] = {}
        for step in self._steps:
            values = getattr(step, name)
            for row, (before, new) in enumerate(zip(step.made, step.new, strict=True)):
                cells |= {(row, before + i): values[row, i] for i in range(new)}
        nothing = torch.zeros_like(cells[0, 0])
        rows = range(len(self._made))
        return tuple(torch.stack([cells.get((row, i), nothing) for row in rows]) for i in range(made))


def _cut_at_eos(tokens: Tensor, new: Tensor, eos: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the first `new [b]` tokens `[b w]` those up to the first `eos`, and whether there is one."""
    if eos is None:
        return new, torch.zeros_like(new, dtype=torch.bool)
    place = torch.arange(tokens.shape[1], device=tokens.device)
    ends = torch.isin(tokens, eos) & (place < new[:, None])
    return torch.where(ends.any(1), ends.int().argmax(1) + 1, new), ends.any(1)
