"""What generated kernels call; imported where Triton is."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trilithon.lower.native.fused.operations import NOTHING
from trilithon.lower.native.split_kv_kernels import (
    LOG2E,
    first_and_end,
    is_seen,
    scored,
    tanh,
    weighed,
)

ABSENT = tl.constexpr(NOTHING)


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
def attend_part(
    q, k_new, v_new, tile_k, tile_v, k, v, start, begin, stop, group, part, sums, marks,
    k_g, k_t, v_g, v_t, t, splits, scale, softcap,
    N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """One token over a cache: the queries of one key head, over one part of the keys.

    The first part also writes the token's key and value into their slot, and takes them from registers.

    Args:
        q: `[BLOCK_M, BLOCK_D]`; k_new `[1, BLOCK_D]`; v_new `[1, BLOCK_E]`.
        tile_k, tile_v: the first keys and values of the part.
        sums, marks: see `put_together`.
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
    SHARES: tl.constexpr = (E + SHARE - 1) // SHARE
    share = tl.arange(0, BLOCK_E // SHARE)
    row = (group * N + m)[:, None] * SHARES
    at_sums = ((row + own_e[None] // SHARE) * splits + part) * SHARE + own_e[None] % SHARE
    tl.store(sums + at_sums, told(acc), mask=(m[:, None] < N) & (own_e[None] < E))
    at_marks = ((row + share[None]) * splits + part) * 2
    inside = (m[:, None] < N) & (share[None] < SHARES)
    tl.store(marks + at_marks, told(best)[:, None], mask=inside)
    tl.store(marks + at_marks + 1, told(total)[:, None], mask=inside)


@triton.jit
def told(x):
    """The bits of a float32 that is put where `ABSENT` stood: a NaN of these very bits becomes another."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits == ABSENT, 0x7FFFFFFF, bits)


@triton.jit
def put_together(
    sums, marks, result, place, splits, active,
    N: tl.constexpr, E: tl.constexpr, BLOCK_S: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """What all parts found, for `SHARE` numbers of one query head.

    It waits for each number by itself: parts write it in place of `ABSENT`, which is put back here for the next token. No
    part waits for anything, and programs start in order of their numbers, so all parts come to their end.

    Args:
        sums: `[shares, splits, SHARE]`, bits of float32; the shares of all heads.
        marks: `[shares, splits, 2]`, the highest score and the sum of the weights, for each share again.
        place: of the share.
        BLOCK_S: so many that no two threads hold the same number: they might find it at different times.
    """
    SHARES: tl.constexpr = (E + SHARE - 1) // SHARE
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, SHARE)
    column = place % SHARES * SHARE + c
    here = (s < active)[:, None] & (column < E)[None]
    own = (place * splits + s)[:, None]
    at_sums, at_best = sums + own * SHARE + c[None], marks + own * 2 + c[None] * 0
    tile = tl.zeros([BLOCK_S, SHARE], tl.int32)
    best, total, missing = tile, tile, 1
    while missing > 0:  # each thread looks for all that it needs
        tile = tl.load(at_sums, mask=here, other=0, volatile=True)
        best = tl.load(at_best, mask=here, other=0, volatile=True)
        total = tl.load(at_best + 1, mask=here, other=0, volatile=True)
        absent = ((tile == ABSENT) | (best == ABSENT) | (total == ABSENT)).to(tl.int32)
        missing = tl.max(tl.max(absent, 1), 0)
    tl.store(at_sums, tl.full([BLOCK_S, SHARE], ABSENT, tl.int32), mask=here)
    tl.store(at_best, tl.full([BLOCK_S, SHARE], ABSENT, tl.int32), mask=here)
    tl.store(at_best + 1, tl.full([BLOCK_S, SHARE], ABSENT, tl.int32), mask=here)
    score = tl.where(here, best.to(tl.float32, bitcast=True), -float("inf"))
    highest = tl.max(score, 0)
    weight = tl.exp2(score - tl.where(highest == -float("inf"), 0.0, highest)[None])
    divisor = tl.sum(total.to(tl.float32, bitcast=True) * weight, 0)
    value = tl.sum(tile.to(tl.float32, bitcast=True) * weight, 0) / tl.where(divisor == 0.0, 1.0, divisor)
    tl.store(result + place // SHARES * E + column, value.to(result.dtype.element_ty), mask=column < E)


@triton.jit
def meet(
    x, result, inboxes, first, size,
    RANKS: tl.constexpr, OWN: tl.constexpr, JOINS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of what all ranks have, added up in their order, or all of it one behind the other.

    Each rank writes its numbers into the inboxes of the others, where `ABSENT` stands, and waits for each of theirs by itself:
    a number is its own sign that it has come. What has been read becomes `ABSENT` again. The next numbers for the same place
    come in the next step, when this rank has taken part in another meeting, and so has read these.

    Args:
        x: `[size]`; result `[size]`, or where it `JOINS` `[RANKS * size]`.
        inboxes: `[RANKS]` int64, the address of each rank's inbox: int32, bits of float32.
        first: where in each this meeting's part begins: `[RANKS, size]`.
    """
    let_next_start(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    here = tl.load(inboxes + OWN).to(tl.pointer_type(tl.int32)) + first + at
    wait(PDL)
    value = tl.load(x + at, mask=inside, other=0.0)
    own = told(value.to(tl.float32))
    for rank in tl.static_range(RANKS):
        if rank != OWN:
            there = tl.load(inboxes + rank).to(tl.pointer_type(tl.int32)) + first + at
            tl.store(there + OWN * size, own, mask=inside)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        bits = own
        if rank != OWN:
            missing = 1
            while missing > 0:
                bits = tl.load(here + rank * size, mask=inside, other=0, volatile=True)
                missing = tl.max((bits == ABSENT).to(tl.int32), 0)
            tl.store(here + rank * size, tl.full([BLOCK], ABSENT, tl.int32), mask=inside)
        found = bits.to(tl.float32, bitcast=True)
        if JOINS:
            tl.store(result + rank * size + at, found.to(result.dtype.element_ty), mask=inside)
        else:
            total += found
    if not JOINS:
        tl.store(result + at, total.to(result.dtype.element_ty), mask=inside)


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
