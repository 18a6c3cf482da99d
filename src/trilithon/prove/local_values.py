"""Labels of values that are computed element by element, or along axes that run over neither rows nor tokens."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from trilithon.passes import bound_arguments
from trilithon.prove.axes import TOKENS, Axes, Axis, Found, Label, Scope, Source, is_free, refuse, widest

aten = torch.ops.aten

BROADCAST = {
    getattr(getattr(aten, name), overload)
    for names, overloads in (
        ("add sub mul div eq ne lt le gt ge remainder fmod floor_divide true_divide", "Tensor Scalar"),
        ("__and__ __or__ __xor__ bitwise_and bitwise_or bitwise_xor", "Tensor Scalar"),
        ("pow", "Tensor_Scalar Tensor_Tensor Scalar"),
        ("div", "Tensor_mode Scalar_mode"),
        ("where", "self ScalarOther ScalarSelf Scalar"),
        ("masked_fill", "Scalar Tensor"),
        ("rsub clamp_min clamp_max", "Scalar Tensor default"),
        ("clamp", "default Tensor"),
        ("max min", "other"),
        ("maximum minimum fmax fmin atan2 polar logical_and logical_or logical_xor hypot lerp", "default Scalar Tensor"),
        ("neg rsqrt sqrt square cos sin tan tanh sigmoid exp exp2 expm1 log log2 log10 log1p erf erfc abs sign", "default"),
        ("floor ceil round trunc frac reciprocal logical_not bitwise_not isnan isinf isfinite", "default"),
        ("silu gelu relu relu6 elu celu selu softplus mish hardswish hardsigmoid hardtanh leaky_relu log_sigmoid", "default"),
        ("clone alias detach _to_copy contiguous lift_fresh_copy nan_to_num conj real imag threshold", "default"),
        ("to", "dtype dtype_layout device"),
        ("ones_like zeros_like full_like empty_like addcmul", "default"),
        ("copy", "default"),
    )
    for name in names.split()
    for overload in overloads.split()
    if hasattr(aten, name) and hasattr(getattr(aten, name), overload)
}
LIKE = {aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.empty_like.default}


def broadcast_axes(node: Node, operands: list[Label], rank: int) -> Axes:
    """The axes of what broadcasts from operands aligned at the right.

    Raises:
        CannotCache: an axis of one operand runs over something else than the same axis of another.
    """
    axes: list[Axis] = []
    for i in range(rank):
        places = [i - (rank - len(x.axes)) for x in operands]
        found = {x.axes[at] for x, at in zip(operands, places, strict=True) if at >= 0 and x.axes[at]}
        if len(found) > 1:
            raise refuse(node, "it combines different tokens or rows: axes that run over different things meet")
        axes.append(found.pop() if found else ())
    return tuple(axes)


def one_order(node: Node, operands: list[Label]) -> Node | None:
    """The order of tokens that all operands with tokens share."""
    if any(x.role for x in operands):
        raise refuse(node, "it computes with the places of sorted tokens")
    orders = {x.order for x in operands if TOKENS in x.factors or x.source is Source.TOKENS}
    if len(orders) > 1:
        raise refuse(node, "it combines sorted tokens with tokens in another order")
    return orders.pop() if orders else None


def broadcast(node: Node, scope: Scope) -> Label:
    operands = [scope.label(x) for x in node.all_input_nodes if x in scope.labels]
    order = one_order(node, operands)
    axes = broadcast_axes(node, operands, node.meta["val"].dim())
    return Label(axes, *widest(operands), order)


def like(node: Node, scope: Scope) -> Label:
    """A constant of another tensor's shape; it stays with that tensor where positions have no rows of their own yet."""
    x = scope.plain(node, node.args[0])
    is_constant = x.source is Source.TOKENS and not x.last
    return Label(x.axes, Source.CONSTANT if is_constant else x.source, x.last)


def dropout(node: Node, scope: Scope) -> Label:
    if bound_arguments(node)["train"]:
        raise refuse(node, "dropout is on: call model.eval() before exporting")
    return broadcast(node, scope)


def type_of_other(node: Node, scope: Scope) -> Label:
    """`type_as`: only the type of the second operand is used."""
    return scope.label(node.args[0])


# ------------------------------------------------------------ along axes


def axes_named(node: Node, label: Label, names: tuple[str, ...] = ("dim",)) -> list[int]:
    """The axes that an operation works along; all where it names none."""
    args = bound_arguments(node)
    given = next((args[name] for name in names if name in args), None)
    rank = len(label.axes)
    if given is None or given == []:
        return list(range(rank))
    return [d % max(rank, 1) for d in (given if isinstance(given, (list, tuple)) else [given])]


