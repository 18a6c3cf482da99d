"""The oracle: attention written out, on any device, in float32 or float64. Every backend is tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import Mask, Padding, parts
from trilithon.spec.term import Term
from trilithon.spec.traverse import tables


def cells(
    h: int, s: int, t: int, *, q_start: Tensor | None, k_positions: Tensor | None, device: torch.device
) -> dict[str, Tensor | int]:
    """The variables of masks and biases, as indices that broadcast to `[b or 1, h, s, t]`, and the sizes.

    Args:
        h, s, t: query heads, queries and keys.
        q_start: `[]` or `[b]` int64, tokens: query i stands at position `q_start + i`; None = 0.
        k_positions: `[b t]` int64: position of each key; None = 0, 1, 2, ...
        device: where to make them.
    """
    start = torch.zeros((), dtype=torch.int64, device=device) if q_start is None else q_start
    keys = torch.arange(t, device=device).view(1, t) if k_positions is None else k_positions
    return {
        "h": torch.arange(h, device=device).view(1, h, 1, 1),
        "q": torch.arange(s, device=device).view(1, 1, s, 1) + start.view(-1, 1, 1, 1),
        "k": keys[:, None, None, :],
        "s": s,
        "t": t,
    }


def allowed_keys(
    mask: Mask,
    s: int,
    t: int,
    *,
    q_start: Tensor | None,
    key_mask: Tensor | None,
    device: torch.device,
    k_positions: Tensor | None = None,
) -> Tensor:
    """The mask as bool `[b or 1, 1, s, t]`.

    Args:
        mask: a conjunction of padding and of parts that read no input.
        s, t: queries and keys.
        q_start: `[]` or `[b]` int64, tokens: query i stands at key position `q_start + i`; None = 0.
        key_mask: bool `[b t]`, what a `Padding` part reads; its table's name does not matter here.
        device: where to make it.
        k_positions: `[b t]` int64: position of each key, negative where there is none; None = 0, 1, 2, ...
    """
    env = cells(1, s, t, q_start=q_start, k_positions=k_positions, device=device)
    result = torch.ones((1, 1, s, t), dtype=torch.bool, device=device)
    if k_positions is not None:
        result = result & (k_positions >= 0)[:, None, None, :]
    for part in parts(mask):
        if isinstance(part, Padding):
            assert key_mask is not None, f"{part} needs key_mask"
            result = result & key_mask[:, None, None, :]
        else:
            assert not tables(part.term()), f"{part} reads inputs"
            result = result & evaluate(part.term(), env)
    return result


def added_scores(
    bias: Term,
    given: Sequence[Tensor],
    h: int,
    s: int,
    t: int,
    *,
    q_start: Tensor | None,
    k_positions: Tensor | None,
    device: torch.device,
) -> Tensor:
    """A bias as float64, broadcastable to `[b h s t]`; each operation in its own dtype.

    Args:
        bias: a float term over `h q k`; table "i" is `given[i]`.
        given: the tables.
        h, s, t: query heads, queries and keys.
        q_start, k_positions: as `cells` takes them.
        device: where to make it.
    """
    env = cells(h, s, t, q_start=q_start, k_positions=k_positions, device=device)
    return evaluate(bias, env, {str(i): table for i, table in enumerate(given)}).double()


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    scale: float,
    dtype: torch.dtype = torch.float32,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention written out: `softmax(scale * q k^T + bias, where allowed) v`.

    Args:
        q: `[b h s d]`.
        k: `[b g t d]`; `h % g == 0`, query head i reads key head `i // (h // g)`.
        v: `[b g t e]`.
        allowed: bool, broadcastable to `[b h s t]`.
        scale: factor on the scores.
        dtype: of the computation.
        bias: added to the scores, broadcastable to `[b h s t]`.
        softcap: c of `c * tanh(scores / c)`, before the bias; 0 = none.
        sinks: `[h]`: a score of one more column, whose weight is thrown away.

    Returns:
        `[b h s e]` in `q.dtype`. A row with no allowed key is 0, not NaN.
    """
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.to(dtype) @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        column = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    return (weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0) @ values).to(q.dtype)
