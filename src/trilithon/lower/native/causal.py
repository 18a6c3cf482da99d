"""Causal attention of a prompt by a kernel of our own, which starts long rows first and needs no scratch memory."""

from __future__ import annotations

import math
from functools import cache, partial

import torch
from torch import Tensor

from trilithon.lower.native.attention import attend
from trilithon.lower.native.hopper import LEAST_TOKENS, is_for, works

WIDTHS = (64, 128)  # of a head
QUERIES, KEYS = 64, 128  # of a block in shared memory
STAGES = 2
TRIED = (4, 2, 333)  # heads, those of keys, tokens with which the kernel is compared before it is used


@torch.library.custom_op("trilithon::attend_causal", mutates_args=())
def attend_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention from position 0; on a Hopper GPU, with many tokens of 16 bits, by one kernel, else through SDPA.

    Args:
        q, k, v: `[1 h s d]`, `[1 g s d]`, `[1 g s d]`.
        scale: factor on the scores.

    Returns:
        `[1 h s d]`, token by token in memory; scores, softmax and sums in float32.
    """
    if _suits(q, k, v, scale) and _works(q.device, q.dtype, q.shape[3]):
        return attend_by_kernel(q, k, v, scale)
    made = attend(q, k, v, "causal", scale, None)
    return made.transpose(1, 2).contiguous().transpose(1, 2)


@attend_causal.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _place_of_result(q)


ATTEND_CAUSAL = torch.ops.trilithon.attend_causal.default


def _place_of_result(q: Tensor) -> Tensor:
    return q.new_empty((1, q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)


def _suits(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Is it long enough, and are the heads of a token side by side, in rows that the copy engine takes?"""
    alike = k.shape == v.shape and q.shape[2:] == k.shape[2:] and q.shape[3] in WIDTHS and q.shape[1] % k.shape[1] == 0
    if not is_for(q) or not alike or q.shape[0] != 1 or q.shape[2] < LEAST_TOKENS or scale <= 0:
        return False
    return all(
        x.stride(3) == 1 and x.stride(1) == x.shape[3] and x.stride(2) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (q, k, v)
    )


def attend_by_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`attend_causal` by the kernel; the heads of a token are side by side."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from trilithon.lower.native.causal_kernels import causal

    _, heads, tokens, width = q.shape
    result, number = _place_of_result(q), {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[q.dtype]
    found = []
    for x, rows in ((q, QUERIES), (k, KEYS), (v, KEYS), (result, QUERIES)):
        by_token = x.as_strided((tokens, x.shape[1] * width), (x.stride(2), 1))
        layout = gl.NVMMASharedLayout.get_default_for([rows, width], number)
        found.append(TensorDescriptor.from_tensor(by_token, [rows, width], layout))
    programs, log2_scale = heads * -(-tokens // (2 * QUERIES)), scale * math.log2(math.e)
    causal[(programs,)](*found, tokens, heads, heads // k.shape[1], log2_scale, width, STAGES, num_warps=4)
    return result


@cache
def _works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """See `works`; on random numbers."""
    heads, groups, tokens = TRIED
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn((1, tokens, n, width), generator=generator, device=device).to(dtype).transpose(1, 2)
        for n in (heads, groups, groups)
    )
    scale = width**-0.5
    return works(
        "causal attention of prompts is PyTorch's",
        partial(attend_by_kernel, q, k, v, scale),
        partial(attend, q, k, v, "causal", scale, None),
    )
