"""Attention of one token, as generated kernels call it; imported where Triton is."""

import triton
import triton.language as tl

from trilithon.lower.native.fused.step_kernels import let_next_start, wait
from trilithon.lower.native.split_kv_kernels import LOG2E, first_and_end, is_seen, scored, tanh, weighed


@triton.jit
def own_part(
    start, part, t, splits,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The slots of one part of the keys, from the first to behind the last, and how many parts have any."""
    first, end = first_and_end(start, 0, t, WINDOW, CHUNK, False)
    if RING:
        first, end = start * 0, tl.minimum(start, t)
    each = tl.maximum(tl.cdiv(tl.cdiv(end - first, splits), BLOCK_N), 1) * BLOCK_N
    begin = first + part * each
    return begin, tl.minimum(begin + each, end), tl.cdiv(end - first, each)


@triton.jit
def load_tile(
    k, v, group, begin, stop, k_g, k_t, v_g, v_t,
    D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Keys `[d n]` and values `[n e]`."""
    slot, own_d, own_e = begin + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    at_k = k + group.to(tl.int64) * k_g + own_d[:, None] + slot[None] * k_t
    at_v = v + group.to(tl.int64) * v_g + own_e[None] + slot[:, None] * v_t
    tile_k = tl.load(at_k, mask=(slot[None] < stop) & (own_d[:, None] < D), other=0.0)
    tile_v = tl.load(at_v, mask=(slot[:, None] < stop) & (own_e[None] < E), other=0.0)
    return tile_k, tile_v


@triton.jit
def take_tile(
    q, tile_k, tile_v, slot, stop, start, t, best, total, acc, scale, softcap,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Softmax over more keys: the highest score `[m]`, the sum of the weights `[m]`, and of weighed values `[m e]`."""
    key = slot
    if RING:
        key = start - (start - slot) % t
    seen = (slot < stop) & (key < start) & is_seen(key, start, WINDOW, CHUNK)
    scores = scored(q, tile_k, q, seen, scale, softcap, CAPPED, False)
    scores = tl.where(seen[None], scores * LOG2E, -float("inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    safe = tl.where(higher == -float("inf"), 0.0, higher)
    weights, shrink = tl.exp2(scores - safe[:, None]), tl.exp2(best - safe)
    acc = acc * shrink[:, None] + weighed(weights, tile_v, q, seen, q, False)
    return higher, total * shrink + tl.sum(weights, 1), acc


@triton.jit
def attend_part(
    q, tile_k, tile_v, k, v, start, begin, stop, group, part, sums, marks,
    k_g, k_t, v_g, v_t, t, splits, scale, softcap,
    N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The queries of one key head over one part of the keys that a cache holds.

    Args:
        q: `[BLOCK_M, BLOCK_D]`.
        tile_k, tile_v: the first keys and values of the part.
        sums, marks: see `put_together`.
    """
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    best, total = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    best, total, acc = take_tile(
        q, tile_k, tile_v, begin + n, stop, start, t, best, total, acc, scale, softcap, WINDOW, CHUNK, RING, CAPPED
    )
    for at in range(begin + BLOCK_N, stop, BLOCK_N):
        more_k, more_v = load_tile(k, v, group, at, stop, k_g, k_t, v_g, v_t, D, E, BLOCK_N, BLOCK_D, BLOCK_E)
        best, total, acc = take_tile(
            q, more_k, more_v, at + n, stop, start, t, best, total, acc, scale, softcap, WINDOW, CHUNK, RING, CAPPED
        )
    leave(best, total, acc, sums, marks, group * N + m[:, None], m[:, None] < N, part, splits, E, BLOCK_E)


@triton.jit
def attend_token(
    q, k_new, v_new, head, inside, part, sums, marks, splits, scale, softcap,
    E: tl.constexpr, CAPPED: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Queries `[m d]` over their own token, `[1 d]` and `[1 e]`; their heads, and which are asked for: one, or `[m 1]`."""
    rows = tl.zeros([q.shape[0], 1], tl.int32)
    score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale
    if CAPPED:
        score = softcap * tanh(score / softcap)
    acc = score[:, None] * 0.0 + v_new.to(tl.float32)
    leave(score * LOG2E, score * 0.0 + 1.0, acc, sums, marks, head + rows, inside & (rows == 0), part, splits, E, BLOCK_E)


@triton.jit
def write_token(
    k_new, v_new, k, v, group, start, t, k_g, k_t, v_g, v_t,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Key and value, `[1 d]` and `[1 e]`, into the token's slot."""
    fresh, own_d, own_e = start % t, tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    tl.store(k + group.to(tl.int64) * k_g + fresh * k_t + own_d[None], k_new, mask=own_d[None] < D)
    tl.store(v + group.to(tl.int64) * v_g + fresh * v_t + own_e[None], v_new, mask=own_e[None] < E)


@triton.jit
def leave(best, total, acc, sums, marks, head, inside, part, splits, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """What a part has found for the heads `[m 1]`, for `put_together`."""
    own_e, place = tl.arange(0, BLOCK_E)[None], head * (splits + 1) + part
    tl.store(sums + place * E + own_e, acc, mask=inside & (own_e < E))
    tl.store(marks + place * 2, best[:, None], mask=inside)
    tl.store(marks + place * 2 + 1, total[:, None], mask=inside)


@triton.jit(do_not_specialize=["t", "splits"])
def put_together(
    sums, marks, result, starts, t, splits,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr, BLOCK_N: tl.constexpr,
    E: tl.constexpr, BLOCK_S: tl.constexpr, SHARE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What all parts found, for `SHARE` numbers of one query head.

    Args:
        sums: `[heads, splits + 1, e]` float32; the last part is that of the token.
        marks: `[heads, splits + 1, 2]` float32, the highest score and the sum of the weights.
        result: `[heads, e]`.
        starts: `[1]`, where the token stands.
    """
    let_next_start(PDL)
    _, _, active = own_part(tl.load(starts), 0, t, splits, WINDOW, CHUNK, RING, BLOCK_N)
    SHARES: tl.constexpr = (E + SHARE - 1) // SHARE
    head, s, pair = tl.program_id(0) // SHARES, tl.arange(0, BLOCK_S), tl.arange(0, 2)
    column = tl.program_id(0) % SHARES * SHARE + tl.arange(0, SHARE)
    found, place = (s < active) | (s == splits), head * (splits + 1) + s
    wait(PDL)
    two = tl.load(marks + place[:, None] * 2 + pair[None], mask=found[:, None] & (pair < 2)[None], other=-float("inf"))
    tile = tl.load(sums + place[:, None] * E + column[None], mask=found[:, None] & (column < E)[None], other=0.0)
    best, total = tl.split(two)
    weight = tl.exp2(best - tl.max(best, 0))  # a token sees itself
    value = tl.sum(tile * weight[:, None], 0) / tl.sum(tl.where(found, total, 0.0) * weight, 0)
    tl.store(result + head * E + column, value.to(result.dtype.element_ty), mask=column < E)


@triton.jit
def write_slot(x, row, column, inside, token, start, count, cache, c_g, c_t, t):
    """What one token of a prompt has in all heads, `x [g d]`, into its slot; padding, and what a later token replaces, is not.

    Args:
        row, column: heads and numbers of a head; inside: which of them there are.
        start, count: tokens in the cache before, and real ones of the prompt.
        cache: `[g t d]`.
    """
    slot = (start % t + token % t) % t
    is_kept = (token < count) & (token >= count - t)
    tl.store(cache + slot * c_t + (slot * 0 + row) * c_g + column, x, mask=inside & is_kept)  # slots, so places, have 64 bits
