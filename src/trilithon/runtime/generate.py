"""The token loop: prefill once, then one decode step a token, with Hugging Face's argument names and output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, Unpack

import torch
from torch import Tensor

from trilithon.errors import InputError
from trilithon.runtime.request import GenerateArguments, Request, make_request
from trilithon.runtime.sampling import SeenTokens, next_tokens

EOS_CHECK_STEPS = 8  # how often the host asks the device whether every row has finished


class Decoder(Protocol):
    """A compiled prefill and decode over one static KV cache.

    Attributes:
        cache_tokens: capacity of a row of the cache, prompt and generated tokens together.
        device: where ids go in and logits come out.
    """

    @property
    def cache_tokens(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def prefill(self, input_ids: Tensor, pad: Tensor) -> Tensor:
        """Reset the cache, take in the prompts and return the logits of their last position.

        Args:
            input_ids: `[b s]` int64, left padded.
            pad: `[b]` int64, left padding tokens in each row.

        Returns:
            `[b v]`; may be a buffer that the next call overwrites.
        """
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Take in one token `[b]` int64 a row and return the logits `[b v]` of the next position, as `prefill` does."""
        ...


class Streamer(Protocol):
    """What receives tokens while they are made; transformers' `TextStreamer` is one."""

    def put(self, value: Tensor, /) -> None: ...

    def end(self) -> None: ...


def generate(
    decoder: Decoder, input_ids: Tensor, *, streamer: Streamer | None = None, **arguments: Unpack[GenerateArguments]
) -> Tensor:
    """Continue each prompt, token by token. Names, defaults and output are those of Hugging Face's `generate`.

    Args:
        decoder: the compiled model; its cache is reset.
        input_ids: `[b s]`, integer token ids on the decoder's device, left padded if the prompts differ in length.
        attention_mask: `[b s]`, 0 for padding and 1 for tokens, each row zeros then ones. Default: all ones, or, as
            in Hugging Face, `input_ids != pad_token_id` where that is given and is no `eos_token_id`.
        max_new_tokens: most tokens to add to a row. Default: up to `max_length`, else 20 or what the cache holds.
        max_length: most tokens of a row, prompt (with padding) included; `max_new_tokens` wins over it.
        eos_token_id: the token or tokens that finish a row. Default: none does, and no token is read on the host
            until the end.
        pad_token_id: fills finished rows. Default: the first `eos_token_id`.
        do_sample, temperature, top_k, top_p, repetition_penalty: see `Sampling`. Defaults: greedy; when sampling,
            1.0, 50, 1.0, 1.0. None switches one off.
        seed: makes sampling repeatable; or
        generator: the source of randomness, on the decoder's device. With `eos_token_id` it may have been drawn from
            for up to 7 steps more than were returned.
        num_return_sequences: sequences a prompt, next to each other in the output; more than 1 only when sampling.
        streamer: its `put` gets the prompt `[1 s]`, then each token `[1]`, on the CPU; then `end`. One row only.

    Returns:
        `[b * num_return_sequences, s + n]` int64 on the decoder's device: the prompt and n new tokens, where n ends at
        the step in which the last row finished.

    Raises:
        InputError: an argument is unknown or has a wrong type, dtype, rank, shape, device or value.
        CapacityExceeded: prompt and new tokens do not fit `decoder.cache_tokens`.
    """
    request = make_request(decoder.cache_tokens, decoder.device, input_ids, **arguments)
    if streamer is not None:
        _check_one_row(request)
        streamer.put(request.input_ids.cpu())
    check_steps = EOS_CHECK_STEPS if streamer is None else 1
    columns: list[Tensor] = []
    for tokens, unfinished in _steps(decoder, request):
        columns.append(tokens)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if request.eos is not None and len(columns) % check_steps == 0 and not bool(unfinished.any()):
            break
    if streamer is not None:
        streamer.end()
    new = torch.stack(columns, 1)
    return torch.cat([request.input_ids, new if request.eos is None else _trim(new, request.eos)], 1)


def stream(decoder: Decoder, input_ids: Tensor, **arguments: Unpack[GenerateArguments]) -> Iterator[Tensor]:
    """Yield the new tokens of each step as they are made; the arguments are those of `generate`, checked at the call.

    Returns:
        An iterator of `[b]` int64 on the decoder's device; it ends when every row has finished. Joined, its tokens are
        the new tokens that `generate` returns.

    Raises:
        InputError, CapacityExceeded: as `generate` does.
    """
    return _stream(decoder, make_request(decoder.cache_tokens, decoder.device, input_ids, **arguments))


def _stream(decoder: Decoder, request: Request) -> Iterator[Tensor]:
    for tokens, unfinished in _steps(decoder, request):
        yield tokens
        if request.eos is not None and not bool(unfinished.any()):
            return


@torch.no_grad()
def _steps(decoder: Decoder, request: Request) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens `[b]` of each step and which rows go on `[b]` bool; the host never waits for the device."""
    logits = decoder.prefill(request.input_ids, request.pad)
    seen = _seen_prompt(request, logits) if request.sampling.penalises else None
    unfinished = torch.ones(len(request.input_ids), dtype=torch.bool, device=logits.device)
    for left in reversed(range(request.new_tokens)):
        tokens = next_tokens(logits, request.sampling, seen.mask if seen else None, request.generator)
        if request.eos is not None and request.pad_token_id is not None:
            tokens = torch.where(unfinished, tokens, request.pad_token_id)
            unfinished = unfinished & ~torch.isin(tokens, request.eos)
        yield tokens, unfinished
        if seen:
            seen.add(tokens[:, None])
        if left:
            logits = decoder.decode(tokens)


def _seen_prompt(request: Request, logits: Tensor) -> SeenTokens:
    rows, vocabulary = logits.shape
    seen = SeenTokens(rows, vocabulary, logits.device)
    positions = torch.arange(request.input_ids.shape[1], device=logits.device)
    seen.add(request.input_ids, valid=positions >= request.pad[:, None])
    return seen


def _trim(new: Tensor, eos: Tensor) -> Tensor:
    """Cut the steps `[b n]` after the one in which the last row finished."""
    finished = torch.isin(new, eos).cumsum(1) > 0
    unfinished_steps = int((~finished.all(0)).sum())
    return new[:, : unfinished_steps + 1]


def _check_one_row(request: Request) -> None:
    rows = len(request.input_ids)
    if rows > 1:
        raise InputError(
            f"a streamer takes one row, got {rows}",
            why="it receives the tokens of a step without saying which row each belongs to",
            todo="pass one prompt, or iterate over stream(...), which yields the tokens of all rows",
        )
