"""Steps of a decoder, one or several at once, run as they are or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trilithon.lower.cuda_graph import captured

Decode = Callable[..., tuple[Tensor, Tensor]]
AT_ONCE = 8  # greedy steps of one graph; runs before its capture write so far ahead, which a ring's spare slots allow


@dataclass(frozen=True)
class Views:
    """Tensors that are made when somebody reads them: dozens of views take the host longer than a replay."""

    make: Callable[[], Iterable[Tensor]]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.make())


@dataclass
class Step:
    """What a step of one batch size works on; the addresses stay, so that a CUDA graph can replay it.

    Attributes:
        tokens: `[b 1]`, taken in.
        start: `[b]`, tokens that each row holds; a step adds 1.
        counts: `[b]`, ones.
        starts: `[AT_ONCE b]`, of several steps; rows begin at multiples of 16 bytes, for which kernels are compiled.
        recorded: by the number of steps, a graph and what it writes.
    """

    tokens: Tensor
    start: Tensor
    counts: Tensor
    starts: Tensor
    recorded: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def run(self, decode: Decode, held: Iterable[Tensor], as_graph: bool) -> tuple[Tensor, Tensor]:
        """Logits `[b 1 v]` and the best tokens `[b]`.

        Args:
            held: context and caches, at the addresses that they had when the graph was recorded; not read by a replay.
        """
        run = partial(self._one, decode, held)
        made: tuple[Tensor, Tensor] = self._replayed(1, run) if as_graph else run()
        return made

    def follow(self, decode: Decode, held: Iterable[Tensor], as_graph: bool) -> Tensor:
        """The best tokens `[b AT_ONCE]` of as many steps, of which each takes in that of the one before."""
        run = partial(self._chain, decode, held)
        made: Tensor = self._replayed(AT_ONCE, run) if as_graph else run()
        return made

    def _one(self, decode: Decode, held: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        logits, best = decode(self.tokens, self.start, self.counts, *held)
        self.start.add_(1)
        return logits, best

    def _chain(self, decode: Decode, held: Iterable[Tensor]) -> Tensor:
        """Between steps no kernel but theirs: all starts are made first."""
        torch.add(self.start, torch.arange(AT_ONCE, device=self.start.device)[:, None], out=self.starts)
        tokens, made = self.tokens, []
        for start in self.starts:
            _, best = decode(tokens, start, self.counts, *held)
            made.append(best)
            tokens = best[:, None]
        self.start.add_(AT_ONCE)
        return torch.stack(made, 1)

    def _replayed(self, steps: int, run: Callable[[], Any]) -> Any:
        """Recorded when first called: runs before that write the slots that the replay writes again. Graphs share memory."""
        if steps not in self.recorded:
            saved = self.start.clone()
            pool = next((graph.pool() for graph, _ in self.recorded.values()), None)
            self.recorded[steps] = captured(run, undo=lambda: self.start.copy_(saved), pool=pool)
        graph, made = self.recorded[steps]
        graph.replay()
        return made


def make_step(rows: int, device: torch.device) -> Step:
    """Of so many rows, which hold nothing; it outlives the mode that the caller is in."""
    with torch.inference_mode(False):
        tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        starts = torch.zeros(AT_ONCE, rows + rows % 2, dtype=torch.int64, device=device)[:, :rows]
        return Step(tokens, torch.zeros_like(tokens[:, 0]), torch.ones_like(tokens[:, 0]), starts)
