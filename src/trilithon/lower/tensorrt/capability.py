"""What TensorRT's fused attention layer (IAttention) can be asked for, and where it is not the form to choose.

The limits were measured with TensorRT-RTX 1.5.0, by building engines and reading their kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from trilithon.lower.inputs import Axis
from trilithon.spec.masks import Causal, Chunked, LocalWindow, Mask, SlidingWindow, parts

Form = Literal["fused", "decomposed", "summed"]
FEW_KEYS = 512  # up to so many, one query and a mask are a form that the builder takes
UNKNOWN = Axis(1, 1, 1 << 31)
HALVES = ", its kernel adds up in float16: up to 8 times the error of PyTorch's"  # measured: docs/backends.md


@dataclass(frozen=True)
class SiteLowering:
    """What one attention site became.

    Attributes:
        name: the site's.
        form: "fused": IAttention; "decomposed": matmul, softmax, matmul, which the builder may fuse on its own; "summed":
            products that are added up, in float32.
        reason: why this form.
        mask: text of the mask that was proved; "" where none was.
        from_start: queries stand behind what a cache holds.
    """

    name: str
    form: Form
    reason: str
    mask: str = ""
    from_start: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """One attention as a backend sees it.

    Attributes:
        dtype: of q, k and v.
        h, g: query heads and key heads; None where they are known only at run time.
        d, e: numbers of a head in q and k, and in v; None likewise.
        s, t: numbers of queries and keys.
        same_length: `s` and `t` are one size.
        upper_left: allowed is exactly key <= query, both counted from 0.
        mask: data type of any other mask: bool, or what is added to the scores; None = every key is allowed.
        from_start: queries stand at positions behind what a cache holds.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        turned: a cache holds the values as `[b g e t]`.
    """

    dtype: torch.dtype
    h: int | None
    g: int | None
    d: int | None
    e: int | None
    s: Axis = UNKNOWN
    t: Axis = UNKNOWN
    same_length: bool = False
    upper_left: bool = False
    mask: torch.dtype | None = None
    from_start: bool = False
    softcap: float | None = None
    turned: bool = False


def by_causal_kind(spec: AttentionSpec) -> bool:
    """May `CausalMaskKind.UPPER_LEFT` stand for the mask? Where there is one query and more than 512 keys it is dropped."""
    return spec.upper_left and (spec.same_length or spec.s.low > 1 or spec.t.high <= FEW_KEYS)


def refuses(spec: AttentionSpec) -> str | None:
    """Why IAttention cannot express `spec`, or None.

    Source: TensorRT-RTX 1.5.0, IAttention: messages of the network API and of the builder for SM75 to SM121.
    """
    if spec.softcap is not None:
        return f"softcap={spec.softcap:g}: IAttention has no score modifier between matmul and softmax"
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"{_name(spec.dtype)}: IAttention has kernels for float16 and bfloat16 alone"
    return _heads(spec) or _mask(spec)


def _heads(spec: AttentionSpec) -> str | None:
    if spec.h is None or spec.g is None:
        return "the number of heads is known only at run time: IAttention cannot tell grouped heads then"
    if spec.h % spec.g:
        return f"{spec.h} query heads over {spec.g} key heads: IAttention wants a multiple"
    if spec.d is None or spec.d != spec.e:
        return f"heads of {spec.d} in k and {spec.e} in v: IAttention wants one shape for both"
    if not 16 <= spec.d <= 256:
        return f"heads of {spec.d}: IAttention has kernels for 16 to 256"
    if spec.d % 8 and spec.s.high == 1 and not spec.t.is_fixed:
        return f"heads of {spec.d} with one query and a dynamic number of keys: IAttention has no kernel"
    return None


def _mask(spec: AttentionSpec) -> str | None:
    masked = spec.mask is not None or (spec.upper_left and not by_causal_kind(spec))
    if masked and spec.s.high == 1 and spec.t.high > FEW_KEYS:
        return f"one query, a mask and up to {_keys(spec)} keys: the builder crashes above {FEW_KEYS}"
    if spec.mask not in (None, torch.bool, spec.dtype):
        return f"a mask of {_name(spec.mask)} for queries of {_name(spec.dtype)}: IAttention wants bool or one type"
    return None


def prefers_primitives(spec: AttentionSpec) -> str | None:
    """Why matmul, softmax, matmul is the better form of what IAttention could express, or None.

    Source: TensorRT-RTX 1.5.0, text of the kernels in engines: types of scores and sums.
    """
    if spec.from_start:
        return "keys of a whole cache: primitives become one kernel that copies nothing"
    if spec.s.high == 1:
        return "one query: IAttention's kernel rounds scores and weights to " + _name(spec.dtype)
    if spec.dtype == torch.float16 and not by_causal_kind(spec):
        return "float16 without a causal kind: IAttention's kernel adds up in float16"
    if spec.mask == torch.bool and spec.h == spec.g:
        return "a mask and no grouped heads: only primitives take the mask into the kernel, and its bounds at several sites"
    return None


def choose(spec: AttentionSpec, attention: str) -> tuple[Form, str]:
    """The form for `attention`, one of "auto", "fused" and "decomposed", and why.

    Returns:
        With "fused", a form "decomposed" means that IAttention cannot serve, and the reason says why.
    """
    if attention == "decomposed":
        return "decomposed", "asked for"
    if attention == "auto" and spec.turned and spec.s.high == 1:
        return "summed", "one query over a cache of turned values: sums along contiguous numbers copy nothing"
    refusal = refuses(spec)
    if refusal is not None:
        return "decomposed", refusal
    if attention == "fused":
        return "fused", "asked for"
    better = prefers_primitives(spec)
    if better is not None:
        return "decomposed", better
    masked = spec.mask is not None or spec.upper_left
    reason = "causal by its kind" if by_causal_kind(spec) else "a mask in the network" if masked else "no mask"
    return "fused", reason + (HALVES if spec.dtype == torch.float16 else "")


def keeps_a_key(mask: Mask, spec: AttentionSpec) -> bool:
    """Is it certain that every query may see a key? A row without one must give 0."""
    kinds = parts(mask)
    own_key = (Causal, SlidingWindow, LocalWindow, Chunked)
    own = all(isinstance(p, own_key) and getattr(p, "align", "upper_left") == "upper_left" for p in kinds)
    if spec.from_start and spec.turned and spec.s.high == 1:
        return own  # the query's own was written before it attends
    if spec.from_start or any(isinstance(p, (Causal, SlidingWindow)) and p.align != "upper_left" for p in kinds):
        return False
    if all(isinstance(p, Causal) for p in kinds):
        return True  # key 0
    return own and (spec.same_length or spec.s.high <= spec.t.low)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _keys(spec: AttentionSpec) -> str:
    return str(spec.t.high) if spec.t.high < UNKNOWN.high else "any number of"
