"""`trilithon::attention`, the one canonical attention op: what every proved site becomes, and every backend lowers."""

from __future__ import annotations

import torch
from torch import Tensor

from trilithon.errors import ShapeError
from trilithon.spec.masks import parse
from trilithon.spec.reference import allowed_keys, reference_attention


@torch.library.custom_op("trilithon::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    scale: float,
    q_start: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attend each query to the keys that `mask` allows.

    Args:
        q: `[b h s d]`, float.
        k: `[b g t d]`, same dtype; `h % g == 0`.
        v: `[b g t e]`.
        mask: canonical text of a mask (`trilithon.spec.masks.parse`), e.g. "causal & padding(attention_mask)".
        scale: factor on the scores.
        q_start: `[]` or `[b]`, int64, tokens. Query i stands at key position `q_start + i`; None = 0 (torch's
            upper-left alignment).
        key_mask: bool `[b t]`: what a padding part of the mask allows.

    Returns:
        `[b h s e]` in `q.dtype`; softmax is computed in float32 (float64 for float64). A row with no allowed
        key is 0, not NaN.

    Raises:
        ShapeError: an axis disagrees.

    Source: torch's SDPA, except that positions come from `q_start`.
    """
    check_shapes(q, k, v)
    allowed = allowed_keys(parse(mask), q.shape[2], k.shape[2], q_start=q_start, key_mask=key_mask, device=q.device)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return reference_attention(q, k, v, allowed, scale, dtype)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    scale: float,
    q_start: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


ATTENTION = torch.ops.trilithon.attention.default


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ShapeError unless q is `[b h s d]`, k `[b g t d]` and v `[b g t e]` with `h % g == 0`."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ShapeError(f"q, k, v must have 4 axes, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    (b, h, _, d), (_, g, t, _) = q.shape, k.shape
    if k.shape[0] != b or k.shape[3] != d or h % g:
        raise ShapeError(f"k must be [b g t d] with b={b} (from q), d={d} and g dividing {h}, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ShapeError(f"v must be [b g t e] with b={b}, g={g}, t={t} (from k), got {list(v.shape)}")
