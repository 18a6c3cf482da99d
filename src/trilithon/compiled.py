"""What `trilithon.compile` returns: call it for logits, or let it generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack, cast, overload

import torch
from torch import Tensor

from trilithon.errors import CannotCache, CannotLower, InputError
from trilithon.options import Options
from trilithon.report.report import Report
from trilithon.runtime.conversation import Conversation
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.generate import answer, stream_answer
from trilithon.runtime.memory import Memory, Tenant
from trilithon.runtime.program import Program
from trilithon.runtime.protocol import Streamer
from trilithon.runtime.request import GenerateArguments, Request, make_request
from trilithon.runtime.run import Generated
from trilithon.runtime.seq2seq import Seq2Seq, Seq2SeqArguments
from trilithon.stages import StartUp

Build = Callable[[tuple[str, ...]], tuple[Program, Report]]


@dataclass(frozen=True)
class Origin:
    """Where a compiled model comes from; its artefact says so.

    Attributes:
        model: see `trilithon.capture.hf.source_of`.
        backend, options: that it was compiled with.
        versions: that it was compiled with; empty = those of this process.
        tuned: settings of generated kernels by GPU, of one that was loaded.
    """

    model: Mapping[str, Any]
    backend: str
    options: Options
    versions: Mapping[str, str] = field(default_factory=dict)
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Compiled:
    """A compiled model.

    Attributes:
        report: what was proved, rewritten and chosen.
        max_tokens: capacity of a row of the KV cache, prompt and generated tokens together.
        defaults: arguments of `generate` that the model's own configuration gives.
        cached: prefill and decode over the KV cache, or the reason why there is none.
        seq2seq: how prompts of an encoder-decoder are read; None for others.
        origin: what it was compiled from, and how; None where nobody said.
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
        seq2seq: Seq2Seq | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.report = report
        self.reports = dict.fromkeys(programs, report)
        self.max_tokens, self.defaults = max_tokens, defaults
        self._programs, self._build, self.cached = programs, build, decoder
        self.seq2seq, self.origin = seq2seq, origin

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
            return self.program  # it says what it takes
        program, report = self._build(names)
        self._programs[program.inputs], self.reports[program.inputs] = program, report
        return program

    @property
    def program(self) -> Program:
        """The call that was compiled first, as its fast and its general module.

        Raises:
            CannotLower: it was loaded from a folder that holds no program for single calls.
        """
        if not self._programs:
            raise CannotLower(
                "cannot run a single call",
                why="only prefill and decode were saved",
                todo="use generate; or call the compiled model once before it is saved, and that call is saved too",
            )
        return next(iter(self._programs.values()))

    @property
    def programs(self) -> list[Program]:
        """Every call that was compiled."""
        return list(self._programs.values())

    @property
    def decoder(self) -> CachedDecoder:
        """Prefill and decode over the static KV cache.

        Raises:
            CannotCache: no cache could be inserted soundly; says which node stands in the way.
        """
        if isinstance(self.cached, CannotCache):
            raise self.cached
        return self.cached

    @property
    def start_up(self) -> StartUp:
        """How long each stage of its compilation took; of one that was loaded, when it was compiled."""
        return self.report.start_up

    @property
    def guard_failures(self) -> int:
        """How many calls did not meet a guard and ran the general program."""
        return sum(p.guard_failures for p in self._programs.values())

    @cached_property
    def memory(self) -> Memory:
        """The decoder, and whose tokens it holds.

        Raises:
            CannotCache: as `decoder` does.
        """
        return Memory(self.decoder)

    @overload
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        streamer: Streamer | None = None,
        return_dict_in_generate: Literal[False] = False,
        **arguments: Unpack[Seq2SeqArguments],
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        streamer: Streamer | None = None,
        return_dict_in_generate: Literal[True],
        **arguments: Unpack[Seq2SeqArguments],
    ) -> Generated: ...

    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        streamer: Streamer | None = None,
        return_dict_in_generate: bool = False,
        **arguments: Unpack[Seq2SeqArguments],
    ) -> Tensor | Generated:
        """Continue each prompt; see `trilithon.runtime.generate.generate` for the arguments, which are Hugging Face's.

        An encoder-decoder takes what its encoder reads as `input_ids` (or by its name, e.g. `input_features`) and
        `attention_mask`, and the arguments of `Seq2SeqArguments` for its decoder; the encoder runs once.

        Returns:
            `[b, s + n]` int64, prompt included (of an encoder-decoder that of the decoder); or a `Generated` with scores,
            logits and counts of accepted drafts.

        Raises:
            CannotCache: this model has no KV cache.
            InputError, CapacityExceeded: an argument is wrong, or does not fit `max_tokens`.
        """
        with self.memory.visit() as decoder:
            return answer(decoder, self._request(input_ids, arguments), streamer, return_dict_in_generate)

    def stream(self, input_ids: Tensor | None = None, **arguments: Unpack[Seq2SeqArguments]) -> Iterator[Tensor]:
        """Yield the new tokens `[b]` of each step as they are made; arguments as in `generate`."""
        return self._stream(stream_answer(self.memory.decoder, self._request(input_ids, arguments)))

    def _request(self, input_ids: Tensor | None, arguments: Seq2SeqArguments) -> Request:
        decoder, given = self.memory.decoder, {**self.defaults, **arguments}
        if self.seq2seq is not None:
            return self.seq2seq.request(decoder, input_ids, given)
        return make_request(decoder.cache_tokens, decoder.device, input_ids, **cast(GenerateArguments, given))  # type: ignore[arg-type]

    def _stream(self, steps: Iterator[Tensor]) -> Iterator[Tensor]:
        """Between two tokens the decoder may serve others."""
        tenant = Tenant()
        try:
            while True:
                with self.memory.turn(tenant):
                    tokens = next(steps, None)
                if tokens is None:
                    return
                yield tokens
        finally:
            self.memory.forget(tenant)

    def conversation(self) -> Conversation:
        """Open a conversation: its `generate` appends tokens and goes on from what the cache holds.

        Raises:
            CannotCache: this model has no KV cache.
            InputError: it is an encoder-decoder.
        """
        if self.seq2seq is not None:
            raise InputError(
                "an encoder-decoder holds no conversation",
                why="what its encoder read cannot be appended to",
                todo="use generate; decoder_input_ids goes on from what was generated",
            )
        return Conversation(self.memory, self.defaults)

    def save(self, folder: str | Path, tokenizer: Any | None = None) -> Path:
        """Write programs, weights, proofs and all else that `trilithon.load` needs; see `trilithon.artefact.save`."""
        from trilithon.artefact import save

        return save(self, folder, tokenizer)

    def __repr__(self) -> str:
        cache = "no cache" if isinstance(self.cached, CannotCache) else f"cache of {self.max_tokens} tokens"
        return f"<trilithon.Compiled {self.report.model}: {len(self.report.sites)} attention sites, {cache}>"
