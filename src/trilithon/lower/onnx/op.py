"""`trilithon::onnx_attention`: what ONNX's `Attention` is used for, and no more of it than every version of it agrees on.

`Attention` of opset 23 was changed in place, without a new version, and runtimes followed at different times. So these are
not used: a causal mask where queries and keys may differ in number (CPU and CUDA aligned it differently, onnxruntime#29020), a
causal mask together with another mask, `softcap` (it came behind the mask, onnx#7865), and rows without any key (NaN,
the mean of V, or 0, onnx#8068).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal) -> Tensor"


@torch.library.custom_op("trilithon::onnx_attention", mutates_args=(), schema=SCHEMA)
def onnx_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """Attend as ONNX's `Attention` does.

    Args:
        q: `[b h s d]`, float.
        k, v: `[b g t d]`, `[b g t e]`, same dtype; `h % g == 0`.
        mask: bool, or added to the scores in the dtype of q: `[b or 1, h or 1, s, t]`. Each row has a key.
        scale: factor on the scores.
        is_causal: query i sees keys 0 .. i; `s == t`, and there is no mask.
    """
    return scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=True).clone()


@onnx_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


ONNX_ATTENTION = torch.ops.trilithon.onnx_attention.default