def check_free(node: Node, label: Label, axes: list[int], what: str) -> None:
    for axis in axes:
        if not is_free(label.axes[axis]):
            over = "tokens" if TOKENS in label.axes[axis] else "rows of the batch"
            raise refuse(node, f"it {what} over {over}")


def reduced(node: Node, scope: Scope) -> Found:
    """sum, mean, max and the like."""
    args = bound_arguments(node)
    label = scope.label(args["self"])
    one_order(node, [label])
    over = axes_named(node, label)
    check_free(node, label, over, "reduces")
    kept = bool(args.get("keepdim"))
    axes = tuple(() if i in over else axis for i, axis in enumerate(label.axes) if kept or i not in over)
    result = Label(axes, label.source, label.last, label.order)
    value = node.meta["val"]
    return result if isinstance(value, torch.Tensor) else (result,) * len(value)


def normalised(node: Node, scope: Scope) -> Label:
    """layer_norm and rms_norm, over the last axes."""
    args = bound_arguments(node)
    label = scope.label(args["input"])
    one_order(node, [label])
    rank = len(label.axes)
    check_free(node, label, list(range(rank - len(args["normalized_shape"]), rank)), "normalises")
    _check_weights(node, scope, args["input"])
    return label


def group_normalised(node: Node, scope: Scope) -> Label:
    """All axes but the first are averaged over."""
    args = bound_arguments(node)
    label = scope.label(args["input"])
    one_order(node, [label])
    check_free(node, label, list(range(1, len(label.axes))), "normalises")
    _check_weights(node, scope, args["input"])
    return label


def _check_weights(node: Node, scope: Scope, x: Any) -> None:
    for other in node.all_input_nodes:
        if other is not x and other in scope.labels and not scope.label(other).is_fixed:
            raise refuse(node, f"its weight {other.name} is not a constant")


def scanned(node: Node, scope: Scope) -> Found:
    """softmax, cumsum and the like: along one axis, which stays."""
    args = bound_arguments(node)
    label = scope.label(args["self"])
    one_order(node, [label])
    over = axes_named(node, label)
    if node.target is aten.cumsum.default and label.source is Source.CONSTANT and label.axes[over[0]] == (TOKENS,):
        return Label(label.axes, Source.POSITIONS)  # of equal numbers: each token's position + 1, times that number
    check_free(node, label, over, "sorts" if node.target in SORTS else "adds up or normalises")
    value = node.meta["val"]
    return label if isinstance(value, torch.Tensor) else (label,) * len(value)


def topk(node: Node, scope: Scope) -> Found:
    args = bound_arguments(node)
    label = scope.label(args["self"])
    one_order(node, [label])
    over = axes_named(node, label)
    check_free(node, label, over, "chooses")
    k = args["k"]
    if not isinstance(k, int):
        raise refuse(node, "how many it chooses is known only at run time")
    axes = tuple(((k,) if k != 1 else ()) if i in over else axis for i, axis in enumerate(label.axes))
    return (Label(axes, label.source, label.last, label.order),) * 2


def item(node: Node, scope: Scope) -> Label:
    found: Any = scope.labels[node.args[0]]  # type: ignore[index]
    return found[node.args[1]]  # type: ignore[no-any-return]


SORTS = {aten.sort.default, aten.argsort.default, aten.sort.stable}
Rule = Callable[[Node, Scope], Found]


def targets(names: str) -> list[Any]:
    """Those of these operations that this torch has; "sum.dim_IntList" names an overload."""
    split = [full.partition(".") for full in names.split()]
    packets = [(getattr(aten, name, None), overload or "default") for name, _, overload in split]
    return [getattr(packet, overload) for packet, overload in packets if packet is not None and hasattr(packet, overload)]


def overloads(names: str, rule: Rule) -> dict[Any, Rule]:
    return dict.fromkeys(targets(names), rule)


RULES: dict[Any, Rule] = {
    **dict.fromkeys(BROADCAST, broadcast),
    **dict.fromkeys(LIKE, like),
    **overloads("type_as", type_of_other),
    **overloads("dropout", dropout),
    **overloads("sum sum.dim_IntList mean mean.dim amax amin max.dim min.dim max min prod prod.dim_int", reduced),
    **overloads("var.dim var.correction std.dim std.correction any any.dim all all.dim argmax argmin logsumexp", reduced),
    **overloads("var_mean.correction norm.ScalarOpt_dim linalg_vector_norm", reduced),
    **overloads("layer_norm rms_norm", normalised),
    **overloads("group_norm", group_normalised),
    **overloads("softmax.int _softmax log_softmax.int _log_softmax _safe_softmax cumsum cumprod", scanned),
    **overloads("sort sort.stable argsort argsort.stable logcumsumexp", scanned),
    **overloads("topk", topk),
    getitem: item,
}
