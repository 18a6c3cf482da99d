"""The operands of an attention: tensors of the network, with what the graph knows of their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from trilithon.lower.inputs import Axis
from trilithon.lower.tensorrt.attention import QKV
from trilithon.lower.tensorrt.capability import UNKNOWN, AttentionSpec
from trilithon.lower.tensorrt.masks import Scores
from trilithon.lower.tensorrt.network import ITensor, Network


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


def operand_of(net: Network, x: ITensor, node: Any) -> Operand:
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


def operands_of(net: Network, tensors: Sequence[ITensor], nodes: Sequence[Any]) -> tuple[QKV, AttentionSpec, Scores]:
    """q, k and v of rank 4 and one type, and what is known of them.

    Raises:
        CannotLower: they fit only by broadcasting, or not at all.
    """
    found = [operand_of(net, x, node) for x, node in zip(tensors, nodes, strict=True)]
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
