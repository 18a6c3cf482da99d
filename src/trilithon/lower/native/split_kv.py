"""Attention of a few queries over a KV cache on a GPU: the cache is read once, in parts, and only where tokens are.

The work of a row is cut by its length, which stands on the device: a captured CUDA graph serves every length, and a step
costs what is in use, not what the cache could hold. Two kernels: partial sums over parts of the keys, and their combination.

Source: "flash decoding", attention split along the keys (Dao, Haziza, Massa, Sizov, 2023).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from trilithon.lower.native.attention import attend_cache
from trilithon.rewrite.cache_ops import read_cache
from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import Causal, Chunked, Mask, SlidingWindow, conjunction, parse, parts

MOST_QUERIES = 128  # rows of a tile: query heads of a key head times queries
MOST_WIDTH = 256  # numbers of a head
PROGRAMS = 264  # to be in flight at once: two for each multiprocessor of a large GPU
WARPS, STAGES = 4, 2  # of a program; tiles that it loads ahead


def has_triton() -> bool:
    """Is Triton here, which comes with PyTorch's builds for GPUs?"""
    return importlib.util.find_spec("triton") is not None


def has_bounds(mask: Mask) -> bool:
    """Is a mask one of which the kernels know the first and the last key: causal, within windows, or chunks of one size?"""
    kinds = parts(mask)
    bounded = all(
        isinstance(p, (Causal, SlidingWindow, Chunked)) and p.align == "upper_left" and getattr(p, "position", None) is None
        for p in kinds
    )
    chunks = {p.chunk_keys for p in kinds if isinstance(p, Chunked)}
    return bounded and len(chunks) <= 1 and any(isinstance(p, (Causal, SlidingWindow)) for p in kinds)


def reach(mask: Mask) -> tuple[int, int]:
    """`(window_keys, chunk_keys)` of a causal mask, 0 where it has none."""
    windows = [p.window_keys for p in parts(mask) if isinstance(p, SlidingWindow)]
    chunks = [p.chunk_keys for p in parts(mask) if isinstance(p, Chunked)]
    return min(windows, default=0), chunks[0] if chunks else 0


@torch.library.custom_op("trilithon::attend_split", mutates_args=())
def attend_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    scale: float,
    q_start: Tensor,
    k_positions: Tensor | None,
    softcap: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Attend over a cache; what the kernels have no tiles for (many queries, wide heads, float64) is written out.

    Args:
        q: `[b h s d]`.
        k, v: `[b g t d]`, `[b g t e]`: the whole cache, contiguous in its last axis.
        mask: canonical text of one that `has_bounds`.
        scale: factor on the scores.
        q_start: `[b]` int64: query i stands at position `q_start + i`.
        k_positions: `[b t]` int64: position of each key, negative = none; None = 0, 1, 2, ...
        softcap: 0 = none.
        k_scales, v_scales: `[b g t 1]` float32 of a cache of 8 bits, which is read as it is: a score is multiplied by the
            scale of its key, a weight by that of its value.

    Returns:
        `[b h s e]` in `q.dtype`; scores, softmax and sums in float32.
    """
    rows, width = q.shape[1] // k.shape[1] * q.shape[2], max(q.shape[3], v.shape[3])
    scales = None if k_scales is None or v_scales is None else (k_scales, v_scales)
    tiled = q.is_cuda and rows <= MOST_QUERIES and width <= MOST_WIDTH and q.dtype != torch.float64
    if tiled and _has_conversions(k):
        return _launch(q, k, v, reach(parse(mask)), scale, q_start, k_positions, softcap, scales)
    if scales is not None:
        k, v = (read_cache(x, of_tokens, q.dtype) for x, of_tokens in zip((k, v), scales, strict=True))
    return _written_out(q, k, v, parse(mask), scale, q_start, k_positions, softcap)


ATTEND_SPLIT = torch.ops.trilithon.attend_split.default


@attend_split.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    scale: float,
    q_start: Tensor,
    k_positions: Tensor | None,
    softcap: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _has_conversions(k: Tensor) -> bool:
    """Can Triton convert the numbers of a cache on its GPU? float8_e4m3fn only where the hardware has it, from SM89 on."""
    return k.dtype != torch.float8_e4m3fn or torch.cuda.get_device_capability(k.device) >= (8, 9)


def _written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    q_start: Tensor,
    k_positions: Tensor | None,
    softcap: float,
) -> Tensor:
    """What the kernels mean, on any device."""
    places = torch.arange(q.shape[2], device=q.device) + q_start[:, None]
    keys = torch.arange(k.shape[2], device=k.device)[None] if k_positions is None else k_positions
    env: dict[str, Any] = {"q": places[:, None, :, None], "k": keys[:, None, None, :]}
    allowed = evaluate(conjunction(parts(mask)).term(), env) & (env["k"] >= 0)
    return attend_cache(q, k, v, scale, allowed, None, softcap)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[int, int],
    scale: float,
    q_start: Tensor,
    k_positions: Tensor | None,
    softcap: float,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    import triton

    from trilithon.lower.native.split_kv_kernels import combine, partial_sums

    b, h, s, d = q.shape
    g, t, e = k.shape[1], k.shape[2], v.shape[3]
    rows = h // g * s
    block_m = max(16, triton.next_power_of_2(rows))
    block_n = 64 if max(d, e) <= 128 and block_m <= 64 else 32
    splits = max(1, min(64, PROGRAMS // (b * g)))
    sums = q.new_empty((b * g, splits, rows, e), dtype=torch.float32)
    marks = q.new_empty((b * g, splits, rows, 2), dtype=torch.float32)
    result = q.new_empty((b, h, s, e))
    held = q_start if k_positions is None else k_positions
    k_scales, v_scales = scales or (k, v)  # of a cache of other types nothing is read there
    blocks = triton.next_power_of_2(d), triton.next_power_of_2(e)
    partial_sums[(b * g, splits)](
        q, k, v, k_scales, v_scales, q_start, held, sums, marks,
        *q.stride()[:4], *k.stride()[:3], *v.stride()[:3], *k_scales.stride()[:3], *v_scales.stride()[:3], held.stride(0),
        g, s, t, rows, splits, d, e, scale, softcap,
        WINDOW=bounds[0], CHUNK=bounds[1], RING=k_positions is not None, CAPPED=softcap != 0.0, SCALED=scales is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=max(16, blocks[0]), BLOCK_E=max(16, blocks[1]),
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    combine[(b * g, rows)](
        sums, marks, result, *result.stride()[:3], g, s, rows, splits, e,
        BLOCK_S=triton.next_power_of_2(splits), BLOCK_E=blocks[1], num_warps=2,
    )  # fmt: skip
    return result
