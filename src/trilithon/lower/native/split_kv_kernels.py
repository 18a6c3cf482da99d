"""The Triton kernels of `split_kv`; imported where they are launched, since only builds for GPUs bring Triton."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def first_and_end(start, s, t, WINDOW: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr):
    """The slots that queries at `start` and behind can see; all of a ring."""
    first, end = start * 0, tl.minimum(start + s, t)
    if RING:
        end = start * 0 + t
    else:
        if WINDOW > 0:
            first = tl.maximum(start - WINDOW + 1, 0)
        if CHUNK > 0:
            first = tl.maximum(first, start // CHUNK * CHUNK)
    return first, end


@triton.jit
def is_seen(key, place, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """May a query at `place [m 1]` see a key at `key [1 n]`?"""
    seen = (key >= 0) & (key <= place)
    if WINDOW > 0:
        seen = seen & (key > place - WINDOW)
    if CHUNK > 0:
        seen = seen & (key // CHUNK == place // CHUNK)
    return seen


@triton.jit
def scored(
    tile_q, tile_k, at_scale, inside, scale, softcap, CAPPED: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    """Scores `[m n]`, with the scales of the keys, and with their cap `c * tanh(scores / c)`."""
    scores = tl.dot(tile_q, tile_k.to(tile_q.dtype), input_precision="ieee") * scale
    if SCALED:
        scores = scores * tl.load(at_scale, mask=inside, other=0.0)[None]
    if CAPPED:
        scores = softcap * tanh(scores / softcap)
    return scores


@triton.jit
def tanh(x):
    """By its series near 0, where 1 - 2 / (exp(2 x) + 1) loses digits."""
    y = x * x
    series = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return tl.where(y < 0.0625, series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def weighed(weights, tile_v, at_scale, inside, like, SCALED: tl.constexpr):
    """Weights times values `[m e]`. The largest scale of the tile is taken out first: halves keep their precision so."""
    if SCALED:
        scales = tl.load(at_scale, mask=inside, other=0.0)
        most = tl.max(scales, 0)
        weights = weights * (scales / tl.where(most == 0.0, 1.0, most))[None]
        product = tl.dot(weights.to(like.dtype), tile_v.to(like.dtype), input_precision="ieee") * most
    else:
        product = tl.dot(weights.to(tile_v.dtype), tile_v, input_precision="ieee")
    return product


@triton.jit
def partial_sums(
    q, k, v, k_scales, v_scales, starts, held, sums, marks,
    q_b, q_h, q_s, q_d, k_b, k_g, k_t, v_b, v_g, v_t,
    ks_b, ks_g, ks_t, vs_b, vs_g, vs_t, held_b,
    g, s, t, rows, splits, d, e, scale, softcap,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Softmax times V over one part of the keys, not divided yet: `sums [bg p m e]`; maximum and sum in `marks [bg p m 2]`."""
    group, part = tl.program_id(0), tl.program_id(1)
    row, head = (group // g).to(tl.int64), (group % g).to(tl.int64)  # caches may be larger than 32 bits can tell
    m, n, own_d, own_e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    start = tl.load(starts + row)
    place = start + m % s
    first, end = first_and_end(start, s, t, WINDOW, CHUNK, RING)
    each = tl.cdiv(tl.cdiv(end - first, splits), BLOCK_N) * BLOCK_N
    begin = first + part * each
    stop = tl.minimum(begin + each, end)
    at_q = q + row * q_b + (head * (rows // s) + m // s)[:, None] * q_h + (m % s)[:, None] * q_s + own_d[None] * q_d
    tile_q = tl.load(at_q, mask=(m[:, None] < rows) & (own_d[None] < d), other=0.0)
    at_k, at_v = k + row * k_b + head * k_g + own_d[:, None], v + row * v_b + head * v_g + own_e[None]
    at_ks, at_vs = k_scales + row * ks_b + head * ks_g, v_scales + row * vs_b + head * vs_g
    best, total = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for at in range(begin, stop, BLOCK_N):
        slot, inside = at + n, at + n < stop
        tile_k = tl.load(at_k + slot[None] * k_t, mask=inside[None] & (own_d[:, None] < d), other=0.0)
        scores = scored(tile_q, tile_k, at_ks + slot * ks_t, inside, scale, softcap, CAPPED, SCALED)
        key = tl.load(held + row * held_b + slot, mask=inside, other=-1) if RING else slot
        seen = inside[None] & is_seen(key[None], place[:, None], WINDOW, CHUNK)
        scores = tl.where(seen, scores * LOG2E, -float("inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weights, shrink = tl.exp2(scores - safe[:, None]), tl.exp2(best - safe)
        total = total * shrink + tl.sum(weights, 1)
        tile_v = tl.load(at_v + slot[:, None] * v_t, mask=inside[:, None] & (own_e[None] < e), other=0.0)
        acc = acc * shrink[:, None] + weighed(weights, tile_v, at_vs + slot * vs_t, inside, tile_q, SCALED)
        best = higher
    at_out = (group * splits + part) * rows
    tl.store(sums + (at_out + m)[:, None] * e + own_e[None], acc, mask=(m[:, None] < rows) & (own_e[None] < e))
    keep_marks(marks + at_out * 2, best, total, m, rows)


@triton.jit
def keep_marks(marks, best, total, m, rows):
    tl.store(marks + m * 2, best, mask=m < rows)
    tl.store(marks + m * 2 + 1, total, mask=m < rows)


@triton.jit
def combine(
    sums, marks, result, r_b, r_h, r_s, g, s, rows, splits, e,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
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
