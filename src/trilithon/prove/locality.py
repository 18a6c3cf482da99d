"""Token locality: outside attention, is the value at token i computed from token i alone?

Each tensor gets a label: the axis that runs over tokens, or None when it has no such axis. A label means that
element `[.., i, ..]` reads inputs at token i only. The table of operations is closed: what it does not list is
refused, with the node and the user's line. Attention is the one place where tokens meet; there the masks' own
proofs speak.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from trilithon.errors import CannotCache
from trilithon.passes import bound_arguments, where_of

aten = torch.ops.aten
Label = int | None

ELEMENTWISE = {
    getattr(getattr(aten, name), overload)
    for name, overloads in {
        **dict.fromkeys(("add", "sub", "mul", "div"), ("Tensor", "Scalar")),
        "pow": ("Tensor_Scalar",),
        **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), ("Tensor", "Scalar")),
        **dict.fromkeys(
            ("neg", "rsqrt", "sqrt", "cos", "sin", "silu", "gelu", "tanh", "sigmoid", "relu", "exp", "erf"), ("default",)
        ),
        **dict.fromkeys(("reciprocal", "abs", "clone", "alias", "_to_copy", "contiguous", "maximum", "minimum"), ("default",)),
        "to": ("dtype",),
        "where": ("self",),
        "bitwise_not": ("default",),
        "detach": ("default",),
        "dropout": ("default",),
    }.items()
    for overload in overloads
}


def token_axes(program: ExportedProgram, tokens: Mapping[str, int], attention: Any) -> dict[Node, Label]:
    """The token axis of every tensor in the program.

    Args:
        program: functional, its attention canonical.
        tokens: input -> its token axis, e.g. `{"input_ids": 1, "position_ids": 1}`.
        attention: the canonical attention op; its operands are `[b h s d]`.

    Raises:
        CannotCache: a node mixes tokens, depends on the number of tokens, or is not modelled.
    """
    labels: dict[Node, Label] = {}
    inputs = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    symbols = set().union(*(_symbols(inputs[name].meta["val"].shape[axis]) for name, axis in tokens.items()))
    for node in program.graph.nodes:
        _refuse_length(node, labels, symbols)
        if node.op == "placeholder":
            labels[node] = tokens.get(node.name)
        elif node.op == "output" or not isinstance(node.meta.get("val"), torch.Tensor):
            _check_sizes(node)
        elif node.target is attention:
            labels[node] = _attention(node, labels)
        else:
            labels[node] = _transfer(node, labels)
    return labels


def refuse(node: Node, why: str) -> CannotCache:
    return CannotCache(
        "cannot insert a KV cache",
        where=where_of(node),
        why=why,
        todo="call it for its logits instead of generate; this model has no cache yet",
    )


def _check_sizes(node: Node) -> None:
    """Sizes and assertions about them make no values; a list of tensors would."""
    if node.op != "output" and isinstance(node.meta.get("val"), (list, tuple)):
        raise refuse(node, f"{node.target} is not modelled")


def _attention(node: Node, labels: Mapping[Node, Label]) -> Label:
    if any(labels[x] != 2 for x in node.args[:3]):  # type: ignore[index]
        raise refuse(node, "its queries, keys or values do not run over tokens on axis 2")
    return 2


def _transfer(node: Node, labels: Mapping[Node, Label]) -> Label:
    operands = [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor)]
    if not any(labels[x] is not None for x in operands):
        return None
    if node.target in ELEMENTWISE:
        return _elementwise(node, operands, labels)
    rule = RULES.get(node.target)
    if rule is None:
        raise refuse(node, f"{node.target} is not known to keep tokens apart")
    return rule(node, labels)


def _symbols(size: Any) -> set[Any]:
    """The size symbols of a number; a float or a condition may be made of sizes too."""
    symbolic = isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return set(size.node.expr.free_symbols) if symbolic else set()


def _refuse_length(node: Node, labels: Mapping[Node, Label], symbols: set[Any]) -> None:
    """A value must not come from the number of tokens, as an arange's does: in a cache that number is another."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return
    if node.target in RESHAPES and not _starts_at_length(node, symbols):
        return
    for x in node.all_input_nodes:
        held = x.meta.get("val")
        sizes = held.shape if isinstance(held, torch.Tensor) and labels[x] is None else [held]
        if any(_symbols(size) & symbols for size in sizes):
            raise refuse(node, f"{node.target} makes values from the number of tokens, not from position_ids")


def _starts_at_length(node: Node, symbols: set[Any]) -> bool:
    """Is it a slice whose first element depends on the number of tokens, or that steps by it?"""
    if node.target is not aten.slice.Tensor:
        return False
    args = bound_arguments(node)
    bounds = [x.meta.get("val") if isinstance(x, Node) else x for x in (args["start"], args["step"])]
    return any(_symbols(x) & symbols for x in bounds)


