"""Prompts of encoder-decoders: what the encoder reads, and the tokens that the decoder goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from trilithon.capture.generation import GenerationSettings, Lengths
from trilithon.errors import CannotCache, GuardFailed, InputError
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.lookup import refuse_ragged
from trilithon.runtime.program import Expected, Program
from trilithon.runtime.prompts import check_ids, same_device
from trilithon.runtime.protocol import Decoder
from trilithon.runtime.request import GenerateArguments, Request, make_request
from trilithon.spec.assumption import Assumption

MASK = "attention_mask"


class Seq2SeqArguments(GenerateArguments, total=False):
    """The arguments of `generate` for an encoder-decoder.

    Its `attention_mask` is that of the encoder's tokens, by default all ones, as in Hugging Face. The decoder goes on from
    `decoder_input_ids [b n]`, of which `decoder_attention_mask` says what is padding; by default from
    `decoder_start_token_id`, the model's own if not given.
    """

    input_features: Tensor
    pixel_values: Tensor
    inputs_embeds: Tensor
    decoder_input_ids: Tensor | None
    decoder_attention_mask: Tensor | None
    decoder_start_token_id: int | None


@dataclass(frozen=True)
class Seq2Seq:
    """How the arguments of a call become a request.

    Attributes:
        expected: what the encoder's inputs must be, in order.
        guards: what the proofs need of them.
        settings: the model's own.
    """

    expected: Mapping[str, Expected]
    guards: tuple[Assumption, ...]
    settings: GenerationSettings

    def request(self, decoder: Decoder, first: Tensor | None, arguments: Mapping[str, Any]) -> Request:
        """Check the arguments of `generate`.

        Args:
            first: the encoder's main input, whatever its name, where it was given by place.

        Raises:
            InputError, CapacityExceeded: as `make_request` does.
            GuardFailed: an input of the encoder breaks what its masks were proved under.
        """
        self.settings.check()
        rest = {**self.settings.arguments, **arguments}
        given = self._given(decoder.device, first, rest)
        rows = len(next(iter(given.values())))
        ids, mask = self._decoder_ids(rows, decoder.device, rest)
        own = cast(GenerateArguments, {**rest, MASK: torch.ones_like(ids) if mask is None else mask})
        request = make_request(decoder.cache_tokens, decoder.device, ids, **own)
        tokens = request.input_ids.shape[1]
        lengths = Lengths(tokens, tokens + request.new_tokens, request.eos, decoder.device)
        processors = (*self.settings.make_processors(lengths), *request.processors)
        if request.lookup is not None and len(request.input_ids) > 1:
            refuse_ragged(len(request.input_ids), request.stops, bool(processors), request.eos is not None)
        return replace(request, processors=processors, given=tuple(given.values()))

    def _given(self, device: torch.device, first: Tensor | None, rest: dict[str, Any]) -> dict[str, Tensor]:
        """The encoder's inputs by name, checked; they are taken out of `rest`."""
        main = next(name for name in self.expected if name != MASK)
        value = rest.pop(main, None) if first is None else first
        if not isinstance(value, Tensor):
            raise InputError(f"generate needs {main}, a tensor", why="the encoder reads it", todo=f"pass {main}")
        if main == "input_ids":
            check_ids(value, device)
            value = value.long()
        found: dict[str, Any] = {main: value}
        mask = self._mask(value, rest)
        for name in self.expected:
            if name != main:
                found[name] = mask if name == MASK else rest.pop(name, None)
        sizes: dict[str, int] = {}
        for name, expected in self.expected.items():
            if not isinstance(found[name], Tensor) or not same_device(found[name].device, device):
                raise InputError(f"{name} must be a tensor on {device}", why="the encoder reads it there", todo=f"pass {name}")
            expected.check(name, found[name], sizes)
        self._check_guards(found)
        return {name: found[name] for name in self.expected}

    def _mask(self, main: Tensor, rest: dict[str, Any]) -> Tensor | None:
        """The mask of the encoder's tokens, where it takes one; taken out of `rest`."""
        mask = rest.pop(MASK, None)
        if MASK in self.expected:
            return (torch.ones_like(main) if mask is None else mask).to(self.expected[MASK].dtype)
        if mask is not None and not bool((mask != 0).all()):
            raise InputError(
                "the encoder takes no padding",
                why=f"the model was captured without {MASK}, or its masks were not proved with it",
                todo="pass prompts of one length, or one at a time",
            )
        return None

    def _check_guards(self, given: Mapping[str, Tensor]) -> None:
        for guard in self.guards:
            if guard.table in given and not bool(guard.holds(given[guard.table])):
                raise GuardFailed(
                    f"the compiled encoder does not apply: {guard.text} does not hold",
                    why=f"its masks were proved only under this assumption, and {guard.table} breaks it",
                    todo="pass other inputs",
                )

    def _decoder_ids(self, rows: int, device: torch.device, rest: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The decoder's prompts `[b n]` and their mask, as Hugging Face makes them; taken out of `rest`."""
        ids, mask = rest.pop("decoder_input_ids", None), rest.pop("decoder_attention_mask", None)
        start = rest.pop("decoder_start_token_id", None)
        start = self.settings.start if start is None else start
        if ids is None:
            if start is None:
                raise InputError(
                    "generate needs decoder_input_ids",
                    why="the model's configuration names no single token that its decoder starts with",
                    todo="pass decoder_input_ids [b n], e.g. a speech model's start, language and task tokens",
                )
            return torch.full((rows, 1), start, dtype=torch.int64, device=device), None
        check_ids(ids, device)
        if len(ids) != rows:
            raise InputError(
                f"decoder_input_ids has {len(ids)} rows, and the encoder {rows}", todo="pass a row for each prompt"
            )
        if self.settings.prepends and start is not None and bool((ids[:, 0] != start).all()):
            ids = torch.cat([torch.full_like(ids[:, :1], start), ids], 1)
            mask = None if mask is None else torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
        return ids, mask


def seq2seq_of(program: Program, decoder: CachedDecoder | CannotCache, settings: GenerationSettings) -> Seq2Seq | None:
    """How prompts are read by a decoder that has a context; None for others.

    Args:
        program: the call that the decoder was made of.
    """
    if isinstance(decoder, CannotCache) or decoder.context.module is None:
        return None
    expected = {name: program.expected[name] for name in decoder.context.inputs}
    return Seq2Seq(expected, tuple(guard for guard in program.guards if guard.table in expected), settings)
