"""The operations that generated kernels can make, and how values lie: as `[rows, width]`, the last axis and all others."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from trilithon.errors import CannotLower
from trilithon.passes import where_of
from trilithon.rewrite.cache_ops import token_positions

aten = torch.ops.aten
TYPES = {
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.float32: "tl.float32",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
}
NOTHING = -1  # where no part has written: the bits of a NaN that no operation makes
POWERS = {2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}", 0.5: "tl.sqrt({0})", -0.5: "tl.rsqrt({0})", 1.0: "{0}"}
SCALED = "{0} {op} {1} * {alpha}"
POINTWISE: dict[Any, str] = {  # of operands in float32
    aten.mul.Tensor: "{0} * {1}",
    aten.mul.Scalar: "{0} * {1}",
    aten.matmul.default: "{0} * {1}",  # over an axis of size 1
    aten.bmm.default: "{0} * {1}",
    aten.div.Tensor: "{0} / {1}",
    aten.neg.default: "-{0}",
    aten.square.default: "{0} * {0}",
    aten.rsqrt.default: "tl.rsqrt({0})",
    aten.sqrt.default: "tl.sqrt({0})",
    aten.reciprocal.default: "1.0 / {0}",
    aten.exp.default: "tl.exp({0})",
    aten.cos.default: "tl.cos({0})",
    aten.sin.default: "tl.sin({0})",
    aten.tanh.default: "tanh({0})",
    aten.sigmoid.default: "1.0 / (1.0 + tl.exp(-{0}))",
    aten.silu.default: "{0} / (1.0 + tl.exp(-{0}))",
    aten.relu.default: "tl.where({0} < 0.0, 0.0, {0})",
}
SUMS = {aten.add.Tensor: "+", aten.sub.Tensor: "-"}
GELU = {
    "none": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "tanh": "{0} / (1.0 + tl.exp(-1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0})))",
}
VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.default, aten.squeeze.dims, aten.transpose.int, aten.permute.default, aten.alias.default,
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.select.int, aten.flatten.using_ints,
}  # fmt: skip
REDUCTIONS = {aten.mean.dim, aten.layer_norm.default}
COLUMNS = {aten.slice.Tensor, operator.getitem, aten.repeat_interleave.self_int}
JOINS = {aten.cat.default, aten.stack.default}
CASTS = {aten._to_copy.default, aten.type_as.default}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}  # their pieces have expressions
OTHERS = {aten.pow.Tensor_Scalar, aten.gelu.default, aten.expand.default, aten.embedding.default, token_positions}
KNOWN = {*POINTWISE, *SUMS, *VIEWS, *REDUCTIONS, *COLUMNS, *JOINS, *CASTS, *OTHERS}
SINGLE = {*POINTWISE, *SUMS, *VIEWS, *CASTS, aten.pow.Tensor_Scalar, aten.gelu.default}  # element by element


class CannotFuse(CannotLower):
    """A value is none that the generated kernels can make; the program stays as it is."""


def refuse(node: Node, why: str) -> CannotFuse:
    return CannotFuse("cannot make this of generated kernels", why=why, where=where_of(node))


def extent(node: Node) -> tuple[int, int]:
    """`(rows, width)` of a value."""
    value = node.meta["val"]
    width = value.shape[-1] if value.dim() else 1
    return value.numel() // max(1, width), width


def numel(node: Node) -> int:
    return math.prod(extent(node))


def padded(size: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, size - 1).bit_length()


def source_column(node: Node) -> tuple[Node, str]:
    """What a slice, a piece of a split, or a repetition is taken of, and the column there of column `{0}`."""
    args: Any = node.args
    given = dict(enumerate(args))
    source: Any = args[0]
    step, place = 1, "{0}"
    if node.target is aten.slice.Tensor:
        axis, begin, step = given.get(1, 0), given.get(2) or 0, given.get(4, 1)
    elif node.target is aten.repeat_interleave.self_int:
        axis, begin = given.get(2, node.kwargs.get("dim")), 0
        place = f"{{0}} // {args[1]}"
    else:
        split, piece = args
        if split.target not in SPLITS:
            raise refuse(node, f"{split.target} has no expression")
        source, axis = split.args[0], split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        begin = sum(x.shape[axis] for x in split.meta["val"][:piece])
    rank, width = source.meta["val"].dim(), source.meta["val"].shape[-1]
    if node.meta["val"].shape == source.meta["val"].shape:
        return source, "{0}"
    if axis is None or axis % rank != rank - 1:
        raise refuse(node, "it is taken along another axis than the last")
    begin = begin + width if begin < 0 else begin
    return source, place + (f" * {step}" if step != 1 else "") + (f" + {begin}" if begin else "")


def number(x: Any) -> str:
    if isinstance(x, (bool, int)):
        return repr(int(x))
    if isinstance(x, float) and math.isfinite(x):
        return repr(x)
    if isinstance(x, float):
        return f'float("{x}")'
    raise CannotFuse("cannot make this of generated kernels", why=f"{x!r} is no number")
