"""The arguments of `generate`, checked once before the first token: every refusal and its text is here."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from trilithon.errors import CapacityExceeded, InputError
from trilithon.runtime.lookup import Lookup, make_lookup, refuse_ragged
from trilithon.runtime.prompts import check_ids, pad_left, same_device
from trilithon.runtime.protocol import LogitsProcessor, StoppingCriterion, Tokenizer
from trilithon.runtime.sampling import Sampling
from trilithon.runtime.stops import Stops, make_stops

DEFAULT_NEW_TOKENS = 20  # Hugging Face's, when neither max_new_tokens nor max_length is given


class GenerateArguments(TypedDict, total=False):
    """The keyword arguments that `generate` and `stream` share; see `generate` for their meaning."""

    attention_mask: Tensor | None
    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    tokenizer: Tokenizer | None
    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    generator: torch.Generator | None
    num_return_sequences: int
    logits_processor: Sequence[LogitsProcessor] | None
    stopping_criteria: Sequence[StoppingCriterion] | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    output_scores: bool
    output_logits: bool


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    """`GenerateArguments` with their defaults."""

    attention_mask: Tensor | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    tokenizer: Tokenizer | None = None
    do_sample: bool = False
    temperature: float | None = 1.0
    top_k: int | None = 50
    top_p: float | None = 1.0
    min_p: float | None = None
    repetition_penalty: float | None = 1.0
    seed: int | None = None
    generator: torch.Generator | None = None
    num_return_sequences: int = 1
    logits_processor: Sequence[LogitsProcessor] | None = None
    stopping_criteria: Sequence[StoppingCriterion] | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    output_scores: bool = False
    output_logits: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One checked call of `generate`.

    Attributes:
        input_ids: `[b s]` int64, left padded; b counts the returned sequences.
        pad: `[b]` int64, left padding tokens in each row, each less than s.
        new_tokens: most tokens to make for a row, >= 1.
        min_new_tokens: an `eos` token is not chosen before so many.
        eos: `[n]` int64, tokens that finish a row; None = no token does.
        pad_token_id: what a finished row is filled with; None only when `eos` is None.
        stops: what else finishes a row.
        processors: change the scores, after the penalty and before temperature, top-k, top-p and min-p.
        generator: source of randomness on the decoder's device; None = torch's own.
        lookup: speculate with drafts from the row's own tokens; None = one token a step.
        output_scores, output_logits: gather them.
        held: tokens of the (one) row that the decoder holds already.
        given: what an encoder reads, of as many rows as there are prompts; see `Decoder.take_context`.
    """

    input_ids: Tensor
    pad: Tensor
    new_tokens: int
    min_new_tokens: int
    eos: Tensor | None
    pad_token_id: int | None
    stops: Stops
    sampling: Sampling
    processors: tuple[LogitsProcessor, ...]
    generator: torch.Generator | None
    lookup: Lookup | None
    output_scores: bool
    output_logits: bool
    held: int = 0
    given: tuple[Tensor, ...] = ()

    @property
    def asks_host(self) -> bool:
        """Whether something on the host is to be called after each token, and not after others."""
        return bool(self.stops) or bool(self.processors)

    @property
    def can_stop(self) -> bool:
        return self.eos is not None or bool(self.stops)


def make_request(cache_tokens: int, device: torch.device, input_ids: Tensor, **arguments: Unpack[GenerateArguments]) -> Request:
    """Check the arguments of `generate` (see there) against a decoder's capacity and device.

    Raises:
        InputError: an argument is unknown or has a wrong type, dtype, rank, shape, device or value.
        CapacityExceeded: prompt and new tokens do not fit `cache_tokens`.
    """
    _refuse_unknown(arguments)
    a = _Arguments(**arguments)
    check_ids(input_ids, device)
    eos = [a.eos_token_id] if isinstance(a.eos_token_id, int) else list(a.eos_token_id or ())
    filler = None if a.pad_token_id in eos else a.pad_token_id  # Hugging Face's rule for reading a mask off the ids
    sampling = _sampling(a)
    copies = _count_copies(a.num_return_sequences, sampling)
    ids, pad = pad_left(input_ids, a.attention_mask, filler)
    new = _count_new_tokens(input_ids.shape[1], cache_tokens, a.max_new_tokens, a.max_length)
    stops = make_stops(a.stop_strings, a.tokenizer, a.stopping_criteria)
    processors = _processors(a.logits_processor)
    lookup = make_lookup(a.prompt_lookup_num_tokens, a.max_matching_ngram_size)
    if lookup is not None and len(input_ids) * copies > 1:
        refuse_ragged(len(input_ids) * copies, stops, bool(processors), bool(eos))
    return Request(
        input_ids=ids.repeat_interleave(copies, 0) if copies > 1 else ids.clone(),  # the caller may write to his own
        pad=pad.repeat_interleave(copies, 0) if copies > 1 else pad,
        new_tokens=new,
        min_new_tokens=_count_min_new_tokens(a.min_new_tokens, new),
        eos=torch.tensor(eos, device=device) if eos else None,
        pad_token_id=eos[0] if a.pad_token_id is None and eos else a.pad_token_id,
        stops=stops,
        sampling=sampling,
        processors=processors,
        generator=_random_source(a.seed, a.generator, device),
        lookup=lookup,
        output_scores=a.output_scores,
        output_logits=a.output_logits,
    )


