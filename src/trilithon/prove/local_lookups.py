"""Labels of what is looked up by number, and of what is written there."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from trilithon.passes import bound_arguments
from trilithon.prove.axes import TOKENS, Axes, Label, Scope, Source, is_free, refuse, widest
from trilithon.prove.local_values import Rule, broadcast_axes, check_free, one_order, overloads

aten = torch.ops.aten


def embedding(node: Node, scope: Scope) -> Label:
    args = bound_arguments(node)
    weight, index = scope.label(args["weight"]), scope.label(args["indices"])
    if not weight.is_fixed:
        raise refuse(node, "it looks tokens up by number")
    return Label((*index.axes, *weight.axes[1:]), index.source, index.last, one_order(node, [index]))


def indexed(node: Node, scope: Scope) -> Label:
    """`x[.., i, ..]`: tensors of numbers for some axes, none of which runs over tokens or rows."""
    args = bound_arguments(node)
    x, given = scope.label(args["self"]), {i: n for i, n in enumerate(args["indices"]) if n is not None}
    numbers = [scope.label(n) for n in given.values()]
    if is_last_by_index(node, scope):
        axes = list(x.axes)
        axes[next(iter(given))] = ()
        return Label(tuple(axes), x.source, last=True)
    if any(n.meta["val"].dtype in (torch.bool, torch.uint8) for n in given.values()):
        raise refuse(node, "how much it selects is known only at run time")
    one_order(node, [x, *numbers])
    for i in given:
        if not is_free(x.axes[i]):
            raise refuse(node, "it looks tokens up by number")
    places = list(given)
    adjacent = places == list(range(places[0], places[0] + len(places)))
    front = places[0] if adjacent else 0
    rest = [axis for i, axis in enumerate(x.axes) if i not in given]
    rank = max(len(n.axes) for n in numbers)
    new: Axes = broadcast_axes(node, numbers, rank)
    order = one_order(node, [x, *numbers])
    return Label((*rest[:front], *new, *rest[front:]), *widest([x, *numbers]), order)


def is_last_by_index(node: Node, scope: Scope) -> bool:
    """`x[:, [-1]]`: the last token of each row by a constant."""
    args = bound_arguments(node)
    given = {i: n for i, n in enumerate(args["indices"]) if n is not None}
    x = scope.label(args["self"])
    if len(given) != 1 or x.source is not Source.TOKENS or x.order or x.role:
        return False
    ((axis, index),) = given.items()
    value = scope.value_of(index)
    return x.axes[axis] == (TOKENS,) and value is not None and value.tolist() == [-1]


def index_select(node: Node, scope: Scope) -> Label:
    args = bound_arguments(node)
    x, index = scope.label(args["self"]), scope.label(args["index"])
    axis = args["dim"] % len(x.axes)
    order = one_order(node, [x, index])
    check_free(node, x, [axis], "selects")
    return Label((*x.axes[:axis], *(index.axes or ((),)), *x.axes[axis + 1 :]), *widest([x, index]), order)


def gathered(node: Node, scope: Scope) -> Label:
    """`x[.., index[.., i, ..], ..]`: along one axis, element by element along the others."""
    args = bound_arguments(node)
    x, index = scope.label(args["self"]), scope.label(args["index"])
    order = one_order(node, [x, index])
    axis = args["dim"] % len(x.axes)
    check_free(node, x, [axis], "looks up")
    for i, (own, wanted) in enumerate(zip(x.axes, index.axes, strict=True)):
        if i != axis and own != wanted and not is_free(own, wanted):
            raise refuse(node, "it looks values up in other tokens or rows")
    return Label(index.axes, *widest([x, index]), order)


def scattered(node: Node, scope: Scope) -> Label:
    """scatter along an axis without tokens, element by element along the others."""
    args = bound_arguments(node)
    x, index = scope.label(args["self"]), scope.label(args["index"])
    operands = [x, index, *([scope.label(args["src"])] if isinstance(args.get("src"), Node) else [])]
    order = one_order(node, operands)
    axis = args["dim"] % len(x.axes)
    if isinstance(args.get("value"), Node):
        raise refuse(node, "what it writes is known only at run time")
    for operand in operands:
        check_free(node, operand, [axis], "writes to places")
        for i, (own, wanted) in enumerate(zip(operand.axes, x.axes, strict=True)):
            if i != axis and own != wanted:
                raise refuse(node, "it writes values of other tokens or rows")
    return Label(x.axes, *widest(operands), order)


RULES: dict[Any, Rule] = {
    **overloads("embedding", embedding),
    **overloads("index.Tensor", indexed),
    **overloads("index_select", index_select),
    **overloads("gather", gathered),
    **overloads("scatter.src scatter.value scatter_add", scattered),
}
