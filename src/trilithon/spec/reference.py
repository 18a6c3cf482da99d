"""The oracle: attention written out, on any device, in float32 or float64. Every backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import Mask, Padding, parts
from trilithon.spec.traverse import tables


def allowed_keys(
    mask: Mask, s: int, t: int, *, q_start: Tensor | None, key_mask: Tensor | None, device: torch.device
) -> Tensor:
    """The mask as bool `[b or 1, 1, s, t]`.

    Args:
        mask: a conjunction of padding and of parts that read no input.
        s, t: queries and keys.
        q_start: `[]` or `[b]` int64, tokens: query i stands at key position `q_start + i`; None = 0.
        key_mask: bool `[b t]`, what a `Padding` part reads; its table's name does not matter here.
        device: where to make it.
    """
    start = torch.zeros((), dtype=torch.int64, device=device) if q_start is None else q_start
    env: dict[str, Tensor | int] = {
        "q": torch.arange(s, device=device).view(1, 1, s, 1) + start.view(-1, 1, 1, 1),
        "k": torch.arange(t, device=device).view(1, 1, 1, t),
        "s": s,
        "t": t,
    }
    result = torch.ones((1, 1, s, t), dtype=torch.bool, device=device)
    for part in parts(mask):
        if isinstance(part, Padding):
            assert key_mask is not None, f"{part} needs key_mask"
            result = result & key_mask[:, None, None, :]
        else:
            assert not tables(part.term()), f"{part} reads inputs"
            result = result & evaluate(part.term(), env)
    return result


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Attention written out: `softmax(scale * q k^T, where allowed) v`.

    Args:
        q: `[b h s d]`.
        k: `[b g t d]`; `h % g == 0`, query head i reads key head `i // (h // g)`.
        v: `[b g t e]`.
        allowed: bool, broadcastable to `[b h s t]`.
        scale: factor on the scores.
        dtype: of the computation.

    Returns:
        `[b h s e]` in `q.dtype`. A row with no allowed key is 0, not NaN.
    """
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (k, v))
    scores = (q.to(dtype) @ keys.transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
    weights = torch.softmax(scores, dim=-1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    return (weights @ values).to(q.dtype)
