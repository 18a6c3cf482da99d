"""Experts that sort tokens by the expert they go to, and put them back: token by token all the same.

    %chosen, %order = sort(view(%expert_of_token, [-1]))        the tokens in the order of their experts
    %x = index(%tokens, [%order // k])                          each token's value, in that order
    %ends = cumsum(histc(%chosen, n, 0, n - 1))                 where each expert's tokens end
    %b = index(%biases, [%chosen])                              what the expert of row j adds
    %y = grouped_mm(%x, %weights, %ends)                        row j times the weights of the expert of row j
    %back = index_put(empty, [%order], arange)                  the inverse of the order
    %out = index(%y, [%back])                                   back in the order of tokens

A label's `order` names the sort in whose order its axis of tokens stands, and its `role` says what numbers that only
serve this purpose mean. Any other use of them is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from trilithon.passes import bound_arguments
from trilithon.prove.axes import TOKENS, Axis, Found, Label, Scope, Source, is_free, merged, refuse
from trilithon.prove.local_lookups import indexed
from trilithon.prove.local_values import Rule, broadcast, like, overloads, scanned

aten = torch.ops.aten


def sort(node: Node, scope: Scope) -> Found:
    """Along an axis of all tokens: the values sorted, and the order."""
    args = bound_arguments(node)
    label = scope.label(args["self"])
    if len(label.axes) != 1 or TOKENS not in label.axes[0] or label.order or label.role or args.get("descending"):
        return scanned(node, scope)
    groups = _groups(args["self"])
    if groups is None:
        raise refuse(node, "it sorts along tokens")
    sorted_ = Label(label.axes, Source.TOKENS, order=node, role=f"groups {groups}")
    return sorted_, Label(label.axes, Source.TOKENS, order=node, role="order")


def _groups(chosen: Any) -> int | None:
    """n, where these numbers are places of the top k among n: certainly from 0 to n - 1."""
    while isinstance(chosen, Node) and chosen.target in (aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        chosen = chosen.args[0]
    source = chosen.args[0] if isinstance(chosen, Node) and len(chosen.args) == 2 and chosen.args[1] == 1 else None
    if not isinstance(source, Node) or source.target is not aten.topk.default:
        return None
    args = bound_arguments(source)
    size = args["self"].meta["val"].shape[args["dim"]]
    return size if isinstance(size, int) else None


def floor_divided(node: Node, scope: Scope) -> Label:
    """`order // k`: the token that a copy of a token belongs to, where each has k copies in a row."""
    label = scope.label(node.args[0]) if isinstance(node.args[0], Node) and node.args[0] in scope.labels else None
    k = node.args[1]
    if label is None or label.role != "order":
        return broadcast(node, scope)
    if not isinstance(k, int) or (k != 1 and label.axes[0][-1:] != (k,)):
        raise refuse(node, "it computes with the places of sorted tokens")
    return replace(label, role=f"order of {k}")


def index(node: Node, scope: Scope) -> Label:
    """Tokens taken in the order of a sort, or put back."""
    args = bound_arguments(node)
    x, given = scope.label(args["self"]), [n for n in args["indices"] if n is not None]
    number = scope.label(given[0])
    if not number.role:
        return indexed(node, scope)
    first, rest = x.axes[0], x.axes[1:]
    if len(args["indices"]) != 1 or x.role or len(number.axes) != 1 or not is_free(*rest):
        raise refuse(node, "it computes with the places of sorted tokens")
    if number.role.startswith("groups") and x.is_fixed:  # what each token's own expert adds
        return Label((number.axes[0], *rest), Source.TOKENS, order=number.order)
    if number.role == "inverse" and x.order is number.order and first == number.axes[0]:
        return replace(x, order=None)
    copies: Axis = (int(number.role.split()[-1]),) if number.role.startswith("order of") else ()
    if number.role.startswith("order") and x.order is None and merged([*first, *copies]) == number.axes[0]:
        return Label((number.axes[0], *rest), Source.TOKENS, x.last, number.order)
    raise refuse(node, "it looks tokens up by number")


def blank_like(node: Node, scope: Scope) -> Label:
    label = scope.label(node.args[0])
    return Label(label.axes, Source.CONSTANT, role="blank") if label.role == "order" else like(node, scope)


def index_put(node: Node, scope: Scope) -> Label:
    """The inverse of an order: place j written to where the order says."""
    args = bound_arguments(node)
    target, values = scope.label(args["self"]), scope.label(args["values"])
    if len(args["indices"]) != 1 or args["accumulate"] or args["indices"][0] is None:
        raise refuse(node, "it writes to places that are known only at run time")
    order = scope.label(args["indices"][0])
    is_inverse = len(order.axes) == 1 and (target.role, order.role, values.role) == ("blank", "order", "numbers")
    if not is_inverse or target.axes != order.axes or sorted(map(str, values.factors)) != sorted(map(str, order.factors)):
        raise refuse(node, "it writes to places that are known only at run time")
    return replace(order, role="inverse")


def converted(node: Node, scope: Scope) -> Label:
    label = scope.label(node.args[0])
    is_exact = node.meta["val"].dtype in (torch.int32, torch.int64, torch.float32, torch.float64)
    return label if label.role.startswith("groups") and is_exact else broadcast(node, scope)


def counted(node: Node, scope: Scope) -> Label:
    """How many tokens go to each of n experts."""
    args = bound_arguments(node)
    label = scope.label(args["self"])
    n = args["bins"]
    if label.role != f"groups {n}" or (args["min"], args["max"]) != (0, n - 1):
        raise refuse(node, "it counts over tokens")
    return Label((merged([n]),), Source.TOKENS, order=label.order, role="counts")


def added_up(node: Node, scope: Scope) -> Found:
    label = scope.label(node.args[0])
    return replace(label, role="ends") if label.role == "counts" else scanned(node, scope)


def grouped_product(node: Node, scope: Scope) -> Label:
    """Row j of the sorted tokens times the matrix of its own expert."""
    x, weights, ends = (scope.label(a) for a in node.args[:3])
    if len(node.args) > 3 or node.kwargs or not weights.is_fixed or len(weights.axes) != 3:
        raise refuse(node, "it is not tokens times the weights of their experts")
    is_grouped = ends.role == "ends" and ends.order is x.order and x.order is not None and not x.role
    if not is_grouped or ends.axes[0] != weights.axes[0] or len(x.axes) != 2 or not is_free(x.axes[1]):
        raise refuse(node, "its groups are not those that its tokens are sorted by")
    return Label((x.axes[0], weights.axes[2]), Source.TOKENS, order=x.order)


# by name: the second exists only once transformers has registered it, where PyTorch has no kernel for the first
NAMED: dict[str, Rule] = {
    "aten._grouped_mm.default": grouped_product,
    "transformers.grouped_mm_fallback.default": grouped_product,
}
RULES: dict[Any, Rule] = {
    **overloads("sort", sort),
    **overloads("floor_divide floor_divide.Scalar", floor_divided),
    **overloads("index.Tensor", index),
    **overloads("empty_like zeros_like", blank_like),
    **overloads("index_put", index_put),
    **overloads("_to_copy to.dtype", converted),
    **overloads("histc", counted),
    **overloads("cumsum", added_up),
}
