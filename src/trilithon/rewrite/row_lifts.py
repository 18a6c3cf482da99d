"""How each operation is done behind a new row axis in front of its operands; see `row_positions`."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from trilithon.passes import bound_arguments
from trilithon.prove.axes import refuse
from trilithon.prove.local_values import BROADCAST, LIKE, targets

if TYPE_CHECKING:
    from trilithon.rewrite.row_positions import RowPositions

aten = torch.ops.aten
AXES = ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim")
Lift = Callable[["RowPositions", Node], Any]


def rank_of(node: Node) -> int:
    value = node.meta["val"]
    return int((value if isinstance(value, Tensor) else value[0]).dim())


def same(made: RowPositions, node: Node) -> Node:
    """Operations on the last axes only."""
    return made.copy(node, made.own)


def broadcast(made: RowPositions, node: Node) -> Node:
    return made.copy(node, lambda x: made.padded(x, rank_of(node) + 1))


def shifted(made: RowPositions, node: Node) -> Node:
    """Axes are counted from behind the rows; those counted from the end stay."""
    return _shifted(made, node, made.own)


def _shifted(made: RowPositions, node: Node, of: Callable[[Node], Any]) -> Node:
    replaced: Any = map_arg((node.args, node.kwargs), of)
    args, kwargs = list(replaced[0]), dict(replaced[1])
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name not in AXES:
            continue
        given = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
        moved = [_behind(d) for d in given] if isinstance(given, (list, tuple)) else _behind(given)
        if i < len(args):
            args[i] = moved
        else:
            kwargs[argument.name] = moved
    return made.call(node.target, *args, like=node, **kwargs)  # type: ignore[arg-type]


def _behind(axis: int) -> int:
    return axis + 1 if axis >= 0 else axis


def viewed(made: RowPositions, node: Node) -> Node:
    return made.call(aten.reshape.default, made.own(node.args[0]), [made.rows, *node.args[1]], like=node)  # type: ignore[arg-type,misc]


def expanded(made: RowPositions, node: Node) -> Node:
    x = made.padded(node.args[0], rank_of(node) + 1)  # type: ignore[arg-type]
    return made.call(aten.expand.default, x, [made.rows, *node.args[1]], like=node)  # type: ignore[misc]


def repeated(made: RowPositions, node: Node) -> Node:
    x = made.padded(node.args[0], rank_of(node) + 1)  # type: ignore[arg-type]
    return made.call(aten.repeat.default, x, [1, *node.args[1]], like=node)  # type: ignore[misc]


def permuted(made: RowPositions, node: Node) -> Node:
    rank, x = rank_of(node), made.own(node.args[0])  # type: ignore[arg-type]
    dims = [rank - 1, rank - 2] if node.target is aten.t.default else bound_arguments(node)["dims"]
    return made.call(aten.permute.default, x, [0, *(d % rank + 1 for d in dims)], like=node)


def squeezed(made: RowPositions, node: Node) -> Node:
    """squeeze of every axis of one element; of one row there may be one, which stays."""
    sizes = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    ones = [i + 1 for i, size in enumerate(sizes) if str(size) == "1"]
    return made.call(aten.squeeze.dims, made.own(node.args[0]), ones, like=node)  # type: ignore[arg-type]


def joined(made: RowPositions, node: Node) -> Node:
    return _shifted(made, node, lambda x: made.with_rows(x) if isinstance(x.meta.get("val"), Tensor) else x)


def multiplied(made: RowPositions, node: Node) -> Node:
    if any(rank_of(x) < 2 for x in node.args):  # type: ignore[arg-type]
        raise refuse(node, "positions of a row cannot be multiplied with a vector")
    return made.copy(node, lambda x: made.padded(x, rank_of(node) + 1), aten.matmul.default)


def outer(made: RowPositions, node: Node) -> Node:
    a, b = (made.own(x) for x in node.args)  # type: ignore[arg-type]
    return made.call(
        aten.mul.Tensor,
        made.call(aten.unsqueeze.default, a, -1),
        made.call(aten.unsqueeze.default, b, -2) if node.args[1] in made.lifted else b,
        like=node,
    )


def summed(made: RowPositions, node: Node) -> Node:
    """einsum: one more letter for the rows."""
    args = bound_arguments(node)
    inputs, _, output = args["equation"].replace(" ", "").partition("->")
    letter = next(x for x in ascii_lowercase if x not in inputs)
    parts = [letter + p if x in made.lifted else p for p, x in zip(inputs.split(","), args["tensors"], strict=True)]
    equation = f"{','.join(parts)}->{letter}{output}"
    return made.call(aten.einsum.default, equation, [made.own(x) for x in args["tensors"]], like=node)


def indexed(made: RowPositions, node: Node) -> Node:
    """A constant looked up by positions, or positions by constants."""
    args = bound_arguments(node)
    x, given = args["self"], [i for i, n in enumerate(args["indices"]) if n is not None]
    lifted = [i for i in given if args["indices"][i] in made.lifted]
    if x in made.lifted and not lifted and given == list(range(given[0], given[0] + len(given))):
        return made.call(aten.index.Tensor, made.lifted[x], [None, *args["indices"]], like=node)
    if x in made.lifted or len(given) != 1:
        raise refuse(node, "positions of a row cannot be looked up like this")
    return _looked_up(made, node, x, args["indices"][given[0]], given[0])


def selected(made: RowPositions, node: Node) -> Node:
    """index_select by positions."""
    args = bound_arguments(node)
    if args["self"] in made.lifted:
        return shifted(made, node)
    return _looked_up(made, node, args["self"], args["index"], args["dim"] % rank_of(args["self"]))


def _looked_up(made: RowPositions, node: Node, table: Node, index: Node, axis: int) -> Node:
    found = made.call(aten.index.Tensor, table, [*[None] * axis, made.lifted[index]], like=node)
    rest = [i for i in range(rank_of(node) + 1) if i != axis]
    return found if axis == 0 else made.call(aten.permute.default, found, [axis, *rest])


LIFTS: dict[Any, Lift] = {
    **dict.fromkeys([*BROADCAST, *LIKE], broadcast),
    **dict.fromkeys([getitem, *targets("linear layer_norm rms_norm embedding dropout view_as_complex view_as_real")], same),
    **dict.fromkeys(targets("type_as constant_pad_nd pad mT"), same),
    **dict.fromkeys(targets("sum.dim_IntList mean.dim amax amin max.dim min.dim softmax.int _softmax topk cumsum"), shifted),
    **dict.fromkeys(targets("transpose.int unsqueeze squeeze.dim squeeze.dims slice.Tensor select.int"), shifted),
    **dict.fromkeys(targets("split.Tensor split_with_sizes split.sizes chunk unbind.int repeat_interleave.self_int"), shifted),
    **dict.fromkeys(targets("flatten.using_ints unflatten.int"), shifted),
    **dict.fromkeys(targets("view reshape _unsafe_view"), viewed),
    **dict.fromkeys(targets("expand"), expanded),
    **dict.fromkeys(targets("repeat"), repeated),
    **dict.fromkeys(targets("permute t"), permuted),
    **dict.fromkeys(targets("squeeze"), squeezed),
    **dict.fromkeys(targets("cat concat stack slice_scatter select_scatter gather"), joined),
    **dict.fromkeys(targets("matmul mm bmm"), multiplied),
    **dict.fromkeys(targets("outer ger"), outer),
    **dict.fromkeys(targets("einsum"), summed),
    **dict.fromkeys(targets("index.Tensor"), indexed),
    **dict.fromkeys(targets("index_select"), selected),
}
