"""Labels of tensors that are made of sizes, and of those whose elements are moved, chosen or repeated."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from trilithon.passes import bound_arguments
from trilithon.prove.axes import TOKENS, Axes, Axis, Found, Label, Scope, Source, is_free, merged, refuse, widest
from trilithon.prove.local_values import Rule, axes_named, broadcast_axes, check_free, one_order, overloads

aten = torch.ops.aten
END = (1 << 63) - 1

# ------------------------------------------------------------ made of sizes


def created(node: Node, scope: Scope) -> Label:
    """zeros, full, new_ones and the like: one number everywhere."""
    args = bound_arguments(node)
    fill = args.get("fill_value")
    if isinstance(fill, Node):
        raise refuse(node, f"it is filled with {fill.name}, which is known only at run time")
    return Label(_new_axes(node, scope), Source.CONSTANT)


def _new_axes(node: Node, scope: Scope) -> Axes:
    axes = [scope.sizes.axis(size) for size in node.meta["val"].shape]
    if any(axis is None for axis in axes):
        raise refuse(node, "its shape depends on the number of tokens or rows in another way than by an axis of so many")
    return tuple(axis or () for axis in axes)


def arange(node: Node, scope: Scope) -> Label:
    """Positions, where it counts tokens one by one from a plain number; the places of sorted tokens, where it counts all."""
    args = bound_arguments(node)
    size = node.meta["val"].shape[0]
    found = scope.sizes.product(size)
    many = found is not None and found != (1, {TOKENS: 1}) and TOKENS in found[1]
    if found is not None and many and args.get("start", 0) == 0 and args.get("step", 1) == 1:
        return Label((merged([*found[1].elements(), found[0]]),), Source.CONSTANT, role="numbers")
    if not scope.sizes.is_tokens(size) or not isinstance(args.get("start", 0), int) or args.get("step", 1) != 1:
        raise refuse(node, "it does not count tokens one by one from the first")
    return Label(((TOKENS,),), Source.POSITIONS)


# ------------------------------------------------------------ views


def view(node: Node, scope: Scope) -> Label:
    """view, reshape, flatten: the same elements in row-major order."""
    label = scope.label(node.args[0])
    axes = scope.sizes.regroup(label.factors, node.meta["val"].shape)
    if axes is None:
        raise refuse(node, "its view cuts across tokens or rows")
    place = label.axis_of(TOKENS)
    if label.order is not None and place is not None and label.axes[place] not in axes:
        raise refuse(node, "its view cuts sorted tokens into groups")
    return Label(axes, label.source, label.last, label.order, label.role)


def moved(node: Node, scope: Scope) -> Label:
    """transpose, permute, unsqueeze, squeeze: whole axes."""
    label = scope.label(node.args[0])
    args, rank = bound_arguments(node), len(label.axes)
    axes = list(label.axes)
    name = str(node.target).split(".")[1]
    if name == "unsqueeze":
        axes.insert(args["dim"] % (rank + 1), ())
    elif name == "squeeze":
        over = axes_named(node, label)
        sizes = node.args[0].meta["val"].shape  # type: ignore[union-attr]
        axes = [axis for i, axis in enumerate(axes) if not (i in over and str(sizes[i]) == "1")]
    elif name in ("transpose", "t", "mT"):
        a, b = (args["dim0"] % rank, args["dim1"] % rank) if name == "transpose" else (rank - 2, rank - 1)
        axes[a], axes[b] = axes[b], axes[a]
    else:
        axes = [axes[d % rank] for d in args["dims"]]
    return Label(tuple(axes), label.source, label.last, label.order, label.role)


def expanded(node: Node, scope: Scope) -> Label:
    """expand: axes of one element repeated; new ones in front."""
    label = scope.plain(node, node.args[0])
    new, shape = _new_axes(node, scope), node.args[0].meta["val"].shape  # type: ignore[union-attr]
    added = len(new) - len(label.axes)
    kept = [i >= added and str(shape[i - added]) != "1" for i in range(len(new))]
    axes = tuple(label.axes[i - added] if keep else new[i] for i, keep in enumerate(kept))
    return Label(axes, label.source, label.last)


def repeated(node: Node, scope: Scope) -> Label:
    """repeat: each axis so many times over."""
    label = scope.plain(node, node.args[0])
    counts = [x.meta["val"] if isinstance(x, Node) else x for x in bound_arguments(node)["repeats"]]
    times = [scope.sizes.axis(count) for count in counts]
    if any(axis is None for axis in times):
        raise refuse(node, "how often it repeats depends on the number of tokens or rows in another way than by so many")
    old = ((),) * (len(counts) - len(label.axes)) + label.axes
    axes = tuple(merged([*(new or ()), *axis]) for new, axis in zip(times, old, strict=True))
    return Label(axes, label.source, label.last)


def repeat_interleaved(node: Node, scope: Scope) -> Label:
    args = bound_arguments(node)
    label = scope.plain(node, args["self"])
    if not isinstance(args["repeats"], int) or args["dim"] is None:
        raise refuse(node, "how often it repeats is not a plain number along one axis")
    (axis,) = axes_named(node, label)
    axes = list(label.axes)
    axes[axis] = merged([*axes[axis], args["repeats"]])
    return Label(tuple(axes), label.source, label.last)


def complex_view(node: Node, scope: Scope) -> Label:
    label = scope.plain(node, node.args[0])
    if node.target is aten.view_as_real.default:
        return Label((*label.axes, (2,)), label.source, label.last)
    check_free(node, label, [len(label.axes) - 1], "views as complex numbers pairs")
    return Label(label.axes[:-1], label.source, label.last)


# ------------------------------------------------------------ parts and joins


def sliced(node: Node, scope: Scope) -> Label:
    """A part of an axis without tokens; the last token; or the first entries of a table, one for each token."""
    args = bound_arguments(node)
    label = scope.label(args["self"])
    if any(_symbolic(args[name], scope) for name in ("start", "step")):
        raise refuse(node, "where it begins depends on the number of tokens or rows")
    axis = args["dim"] % len(label.axes)
    old, new = args["self"].meta["val"].shape[axis], node.meta["val"].shape[axis]
    start = args["start"] or 0
    if str(old) == str(new) and args["step"] == 1:
        return label
    if is_free(label.axes[axis]) and not _symbolic(new, scope):
        one_order(node, [label])
        axes = (*label.axes[:axis], merged(scope.sizes.axis(new) or ()), *label.axes[axis + 1 :])
        return Label(axes, label.source, label.last, label.order)
    if is_last(node, label):
        return Label((*label.axes[:axis], (), *label.axes[axis + 1 :]), label.source, last=True)
    if scope.sizes.is_tokens(new) and isinstance(old, int) and isinstance(start, int) and start >= 0 and args["step"] == 1:
        if label.is_fixed:
            return Label((*label.axes[:axis], (TOKENS,), *label.axes[axis + 1 :]), Source.POSITIONS)
        raise refuse(node, "it takes so many entries as there are tokens, and these are not constants")
    raise refuse(node, "it selects tokens or rows")


def is_last(node: Node, label: Label) -> bool:
    """Does a slice or select take the last token of each row, and nothing else?"""
    args = bound_arguments(node)
    axis = args["dim"] % len(label.axes)
    if label.axes[axis] != (TOKENS,) or label.source is not Source.TOKENS or label.order or label.role:
        return False
    if node.target is aten.select.int:
        return bool(args["index"] == -1)
    end = args["end"]
    return bool(args["start"] == -1 and args["step"] == 1 and (end is None or (isinstance(end, int) and end >= END >> 1)))


def _symbolic(value: Any, scope: Scope) -> bool:
    return bool(scope.sizes.depends(value.meta.get("val") if isinstance(value, Node) else value))


def selected(node: Node, scope: Scope) -> Label:
    args = bound_arguments(node)
    label = scope.label(args["self"])
    axis = args["dim"] % len(label.axes)
    rest = (*label.axes[:axis], *label.axes[axis + 1 :])
    if is_last(node, label):
        return Label(rest, label.source, last=True)
    one_order(node, [label])
    check_free(node, label, [axis], "selects")
    if not isinstance(args["index"], int):
        raise refuse(node, "what it selects is known only at run time")
    return Label(rest, label.source, label.last, label.order)


def joined(node: Node, scope: Scope) -> Label:
    """cat and stack, along an axis without tokens."""
    args = bound_arguments(node)
    labels = [scope.label(x) for x in args["tensors"]]
    order = one_order(node, labels)
    value = node.meta["val"]
    axis = args["dim"] % value.dim()
    if node.target is aten.stack.default:
        axes = broadcast_axes(node, labels, value.dim() - 1)
        _check_joined(node, labels, axes, None)
        return Label((*axes[:axis], merged([len(labels)]), *axes[axis:]), *widest(labels), order)
    for label in labels:
        check_free(node, label, [axis], "joins")
    others = [Label((*x.axes[:axis], (), *x.axes[axis + 1 :]), x.source) for x in labels]
    axes = broadcast_axes(node, others, value.dim())
    _check_joined(node, others, axes, axis)
    new = scope.sizes.axis(value.shape[axis])
    if new is None or not is_free(new):
        raise refuse(node, "it joins as many parts as there are tokens or rows")
    return Label((*axes[:axis], new, *axes[axis + 1 :]), *widest(labels), order)


def _check_joined(node: Node, labels: list[Label], axes: Axes, axis: int | None) -> None:
    for label in labels:
        if any(own != wanted for i, (own, wanted) in enumerate(zip(label.axes, axes, strict=True)) if i != axis):
            raise refuse(node, "it joins parts whose axes run over different things")


def split(node: Node, scope: Scope) -> Found:
    """split, chunk, unbind, along an axis without tokens."""
    args = bound_arguments(node)
    label = scope.label(args["self"])
    one_order(node, [label])
    (axis,) = axes_named(node, label)
    check_free(node, label, [axis], "splits")
    found = []
    for part in node.meta["val"]:
        new: tuple[Axis, ...] = ()
        if node.target is not aten.unbind.int:
            new = (merged(scope.sizes.axis(part.shape[axis]) or ()),)
        found.append(Label((*label.axes[:axis], *new, *label.axes[axis + 1 :]), label.source, label.last, label.order))
    return tuple(found)


def padded(node: Node, scope: Scope) -> Label:
    args = bound_arguments(node)
    label = scope.plain(node, args["self"])
    widths = list(args["pad"])
    rank = len(label.axes)
    touched = [rank - 1 - i // 2 for i, width in enumerate(widths) if isinstance(width, Node) or width != 0]
    if args.get("mode", "constant") != "constant" or any(isinstance(w, Node) for w in widths):
        raise refuse(node, "it pads with values of other elements, or by a number known only at run time")
    check_free(node, label, touched, "pads")
    shape = node.meta["val"].shape
    axes = tuple(merged(scope.sizes.axis(shape[i]) or ()) if i in touched else axis for i, axis in enumerate(label.axes))
    return Label(axes, label.source, label.last)


def slice_written(node: Node, scope: Scope) -> Label:
    """slice_scatter and select_scatter: a part of an axis without tokens is replaced."""
    args = bound_arguments(node)
    whole, part = scope.label(args["self"]), scope.label(args["src"])
    order = one_order(node, [whole, part])
    axis = args["dim"] % len(whole.axes)
    check_free(node, whole, [axis], "writes to a part")
    if node.target is aten.select_scatter.default:
        part = Label((*part.axes[:axis], (), *part.axes[axis:]), part.source, part.last)
    if any(_symbolic(args.get(name), scope) for name in ("start", "end", "step", "index")):
        raise refuse(node, "where it writes depends on the number of tokens or rows")
    others = [Label((*x.axes[:axis], (), *x.axes[axis + 1 :]), x.source) for x in (whole, part)]
    axes = broadcast_axes(node, others, len(whole.axes))
    _check_joined(node, others, axes, axis)
    return Label((*axes[:axis], whole.axes[axis], *axes[axis + 1 :]), *widest([whole, part]), order)


VIEWS = "view reshape _unsafe_view flatten.using_ints unflatten.int view_as reshape_as"
RULES: dict[Any, Rule] = {
    **overloads("zeros ones full empty.memory_format new_zeros new_ones new_full new_empty", created),
    **overloads("arange arange.start arange.start_step", arange),
    **overloads(VIEWS, view),
    **overloads("transpose.int permute t unsqueeze squeeze squeeze.dim squeeze.dims mT", moved),
    **overloads("expand expand_as", expanded),
    **overloads("repeat", repeated),
    **overloads("repeat_interleave.self_int", repeat_interleaved),
    **overloads("view_as_complex view_as_real", complex_view),
    **overloads("slice.Tensor", sliced),
    **overloads("select.int", selected),
    **overloads("cat concat stack", joined),
    **overloads("split.Tensor split_with_sizes split.sizes chunk unbind.int", split),
    **overloads("constant_pad_nd pad", padded),
    **overloads("slice_scatter select_scatter", slice_written),
}
SIZED = {target for target, rule in RULES.items() if rule in (created, arange, view, expanded, repeated, sliced, slice_written)}
