"""Labels of products of matrices: tokens and rows may be kept, never summed over."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from trilithon.passes import bound_arguments
from trilithon.prove.axes import Axis, Label, Scope, is_free, refuse, widest
from trilithon.prove.local_values import Rule, broadcast_axes, one_order, overloads

aten = torch.ops.aten


def linear(node: Node, scope: Scope) -> Label:
    args = bound_arguments(node)
    x = scope.label(args["input"])
    order = one_order(node, [x])
    weight = scope.label(args["weight"])
    if not weight.is_fixed or (args["bias"] is not None and not scope.label(args["bias"]).is_fixed):
        raise refuse(node, "its weights are not constants")
    if not is_free(x.axes[-1]):
        raise refuse(node, "it multiplies along tokens")
    return Label((*x.axes[:-1], *weight.axes[:-1]), x.source, x.last, order)


def product(node: Node, scope: Scope) -> Label:
    args = bound_arguments(node)
    names = ("batch1", "batch2") if "batch1" in args else ("mat1", "mat2") if "mat1" in args else ("self", "mat2")
    names = names if names[1] in args else ("self", "vec") if "vec" in args else ("self", "other")
    names = names if names[1] in args else ("self", "tensor")
    a, b = (scope.label(args[name]) for name in names)
    result = _multiplied(node, a, b)
    if names[0] == "self":
        return result
    added = scope.label(args["self"])  # addmm, baddbmm: added to the product
    order = one_order(node, [result, added])
    axes = broadcast_axes(node, [result, added], len(result.axes))
    return Label(axes, *widest([result, added]), order)


def _multiplied(node: Node, a: Label, b: Label) -> Label:
    """The product of `[.. m c]` and `[.. c n]`; vectors have no `m`, or no `n`."""
    order = one_order(node, [a, b])
    summed = [a.axes[-1], b.axes[-2] if len(b.axes) > 1 else b.axes[-1]]
    if not is_free(*summed):
        raise refuse(node, "it multiplies along tokens, or along rows of the batch")
    batches = [Label(x.axes[:-2], x.source) for x in (a, b)]
    axes = broadcast_axes(node, batches, max(len(x.axes) for x in batches))
    rows: tuple[Axis, ...] = a.axes[-2:-1]
    columns: tuple[Axis, ...] = b.axes[-1:] if len(b.axes) > 1 else ()
    return Label((*axes, *rows, *columns), *widest([a, b]), order)


def outer(node: Node, scope: Scope) -> Label:
    args = bound_arguments(node)
    a, b = scope.label(args["self"]), scope.label(args["vec2"])
    return Label((*a.axes, *b.axes), *widest([a, b]), one_order(node, [a, b]))


def einsum(node: Node, scope: Scope) -> Label:
    """Each letter is an axis; letters that the result lacks are summed over."""
    args = bound_arguments(node)
    equation = args["equation"].replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    labels = [scope.label(x) for x in args["tensors"]]
    if not arrow or "." in equation or any(len(set(part)) < len(part) for part in inputs.split(",")):
        raise refuse(node, f"einsum {equation!r} is not modelled")
    order = one_order(node, labels)
    letters: dict[str, Axis] = {}
    for part, label in zip(inputs.split(","), labels, strict=True):
        for letter, axis in zip(part, label.axes, strict=True):
            if axis and letters.setdefault(letter, axis) != axis:
                raise refuse(node, "it combines different tokens or rows: axes that run over different things meet")
    if any(not is_free(axis) for letter, axis in letters.items() if letter not in output):
        raise refuse(node, "it multiplies along tokens, or along rows of the batch")
    return Label(tuple(letters.get(letter, ()) for letter in output), *widest(labels), order)


RULES: dict[Any, Rule] = {
    **overloads("linear", linear),
    **overloads("matmul mm bmm mv dot addmm baddbmm", product),
    **overloads("outer ger", outer),
    **overloads("einsum", einsum),
}
