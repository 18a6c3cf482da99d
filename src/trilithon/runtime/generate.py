"""The token loop: prefill once, then one decode step a token, with Hugging Face's argument names and output."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, Unpack, overload

from torch import Tensor

from trilithon.errors import InputError
from trilithon.runtime.protocol import Decoder, Streamer
from trilithon.runtime.request import GenerateArguments, Request, make_request
from trilithon.runtime.run import Generated, Run, TokenRun
from trilithon.runtime.speculate import LookupRun

EOS_CHECK_STEPS = 8  # how often the host asks the device whether every row has finished


@overload
def generate(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    streamer: Streamer | None = None,
    return_dict_in_generate: Literal[False] = False,
    **arguments: Unpack[GenerateArguments],
) -> Tensor: ...


@overload
def generate(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    streamer: Streamer | None = None,
    return_dict_in_generate: Literal[True],
    **arguments: Unpack[GenerateArguments],
) -> Generated: ...


def generate(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    streamer: Streamer | None = None,
    return_dict_in_generate: bool = False,
    **arguments: Unpack[GenerateArguments],
) -> Tensor | Generated:
    """Continue each prompt, token by token. Names, defaults and output are those of Hugging Face's `generate`.

    Args:
        decoder: the compiled model; what it holds is forgotten.
        input_ids: `[b s]`, integer token ids on the decoder's device, padded if the prompts differ in length.
        attention_mask: `[b s]`, 0 for padding and 1 for tokens; each row's tokens stand together, with padding to
            the left or to the right. Default: all ones, or, as in Hugging Face, `input_ids != pad_token_id` where that is
            given and is no `eos_token_id`.
        max_new_tokens: most tokens to add to a row. Default: up to `max_length`, else 20 or what the cache holds.
        max_length: most tokens of a row, prompt (with padding) included; `max_new_tokens` wins over it.
        min_new_tokens: an `eos_token_id` is not chosen before so many.
        eos_token_id: the token or tokens that finish a row. Default: none does, and no token is read on the host
            until the end.
        pad_token_id: fills finished rows. Default: the first `eos_token_id`. Without `eos_token_id` a row that something
            else finished goes on until all rows have finished, as in Hugging Face.
        stop_strings: text that finishes a row as soon as a token completes it, also across tokens; needs
        tokenizer: whose `decode` gives the text. The tokens are read on the host in each step.
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`. Defaults: greedy; when sampling,
            1.0, 50, 1.0, none. None switches one off.
        seed: makes sampling repeatable; or
        generator: the source of randomness, on the decoder's device. With `eos_token_id` it may have been drawn from
            for up to 7 steps more than were returned.
        num_return_sequences: sequences a prompt, next to each other in the output; more than 1 only when sampling.
        logits_processor: callables `(input_ids [b n], scores [b v]) -> scores`, applied behind the penalty and before
            temperature, top-k, top-p and min-p.
        stopping_criteria: callables `(input_ids [b n], scores) -> [b] bool`, called after each token; `scores` is the tuple
            gathered so far, or None without `output_scores`.
        prompt_lookup_num_tokens: guess up to so many tokens (at most 15) from what followed the row's last tokens earlier,
            and check them in one step. Greedy tokens are the same, in fewer steps where text repeats itself.
        max_matching_ngram_size: most last tokens that are looked up; default 2.
        streamer: its `put` gets the prompt `[1 s]`, then each token `[1]` (with drafts: the tokens of a step `[1 n]`),
            on the CPU; then `end`. One row only.
        return_dict_in_generate: return a `Generated`, which also has what these ask for:
        output_scores, output_logits: with drafts, zeros where a row had finished.

    Returns:
        `[b * num_return_sequences, s + n]` int64 on the decoder's device: the prompt and n new tokens, where n ends at
        the step in which the last row finished. New tokens start at column s in each row; a prompt that was padded
        at the right has its padding at the left here, so that each row is without gaps.

    Raises:
        InputError: an argument is unknown or has a wrong type, dtype, rank, shape, device or value.
        CapacityExceeded: prompt and new tokens do not fit `decoder.cache_tokens`.
    """
    request = make_request(decoder.cache_tokens, decoder.device, input_ids, **arguments)
    return answer(decoder, request, streamer, return_dict_in_generate)


def answer(decoder: Decoder, request: Request, streamer: Streamer | None, return_dict_in_generate: bool) -> Tensor | Generated:
    """What `generate` returns for a checked call."""
    if not return_dict_in_generate:
        request = without_outputs(request)
    run = run_to_end(decoder, request, streamer, shown=request.input_ids)
    return run.generated() if return_dict_in_generate else run.sequences()


def without_outputs(request: Request) -> Request:
    """The request of a caller who gets only the sequences; warns if it asks for more."""
    if request.output_scores or request.output_logits:
        unused = "output_scores" if request.output_scores else "output_logits"
        warnings.warn(f"{unused} has no effect without return_dict_in_generate=True", stacklevel=3)
    return replace(request, output_scores=False, output_logits=False)


def run_to_end(decoder: Decoder, request: Request, streamer: Streamer | None, shown: Tensor) -> Run:
    """Make all tokens of a request.

    Args:
        shown: `[b s]`, what a streamer gets as the prompt.
    """
    if streamer is not None:
        _check_one_row(request)
        streamer.put(shown.cpu())
    run = make_run(request, by_the_token=streamer is not None)
    seldom = streamer is None and not request.asks_host
    for n, tokens in enumerate(run.steps(decoder), start=1):
        if streamer is not None:
            streamer.put(run.as_streamed(tokens))
        now = not seldom or n % EOS_CHECK_STEPS == 0 or tokens.shape[1] >= EOS_CHECK_STEPS
        if request.can_stop and now and run.is_finished():
            break
    if streamer is not None:
        streamer.end()
    return run


def stream(decoder: Decoder, input_ids: Tensor, **arguments: Unpack[GenerateArguments]) -> Iterator[Tensor]:
    """Yield the new tokens of each step as they are made; the arguments are those of `generate`, checked at the call.

    Returns:
        An iterator of `[b]` int64 on the decoder's device; it ends when every row has finished. Joined, its tokens are
        the new tokens that `generate` returns.

    Raises:
        InputError, CapacityExceeded: as `generate` does.
    """
    return stream_answer(decoder, make_request(decoder.cache_tokens, decoder.device, input_ids, **arguments))


def stream_answer(decoder: Decoder, request: Request) -> Iterator[Tensor]:
    """What `stream` yields for a checked call."""
    run = make_run(request)
    for tokens in run.steps(decoder):
        yield from tokens.unbind(1)
        if request.can_stop and run.is_finished():
            return


def make_run(request: Request, by_the_token: bool = True) -> Run:
    return TokenRun(request, by_the_token) if request.lookup is None else LookupRun(request, request.lookup)


def _check_one_row(request: Request) -> None:
    rows = len(request.input_ids)
    if rows > 1:
        raise InputError(
            f"a streamer takes one row, got {rows}",
            why="it receives the tokens of a step without saying which row each belongs to",
            todo="pass one prompt, or iterate over stream(...), which yields the tokens of all rows",
        )