def _elementwise(node: Node, operands: list[Node], labels: Mapping[Node, Label]) -> Label:
    rank = node.meta["val"].dim()
    axes: set[int] = {rank - x.meta["val"].dim() + own for x in operands if (own := labels[x]) is not None}
    if len(axes) != 1:
        raise refuse(node, "it combines different tokens")
    (axis,) = axes
    for x in operands:
        own = axis - (rank - x.meta["val"].dim())
        if labels[x] is None and own >= 0 and str(x.meta["val"].shape[own]) != "1":
            raise refuse(node, f"{x.name} varies along the tokens but does not come from them")
    return axis


def _same_axis(node: Node, labels: Mapping[Node, Label]) -> Label:
    """Operations over the last axis (or listed axes) that must not be the token axis."""
    args = bound_arguments(node)
    source: Any = args.get("self", args.get("input"))
    axis, rank = labels[source], source.meta["val"].dim()
    dims = args.get("dim", -1)
    if "normalized_shape" in args:
        dims = list(range(-len(args["normalized_shape"]), 0))
    over = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims]) if d is not None}
    if axis is None or axis in over or not over:  # no axis named: all of them
        raise refuse(node, "it reduces over tokens")
    removed = sum(d < axis for d in over) if node.target is aten.mean.dim and not args["keepdim"] else 0
    return axis - removed


def _linear(node: Node, labels: Mapping[Node, Label]) -> Label:
    args = bound_arguments(node)
    x, w = args["input"], args["weight"]
    axis = labels[x]
    if labels[w] is not None or axis is None or axis == x.meta["val"].dim() - 1:
        raise refuse(node, "it multiplies along tokens")
    return axis


def _embedding(node: Node, labels: Mapping[Node, Label]) -> Label:
    if labels[node.args[0]] is not None:  # type: ignore[index]
        raise refuse(node, "it looks tokens up by number")
    return labels[node.args[1]]  # type: ignore[index]


def _view(node: Node, labels: Mapping[Node, Label]) -> Label:
    source: Any = node.args[0]
    old, new, axis = source.meta["val"].shape, node.meta["val"].shape, labels[source]
    assert axis is not None
    before: Any = 1
    for size in old[:axis]:
        before = before * size
    product: Any = 1
    for j, size in enumerate(new):
        if str(size) == str(old[axis]) and str(product) == str(before):
            return j
        product = product * size
    raise refuse(node, "it merges tokens with another axis")


def _unsqueeze(node: Node, labels: Mapping[Node, Label]) -> Label:
    source: Any = node.args[0]
    dim = bound_arguments(node)["dim"] % (source.meta["val"].dim() + 1)
    axis = labels[source]
    assert axis is not None
    return axis + int(dim <= axis)


def _transpose(node: Node, labels: Mapping[Node, Label]) -> Label:
    source: Any = node.args[0]
    rank = source.meta["val"].dim()
    args = bound_arguments(node)
    a, b, axis = args["dim0"] % rank, args["dim1"] % rank, labels[source]
    return b if axis == a else a if axis == b else axis


def _permute(node: Node, labels: Mapping[Node, Label]) -> Label:
    source: Any = node.args[0]
    order = [d % source.meta["val"].dim() for d in bound_arguments(node)["dims"]]
    return order.index(labels[source])


def _expand(node: Node, labels: Mapping[Node, Label]) -> Label:
    source: Any = node.args[0]
    axis = labels[source]
    assert axis is not None
    added: int = node.meta["val"].dim() - source.meta["val"].dim()
    return axis + added


def _off_axis(node: Node, labels: Mapping[Node, Label]) -> Label:
    """slice, split: fine on any axis but the tokens'."""
    source: Any = node.args[0]
    dim = bound_arguments(node)["dim"] % source.meta["val"].dim()
    if dim == labels[source]:
        raise refuse(node, "it selects tokens")
    return labels[source]


def _cat(node: Node, labels: Mapping[Node, Label]) -> Label:
    parts: Any = node.args[0]
    axes = {labels[x] for x in parts}
    dim = bound_arguments(node)["dim"] % node.meta["val"].dim()
    if len(axes) != 1 or dim in axes:
        raise refuse(node, "it joins tokens")
    return axes.pop()


def _matmul(node: Node, labels: Mapping[Node, Label]) -> Label:
    """Tokens may be rows of the left factor or columns of the right one, never what is summed over."""
    a: Any = node.args[0]
    b: Any = node.args[1]
    rank: int = node.meta["val"].dim()
    left, right = labels[a], labels[b]
    if min(a.meta["val"].dim(), b.meta["val"].dim()) < 2:
        raise refuse(node, "it multiplies with a vector, which is not modelled")
    if right is None and left == a.meta["val"].dim() - 2:
        return rank - 2
    if left is None and right == b.meta["val"].dim() - 1:
        return rank - 1
    raise refuse(node, "it multiplies along tokens")


RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.slice.Tensor,
}
RULES: dict[Any, Callable[[Node, Mapping[Node, Label]], Label]] = {
    aten.mean.dim: _same_axis,
    aten.softmax.int: _same_axis,
    aten.layer_norm.default: _same_axis,
    aten.rms_norm.default: _same_axis,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.embedding.default: _embedding,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.unsqueeze.default: _unsqueeze,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.expand.default: _expand,
    aten.slice.Tensor: _off_axis,
    aten.cat.default: _cat,
}
