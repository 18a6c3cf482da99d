"""Prompts of unlike lengths: which of their tokens are padding, and how they are brought to one form."""

from __future__ import annotations

import torch
from torch import Tensor

from trilithon.errors import InputError


def check_ids(input_ids: Tensor, device: torch.device) -> None:
    """Refuse what is not `[b s]` of token ids on the device."""
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
    if not same_device(input_ids.device, device):
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


def same_device(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index is None or b.index is None or a.index == b.index)


def pad_left(input_ids: Tensor, mask: Tensor | None, filler: int | None) -> tuple[Tensor, Tensor]:
    """The prompts with all their padding at the left.

    Args:
        input_ids: `[b s]`, of which each row is padding, then tokens, then padding; either padding may be none.
        mask: `[b s]`, 0 for padding and 1 for tokens. None: the tokens that equal `filler` are padding.
        filler: None = without a mask no token is padding.

    Returns:
        The ids `[b s]` int64, each row moved to the right by its padding there (which comes round to the left); and the
        number of padding tokens in each row, `[b]` int64, on the device of the ids.

    Raises:
        InputError: the mask has another form.
    """
    rows, tokens = input_ids.shape
    ids, source = input_ids.long(), "attention_mask"
    if mask is None:
        if filler is None:
            return ids, torch.zeros(rows, dtype=torch.int64, device=ids.device)
        mask, source = input_ids.ne(filler), f"the mask read off input_ids where pad_token_id={filler}"
    real = _real_tokens(mask, rows, tokens)
    count, first = real.sum(1), real.int().argmax(1)
    place = torch.arange(tokens)
    wrong = (real != (place >= first[:, None]) & (place < (first + count)[:, None])).any(1) | (count == 0)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise _hole(real[row], row, source)
    right = tokens - first - count
    if bool(right.any()):
        ids = ids.gather(1, ((place - right[:, None]) % tokens).to(ids.device))
    return ids, (tokens - count).to(ids.device)


def _real_tokens(mask: Tensor, rows: int, tokens: int) -> Tensor:
    """The mask as `[b s]` bool on the host."""
    if mask.shape != (rows, tokens):
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
    return values == 1


def _hole(real: Tensor, row: int, source: str) -> InputError:
    shown = " ".join("1" if r else "0" for r in real[:24].tolist()) + (" ..." if len(real) > 24 else "")
    if bool(real.any()):
        what, why = "has padding between tokens", "a row is its padding, then its tokens without gaps, then padding"
        todo = "pass each row without gaps"
    else:
        what, why, todo = "is all padding", "the row has no token at all", "leave the row out, or give it at least one token"
    if source != "attention_mask":
        todo += "; or pass attention_mask yourself"
    return InputError(f"row {row} of {source} {what}: it reads {shown}", why=why, todo=todo)
