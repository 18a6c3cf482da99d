"""The Triton kernels of `split_kv`; imported where they are launched, since only builds for GPUs bring Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def partial_sums(
    q: Any, k: Any, v: Any, starts: Any, held: Any, sums: Any, marks: Any,
    q_b: Any, q_h: Any, q_s: Any, q_d: Any, k_b: Any, k_g: Any, k_t: Any, v_b: Any, v_g: Any, v_t: Any, held_b: Any,
    g: Any, s: Any, t: Any, rows: Any, splits: Any, d: Any, e: Any, scale: Any, softcap: Any,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
) -> None:  # fmt: skip
    """Softmax times V over one part of the keys, not divided yet: `sums [bg p m e]`; maximum and sum in `marks [bg p m 2]`."""
    group, part = tl.program_id(0), tl.program_id(1)
    row, head = group // g, group % g
    start = tl.load(starts + row)
    m, n, own_d, own_e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    query_head, query = head * (rows // s) + m // s, m % s
    place = start + query
    first, end = start * 0, tl.minimum(start + s, t)
    if RING:
        end = first + t
    elif WINDOW > 0:
        first = tl.maximum(start - WINDOW + 1, 0)
    if not RING and CHUNK > 0:
        first = tl.maximum(first, start // CHUNK * CHUNK)
    each = tl.cdiv(tl.cdiv(end - first, splits), BLOCK_N) * BLOCK_N
    begin = first + part * each
    stop = tl.minimum(begin + each, end)
    at_q = q + row * q_b + query_head[:, None] * q_h + query[:, None] * q_s + own_d[None] * q_d
    tile_q = tl.load(at_q, mask=(m[:, None] < rows) & (own_d[None] < d), other=0.0)
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    at_k = k + row * k_b + head * k_g
    at_v = v + row * v_b + head * v_g
    for at in range(begin, stop, BLOCK_N):
        slot = at + n
        inside = slot < stop
        tile_k = tl.load(at_k + slot[None] * k_t + own_d[:, None], mask=inside[None] & (own_d[:, None] < d), other=0.0)
        scores = tl.dot(tile_q, tile_k, input_precision="ieee") * scale
        if CAPPED:
            bent = scores / softcap
            scores = softcap * (1.0 - 2.0 / (tl.exp2(2.0 * LOG2E * bent) + 1.0))
        key = slot
        if RING:
            key = tl.load(held + row * held_b + slot, mask=inside, other=-1)
        seen = inside[None] & (key[None] >= 0) & (key[None] <= place[:, None])
        if WINDOW > 0:
            seen = seen & (key[None] > place[:, None] - WINDOW)
        if CHUNK > 0:
            seen = seen & (key[None] // CHUNK == place[:, None] // CHUNK)
        scores = tl.where(seen, scores * LOG2E, -float("inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(best - safe)
        total = total * shrink + tl.sum(weights, 1)
        tile_v = tl.load(at_v + slot[:, None] * v_t + own_e[None], mask=inside[:, None] & (own_e[None] < e), other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(tile_v.dtype), tile_v, input_precision="ieee")
        best = higher
    place_out = (group * splits + part) * rows + m
    tl.store(sums + place_out[:, None] * e + own_e[None], acc, mask=(m[:, None] < rows) & (own_e[None] < e))
    tl.store(marks + place_out * 2, best, mask=m < rows)
    tl.store(marks + place_out * 2 + 1, total, mask=m < rows)


@triton.jit
def combine(
    sums: Any, marks: Any, result: Any, r_b: Any, r_h: Any, r_s: Any, g: Any, s: Any, rows: Any, splits: Any, e: Any,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
) -> None:  # fmt: skip
    """The parts of one query put together; a query that sees no key gives 0."""
    group, m = tl.program_id(0), tl.program_id(1)
    part, own_e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)
    place = (group * splits + part) * rows + m
    best = tl.load(marks + place * 2, mask=part < splits, other=-float("inf"))
    total = tl.load(marks + place * 2 + 1, mask=part < splits, other=0.0)
    highest = tl.max(best, 0)
    weight = tl.exp2(best - tl.where(highest == -float("inf"), 0.0, highest))
    tile = tl.load(sums + place[:, None] * e + own_e[None], mask=(part[:, None] < splits) & (own_e[None] < e), other=0.0)
    divisor = tl.sum(total * weight, 0)
    value = tl.sum(tile * weight[:, None], 0) / tl.where(divisor == 0.0, 1.0, divisor)
    row, head = group // g, group % g
    at = result + row * r_b + (head * (rows // s) + m // s) * r_h + (m % s) * r_s
    tl.store(at + own_e, value.to(result.dtype.element_ty), mask=own_e < e)
