"""What generated kernels call; imported where Triton is."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trilithon.lower.native.fused.operations import NOTHING

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
def told(x):
    """The bits of a float32 that is put where `ABSENT` stood: a NaN of these very bits becomes another."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits == ABSENT, 0x7FFFFFFF, bits)


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
