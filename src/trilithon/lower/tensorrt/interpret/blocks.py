"""Layers that are blocks of networks: attention, rotary embedding, normalization, convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trilithon.lower.tensorrt.interpret.read import Layer, evaluates, wide


@evaluates("ATTENTION_INPUT", "IAttentionInputLayer")
def attention_input(layer: Layer) -> Tensor:
    """The whole attention, which TensorRT shows as two layers; the second passes it on. No scale is applied."""
    attention = layer.own.attention
    why = _not_modelled(attention)
    if why is not None:
        raise layer.refuse(why)
    q, k, v = layer.wide(0), layer.wide(1), layer.wide(2)
    heads = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(heads, 1).transpose(-1, -2)  # query head h reads key head h // heads
    allowed = _causal(attention.causal_kind.name, scores.shape[-2], scores.shape[-1])
    if attention.mask is not None:
        mask = layer.env[attention.mask.name]
        allowed = allowed & (mask if mask.dtype == torch.bool else mask > -torch.inf)
        scores = scores if mask.dtype == torch.bool else scores + wide(mask)
    allowed = allowed.expand(scores.shape)
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1)
    result = weights @ v.repeat_interleave(heads, 1)
    return result.masked_fill(~allowed.any(-1, keepdim=True), layer.mode.empty_row)


def _not_modelled(attention: Any) -> str | None:
    """Why this attention has no known meaning, or None."""
    forms = attention.query_form.name, attention.key_value_form.name
    if forms != ("PADDED_BHND", "PADDED_BHND"):
        return f"its forms are {forms}; only padded ones are modelled"
    if attention.norm_op.name != "SOFTMAX":
        return f"its normalization is {attention.norm_op.name}, which TensorRT 1.5 builds as a softmax all the same"
    if attention.query_lengths is not None or attention.key_value_lengths is not None:
        return "it has lengths, which TensorRT 1.5 inverts, and which make it drop the mask"
    if attention.normalization_quantize_scale is not None or attention.num_ranks != 1:
        return "it is quantized or runs on several devices"
    return None


def _causal(kind: str, s: int, t: int) -> Tensor:
    """Which of t keys each of s queries may see, `[s t]`."""
    if kind == "NONE":
        return torch.ones(s, t, dtype=torch.bool)
    last_key = torch.arange(s)[:, None] + (t - s if kind == "LOWER_RIGHT" else 0)
    return torch.arange(t) <= last_key


@evaluates("ATTENTION_OUTPUT", "IAttentionOutputLayer")
def attention_output(layer: Layer) -> Tensor:
    return layer.x()


@evaluates("ROTARY_EMBEDDING", "IRotaryEmbeddingLayer")
def rotary_embedding(layer: Layer) -> Tensor:
    """The first features of `[b h s d]` turned, in pairs: neighbours (interleaved), or one of each half."""
    x, cos, sin, positions = layer.wide(0), layer.wide(1), layer.wide(2), layer.maybe(3)
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [b 1 s d/2]
    turned = layer.own.rotary_embedding_dim or x.shape[-1]
    x, rest = x[..., :turned], x[..., turned:]
    a, b = (x[..., 0::2], x[..., 1::2]) if layer.own.interleaved else x.chunk(2, -1)
    pair = a * cos - b * sin, a * sin + b * cos
    x = torch.stack(pair, -1).flatten(-2) if layer.own.interleaved else torch.cat(pair, -1)
    return torch.cat([x, rest], -1)


@evaluates("NORMALIZATION", "INormalizationLayer")
def normalization(layer: Layer) -> Tensor:
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias` over axes, or over groups of channels and these axes."""
    own, x, scale, bias, axes = layer.own, layer.wide(0), layer.wide(1), layer.wide(2), layer.axes()
    groups, shape = own.num_groups, x.shape
    if groups != 1:
        if axes != list(range(2, x.dim())):
            raise layer.refuse(f"it has {groups} groups of channels and normalizes axes {axes}, not all behind the channels")
        x = x.reshape(shape[0], groups, shape[1] // groups, *shape[2:])
        axes = list(range(2, x.dim()))
        if scale.shape[1] == groups != shape[1]:  # one number for each group, not for each channel
            scale, bias = (p.repeat_interleave(shape[1] // groups, 1) for p in (scale, bias))
    centred = x - x.mean(axes, keepdim=True)
    variance = centred.square().mean(axes, keepdim=True)
    return (centred / torch.sqrt(variance + own.epsilon)).reshape(shape) * scale + bias


@evaluates("CONVOLUTION", "IConvolutionLayer")
def convolution(layer: Layer) -> Tensor:
    """A convolution over the last two or three axes; kernel and bias are inputs, or weights of the layer."""
    own, x = layer.own, layer.wide()
    if own.padding_mode.name != "EXPLICIT_ROUND_DOWN":
        raise layer.refuse(f"its padding mode {own.padding_mode.name} is not modelled")
    window = [int(size) for size in own.kernel_size_nd]
    kernel, bias = layer.maybe(1), layer.maybe(2)
    if kernel is None:
        kernel = layer.weights("kernel").reshape(own.num_output_maps, x.shape[1] // own.num_groups, *window)
    if bias is None:
        bias = layer.weights("bias")
    before, after = [int(n) for n in own.padding_nd], [int(n) for n in own.padding_nd]
    if len(window) == 2:  # only there can the two sides differ
        before, after = [int(n) for n in own.pre_padding], [int(n) for n in own.post_padding]
    widths = [width for axis in reversed(range(len(window))) for width in (before[axis], after[axis])]
    convolve = functional.conv2d if len(window) == 2 else functional.conv3d
    result = convolve(
        functional.pad(x, widths),
        wide(kernel).to(x.dtype),
        stride=[int(n) for n in own.stride_nd],
        dilation=[int(n) for n in own.dilation_nd],
        groups=own.num_groups,
    )
    return result + wide(bias).to(x.dtype).reshape(1, -1, *[1] * len(window)) if bias.numel() else result
