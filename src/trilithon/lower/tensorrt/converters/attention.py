"""Attention calls, canonical and PyTorch's own, and the writes into a static cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.fx import Node
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from trilithon.lower.inputs import Axis
from trilithon.lower.tensorrt.attention import QKV, Attention, attend
from trilithon.lower.tensorrt.capability import UNKNOWN, AttentionSpec, keeps_a_key
from trilithon.lower.tensorrt.converters.registry import converts
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.masks import Scores, emit_mask
from trilithon.lower.tensorrt.network import ITensor, Network, Size, is_tensor
from trilithon.passes import bound_arguments, module_path
from trilithon.rewrite.fuse_attention import SITE
from trilithon.rewrite.insert_cache import _slots
from trilithon.rewrite.op import ATTENTION
from trilithon.spec.masks import Causal, Full, Mask, parse

aten = torch.ops.aten


# ------------------------------------------------------------ sizes


@dataclass(frozen=True)
class Operand:
    """A tensor of the network.

    Attributes:
        x: with the sizes that the graph knows and TensorRT lost put back in.
        sizes: ints, and the graph's sizes where they vary; -1 where nothing is known.
        names: of the sizes in the graph: those of one name are equal; "" where the graph records none.
    """

    x: ITensor
    sizes: tuple[Any, ...]
    names: tuple[str, ...]

    def name(self, axis: int) -> str:
        """A name that no other size has."""
        size = self.sizes[axis]
        return self.names[axis] or (f"{self.x.name}[{axis}]" if _known(size) is None else str(size))

    def ranked(self, net: Network, rank: int) -> Operand:
        """With axes of size 1 in front."""
        lead = rank - len(self.sizes)
        return Operand(net.ranked(self.x, rank), (1,) * lead + self.sizes, ("1",) * lead + self.names)


def _operand(net: Network, x: ITensor, node: Any) -> Operand:
    value = node.meta.get("val") if isinstance(node, Node) else None
    own = tuple(int(size) for size in x.shape)
    if value is None:
        return Operand(x, own, ("",) * len(own))
    lost = [isinstance(size, int) and known < 0 for known, size in zip(own, value.shape, strict=True)]
    if any(lost):
        keep = tuple(size if put else 0 for put, size in zip(lost, value.shape, strict=True))
        x = net.out("shuffle", x, reshape_dims=keep, zero_is_placeholder=True)
    sizes = tuple(size if known < 0 else known for known, size in zip(own, value.shape, strict=True))
    return Operand(x, sizes, tuple(map(str, value.shape)))


def _known(size: Any) -> int | None:
    return size if isinstance(size, int) and size >= 0 else None


def _span(net: Network, size: Any) -> Axis:
    """What a size may be in this network."""
    if isinstance(size, int):
        return Axis(size, size, size) if size >= 0 else UNKNOWN
    expression, ranges = size.node.expr, dict(size.node.shape_env.var_to_range)
    for symbol in expression.free_symbols & {s for s in expression.free_symbols if str(s) in net.spans}:
        axis = net.spans[str(symbol)]
        ranges[symbol] = ValueRanges(axis.low, axis.high)
    found = bound_sympy(expression, ranges)
    low = max(1, int(found.lower)) if found.lower.is_Integer else 1
    high = int(found.upper) if found.upper.is_Integer else UNKNOWN.high
    return Axis(low, low, max(low, high))


def _site_name(node: Node | None) -> str:
    if node is None:
        return "attention"
    return str(node.meta.get(SITE) or module_path(node) or node.name)


# ------------------------------------------------------------ operands


def _operands(net: Network, tensors: Sequence[ITensor], nodes: Sequence[Any]) -> tuple[QKV, AttentionSpec, Scores]:
    """q, k and v of rank 4 and one type, and what is known of them.

    Raises:
        CannotLower: they fit only by broadcasting, or not at all.
    """
    found = [_operand(net, x, node) for x, node in zip(tensors, nodes, strict=True)]
    ranks = {len(operand.sizes) for operand in found}
    if len(ranks) > 1 or not ranks <= {2, 3, 4}:
        raise net.refuse(f"its operands have ranks {sorted(ranks)}; they must have one, up to 4")
    q, k, v = (operand.ranked(net, 4) for operand in found)
    if not (_fit(q, k, 0, 3) and _fit(k, v, 0, 1, 2)):
        shown = (f"{name} {list(operand.sizes)}" for name, operand in zip("qkv", (q, k, v), strict=True))
        raise net.refuse(f"its operands fit only by broadcasting: {', '.join(shown)}")
    tensors = q.x, k.x, v.x
    if len({x.dtype for x in tensors}) > 1:
        raise net.refuse(f"its operands are of types {', '.join(str(net.dtype(x)) for x in tensors)}")
    spec = AttentionSpec(
        dtype=net.dtype(q.x),
        h=_known(q.sizes[1]),
        g=_known(k.sizes[1]),
        d=_known(q.sizes[3]),
        e=_known(v.sizes[3]),
        s=_span(net, q.sizes[2]),
        t=_span(net, k.sizes[2]),
        same_length=_same(q, 2, k, 2),
    )
    axes = ((q, 0), (q, 1), (q, 2), (k, 2))
    return tensors, spec, Scores(tuple(net.size(x.x, i) for x, i in axes), tuple(x.name(i) for x, i in axes))


def _same(one: Operand, i: int, other: Operand, j: int) -> bool:
    """Is it certain that two sizes are equal?"""
    return one.name(i) == other.name(j) or one.sizes[i] == other.sizes[j] == _known(one.sizes[i])


def _fit(one: Operand, other: Operand, *axes: int) -> bool:
    """Are sizes equal, as far as both are known?"""
    unknown = [one.names[i] == "" or other.names[i] == "" for i in axes]
    numbers = [None not in (_known(one.sizes[i]), _known(other.sizes[i])) for i in axes]
    return all(_same(one, i, other, i) or (u and not n) for i, u, n in zip(axes, unknown, numbers, strict=True))


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
) -> ITensor:
    """Source: `trilithon.rewrite.op`: positions come from `q_start`; a row without a key is 0."""
    meaning, nodes = parse(mask), _nodes(net, "q", "k", "v")
    operands, spec, scores = _operands(net, (q, k, v), nodes)
    upper_left = meaning == Causal() and q_start is None
    typed = None if upper_left or meaning == Full() else torch.bool
    spec = replace(spec, upper_left=upper_left, mask=typed, from_start=q_start is not None)
    allowed = partial(emit_mask, net, meaning, scores, q_start, key_mask, None)
    site = Attention(
        name=_site_name(net.node),
        qkv=operands,
        scale=scale,
        spec=spec,
        allowed=allowed,
        keeps_a_key=keeps_a_key(meaning, spec),
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
    operands, spec, scores = _operands(net, tensors, _nodes(net, "query", "key", "value"))
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
    mask = _operand(net, mask, _nodes(net, name)[0]).x
    if len(mask.shape) > 4 or net.dtype(mask) not in (torch.bool, torch.float32, torch.float16, torch.bfloat16):
        raise net.refuse(f"its mask is {net.dtype(mask)} of rank {len(mask.shape)}")
    return net.ranked(mask, 4)


def _unranked(net: Network, x: ITensor, rank: int) -> ITensor:
    return net.reshape(x, net.sizes(x)[-rank:])


# ------------------------------------------------------------ the static cache


@converts(_slots)
def convert_slots(net: Network, start: ITensor, tokens: Size) -> ITensor:
    """`start .. start + tokens - 1`."""
    slots = net.elementwise("SUM", net.iota(tokens), net.reshape(start, [1]))
    net.shared["start of slots", slots.name] = start
    return slots


@converts(aten.index_copy_.default)
def convert_index_copy_(net: Network, self: ITensor, dim: int, index: ITensor, source: ITensor) -> ITensor:
    """A write of consecutive slots into a cache, in place.

    Source: TensorRT IKVCacheUpdateLayer: `write_indices` is the first slot of each row; slots behind the end are dropped.
    """
    start = net.shared.get(("start of slots", index.name)) if is_tensor(index) else None
    if start is None or dim != 2 or not self.is_network_input or len(self.shape) != 4:
        raise net.refuse("it is not a write of consecutive slots along axis 2 of a cache [b g t d] that is an input")
    if net.dtype(self) != net.dtype(source):
        raise net.refuse(f"it writes {net.dtype(source)} into a cache of {net.dtype(self)}")
    rows: Any = net.size(self, 0)
    key = ("first slots", start.name, rows.name if is_tensor(rows) else rows)
    if key not in net.shared:
        first = net.cast(net.reshape(start, [1]), torch.int32)
        net.shared[key] = net.expand(first, [rows])
    return net.out("kv_cache_update", self, source, net.shared[key], library().KVCacheMode.LINEAR)
