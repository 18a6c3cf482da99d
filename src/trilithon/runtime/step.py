"""A single step of a decoder, run as it is or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trilithon.lower.cuda_graph import captured

Decode = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class Step:
    """What a step of one batch size works on; the addresses stay, so that a CUDA graph can replay it.

    Attributes:
        tokens: `[b 1]`, taken in.
        start: `[b]`, tokens that each row holds; a step adds 1.
        counts: `[b]`, ones.
        made: with a graph, what it writes: logits `[b 1 v]`, and the best token `[b]` of each row.
    """

    tokens: Tensor
    start: Tensor
    counts: Tensor
    made: tuple[Tensor, Tensor] | None = None
    graph: Any = None

    def run(self, decode: Decode, held: Sequence[Tensor], as_graph: bool) -> tuple[Tensor, Tensor]:
        """Logits `[b 1 v]` and the best tokens `[b]`.

        Args:
            held: context and caches, at the addresses that they had when the graph was recorded.
        """
        if not as_graph:
            return self._advance(decode, held)
        if self.graph is None:
            self._record(decode, held)
        assert self.made is not None
        self.graph.replay()
        return self.made

    def _advance(self, decode: Decode, held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        logits, best = decode(self.tokens, self.start, self.counts, *held)
        self.start.add_(1)
        return logits, best

    def _record(self, decode: Decode, held: Sequence[Tensor]) -> None:
        """Capture one step; runs before that write the slots that the replay writes again."""
        saved = self.start.clone()
        self.graph, self.made = captured(lambda: self._advance(decode, held), undo=lambda: self.start.copy_(saved))
