"""What cached programs call beside ATen: positions of rows, writes into their caches, and what the caches hold.

Plain functions of tensors, targets of `call_function`; backends that compile graphs have a converter for each.
The token at position p of a row is kept in slot `p % slots` of that row's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import has_side_effect

STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # by name in `Options.cache_dtype`
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


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
        return _put(cache, x, (start % slots)[:, None])
    index = torch.arange(x.shape[2], device=x.device)[None]
    index = torch.minimum(torch.maximum(index, (counts - slots).clamp_min(0)[:, None]), counts[:, None] - 1)
    kept = x.gather(2, index[:, None, :, None].expand_as(x))
    return _put(cache, kept, (start[:, None] + index) % slots)


def _put(cache: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """`x [b g s d]` into the slots `places [b s]` of each row.

    Of a `scatter_` Inductor makes two copies of the whole cache, an `index_put_` it leaves in place; run as it is on a CPU
    the first is faster.
    """
    if not cache.is_cuda and not torch.compiler.is_compiling():
        return cache.scatter_(2, places[:, None, :, None].expand_as(x), x)
    rows, heads = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return cache.index_put_((rows[:, None, None], heads[None, :, None], places[:, None]), x)


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers of 8 bits, and one scale a token and head: `x` is about `values * scales`.

    Args:
        x: `[b g s d]`.
        dtype: one of `LARGEST`.

    Returns:
        `[b g s d]` in `dtype`, rounded to nearest, and `[b g s 1]` float32: the largest magnitude becomes the largest
        number. Zeros have the scale 0; what is not finite has a scale that is not either.
    """
    wide, most = x.float(), LARGEST[dtype]
    scales = wide.abs().amax(-1, keepdim=True) / most
    ratio = (wide / torch.where(scales > 0, scales, 1.0)).clamp(-most, most)
    return (ratio if dtype.is_floating_point else ratio.round()).to(dtype), scales


@has_side_effect
def write_cache_8bit(cache: Tensor, scales: Tensor, x: Tensor, start: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`write_cache` of what `quantise` makes of `x`.

    Args:
        cache: `[b g t d]` of a type in `LARGEST`.
        scales: `[b g t 1]` float32.
        x: `[b g s d]`.
        start, counts: as there.

    Returns:
        `cache` and `scales`.
    """
    values, of_tokens = quantise(x, cache.dtype)
    write_cache(cache.view(torch.int8), values.view(torch.int8), start, counts)
    write_cache(scales, of_tokens, start, counts)
    return cache, scales


def read_cache(cache: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache of 8 bits holds, `[b g t d]` in `dtype`; one rounding, from float32 or wider."""
    return (cache.to(torch.promote_types(dtype, torch.float32)) * scales).to(dtype)


def turn(x: Tensor) -> Tensor:
    """Values `[b g s e]` as `g * e` heads of one number, `[b g*e s 1]`."""
    return x.transpose(2, 3).flatten(1, 2).unsqueeze(3)


def turn_back(cache: Tensor, g: int) -> Tensor:
    """The values `[b g t e]` in a cache `[b g*e t 1]` of what `turn` gives; a view."""
    b, heads, t, _ = cache.shape
    return cache.view(b, g, heads // g, t).transpose(2, 3)


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
