"""`trilithon::attention`, the one canonical attention op: what every proved site becomes, and every backend lowers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trilithon.errors import InputError, ShapeError
from trilithon.spec.bias_text import parse_bias
from trilithon.spec.masks import parse
from trilithon.spec.reference import added_scores, allowed_keys, reference_attention

# Written out, since no Python type gives a list of tensors that may be left out.
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, str mask, float scale, Tensor? q_start=None, Tensor? key_mask=None, "
    'Tensor? k_positions=None, str bias="", Tensor[]? tables=None, float softcap=0.0, Tensor? sinks=None) -> Tensor'
)


@torch.library.custom_op("trilithon::attention", mutates_args=(), schema=SCHEMA)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    scale: float,
    q_start: Tensor | None = None,
    key_mask: Tensor | None = None,
    k_positions: Tensor | None = None,
    bias: str = "",
    tables: Sequence[Tensor] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend each query to the keys that `mask` allows.

    Args:
        q: `[b h s d]`, float.
        k: `[b g t d]`, same dtype; `h % g == 0`.
        v: `[b g t e]`.
        mask: canonical text of a mask (`trilithon.spec.masks.parse`), e.g. "causal & padding(attention_mask)".
        scale: factor on the scores.
        q_start: `[]` or `[b]`, int64, tokens. Query i stands at position `q_start + i`; None = 0 (torch's
            upper-left alignment).
        key_mask: bool `[b t]`: what a padding part of the mask allows.
        k_positions: int64 `[b t]`: position of each key, negative where there is no key; None = 0, 1, 2, ...
        bias: text of what is added to the scores, after scale and softcap: a float term over head `h` and positions
            `q` and `k` (`trilithon.spec.bias_text`); "" = nothing.
        tables: what the bias reads, by number.
        softcap: c of `c * tanh(scores / c)`; 0 = none.
        sinks: float `[h]`: the score of one more column, whose weight is thrown away.

    Returns:
        `[b h s e]` in `q.dtype`; softmax is computed in float32 (float64 for float64). A row with no allowed
        key is 0, not NaN.

    Raises:
        ShapeError: an axis disagrees.
        InputError: a text or a number means nothing.

    Source: torch's SDPA, except that positions come from `q_start` and `k_positions`.
    """
    check_shapes(q, k, v)
    _check_positions(k, q_start, key_mask, k_positions)
    _check_scores(q, softcap, sinks)
    (_, h, s, _), t = q.shape, k.shape[2]
    allowed = allowed_keys(parse(mask), s, t, q_start=q_start, key_mask=key_mask, device=q.device, k_positions=k_positions)
    added, given = None, tables or ()
    if bias:
        term = parse_bias(bias, len(given))
        added = added_scores(term, given, h, s, t, q_start=q_start, k_positions=k_positions, device=q.device)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return reference_attention(q, k, v, allowed, scale, dtype, bias=added, softcap=softcap, sinks=sinks)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    scale: float,
    q_start: Tensor | None = None,
    key_mask: Tensor | None = None,
    k_positions: Tensor | None = None,
    bias: str = "",
    tables: Sequence[Tensor] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
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


def _check_positions(k: Tensor, q_start: Tensor | None, key_mask: Tensor | None, k_positions: Tensor | None) -> None:
    b, t = k.shape[0], k.shape[2]
    if q_start is not None and list(q_start.shape) not in ([], [1], [b]):
        raise ShapeError(f"q_start must be [] or [b] with b={b} (from k), got {list(q_start.shape)}")
    for name, given in (("key_mask", key_mask), ("k_positions", k_positions)):
        if given is not None and list(given.shape) not in ([b, t], [1, t]):
            raise ShapeError(f"{name} must be [b t] with b={b}, t={t} (from k), got {list(given.shape)}")


def _check_scores(q: Tensor, softcap: float, sinks: Tensor | None) -> None:
    if softcap < 0:
        raise InputError(f"softcap must be positive, or 0 for none, got {softcap:g}")
    if sinks is not None and list(sinks.shape) != [q.shape[1]]:
        raise ShapeError(f"sinks must be [h] with h={q.shape[1]} (from q), got {list(sinks.shape)}")
