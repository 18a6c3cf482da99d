"""Prompt lookup: what follows an n-gram earlier in a row is a guess at what follows it now."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilithon.errors import InputError
from trilithon.runtime.stops import Stops

DEFAULT_NGRAM = 2  # Hugging Face's
MOST_DRAFTS = 15  # a step takes in 16 tokens: the one just chosen and these


@dataclass(frozen=True)
class Lookup:
    """How drafts are looked up in what a row holds.

    Attributes:
        drafts: most tokens that are guessed at once.
        ngram: most last tokens that are looked for; fewer where so many are not found, 1 at least.
    """

    drafts: int
    ngram: int


def make_lookup(drafts: int | None, ngram: int | None) -> Lookup | None:
    """Check `prompt_lookup_num_tokens` and `max_matching_ngram_size`; None = no lookup.

    Raises:
        InputError: one of them is out of its range, or the second was given alone.
    """
    if drafts is None:
        if ngram is not None:
            raise InputError(
                f"max_matching_ngram_size={ngram} was given without prompt_lookup_num_tokens",
                why="it says how drafts are looked up, and none are",
                todo="pass prompt_lookup_num_tokens=10 too, or leave it out",
            )
        return None
    if isinstance(drafts, bool) or not isinstance(drafts, int) or not 1 <= drafts <= MOST_DRAFTS:
        raise InputError(
            f"prompt_lookup_num_tokens={drafts!r} must be a whole number between 1 and {MOST_DRAFTS}",
            why=f"a step takes in {MOST_DRAFTS + 1} tokens at most: the last one and the drafts",
            todo="10 is a good value",
        )
    ngram = DEFAULT_NGRAM if ngram is None else ngram
    if isinstance(ngram, bool) or not isinstance(ngram, int) or ngram < 1:
        raise InputError(
            f"max_matching_ngram_size={ngram!r} must be a whole number, 1 or more",
            why="so many last tokens are looked for earlier in the row",
            todo=f"{DEFAULT_NGRAM} is a good value",
        )
    return Lookup(drafts, ngram)


def refuse_ragged(rows: int, stops: Stops, has_processors: bool, has_eos: bool) -> None:
    """Refuse what needs the rows of a batch to be equally long under way."""
    named = "logits_processor" if has_processors else "stopping_criteria" if stops.criteria else None
    if named is not None:
        raise InputError(
            f"{named} does not go with prompt_lookup_num_tokens and {rows} rows",
            why="the rows have unlike lengths under way, and it takes one tensor of all rows",
            todo="leave prompt_lookup_num_tokens out, or pass one prompt at a time",
        )
    if stops and not has_eos:
        raise InputError(
            f"stop_strings without eos_token_id does not go with prompt_lookup_num_tokens and {rows} rows",
            why="without eos_token_id a stopped row goes on until all have stopped, and rows are not at the same token",
            todo="pass eos_token_id too, then stopped rows are filled; or leave prompt_lookup_num_tokens out",
        )


def find_drafts(rows: Tensor, lengths: Tensor, lookup: Lookup) -> tuple[Tensor, Tensor]:
    """Guess the next tokens of each row, without waiting for the device.

    The longest n-gram of last tokens that stands earlier in the row is taken, and of its places the first.

    Args:
        rows: `[b n]` int64, each row's tokens from column 0.
        lengths: `[b]` int64, how many tokens each row has, 1 at least; what stands behind them is not read.

    Returns:
        Drafts `[b lookup.drafts]`, and how many of them each row has `[b]`, 0 where its last token is new to it.

    Source: transformers `PromptLookupCandidateGenerator.get_candidates`, which takes the same drafts.
    """
    width = rows.shape[1]
    place = torch.arange(width, device=rows.device)
    ends = (place < lengths[:, None] - 1).expand(rows.shape)  # an n-gram that ends here has something behind it
    start, found = torch.zeros_like(lengths), torch.zeros_like(lengths, dtype=torch.bool)
    for n in range(min(lookup.ngram, width)):
        wanted = rows.gather(1, (lengths[:, None] - 1 - n).clamp_min(0))
        ends = ends & (rows.roll(n, 1) == wanted) & (place >= n) & (lengths[:, None] > n + 1)
        any_place = ends.any(1)
        start = torch.where(any_place, ends.int().argmax(1) + 1, start)
        found = found | any_place
    count = torch.where(found, (lengths - start).clamp_max(lookup.drafts), 0)
    behind = start[:, None] + torch.arange(lookup.drafts, device=rows.device)
    return rows.gather(1, behind.clamp_max(width - 1)), count
