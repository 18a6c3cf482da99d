"""Attention through PyTorch: what each canonical site runs on, on CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trilithon.spec.masks import Causal, Full, Mask


def kernel_for(mask: Mask, added: Sequence[str] = (), *, fits: bool = True) -> str:
    """The kernel that serves a site without a cache, in words, for the report.

    Args:
        added: what its scores have beside the mask, of "bias", "softcap" and "sinks".
        fits: the bias loses nothing in the type of q, which SDPA asks for.
    """
    made = "mask and bias made once for all layers" if "bias" in added else "mask made once for all layers"
    if set(added) - {"bias"} or not fits:
        return f"matmul-softmax-matmul with {' and '.join(added)}; {made}"
    if "bias" not in added and isinstance(mask, (Causal, Full)):
        flag = "is_causal=True" if isinstance(mask, Causal) else "no mask"
        return f"SDPA, {flag}, grouped heads"
    return f"SDPA, {made}"


def attend(q: Tensor, k: Tensor, v: Tensor, mask: str, scale: float, allowed: Tensor | None) -> Tensor:
    """Attention from position 0 through SDPA.

    Args:
        q, k, v: `[b h s d]`, `[b g t d]`, `[b g t e]`.
        mask: canonical text; "causal" and "full" need no tensor.
        allowed: for other masks, and where there is a bias, what `emit_mask` or `blocked` made.

    Source: torch SDPA: `is_causal` is upper-left, `enable_gqa` reads key head `i // (h // g)`.
    """
    grouped = q.shape[1] != k.shape[1]
    if allowed is None:
        return scaled_dot_product_attention(q, k, v, is_causal=mask == "causal", scale=scale, enable_gqa=grouped)
    if grouped:  # no fused kernel takes a mask with grouped heads: copies of K and V are cheaper than unfused scores
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


def attend_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    allowed: Tensor | None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention from position 0, written out for what SDPA does not take.

    Args:
        q, k, v: `[b h s d]`, `[b g t d]`, `[b g t e]`.
        allowed: bool `[b or 1, 1, s, t]`, None = every key.
        bias: broadcastable to `[b h s t]`.
        softcap: 0 = none.
        sinks: `[h]`.

    Returns:
        `[b h s e]`; softmax in float32 or wider. A row with no allowed key is 0.
    """
    return _written_out(q, k, v, scale, allowed, bias, softcap, sinks, zero_rows=allowed is not None)


def attend_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    allowed: Tensor | None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a few queries over a static cache, written out so that the heads of a group share one read of K and V.

    Args:
        q: `[b h s d]`, few queries.
        k, v: `[b g t d]`, `[b g t e]`: the whole cache; `t` is its capacity.
        allowed, bias, softcap, sinks: as `attend_scores` takes them.

    Returns:
        `[b h s e]`; softmax in float32 or wider. A row with no allowed key is the mean of V: such rows are padding,
        which nothing reads.
    """
    return _written_out(q, k, v, scale, allowed, bias, softcap, sinks, zero_rows=False)


def slots_in_use(q_start: Tensor, q: Tensor, k: Tensor) -> int:
    """How many slots of a cache `k [b g t d]` queries `q [b h s d]` behind `q_start` tokens can see; the host waits for it."""
    return min(int(q_start.max()) + q.shape[2], k.shape[2])


def first_slots(cache: Tensor, used: int) -> Tensor:
    """The first slots of a cache `[b g t d]`, a view."""
    return cache[:, :, :used]


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    allowed: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
    *,
    zero_rows: bool,
) -> Tensor:
    """Softmax over scores `[b g n s t]`, n query heads of each of g key heads."""
    b, h, s, d = q.shape
    g, t = k.shape[1], k.shape[2]
    n, wide = h // g, torch.promote_types(q.dtype, torch.float32)
    scores = (q.reshape(b, g, n * s, d) @ k.transpose(-1, -2)).to(wide).view(b, g, n, s, t) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + _by_group(bias.to(wide), g)
    if allowed is not None:
        scores = scores.masked_fill(~allowed.unsqueeze(1), torch.finfo(wide).min)
    if sinks is not None:
        column = sinks.to(wide).view(1, g, n, 1, 1).expand(b, g, n, s, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :t]
    if allowed is not None and zero_rows:
        weights = weights.masked_fill(~allowed.unsqueeze(1), 0.0)
    return (weights.to(v.dtype).reshape(b, g, n * s, t) @ v).view(b, h, s, v.shape[3])


def _by_group(x: Tensor, g: int) -> Tensor:
    """`[b h s t]` as `[b g n s t]`; axes of size 1 stay so."""
    return x.unsqueeze(2) if x.shape[1] == 1 else x.unflatten(1, (g, -1))
