"""What cached programs call beside ATen: positions of rows, writes into their caches, and what the caches hold.

Plain functions of tensors, targets of `call_function`; backends that compile graphs have a converter for each.
The token at position p of a row is kept in slot `p % slots` of that row's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import has_side_effect


def token_positions(start: Tensor, tokens: int) -> Tensor:
    """The positions of the tokens at hand, `[b tokens]`: `start .. start + tokens - 1` in each row.

    Args:
        start: `[b]` int64, tokens that each row holds before.
        tokens: how many are at hand.
    """
    return start[:, None] + torch.arange(tokens, device=start.device)


def real_positions(positions: Tensor, start: Tensor, counts: Tensor) -> Tensor:
    """`positions [b s]`, with those of padding behind a row's last token moved to it: no table is read past its end."""
    return torch.minimum(positions, (start + counts - 1)[:, None])


@has_side_effect
def write_cache(cache: Tensor, x: Tensor, start: Tensor, counts: Tensor) -> Tensor:
    """Write the tokens at hand into their slots, in place: token i of row b to slot `(start[b] + i) % t`.

    Tokens at or past `counts[b]` leave no trace, and of more tokens than slots the last remain: the index of a token
    is clamped to what is to be kept, so that slots that are written twice are written with equal values.

    Args:
        cache: `[b g t d]`.
        x: `[b g s d]`, same dtype.
        start: `[b]` int64.
        counts: `[b]` int64, 1 to s: how many of the s tokens are real.

    Returns:
        `cache`.
    """
    slots = cache.shape[2]
    if x.shape[2] == 1:
        return cache.scatter_(2, (start % slots)[:, None, None, None].expand_as(x), x)
    index = torch.arange(x.shape[2], device=x.device)[None]
    index = torch.minimum(torch.maximum(index, (counts - slots).clamp_min(0)[:, None]), counts[:, None] - 1)
    kept = x.gather(2, index[:, None, :, None].expand_as(x))
    places = (start[:, None] + index) % slots
    return cache.scatter_(2, places[:, None, :, None].expand_as(x), kept)


def slot_positions(end: Tensor, slots: int) -> Tensor:
    """The position of the token that each slot holds once `end` tokens were written, `[b slots]`; negative = empty.

    Args:
        end: `[b]` int64.
        slots: how many.
    """
    last = end[:, None] - 1
    return last - (last - torch.arange(slots, device=end.device)) % slots


def last_tokens(x: Tensor, counts: Tensor) -> Tensor:
    """The last real token of each row: `[b s c]` and `counts [b]` to `[b 1 c]`."""
    return x.gather(1, (counts - 1)[:, None, None].expand(-1, 1, x.shape[2]))
