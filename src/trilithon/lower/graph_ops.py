"""The closed table of what a saved graph may call: operations that make values of values, and nothing else.

A saved graph is data from a file. Whatever could read or write a file, run code, or reach beyond a tensor's memory is not
in the table, so that no graph can ask for it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from trilithon.rewrite import cache_ops
from trilithon.rewrite.op import ATTENTION


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ATEN = _names(
    """
    __and__ __or__ __xor__ _assert_async _assert_scalar _assert_tensor_metadata _fused_rms_norm _grouped_mm _log_softmax
    _native_batch_norm_legit_no_training _scaled_dot_product_cudnn_attention _scaled_dot_product_efficient_attention
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _unsafe_view
    abs absolute acos acosh add addcdiv addcmul addmm alias all amax amin any arange argmax argmin argsort asin asinh atan
    atan2 atanh avg_pool2d baddbmm batch_norm bitwise_and bitwise_not bitwise_or bitwise_xor bmm cat ceil celu chunk clamp
    clamp_max clamp_min clip clone concat concatenate constant_pad_nd contiguous conv1d conv2d conv3d convolution copy cos
    cosh cumprod cumsum detach diff div divide dot dropout einsum elu embedding empty empty_like eq erf erfc exp exp2 expand
    expand_as expm1 eye fill flatten flip floor floor_divide fmod frac full full_like gather ge gelu glu greater
    greater_equal group_norm gt hardsigmoid hardswish hardtanh histc index index_add index_put index_select isfinite isinf
    isnan item layer_norm le leaky_relu lerp less less_equal lift_fresh lift_fresh_copy linalg_norm linalg_vector_norm linear
    log log10 log1p log2 log_sigmoid log_softmax logical_and logical_not logical_or logical_xor logsumexp lt masked_fill
    matmul max maximum mean min minimum mish mm movedim mul multiply mv nan_to_num narrow native_group_norm
    native_layer_norm ne neg negative new_empty new_full new_ones new_zeros norm not_equal one_hot ones ones_like outer pad
    permute polar pow prod reciprocal relu relu6 remainder repeat repeat_interleave reshape rms_norm roll round rsqrt rsub
    scalar_tensor scaled_dot_product_attention scatter scatter_add select select_scatter selu sgn sigmoid sign silu sin sinh
    slice slice_scatter softmax softplus sort split split_with_sizes sqrt square squeeze stack std sub subtract sum
    sym_constrain_range sym_constrain_range_for_size sym_numel sym_size sym_storage_offset sym_stride t tan tanh tile to
    topk transpose tril triu true_divide trunc type_as unbind unflatten unsqueeze upsample_bicubic2d upsample_bilinear2d
    upsample_nearest2d var var_mean view view_as_complex view_as_real where zeros zeros_like
    """
)
OPERATOR = _names(
    "add and_ eq floordiv ge getitem gt invert le lt mod mul ne neg not_ or_ pos pow rshift lshift sub truediv xor"
)
SYM = _names("sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum")
TRANSFORMERS = "transformers.grouped_mm_fallback.default"  # products of experts; known once transformers has said what it is
OURS = {
    f.__name__: f
    for f in (
        cache_ops.last_tokens,
        cache_ops.read_cache,
        cache_ops.real_positions,
        cache_ops.slot_positions,
        cache_ops.token_positions,
        cache_ops.turn,
        cache_ops.turn_back,
        cache_ops.write_cache,
        cache_ops.write_cache_8bit,
    )
}
Called = Callable[..., Any] | OpOverload


def name_of(called: Any) -> str | None:
    """What a file calls it, e.g. "aten.add.Tensor"; None where it is not in the table."""
    if isinstance(called, OpOverload):
        name = str(called)
    elif called in OURS.values():
        name = f"trilithon.{called.__name__}"
    else:
        home = str(getattr(called, "__module__", "")).lstrip("_")  # of `operator` it is `_operator`
        name = f"{home}.{getattr(called, '__name__', '')}"
    return name if _find(name) is called else None


def called(name: str) -> Called:
    """What `name_of` gave this name.

    Raises:
        ValueError: it is not in the table, or is not known here.
    """
    found = _find(name)
    if found is None:
        raise ValueError(f"{name} is no operation that a saved graph may call")
    return found


def _find(name: str) -> Called | None:
    family, _, rest = name.partition(".")
    if family == "aten":
        packet, _, overload = rest.partition(".")
        if packet not in ATEN or not overload.isidentifier():
            return None
        found: Any = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        return found if isinstance(found, OpOverload) and not _writes(found) else None
    if name == str(ATTENTION):
        return ATTENTION
    if name == TRANSFORMERS:
        from trilithon.capture import hf  # transformers takes a second to import: only for graphs that call it

        hf.register_operations()
        return getattr(getattr(torch.ops.transformers, "grouped_mm_fallback", None), "default", None)
    own: Any = {"operator": (OPERATOR, operator), "torch": (SYM, torch)}.get(family)
    if own is not None:
        return getattr(own[1], rest, None) if rest in own[0] else None
    return OURS.get(rest) if family == "trilithon" else None


def _writes(found: OpOverload) -> bool:
    """Into one of its arguments? `out` overloads do."""
    return bool(found._schema.is_mutable)
