"""Attention through PyTorch: what each canonical mask runs on, on CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trilithon.spec.masks import Causal, Full, Mask


def kernel_for(mask: Mask, *, cached: bool = False) -> str:
    """The kernel that serves a mask, in words, for the report."""
    if cached:
        return "matmul-softmax-matmul over the static cache, grouped heads"
    if isinstance(mask, (Causal, Full)):
        flag = "is_causal=True" if isinstance(mask, Causal) else "no mask"
        return f"SDPA, {flag}, grouped heads"
    return "SDPA, mask made once for all layers"


def attend(q: Tensor, k: Tensor, v: Tensor, mask: str, scale: float, allowed: Tensor | None) -> Tensor:
    """Attention from position 0 through SDPA.

    Args:
        q, k, v: `[b h s d]`, `[b g t d]`, `[b g t e]`.
        mask: canonical text; "causal" and "full" need no tensor.
        allowed: for other masks, what `emit_mask` made.

    Source: torch SDPA: `is_causal` is upper-left, `enable_gqa` reads key head `i // (h // g)`.
    """
    grouped = q.shape[1] != k.shape[1]
    if allowed is None:
        return scaled_dot_product_attention(q, k, v, is_causal=mask == "causal", scale=scale, enable_gqa=grouped)
    if grouped:  # no fused kernel takes a mask with grouped heads: copies of K and V are cheaper than unfused scores
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


def attend_cache(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor) -> Tensor:
    """Attention of a few queries over a static cache, written out so that the heads of a group share one read of K and V.

    Args:
        q: `[b h s d]`, few queries.
        k, v: `[b g t d]`, `[b g t e]`: the whole cache; `t` is its capacity.
        allowed: bool `[b or 1, 1, s, t]`.

    Returns:
        `[b h s e]`; softmax in float32. A row with no allowed key is the mean of V: such rows are padding, which
        nothing reads.
    """
    b, h, s, d = q.shape
    g, t = k.shape[1], k.shape[2]
    rows = q.reshape(b, g, (h // g) * s, d)
    scores = (rows @ k.transpose(-1, -2)).float() * scale
    lowest = torch.finfo(torch.float32).min
    scores = scores.view(b, g, h // g, s, t).masked_fill(~allowed.unsqueeze(1), lowest)
    weights = torch.softmax(scores, dim=-1).to(v.dtype).view(b, g, (h // g) * s, t)
    return (weights @ v).view(b, h, s, v.shape[3])
