"""The kernel of `attend_causal`, for Hopper GPUs; imported where Triton has Gluon.

A program has 128 queries of one head. One warp copies keys and values to shared memory; each of two warpgroups has 64 of the
queries and adds the values up by the weights of one block of keys while it makes those of the next.

Source: FlashAttention-3 (Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao, 2024), section 3.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK = gl.constexpr(128)  # queries of a program, and keys that they meet at a time: only of the last block some are later
HALF = gl.constexpr(64)  # queries of a warpgroup
CAUSAL = gl.constexpr("causal")  # kinds of masks; else chunks
WINDOW = gl.constexpr("window")


@gluon.jit
def first_key(row, reach, KIND: gl.constexpr):
    """The first key that a query sees: none further back than `reach` keys, or than its chunk of so many."""
    if KIND == CAUSAL:
        return row * 0
    elif KIND == WINDOW:
        return gl.maximum(row - reach + 1, 0)
    else:
        return row // reach * reach


@gluon.jit
def barriers(STAGES: gl.constexpr, arrivals: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit
def copy_in(q, k, v, held, full, empty, row, head, of_keys, blocks, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    """What one warp does: copy the queries once, and blocks of keys and values, the last first, where there is room."""
    q_held, k_held, v_held = held
    q_full, k_full, v_full = full
    k_empty, v_empty = empty
    mbarrier.expect(q_full.index(0), 2 * q.block_type.nbytes)
    tma.async_copy_global_to_shared(q, [row, head * BLOCK_D], q_full.index(0), q_held.index(0))
    tma.async_copy_global_to_shared(q, [row + HALF, head * BLOCK_D], q_full.index(0), q_held.index(1))
    for j in range(blocks):
        at, stage, phase = row - j * BLOCK, j % STAGES, (j // STAGES) & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
        tma.async_copy_global_to_shared(k, [at, of_keys * BLOCK_D], k_full.index(stage), k_held.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
        tma.async_copy_global_to_shared(v, [at, of_keys * BLOCK_D], v_full.index(stage), v_held.index(stage))


@gluon.jit
def copy_out(made, held, result, row, column):
    """Through shared memory that nobody reads any more."""
    held.store(made)
    fence_async_shared()
    tma.async_copy_shared_to_global(result, [row, column], held)
    tma.store_wait(0)


@gluon.jit
def first_weighted(scores, scale):
    """As `weighted`, of the first block, in which each query sees itself."""
    best = gl.max(scores, 1) * scale
    weights = gl.exp2(scores * scale - best[:, None])
    return weights, best, gl.sum(weights, 1)


@gluon.jit
def weighted(scores, best, total, scale):
    """Weights of keys by the largest score of a row so far, that score, the sum of weights, and what sums before are worth."""
    new = gl.maximum(best, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new[:, None])
    kept = gl.exp2(best - new)
    return weights, new, total * kept + gl.sum(weights, 1), kept


@gluon.jit
def seen(scores, row, key, reach, KIND: gl.constexpr, DIAGONAL: gl.constexpr, layout: gl.constexpr):
    """Scores of the queries from `row` on with the keys from `key` on; those that a query must not see are -inf."""
    rows = row + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))[:, None]
    keys = key + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))[None, :]
    if DIAGONAL:
        scores = gl.where(rows >= keys, scores, float("-inf"))
    if KIND != CAUSAL:
        scores = gl.where(first_key(rows, reach, KIND) <= keys, scores, float("-inf"))
    return scores


@gluon.jit
def seen_before(scores, row, key, reach, KIND: gl.constexpr, layout: gl.constexpr):
    """`seen` of keys before all the queries, of which a block has some to hide only where a window or chunk begins in it."""
    if KIND != CAUSAL:  # noqa: SIM102 - known to the compiler, unlike the other
        if key < first_key(row + HALF - 1, reach, KIND):
            scores = seen(scores, row, key, reach, KIND, False, layout)
    return scores


@gluon.jit
def attend_half(
    half: gl.constexpr, result, held, full, empty, row, head, blocks, scale, reach,
    KIND: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What one warpgroup does: attend with 64 queries. The last block of keys, where the diagonal is, comes first."""
    q_held, k_held, v_held = held
    q_full, k_full, v_full = full
    k_empty, v_empty = empty
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_sums, 2)
    nothing, sums = gl.zeros([HALF, BLOCK], gl.float32, layout=of_scores), gl.zeros([HALF, BLOCK_D], gl.float32, layout=of_sums)
    queries, own = q_held.index(half), row + half * HALF
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(queries, k_held.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0), count=1)
    weights, best, total = first_weighted(seen(scores, own, row, reach, KIND, True, of_scores), scale)
    weights = gl.convert_layout(weights.to(result.dtype), of_weights)
    mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1, pred=blocks > 1)
    for j in range(1, blocks):
        stage, last = j % STAGES, (j - 1) % STAGES
        scores = warpgroup_mma(queries, k_held.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(last), ((j - 1) // STAGES) & 1)
        sums = warpgroup_mma(weights, v_held.index(last), sums, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        scores = seen_before(scores, own, row - j * BLOCK, reach, KIND, of_scores)
        coming, best, total, kept = weighted(scores, best, total, scale)
        coming = gl.convert_layout(coming.to(result.dtype), of_weights)
        # waiting here, though only the next turn reads it, keeps ptxas from making the weights behind the wait for the sums
        mbarrier.wait(k_full.index((j + 1) % STAGES), ((j + 1) // STAGES) & 1, pred=j + 1 < blocks)
        sums, weights = warpgroup_mma_wait(0, deps=[sums, coming])
        mbarrier.arrive(v_empty.index(last), count=1)
        sums = sums * gl.convert_layout(kept, gl.SliceLayout(1, of_sums))[:, None]
    mbarrier.wait(v_full.index((blocks - 1) % STAGES), ((blocks - 1) // STAGES) & 1)
    sums = warpgroup_mma(weights, v_held.index((blocks - 1) % STAGES), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[sums])
    made = sums / gl.convert_layout(total, gl.SliceLayout(1, of_sums))[:, None]
    copy_out(made.to(result.dtype), queries, result, own, head * BLOCK_D)


@gluon.jit(do_not_specialize=["tokens", "heads", "group", "reach"])
def causal(
    q, k, v, result, tokens, heads, group, scale, reach, KIND: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Causal attention from position 0, of windows or chunks too; programs with the most keys come first.

    Args:
        q, k, v, result: descriptors of `[tokens, heads x BLOCK_D]`, keys and values of `heads / group`; blocks of
            `HALF` queries and results, `BLOCK` keys and values, and `BLOCK_D` columns.
        scale: of the scores, times log2(e).
        reach: keys of a window or a chunk; blocks of keys that no query of a program sees are not read.
    """
    row, head = (gl.cdiv(tokens, BLOCK) - 1 - gl.program_id(0) // heads) * BLOCK, gl.program_id(0) % heads
    blocks = row // BLOCK + 1 - first_key(row, reach, KIND) // BLOCK
    q_held = gl.allocate_shared_memory(q.dtype, [2, HALF, BLOCK_D], q.layout)
    k_held = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK, BLOCK_D], k.layout)
    v_held = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK, BLOCK_D], v.layout)
    full = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1))
    empty = (barriers(STAGES, 2), barriers(STAGES, 2))
    fence_async_shared()
    held = (q_held, k_held, v_held)
    gl.warp_specialize(
        [
            (attend_half, (0, result, held, full, empty, row, head, blocks, scale, reach, KIND, BLOCK_D, STAGES)),
            (attend_half, (1, result, held, full, empty, row, head, blocks, scale, reach, KIND, BLOCK_D, STAGES)),
            (copy_in, (q, k, v, held, full, empty, row, head, head // group, blocks, BLOCK_D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
