"""What generated kernels call; imported where Triton is."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trilithon.lower.native.split_kv_kernels import (
    LOG2E,
    first_and_end,
    is_seen,
    keep_marks,
    scored,
    tanh,
    weighed,
)


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel may take up what multiprocessors are free, and load its weights; it waits before it reads more."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until the kernels before have written all that they write."""
    if PDL:
        gdc_wait()


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
    return begin, tl.minimum(begin + each, end), tl.maximum(tl.cdiv(end - first, each), 1)


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
def attend_token(
    q, k_new, v_new, tile_k, tile_v, k, v, start, begin, stop, active, group, part, sums, marks, arrived, result,
    k_g, k_t, v_g, v_t, t, splits, scale, softcap,
    N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One token over a cache: the queries of one key head, over one part of the keys; the last part to end puts all together.

    The first part also writes the token's key and value into their slot, and takes them from registers.

    Args:
        q: `[BLOCK_M, BLOCK_D]`; k_new `[1, BLOCK_D]`; v_new `[1, BLOCK_E]`.
        tile_k, tile_v: the first keys and values of the part.
        arrived: `[g]` int32, zeros, and again zeros at the end.
    """
    m, n, own_d, own_e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    fresh = start % t
    at_k, at_v = k + group.to(tl.int64) * k_g + fresh * k_t, v + group.to(tl.int64) * v_g + fresh * v_t
    tl.store(at_k + own_d[None], k_new, mask=(part == 0) & (own_d[None] < D))
    tl.store(at_v + own_e[None], v_new, mask=(part == 0) & (own_e[None] < E))
    score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale
    if CAPPED:
        score = softcap * tanh(score / softcap)
    best = tl.where(part == 0, score * LOG2E, -float("inf"))
    total = tl.where(part == 0, tl.full([BLOCK_M], 1.0, tl.float32), 0.0)
    acc = tl.where(part == 0, tl.zeros([BLOCK_M, BLOCK_E], tl.float32) + v_new.to(tl.float32), 0.0)
    best, total, acc = take_tile(
        q, tile_k, tile_v, begin + n, stop, start, t, best, total, acc, scale, softcap, WINDOW, CHUNK, RING, CAPPED
    )
    for at in range(begin + BLOCK_N, stop, BLOCK_N):
        more_k, more_v = load_tile(k, v, group, at, stop, k_g, k_t, v_g, v_t, D, E, BLOCK_N, BLOCK_D, BLOCK_E)
        best, total, acc = take_tile(
            q, more_k, more_v, at + n, stop, start, t, best, total, acc, scale, softcap, WINDOW, CHUNK, RING, CAPPED
        )
    at_out = (group * splits + part) * N
    tl.store(sums + (at_out + m)[:, None] * E + own_e[None], acc, mask=(m[:, None] < N) & (own_e[None] < E))
    keep_marks(marks + at_out * 2, best, total, m, N)
    tl.debug_barrier()
    if tl.atomic_add(arrived + group, 1, sem="acq_rel") == active - 1:
        put_together(sums, marks, result, group, splits, active, N, E, BLOCK_S, BLOCK_H, BLOCK_E)
        tl.store(arrived + group, 0)


@triton.jit
def put_together(
    sums, marks, result, group, splits, active,
    N: tl.constexpr, E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What all parts found, for all queries of a key head at once."""
    s, h, own_e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_E)
    best, total = tl.full([BLOCK_H], -float("inf"), tl.float32), tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_E], tl.float32)
    for at in range(0, active, BLOCK_S):
        place = (group * splits + at + s)[:, None] * N + h[None]
        inside = (at + s < active)[:, None] & (h < N)[None]
        of_e = inside[:, :, None] & (own_e < E)[None, None]
        tile = tl.load(sums + place[:, :, None] * E + own_e[None, None], mask=of_e, other=0.0, cache_modifier=".cg")
        mark = tl.load(marks + place * 2, mask=inside, other=-float("inf"), cache_modifier=".cg")
        part_total = tl.load(marks + place * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(best, tl.max(mark, 0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weight, shrink = tl.exp2(mark - safe[None]), tl.exp2(best - safe)
        total = total * shrink + tl.sum(part_total * weight, 0)
        acc = acc * shrink[:, None] + tl.sum(tile * weight[:, :, None], 0)
        best = higher
    value = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at_out = result + (group * N + h)[:, None] * E + own_e[None]
    tl.store(at_out, value.to(result.dtype.element_ty), mask=(h < N)[:, None] & (own_e < E)[None])


@triton.jit
def better(value, place, other, at):
    """The larger of two numbers, and where it stands; of equal ones the first. What is no number is larger than all."""
    is_first = (value > other) | ((value != value) & (other == other))
    is_equal = (value == other) | ((value != value) & (other != other))
    takes = is_first | (is_equal & (place < at))
    return tl.where(takes, value, other), tl.where(takes, place, at)


@triton.jit
def largest(x, result, values, places, arrived, size, PDL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """The place of the largest of many numbers; the program that ends last compares what the others found.

    Args:
        x: `[size]`; result `[1]` int64; values, places: of each program.
        arrived: `[1]` int32, zero, and zero again at the end.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    let_next_start(PDL)
    wait(PDL)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    found, place = tl.reduce((tl.load(x + at, mask=at < size, other=-float("inf")).to(tl.float32), at), 0, better)
    tl.store(values + pid, found)
    tl.store(places + pid, place)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == programs - 1:
        own = tl.arange(0, BLOCK_P)
        of_all = tl.load(values + own, mask=own < programs, other=-float("inf"), cache_modifier=".cg")
        where = tl.load(places + own, mask=own < programs, other=size, cache_modifier=".cg")
        _, first = tl.reduce((of_all, where), 0, better)
        tl.store(result, first.to(tl.int64))
        tl.store(arrived, 0)
