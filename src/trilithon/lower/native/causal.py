"""Causal attention of a prompt by a kernel of our own, which reads no keys outside of windows and chunks, starts long rows
first, and needs no scratch memory.
"""

from __future__ import annotations

import math
from functools import cache, partial

import torch
from torch import Tensor

from trilithon.lower.native.attention import attend
from trilithon.lower.native.hopper import LEAST_TOKENS, is_for, works
from trilithon.lower.native.split_kv import has_bounds, reach
from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import Causal, Chunked, Mask, SlidingWindow, parse

WIDTHS = (64, 128)  # of a head
STAGES = 2
TRIED = (4, 2, 700)  # heads, those of keys, tokens with which the kernel is compared before it is used
KINDS: dict[str, Mask] = {  # of masks, and one of each with which that is done
    "causal": Causal(),
    "window": SlidingWindow(200),
    "chunk": Causal() & Chunked(300),
}


def attend_causal(q: Tensor, k: Tensor, v: Tensor, mask: str, scale: float) -> Tensor:
    """Attention from position 0; on a Hopper GPU, with many tokens of 16 bits, by one kernel, else through SDPA.

    Args:
        q, k, v: `[1 h s d]`, `[1 g s d]`, `[1 g s d]`.
        mask: canonical text of one that `has_kernel`.
        scale: factor on the scores.

    Returns:
        `[1 h s d]`, token by token in memory; scores, softmax and sums in float32.
    """
    meant = parse(mask)
    if _suits(q, k, v, scale) and _works(q.device, q.dtype, q.shape[3], kind_of(meant)):
        return attend_by_kernel(q, k, v, meant, scale)
    return _through_sdpa(q, k, v, meant, scale).transpose(1, 2).contiguous().transpose(1, 2)


def kind_of(mask: Mask) -> str:
    """Which of `KINDS` it is; "" if none."""
    if not has_bounds(mask):
        return ""
    window, chunk = reach(mask)
    return "" if window and chunk else "window" if window else "chunk" if chunk else "causal"


def has_kernel(mask: Mask, width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """May prompts with such a mask, and heads so wide, run on the kernel there?"""
    return bool(kind_of(mask)) and width in WIDTHS and is_for(device, dtype)


def _place_of_result(q: Tensor) -> Tensor:
    return q.new_empty((1, q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)


def _through_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    if mask == Causal():
        return attend(q, k, v, str(mask), scale, None)
    place = torch.arange(q.shape[2], device=q.device)
    return attend(q, k, v, str(mask), scale, evaluate(mask.term(), {"q": place[:, None], "k": place}))


def _suits(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Is it long enough, and are the heads of a token side by side, in rows that the copy engine takes?"""
    alike = k.shape == v.shape and q.shape[2:] == k.shape[2:] and q.shape[3] in WIDTHS and q.shape[1] % k.shape[1] == 0
    if not is_for(q.device, q.dtype) or not alike or q.shape[0] != 1 or q.shape[2] < LEAST_TOKENS or scale <= 0:
        return False
    return all(
        x.stride(3) == 1 and x.stride(1) == x.shape[3] and x.stride(2) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (q, k, v)
    )


def attend_by_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """`attend_causal` by the kernel; the heads of a token are side by side."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from trilithon.lower.native.causal_kernels import BLOCK, HALF, causal

    _, heads, tokens, width = q.shape
    result, number = _place_of_result(q), {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[q.dtype]
    found = []
    for x, rows in ((q, HALF.value), (k, BLOCK.value), (v, BLOCK.value), (result, HALF.value)):
        by_token = x.as_strided((tokens, x.shape[1] * width), (x.stride(2), 1))
        layout = gl.NVMMASharedLayout.get_default_for([rows, width], number)
        found.append(TensorDescriptor.from_tensor(by_token, [rows, width], layout))
    programs, log2_scale = heads * -(-tokens // BLOCK.value), scale * math.log2(math.e)
    sizes = tokens, heads, heads // k.shape[1], log2_scale, max(reach(mask))
    causal[(programs,)](*found, *sizes, kind_of(mask), width, STAGES, num_warps=4)
    return result


@cache
def _works(device: torch.device, dtype: torch.dtype, width: int, kind: str) -> bool:
    """See `works`; on random numbers."""
    heads, groups, tokens = TRIED
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn((1, tokens, n, width), generator=generator, device=device).to(dtype).transpose(1, 2)
        for n in (heads, groups, groups)
    )
    given = q, k, v, KINDS[kind], width**-0.5
    return works("causal attention of prompts is PyTorch's", partial(attend_by_kernel, *given), partial(_through_sdpa, *given))
