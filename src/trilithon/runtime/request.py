"""The arguments of `generate`, checked once before the first token: every refusal and its text is here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from trilithon.errors import CapacityExceeded, InputError
from trilithon.runtime.sampling import Sampling

DEFAULT_NEW_TOKENS = 20  # Hugging Face's, when neither max_new_tokens nor max_length is given


class GenerateArguments(TypedDict, total=False):
    """The keyword arguments that `generate` and `stream` share; see `generate` for their meaning."""

    attention_mask: Tensor | None
    max_new_tokens: int | None
    max_length: int | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    seed: int | None
    generator: torch.Generator | None
    num_return_sequences: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """One checked call of `generate`.

    Attributes:
        input_ids: `[b s]` int64, left padded; b counts the returned sequences.
        pad: `[b]` int64, left padding tokens in each row, each less than s.
        new_tokens: most tokens to make for a row, >= 1.
        eos: `[n]` int64, tokens that finish a row; None = no token does.
        pad_token_id: what a finished row is filled with; None only when `eos` is None.
        generator: source of randomness on the decoder's device; None = torch's own.
    """

    input_ids: Tensor
    pad: Tensor
    new_tokens: int
    eos: Tensor | None
    pad_token_id: int | None
    sampling: Sampling
    generator: torch.Generator | None


def make_request(
    cache_tokens: int,
    device: torch.device,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float | None = 1.0,
    top_k: int | None = 50,
    top_p: float | None = 1.0,
    repetition_penalty: float | None = 1.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    num_return_sequences: int = 1,
    **unknown: object,
) -> Request:
    """Check the arguments of `generate` (see there) against a decoder's capacity and device.

    Raises:
        InputError: an argument is unknown or has a wrong type, dtype, rank, shape, device or value.
        CapacityExceeded: prompt and new tokens do not fit `cache_tokens`.
    """
    _refuse_unknown(unknown)
    _check_ids(input_ids, device)
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    filler = None if pad_token_id in eos else pad_token_id  # Hugging Face's rule for reading a mask off the ids
    sampling = _sampling(do_sample, temperature, top_k, top_p, repetition_penalty)
    copies = _count_copies(num_return_sequences, sampling)
    return Request(
        input_ids=input_ids.long().repeat_interleave(copies, 0),
        pad=_left_padding(attention_mask, input_ids, filler).repeat_interleave(copies, 0),
        new_tokens=_count_new_tokens(input_ids.shape[1], cache_tokens, max_new_tokens, max_length),
        eos=torch.tensor(eos, device=device) if eos else None,
        pad_token_id=eos[0] if pad_token_id is None and eos else pad_token_id,
        sampling=sampling,
        generator=_random_source(seed, generator, device),
    )


def _refuse_unknown(unknown: dict[str, object]) -> None:
    if not unknown:
        return
    name, value = next(iter(unknown.items()))
    parameters = inspect.signature(make_request).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY] + ["streamer"]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise InputError(
        f"generate has no argument {name} (got {name}={value!r})",
        why="an argument that is not understood could change the tokens, so none is ignored",
        todo=f"did you mean {close[0]}? The arguments are: {', '.join(known)}"
        if close
        else f"leave it out; the arguments are: {', '.join(known)}",
    )


def _check_ids(input_ids: Tensor, device: torch.device) -> None:
    if not isinstance(input_ids, Tensor):
        raise InputError(
            f"input_ids must be a tensor [b s] of token ids, got {type(input_ids).__name__}",
            todo="pass torch.tensor([[1, 2, 3]]), or tokenizer(text, return_tensors='pt').input_ids",
        )
    shape = list(input_ids.shape)
    if input_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise InputError(
            f"input_ids must hold integers, got {input_ids.dtype} {shape}",
            why="token ids are rows of the embedding table",
            todo="pass input_ids.long() if the values are ids; embeddings and text are not accepted",
        )
    if input_ids.dim() != 2:
        raise InputError(
            f"input_ids must be [b s], one row a prompt, got {shape}",
            todo="pass input_ids[None] for a single prompt" if input_ids.dim() == 1 else "pass one row of ids a prompt",
        )
    if input_ids.numel() == 0:
        raise InputError(
            f"input_ids is empty: {shape}",
            why="the first new token is read off the logits of the last prompt token",
            todo="pass at least one row with at least one token, for example the tokenizer's bos_token_id",
        )
    if not _same_device(input_ids.device, device):
        raise InputError(
            f"input_ids is on {input_ids.device}, but the model was compiled for {device}",
            todo=f"pass input_ids.to('{device}'), and attention_mask likewise",
        )
    lowest = int(input_ids.min())
    if lowest < 0:
        raise InputError(
            f"input_ids holds {lowest}",
            why="a token id is a row of the embedding table, 0 or more",
            todo="use the tokenizer's pad id with an attention_mask instead of a negative filler",
        )


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index is None or b.index is None or a.index == b.index)


def _sampling(
    do_sample: bool, temperature: float | None, top_k: int | None, top_p: float | None, repetition_penalty: float | None
) -> Sampling:
    """Hugging Face's None switches a setting off."""
    return Sampling(
        do_sample=do_sample,
        temperature=1.0 if temperature is None else temperature,
        top_k=0 if top_k is None else top_k,
        top_p=1.0 if top_p is None else top_p,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
    )


def _left_padding(mask: Tensor | None, input_ids: Tensor, filler: int | None) -> Tensor:
    """Number of left padding tokens a row, `[b]` int64 on the device of the ids; a mask of any other form is refused.

    Without a mask, tokens that equal `filler` are padding; None = no token is.
    """
    rows, tokens = input_ids.shape
    source = "attention_mask"
    if mask is None:
        if filler is None:
            return torch.zeros(rows, dtype=torch.int64, device=input_ids.device)
        mask, source = input_ids.ne(filler), f"the mask read off input_ids where pad_token_id={filler}"
    if mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask must be [b s] = {[rows, tokens]} as input_ids is, got {list(mask.shape)}",
            why="it says of each prompt token whether it is padding",
            todo="pass the attention_mask that the tokenizer returned with these input_ids",
        )
    values = mask.detach().cpu()
    if not bool(((values == 0) | (values == 1)).all()):
        raise InputError(
            f"attention_mask must hold only 0 (padding) and 1 (token), got values up to {values.max().item()}",
            todo="pass the tokenizer's attention_mask, not an additive mask or a mask of segment numbers",
        )
    padding = values == 0
    count = padding.sum(1)
    expected = torch.arange(tokens) < count[:, None]
    wrong = (padding != expected).any(1) | (count == tokens)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise _not_left_padding(padding[row], row, source)
    return count.to(input_ids.device)


def _not_left_padding(padding: Tensor, row: int, source: str) -> InputError:
    shown = " ".join("0" if p else "1" for p in padding[:24].tolist()) + (" ..." if len(padding) > 24 else "")
    tokens = padding.logical_not().nonzero().flatten().tolist()
    todo = "set tokenizer.padding_side='left' and tokenize again"
    if not tokens:
        why, todo = "the row has no token at all", "leave the row out, or give it at least one token"
    elif bool(padding[tokens[0] : tokens[-1]].any()):
        why, todo = "there is padding between tokens", "pass each row as its padding, then its tokens, without gaps"
    else:
        why = "the padding stands to the right, so the next token would follow padding"
    if source != "attention_mask":
        todo += "; or pass attention_mask yourself"
    return InputError(f"row {row} of {source} is not left padding: it reads {shown}", why=why, todo=todo)


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


def _random_source(seed: int | None, generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    if seed is None:
        if generator is not None and not _same_device(generator.device, device):
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
