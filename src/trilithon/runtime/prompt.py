"""Prompts replayed as CUDA graphs: lengths are padded to few sizes, and a size that comes again is recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trilithon.lower.cuda_graph import captured

BUCKET = 64  # prompts are padded to a multiple of so many tokens
MOST_GRAPHS = 32  # of all sizes up to 2048 tokens; with Llama-3.2-1B they hold 0.2 GB together
log = logging.getLogger(__name__)


def bucket(tokens: int, most: int) -> int:
    """How many tokens a prompt is padded to: the next multiple of `BUCKET`, or none where that is beyond `most`."""
    padded = -(-tokens // BUCKET) * BUCKET
    return padded if padded <= most else tokens


@dataclass(frozen=True)
class _Recorded:
    """A graph, what it reads beside the caches, and the logits `[b 1 v]` that it writes.

    Attributes:
        inputs: tokens, start and counts, at the addresses that the graph knows; held for as long as it may be replayed.
    """

    inputs: tuple[Tensor, ...]
    graph: Any
    logits: Tensor

    def replay(self, *given: Tensor) -> Tensor:
        for own, now in zip(self.inputs, given, strict=True):
            own.copy_(now)
        self.graph.replay()
        return self.logits


@dataclass
class PromptGraphs:
    """Runs prompts; called as the program of prompts is, with caches whose addresses stay until `drop`.

    The first prompt of a number of rows and tokens runs as it is, the second is captured, the others are replayed. Graphs
    share their memory: logits are valid until the next prompt. Where a capture fails, none is tried again, and a warning
    says why.

    Attributes:
        prefill: `(tokens, start, counts, *caches)` to logits `[b 1 v]`.
    """

    prefill: Callable[..., Tensor]
    _seen: set[tuple[int, ...]] = field(init=False, default_factory=set)
    _graphs: dict[tuple[int, ...], _Recorded] = field(init=False, default_factory=dict)  # the least recently used first
    _refused: bool = field(init=False, default=False)

    def __call__(self, tokens: Tensor, start: Tensor, counts: Tensor, *caches: Tensor) -> Tensor:
        """See `run`."""
        return self.run(tokens, start, counts, caches)

    def run(self, tokens: Tensor, start: Tensor, counts: Tensor, caches: Iterable[Tensor]) -> Tensor:
        """Logits `[b 1 v]`.

        Args:
            tokens: `[b s]`, s as `bucket` gives it.
            start: `[b]`, zeros.
            counts: `[b]`, tokens of each row without its padding.
            caches: not looked at where a graph is replayed.
        """
        size = tuple(tokens.shape)
        recorded = self._graphs.pop(size, None)
        if recorded is None and size in self._seen and not self._refused:
            recorded = self._record(tokens, start, counts, caches)
        self._seen.add(size)
        if recorded is None:
            return self.prefill(tokens, start, counts, *caches)
        self._keep(size, recorded)
        return recorded.replay(tokens, start, counts)

    def drop(self) -> None:
        """Forget all graphs: the caches are at other addresses."""
        self._graphs.clear()

    def _keep(self, size: tuple[int, ...], recorded: _Recorded) -> None:
        self._graphs[size] = recorded
        if len(self._graphs) > MOST_GRAPHS:
            oldest = next(iter(self._graphs))
            del self._graphs[oldest]
            self._seen.discard(oldest)  # it must come twice again

    def _record(self, tokens: Tensor, start: Tensor, counts: Tensor, caches: Iterable[Tensor]) -> _Recorded | None:
        with torch.inference_mode(False):  # they outlive the mode that the caller is in
            own = tuple(x.clone() for x in (tokens, start, counts))
        pool = next((kept.graph.pool() for kept in self._graphs.values()), None)
        try:
            graph, logits = captured(lambda: self.prefill(*own, *caches), pool=pool)
        except RuntimeError as error:
            self._refused = True
            reason = next(iter(str(error).splitlines()), "no message")
            log.warning("prompts run without CUDA graphs from now on: %s: %s", type(error).__name__, reason)
            return None
        return _Recorded(own, graph, logits)
