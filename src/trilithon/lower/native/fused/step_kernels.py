"""What generated kernels call; imported where Triton is."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trilithon.lower.native.split_kv_kernels import (
    LOG2E,
    first_and_end,
    is_seen,
    keep_marks,
    put_together,
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
def fresh_score(q, k_new, scale, softcap, CAPPED: tl.constexpr):
    """The scores `[m]` of the token at hand."""
    score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale
    if CAPPED:
        score = softcap * tanh(score / softcap)
    return score * LOG2E


@triton.jit
def attend_token(
    q, k_new, v_new, k, v, start, group, part, sums, marks, arrived, result,
    k_g, k_t, v_g, v_t, t, splits, scale, softcap,
    N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One token over a cache: the queries of one key head, over one part of the keys; the last part to end puts all together.

    The last part also writes the token's key and value into their slot, and takes them from registers.

    Args:
        q: `[BLOCK_M, BLOCK_D]`; k_new `[1, BLOCK_D]`; v_new `[1, BLOCK_E]`.
        arrived: `[g]` int32, zeros, and again zeros at the end.
    """
    m, n, own_d, own_e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    at_k, at_v = k + group.to(tl.int64) * k_g, v + group.to(tl.int64) * v_g
    is_last, fresh = part == splits - 1, start % t
    tl.store(at_k + fresh * k_t + own_d[None], k_new, mask=is_last & (own_d[None] < D))
    tl.store(at_v + fresh * v_t + own_e[None], v_new, mask=is_last & (own_e[None] < E))
    best = tl.where(is_last & (m < N), fresh_score(q, k_new, scale, softcap, CAPPED), -float("inf"))
    total = tl.where(is_last & (m < N), 1.0, 0.0)
    acc = tl.where((is_last & (m < N))[:, None], v_new.to(tl.float32), 0.0)
    first, end = first_and_end(start, 0, t, WINDOW, CHUNK, False)
    if RING:
        first, end = start * 0, tl.minimum(start, t)
    each = tl.cdiv(tl.cdiv(end - first, splits), BLOCK_N) * BLOCK_N
    begin = first + part * each
    stop = tl.minimum(begin + each, end)
    for at in range(begin, stop, BLOCK_N):
        slot, inside = at + n, at + n < stop
        tile_k = tl.load(at_k + own_d[:, None] + slot[None] * k_t, mask=inside[None] & (own_d[:, None] < D), other=0.0)
        tile_v = tl.load(at_v + own_e[None] + slot[:, None] * v_t, mask=inside[:, None] & (own_e[None] < E), other=0.0)
        scores = scored(q, tile_k, k, inside, scale, softcap, CAPPED, False)
        key = slot
        if RING:
            key = start - (start - slot) % t
        seen = inside & (key < start) & is_seen(key, start, WINDOW, CHUNK)
        scores = tl.where(seen[None] & (m < N)[:, None], scores * LOG2E, -float("inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weights, shrink = tl.exp2(scores - safe[:, None]), tl.exp2(best - safe)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + weighed(weights, tile_v, v, inside, q, False)
        best = higher
    at_out = (group * splits + part) * N
    tl.store(sums + (at_out + m)[:, None] * E + own_e[None], acc, mask=(m[:, None] < N) & (own_e[None] < E))
    keep_marks(marks + at_out * 2, best, total, m, N)
    tl.debug_barrier()
    if tl.atomic_add(arrived + group, 1, sem="acq_rel") == splits - 1:
        for head in tl.static_range(N):
            value = put_together(sums, marks, group * splits * N + head, N, splits, E, BLOCK_S, BLOCK_E)
            tl.store(result + (group * N + head) * E + own_e, value.to(result.dtype.element_ty), mask=own_e < E)
        tl.store(arrived + group, 0)


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
