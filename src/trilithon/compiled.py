"""What `trilithon.compile` returns: call it for logits, or let it generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from trilithon.errors import CannotCache
from trilithon.report.report import Report
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.generate import Streamer, generate, stream
from trilithon.runtime.program import Program
from trilithon.runtime.request import GenerateArguments

Build = Callable[[tuple[str, ...]], tuple[Program, Report]]


class Compiled:
    """A compiled model.

    Attributes:
        report: what was proved, rewritten and chosen.
        max_tokens: capacity of a row of the KV cache, prompt and generated tokens together.
    """

    def __init__(
        self,
        *,
        programs: dict[tuple[str, ...], Program],
        report: Report,
        build: Build | None,
        decoder: CachedDecoder | CannotCache,
        max_tokens: int,
        defaults: dict[str, Any],
    ) -> None:
        self.report = report
        self.reports = {next(iter(programs)): report}
        self.max_tokens = max_tokens
        self._programs, self._build, self._decoder, self._defaults = programs, build, decoder, defaults

    def __call__(self, input_ids: Tensor | None = None, **tensors: Tensor) -> Any:
        """The model's output without a cache, e.g. logits `[b s v]` of a causal LM.

        A call with other inputs than those compiled (say with `attention_mask`) compiles that call first; its
        report is then in `reports`.

        Raises:
            InputError: an input is missing, unknown, or of another dtype or rank than was captured.
            GuardFailed: see `Options.when_guard_fails`.
        """
        given = {"input_ids": input_ids, **tensors} if input_ids is not None else dict(tensors)
        if tuple(given) == ("input_ids",) and isinstance(input_ids, Tensor) and input_ids.dim() == 2 and self._has_positions:
            given["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        return self._program(tuple(given))(**given)

    @property
    def _has_positions(self) -> bool:
        return any(set(inputs) == {"input_ids", "position_ids"} for inputs in self._programs)

    def _program(self, names: tuple[str, ...]) -> Program:
        for inputs, program in self._programs.items():
            if set(inputs) == set(names):
                return program
        if self._build is None:
            return next(iter(self._programs.values()))  # it says what it takes
        program, report = self._build(names)
        self._programs[program.inputs], self.reports[program.inputs] = program, report
        return program

    @property
    def program(self) -> Program:
        """The call that was compiled first, as its fast and its general module."""
        return next(iter(self._programs.values()))

    @property
    def decoder(self) -> CachedDecoder:
        """Prefill and decode over the static KV cache.

        Raises:
            CannotCache: no cache could be inserted soundly; says which node stands in the way.
        """
        if isinstance(self._decoder, CannotCache):
            raise self._decoder
        return self._decoder

    @property
    def guard_failures(self) -> int:
        """How many calls did not meet a guard and ran the general program."""
        return sum(p.guard_failures for p in self._programs.values())

    def generate(
        self, input_ids: Tensor, *, streamer: Streamer | None = None, **arguments: Unpack[GenerateArguments]
    ) -> Tensor:
        """Continue each prompt; see `trilithon.runtime.generate.generate` for the arguments, which are Hugging Face's.

        Returns:
            `[b, s + n]` int64, prompt included.

        Raises:
            CannotCache: this model has no KV cache.
            InputError, CapacityExceeded: an argument is wrong, or does not fit `max_tokens`.
        """
        decoder = self.decoder
        return generate(decoder, input_ids, streamer=streamer, **{**self._defaults, **arguments})

    def stream(self, input_ids: Tensor, **arguments: Unpack[GenerateArguments]) -> Iterator[Tensor]:
        """Yield the new tokens `[b]` of each step as they are made; arguments as in `generate`."""
        return stream(self.decoder, input_ids, **{**self._defaults, **arguments})

    def __repr__(self) -> str:
        cache = "no cache" if isinstance(self._decoder, CannotCache) else f"cache of {self.max_tokens} tokens"
        return f"<trilithon.Compiled {self.report.model}: {len(self.report.sites)} attention sites, {cache}>"
