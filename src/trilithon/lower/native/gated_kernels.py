"""The kernel of `gated_product`; imported where Triton is."""

import triton
import triton.language as tl

from trilithon.lower.native.split_kv_kernels import tanh


@triton.jit
def tile_of(number, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The first row and column of a tile; `GROUP` tiles that read the same columns follow each other."""
    rows, each = tl.cdiv(m, BLOCK_M), GROUP * tl.cdiv(n, BLOCK_N)
    first = number // each * GROUP
    height = tl.minimum(rows - first, GROUP)
    return (first + number % each % height) * BLOCK_M, number % each // height * BLOCK_N


@triton.jit
def activated(x, ACT: tl.constexpr):
    if ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit(do_not_specialize=["m"])
def gated(
    x, weight, result, m, n, k,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles of `act(x @ gate.T) * (x @ up.T)`; sums in float32, each product and the activation rounded as PyTorch rounds.

    Args:
        x, weight, result: tensor descriptors of `[m k]`, `[2n k]` (gate above up) and `[m n]`.
    """
    dtype: tl.constexpr = result.dtype
    for number in tl.range(tl.program_id(0), tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N), tl.num_programs(0)):
        row, column = tile_of(number, m, n, BLOCK_M, BLOCK_N, GROUP)
        gate, up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for at in range(0, k, BLOCK_K):
            tile = x.load([row, at])
            gate = tl.dot(tile, weight.load([column, at]).T, gate)
            up = tl.dot(tile, weight.load([n + column, at]).T, up)
        made = activated(gate.to(dtype).to(tl.float32), ACT).to(dtype).to(tl.float32)
        result.store([row, column], (made * up.to(dtype).to(tl.float32)).to(dtype))
