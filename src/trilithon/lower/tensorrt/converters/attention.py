"""Attention calls, the canonical one and PyTorch's own."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from trilithon.lower.tensorrt.attention import Attention, attend
from trilithon.lower.tensorrt.capability import AttentionSpec, keeps_a_key
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.masks import emit_bias, emit_mask
from trilithon.lower.tensorrt.network import ITensor, Network
from trilithon.lower.tensorrt.operands import operand_of, operands_of
from trilithon.passes import bound_arguments, module_path
from trilithon.rewrite.fuse_attention import SITE
from trilithon.rewrite.op import ATTENTION
from trilithon.spec.masks import Causal, Full, Mask, parse

aten = torch.ops.aten


def _site_name(node: Node | None) -> str:
    if node is None:
        return "attention"
    return str(node.meta.get(SITE) or module_path(node) or node.name)


# ------------------------------------------------------------ the canonical operation


@converts(ATTENTION)
def convert_attention(
    net: Network,
    q: ITensor,
    k: ITensor,
    v: ITensor,
    mask: str,
    scale: float,
    q_start: ITensor | None,
    key_mask: ITensor | None,
    k_positions: ITensor | None,
    bias: str,
    tables: list[ITensor] | None,
    softcap: float,
    sinks: ITensor | None,
) -> ITensor:
    """Source: `trilithon.rewrite.op`: positions come from `q_start`; a row without a key is 0."""
    if k_positions is not None:
        raise net.refuse("keys that do not stand in the order of their positions have no TensorRT form")
    if sinks is not None:
        raise net.refuse("attention sinks have no TensorRT form")
    meaning, nodes = parse(mask), _nodes(net, "q", "k", "v")
    operands, spec, scores = operands_of(net, (q, k, v), nodes)
    added = emit_bias(net, bias, scores, q_start, tables or ()) if bias else None
    upper_left = meaning == Causal() and q_start is None and added is None
    typed = None if upper_left or meaning == Full() else torch.bool
    typed = typed if added is None else torch.float32
    spec = replace(spec, upper_left=upper_left, mask=typed, from_start=q_start is not None, softcap=softcap or None)
    spec = replace(spec, turned=("turned", v.name) in net.shared)
    allowed = partial(emit_mask, net, meaning, scores, q_start, key_mask, None)
    site = Attention(
        name=_site_name(net.node),
        qkv=operands,
        scale=scale,
        spec=spec,
        allowed=allowed,
        bias=added,
        keeps_a_key=keeps_a_key(meaning, spec),
        mask=mask,
        turned=net.shared.get(("turned", v.name)),
    )
    return attend(net, site)


def _nodes(net: Network, *names: str) -> list[Any]:
    """The nodes that are these arguments of the node at hand."""
    bound = bound_arguments(net.node) if net.node is not None else {}
    return [bound.get(name) for name in names]


# ------------------------------------------------------------ PyTorch's operations


@converts(aten.scaled_dot_product_attention.default)
def convert_sdpa(
    net: Network,
    query: ITensor,
    key: ITensor,
    value: ITensor,
    attn_mask: ITensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> ITensor:
    return _sdpa(net, (query, key, value), attn_mask, dropout_p, is_causal, scale, "attn_mask")


@converts(aten._scaled_dot_product_efficient_attention.default)
def convert_efficient(
    net: Network,
    query: ITensor,
    key: ITensor,
    value: ITensor,
    attn_bias: ITensor | None,
    compute_log_sumexp: bool,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> tuple[ITensor, ...]:
    return _first_of(net, 4, _sdpa(net, (query, key, value), attn_bias, dropout_p, is_causal, scale, "attn_bias"))


@converts(aten._scaled_dot_product_flash_attention.default)
def convert_flash(
    net: Network,
    query: ITensor,
    key: ITensor,
    value: ITensor,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None,
) -> tuple[ITensor, ...]:
    return _first_of(net, 9, _sdpa(net, (query, key, value), None, dropout_p, is_causal, scale, ""))


@converts(aten._scaled_dot_product_flash_attention_for_cpu.default)
def convert_flash_for_cpu(
    net: Network,
    query: ITensor,
    key: ITensor,
    value: ITensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: ITensor | None,
    scale: float | None,
) -> tuple[ITensor, ...]:
    return _first_of(net, 2, _sdpa(net, (query, key, value), attn_mask, dropout_p, is_causal, scale, "attn_mask"))


@converts(aten._scaled_dot_product_cudnn_attention.default)
def convert_cudnn(
    net: Network,
    query: ITensor,
    key: ITensor,
    value: ITensor,
    attn_bias: ITensor | None,
    compute_log_sumexp: bool,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    scale: float | None,
) -> tuple[ITensor, ...]:
    return _first_of(net, 9, _sdpa(net, (query, key, value), attn_bias, dropout_p, is_causal, scale, "attn_bias"))


def _first_of(net: Network, count: int, result: ITensor) -> tuple[ITensor, ...]:
    """The results of an operation that gives the attention first."""
    for user in net.node.users if net.node is not None else ():
        if user.args[1:] != (0,) and user.users:
            raise net.refuse(f"its output {user.args[1]} is used; only the attention itself is given")
    return (result, *[None] * (count - 1))


def _sdpa(
    net: Network,
    tensors: tuple[ITensor, ITensor, ITensor],
    mask: ITensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    mask_name: str,
) -> ITensor:
    """Source: torch SDPA: `is_causal` is upper-left; bool masks say what to keep; others are added; a row of -inf gives 0."""
    if dropout:
        raise net.refuse(f"dropout_p={dropout}: call model.eval() before exporting")
    operands, spec, scores = operands_of(net, tensors, _nodes(net, "query", "key", "value"))
    if scale is not None and not isinstance(scale, (int, float)):
        raise net.refuse("its scale is known only at run time")
    own = _own_mask(net, mask, mask_name)
    is_bool = own is not None and net.dtype(own) == torch.bool
    triangle: Mask = Causal() if is_causal else Full()
    spec = replace(spec, upper_left=is_causal and own is None, mask=None if own is None else net.dtype(own))

    def allowed(use: str) -> ITensor | None:
        below = emit_mask(net, triangle, scores, use=use)
        if below is None or own is None or not is_bool:
            return own if is_bool else below
        key = ("triangle and mask", below.name, own.name)
        if key not in net.shared:
            net.shared[key] = net.elementwise("AND", below, own)
        return net.shared[key]

    site = Attention(
        name=_site_name(net.node),
        qkv=operands,
        scale=_default_scale(net, spec) if scale is None else float(scale),
        spec=spec,
        allowed=allowed,
        bias=None if is_bool else own,
        keeps_a_key=own is None,
    )
    result = attend(net, site)
    return result if len(tensors[0].shape) == 4 else _unranked(net, result, len(tensors[0].shape))


def _default_scale(net: Network, spec: AttentionSpec) -> float:
    if spec.d is None:
        raise net.refuse("its scale is 1/sqrt of a size that is known only at run time")
    return 1 / math.sqrt(spec.d)


def _own_mask(net: Network, mask: ITensor | None, name: str) -> ITensor | None:
    """A mask of rank 4, with the sizes that the graph knows."""
    if mask is None:
        return None
    mask = operand_of(net, mask, _nodes(net, name)[0]).x
    if len(mask.shape) > 4 or net.dtype(mask) not in (torch.bool, torch.float32, torch.float16, torch.bfloat16):
        raise net.refuse(f"its mask is {net.dtype(mask)} of rank {len(mask.shape)}")
    return net.ranked(mask, 4)


def _unranked(net: Network, x: ITensor, rank: int) -> ITensor:
    return net.reshape(x, net.sizes(x)[-rank:])
