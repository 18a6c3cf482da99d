"""Attention as TensorRT layers: the fused one; matmul, softmax, matmul, which the builder turns into one kernel too; sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trilithon.lower.tensorrt.capability import AttentionSpec, SiteLowering, by_causal_kind, choose
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import ITensor, Network

QKV = tuple[ITensor, ITensor, ITensor]


@dataclass(frozen=True)
class Attention:
    """One attention to emit.

    Attributes:
        name: the site's.
        qkv: `[b h s d]`, `[b g t d]`, `[b g t e]`, of one type.
        scale: factor on the scores.
        spec: the same in a backend's terms.
        allowed: gives the bool mask for a use ("scores" or "rows"), None = every key; emitted when it is asked for.
        bias: added to the scores; -inf forbids a key.
        keeps_a_key: it is certain that every query may see a key.
        mask: text of the mask that was proved; "" where none was.
        turned: the values as a cache holds them, `[b g e t]`, where `spec` says so.
    """

    name: str
    qkv: QKV
    scale: float
    spec: AttentionSpec
    allowed: Callable[[str], ITensor | None]
    bias: ITensor | None = None
    keeps_a_key: bool = True
    mask: str = ""
    turned: ITensor | None = None


def attend(net: Network, site: Attention) -> ITensor:
    """`softmax(scale * q k^T, where allowed) v`, `[b h s e]`; a query that may see no key gives 0.

    Raises:
        CannotLower: `net.attention` is "fused", and the fused layer cannot serve this site.
    """
    form, reason = choose(site.spec, net.attention)
    if net.attention == "fused" and form != "fused":
        raise net.refuse(f"{site.name} was asked to be fused: {reason}", todo="use attention='auto' or 'decomposed'")
    net.sites.append(SiteLowering(site.name, form, reason, site.mask, site.spec.from_start))
    if form == "summed":
        return _summed(net, site)
    return _fused(net, site) if form == "fused" else _primitives(net, site)


def _fused(net: Network, site: Attention) -> ITensor:
    """IAttention. It applies no scale; its key_value_lengths are never set (they are inverted, and drop the mask)."""
    trt = library()
    kind = trt.CausalMaskKind.UPPER_LEFT if by_causal_kind(site.spec) else trt.CausalMaskKind.NONE
    mask = _mask_of(net, site) if kind == trt.CausalMaskKind.NONE else None
    softmax = trt.AttentionNormalizationOp.SOFTMAX
    settings = {"decomposable": False} | ({} if mask is None else {"mask": mask})
    q, k, v = site.qkv
    layer = net.add("attention_v2", _scaled(net, q, site.scale), k, v, softmax, kind, **settings)
    kept = (layer.causal_kind, layer.norm_op, layer.decomposable, None if layer.mask is None else layer.mask.name)
    if kept != (kind, softmax, False, None if mask is None else mask.name):
        raise net.refuse(f"TensorRT did not keep the settings of {site.name}: it has {kept}")
    return _without_empty_rows(net, site, layer.get_output(0))


def _mask_of(net: Network, site: Attention) -> ITensor | None:
    """The one mask that IAttention takes: bool, or a bias that is -inf where a key is forbidden."""
    allowed = site.allowed("scores")
    if site.bias is None or allowed is None:
        return allowed if site.bias is None else net.ranked(site.bias, 4)
    return net.select(allowed, site.bias, net.number(-math.inf, net.dtype(site.bias), 4))


def _scaled(net: Network, q: ITensor, scale: float) -> ITensor:
    """`q * scale` in q's type, rounded once: a scale that the type cannot hold is applied in float32."""
    dtype = net.dtype(q)
    if scale == 1:
        return q
    if float(torch.tensor(scale, dtype=dtype)) == scale:
        return net.elementwise("PROD", q, net.number(scale, dtype, 4))
    wide = net.elementwise("PROD", net.cast(q, torch.float32), net.number(scale, torch.float32, 4))
    return net.cast(wide, dtype)


def _primitives(net: Network, site: Attention) -> ITensor:
    """matmul, softmax in float32, matmul.

    Which spellings become one kernel was measured. One query: the lowest number where a key is forbidden, and its weight
    set to 0. More: -inf, which alone lets the builder find bounds, and a choice between the result and 0.
    """
    one_query = site.spec.s.high == 1
    q, k, v = site.qkv
    wide, dtype = torch.float32, net.dtype(q)
    keys, values = (_per_query_head(net, x, site) for x in (k, v))
    scores = _changed(net, site, net.cast(net.matmul(q, keys, transpose_b=True), wide), site.bias)
    allowed = _may_see(net, site, "scores") if one_query else site.allowed("scores")
    if allowed is not None:
        outside = torch.finfo(wide).min if one_query else -math.inf
        scores = net.select(allowed, scores, net.number(outside, wide, 4))
    weights = net.softmax(scores)
    if allowed is not None and one_query and not site.keeps_a_key:
        weights = net.select(allowed, weights, net.number(0.0, wide, 4))
    result = net.matmul(net.cast(weights, dtype), values)
    return result if one_query else _without_empty_rows(net, site, result)