def _refuse_unknown(arguments: Any) -> None:
    known = [field.name for field in fields(_Arguments)]
    unknown = [name for name in arguments if name not in known]
    if not unknown:
        return
    name, known = unknown[0], [*known, "streamer", "return_dict_in_generate"]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise InputError(
        f"generate has no argument {name} (got {name}={arguments[name]!r})",
        why="an argument that is not understood could change the tokens, so none is ignored",
        todo=f"did you mean {close[0]}? The arguments are: {', '.join(known)}"
        if close
        else f"leave it out; the arguments are: {', '.join(known)}",
    )


def _sampling(a: _Arguments) -> Sampling:
    """Hugging Face's None switches a setting off."""
    return Sampling(
        do_sample=a.do_sample,
        temperature=1.0 if a.temperature is None else a.temperature,
        top_k=0 if a.top_k is None else a.top_k,
        top_p=1.0 if a.top_p is None else a.top_p,
        min_p=0.0 if a.min_p is None else a.min_p,
        repetition_penalty=1.0 if a.repetition_penalty is None else a.repetition_penalty,
    )


def _count_copies(num_return_sequences: int, sampling: Sampling) -> int:
    if num_return_sequences < 1 or (num_return_sequences > 1 and not sampling.do_sample):
        why = "without sampling all of them would be equal" if num_return_sequences > 1 else "there would be nothing to return"
        todo = "pass num_return_sequences=1, or do_sample=True with more"
        raise InputError(f"cannot generate with num_return_sequences={num_return_sequences}", why=why, todo=todo)
    return num_return_sequences


def _count_new_tokens(prompt: int, cache_tokens: int, max_new_tokens: int | None, max_length: int | None) -> int:
    room = cache_tokens - prompt
    if max_new_tokens is not None:
        new = max_new_tokens
        if isinstance(new, bool) or not isinstance(new, int) or new < 1:
            raise InputError(f"max_new_tokens must be a whole number of tokens, 1 or more, got {new!r}", todo="pass at least 1")
    elif max_length is not None:
        new = max_length - prompt
        if new < 1:
            raise InputError(
                f"max_length={max_length} leaves no room for a new token",
                why=f"it counts the prompt too, which has {prompt} tokens",
                todo=f"pass max_length={prompt + 1} or more, or max_new_tokens=1 or more, which counts new tokens only",
            )
    else:
        new = max(1, min(DEFAULT_NEW_TOKENS, room))
    if new > room:
        fits = (
            f"pass max_new_tokens={room} or fewer" if room > 0 else f"shorten the prompt to {cache_tokens - 1} tokens or fewer"
        )
        raise CapacityExceeded(
            f"{prompt} prompt tokens and {new} new ones do not fit: {new - room} tokens too many",
            why=f"the cache was compiled for {cache_tokens} tokens a row, prompt and new tokens together",
            todo=f"{fits}, or compile with max_tokens={prompt + new} or more",
        )
    return new


def _count_min_new_tokens(least: int | None, most: int) -> int:
    if least is None:
        return 0
    if isinstance(least, bool) or not isinstance(least, int) or not 0 <= least <= most:
        raise InputError(
            f"min_new_tokens={least!r} must be a whole number between 0 and {most}",
            why=f"no row gets more than {most} new tokens",
            todo=f"pass min_new_tokens={most} or less, or raise max_new_tokens",
        )
    return least


def _processors(processors: Sequence[LogitsProcessor] | None) -> tuple[LogitsProcessor, ...]:
    for processor in processors or ():
        if not callable(processor):
            raise InputError(
                f"logits_processor holds a {type(processor).__name__}, which cannot be called",
                todo="pass a list of callables (input_ids, scores) -> scores, such as transformers' LogitsProcessor",
            )
    return tuple(processors or ())


def _random_source(seed: int | None, generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    if seed is None:
        if generator is not None and not same_device(generator.device, device):
            raise InputError(
                f"the generator is on {generator.device}, but the model was compiled for {device}",
                why="tokens are drawn where the logits are",
                todo=f"pass torch.Generator('{device}').manual_seed(0), or seed=0",
            )
        return generator
    if generator is not None:
        raise InputError(
            f"both seed={seed} and generator were given", why="each alone decides what is drawn", todo="pass one of them"
        )
    return torch.Generator(device).manual_seed(seed)
