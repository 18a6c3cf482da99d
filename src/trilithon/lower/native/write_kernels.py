"""The kernel of `write_tokens`; imported where Triton is."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["s", "t"])
def write(
    x, cache, starts, counts, x_b, x_g, x_s, c_b, c_g, c_t, g, s, t, d,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head, each into its slot; what is padding, or older than the cache is long, is not read either."""
    head, row = tl.program_id(1) % g, tl.program_id(1) // g
    start, count = tl.load(starts + row), tl.load(counts + row)
    token, own = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    inside = ((token < count) & (token >= count - t))[:, None] & (own[None] < d)
    slot = ((start % t).to(tl.int32) + token % t) % t
    at_x = x + row.to(tl.int64) * x_b + head.to(tl.int64) * x_g + token[:, None].to(tl.int64) * x_s + own[None]
    at_cache = cache + row.to(tl.int64) * c_b + head.to(tl.int64) * c_g + slot[:, None].to(tl.int64) * c_t + own[None]
    tl.store(at_cache, tl.load(at_x, mask=inside), mask=inside)