def _summed(net: Network, site: Attention) -> ITensor:
    """One query over a cache of turned values: products in float32, added up along contiguous numbers, `d` and then `t`.

    Scores are `[b g h//g t]`: the query heads of a key head read it together, and nothing is repeated for them.
    """
    (q, k, v), (g, n) = site.qkv, _groups(net, site)
    wide, b, t, d = torch.float32, net.size(q, 0), net.size(k, 2), net.size(k, 3)

    def grouped(x: ITensor | None) -> ITensor | None:
        return x if x is None or x.shape[1] == 1 else net.reshape(x, [net.size(x, 0), g, n, net.size(x, 3)])

    queries = net.reshape(net.cast(q, wide), [b, g, n, 1, d])
    keys = net.reshape(net.cast(k, wide), [b, g, 1, t, d])
    scores = net.reduce("SUM", net.elementwise("PROD", queries, keys), [4], keep=False)
    scores = _changed(net, site, scores, grouped(site.bias))
    allowed = grouped(_may_see(net, site, "scores"))
    if allowed is not None:
        scores = net.select(allowed, scores, net.number(torch.finfo(wide).min, wide, 4))
    weights = net.unary("EXP", net.elementwise("SUB", scores, net.reduce("MAX", scores, [3], keep=True)))
    if allowed is not None and not site.keeps_a_key:
        weights = net.select(allowed, weights, net.number(0.0, wide, 4))
    total = net.reduce("SUM", weights, [3], keep=True)
    if not site.keeps_a_key:
        total = net.elementwise("MAX", total, net.number(1.0, wide, 4))  # the largest weight is 1, if there is any
    values = net.reshape(net.cast(site.turned, wide), [b, g, 1, net.size(v, 3), t])
    added = net.reduce("SUM", net.elementwise("PROD", net.reshape(weights, [b, g, n, 1, t]), values), [4], keep=False)
    result = net.cast(net.elementwise("DIV", added, total), net.dtype(q))
    return net.reshape(result, [b, g * n, 1, net.size(v, 3)])


def _changed(net: Network, site: Attention, scores: ITensor, bias: ITensor | None) -> ITensor:
    """Scores in float32 with scale, softcap and bias."""
    if site.scale != 1:
        scores = net.elementwise("PROD", scores, net.number(site.scale, torch.float32, 4))
    if site.spec.softcap is not None:
        scores = _capped(net, scores, site.spec.softcap)
    return scores if bias is None else net.elementwise("SUM", scores, net.cast(bias, torch.float32))


def _capped(net: Network, scores: ITensor, softcap: float) -> ITensor:
    """`softcap * tanh(scores / softcap)`."""
    down, up = (net.number(x, torch.float32, 4) for x in (1 / softcap, softcap))
    return net.elementwise("PROD", net.activation("TANH", net.elementwise("PROD", scores, down)), up)


def _per_query_head(net: Network, x: ITensor, site: Attention) -> ITensor:
    """Keys or values `[b g t d]` as `[b h t d]`: query head i reads head i // (h // g). One query's kernel copies nothing."""
    g, n = _groups(net, site)
    if n == 1:
        return x
    b, _, t, d = net.sizes(x)
    grouped = net.expand(net.reshape(x, [b, g, 1, t, d]), [-1, -1, n, -1, -1])
    return net.reshape(grouped, [b, g * n, t, d])


def _groups(net: Network, site: Attention) -> tuple[int, int]:
    """Key heads, and query heads of each."""
    h, g = site.spec.h, site.spec.g
    if h is None or g is None or h % g:
        raise net.refuse(f"{site.name} has {h} query heads over {g} key heads")
    return g, h // g


def _may_see(net: Network, site: Attention, use: str) -> ITensor | None:
    """Which keys a query may see, mask and bias taken together."""
    allowed = site.allowed(use)
    if site.bias is None or site.keeps_a_key:
        return allowed
    open_ = net.elementwise("GREATER", site.bias, net.number(-math.inf, net.dtype(site.bias), 4))
    return open_ if allowed is None else net.elementwise("AND", open_, allowed)


def _without_empty_rows(net: Network, site: Attention, result: ITensor) -> ITensor:
    """0 where a query may see no key; what a softmax over nothing gives is not stated."""
    if site.keeps_a_key:
        return result
    masks = [x for x in (site.allowed("rows"), site.bias) if x is not None]
    key = ("rows with a key", *(x.name for x in masks))
    if key not in net.shared:
        seen = _may_see(net, site, "rows")
        most = net.reduce("MAX", net.cast(seen, torch.int32), [3], keep=True)
        net.shared[key] = net.elementwise("GREATER", most, net.number(0, torch.int32, 4))
    return net.select(net.shared[key], result, net.number(0.0, net.dtype(result), 4))
