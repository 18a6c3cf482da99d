"""Prefill and decode over a static KV cache; on a GPU each decode step is one CUDA graph replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trilithon.errors import CapacityExceeded
from trilithon.rewrite.insert_cache import CacheShape

Module = Callable[..., Tensor]


@dataclass(frozen=True)
class CachedModules:
    """The programs that `insert_cache` makes, lowered; each takes `(tokens, start, counts, *caches)`."""

    prefill: Module
    decode: Module


@dataclass
class _Step:
    """What a decode step of one batch size works on; the addresses stay, so that a CUDA graph can replay it."""

    tokens: Tensor
    start: Tensor
    counts: Tensor
    logits: Tensor | None = None
    graph: Any = None


@dataclass
class CachedDecoder:
    """A static KV cache and the programs over it.

    Args:
        modules: the lowered programs.
        shapes: one entry a site.
        cache_tokens: slots a row, prompt and generated tokens together.
        max_batch: rows.
        device: of the cache and the inputs.
        cuda_graphs: replay decode steps as CUDA graphs.
    """

    modules: CachedModules
    shapes: list[CacheShape]
    cache_tokens: int
    max_batch: int
    device: torch.device
    cuda_graphs: bool = False
    caches: list[Tensor] = field(init=False)
    _steps: dict[int, _Step] = field(init=False, default_factory=dict)
    _used: int = field(init=False, default=0)
    _batch: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        def zeros(shape: CacheShape, width: int) -> Tensor:
            slots = shape.slots(self.cache_tokens)
            return torch.zeros(self.max_batch, shape.g, slots, width, dtype=shape.dtype, device=self.device)

        self.caches = [zeros(shape, width) for shape in self.shapes for width in (shape.d, shape.e)]

    @property
    def cache_bytes(self) -> int:
        return sum(c.numel() * c.element_size() for c in self.caches)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, pad: Tensor) -> Tensor:
        """Fill the cache with a prompt, from empty. Padding that all rows share is cut off.

        Args:
            input_ids: `[b s]` int64, left padded.
            pad: `[b]` int64, padding tokens at the left of each row.

        Returns:
            logits `[b v]` of the last token.

        Raises:
            CapacityExceeded: more rows or tokens than the cache holds.
        """
        b, s = input_ids.shape
        if b > self.max_batch:
            raise CapacityExceeded(
                f"{b} rows do not fit a cache of {self.max_batch}",
                todo=f"compile with Options(max_batch={b})",
            )
        shared = int(pad.min())
        width = s - shared
        self._check_room(width, already=0)
        step = self._step(b)
        index = torch.arange(width, device=self.device) + pad[:, None]
        tokens = input_ids.gather(1, index.clamp_max(s - 1))  # padding comes to the right, where no token sees it
        step.start.zero_()
        counts = s - pad
        logits = self.modules.prefill(tokens, step.start, counts, *self._rows(b))
        step.start.copy_(counts)
        self._used, self._batch = width, b
        return logits[:, -1]

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token to each row.

        Args:
            tokens: `[b]` int64.

        Returns:
            logits `[b v]` for the next token, in a buffer that the next call overwrites.

        Raises:
            CapacityExceeded: the cache is full.
        """
        self._check_room(1, already=self._used)
        step = self._step(self._batch)
        step.tokens.copy_(tokens[:, None])
        if not self.cuda_graphs:
            step.logits = self._advance(step)
        else:
            if step.graph is None:
                self._record(step)
            step.graph.replay()
        self._used += 1
        assert step.logits is not None
        return step.logits[:, -1]

    def _check_room(self, tokens: int, already: int) -> None:
        if already + tokens > self.cache_tokens:
            raise CapacityExceeded(
                f"{already + tokens} tokens do not fit a cache of {self.cache_tokens}",
                todo=f"compile with max_tokens={already + tokens} or more, prompt and generated tokens together",
            )

    def _rows(self, b: int) -> list[Tensor]:
        return [cache[:b] for cache in self.caches]

    def _step(self, b: int) -> _Step:
        if b not in self._steps:
            tokens = torch.zeros(b, 1, dtype=torch.int64, device=self.device)
            self._steps[b] = _Step(tokens, torch.zeros_like(tokens[:, 0]), torch.ones_like(tokens[:, 0]))
        return self._steps[b]

    def _advance(self, step: _Step) -> Tensor:
        logits = self.modules.decode(step.tokens, step.start, step.counts, *self._rows(len(step.tokens)))
        step.start.add_(1)
        return logits

    def _record(self, step: _Step) -> None:
        """Capture one step as a CUDA graph; the warm-up runs write the slots that the replay writes again."""
        saved = step.start.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._advance(step)
                step.start.copy_(saved)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.logits = self._advance(step)
        step.start.copy_(saved)
        step.graph = graph
