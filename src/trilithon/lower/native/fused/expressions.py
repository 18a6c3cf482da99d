"""Triton expressions of the values of a one-token graph, each rounded to its type where PyTorch rounds it.

A value of any rank is read as `[rows, width]`: its last axis, and all others flattened. With one row and one token, views
and transpositions only move axes of size 1, so that they keep the order of the numbers; a slice or a concatenation along the
last axis shifts columns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from trilithon.lower.native.fused.operations import (
    CASTS,
    COLUMNS,
    GELU,
    JOINS,
    KNOWN,
    POINTWISE,
    POWERS,
    REDUCTIONS,
    SCALED,
    SUMS,
    TYPES,
    VIEWS,
    extent,
    number,
    numel,
    padded,
    refuse,
    source_column,
)
from trilithon.rewrite.cache_ops import token_positions

aten = torch.ops.aten


@dataclass(frozen=True)
class Frame:
    """Which elements of a `[rows, width]` value: names of index tensors, and conditions under which they are inside."""

    row: str = "0"
    column: str = "0"
    row_inside: str = ""
    column_inside: str = ""

    @property
    def inside(self) -> str:
        return " & ".join(f"({x})" for x in (self.row_inside, self.column_inside) if x)


@dataclass
class Emitter:
    """Writes statements that compute values.

    Attributes:
        leaves: values that stand in memory, in the order of the kernel's parameters `p0, p1, ...`.
        is_stored: tells them.
        lines: the statements so far.
        least: columns that an index has at least.
        prefix: of the variables' names.
        made: variable of each value in a frame; a caller may put some in.
    """

    leaves: list[Node]
    is_stored: Callable[[Node], bool]
    least: int = 1
    prefix: str = "x"
    lines: list[str] = field(default_factory=list)
    made: dict[tuple[Node, Frame], str] = field(default_factory=dict)

    def assign(self, expression: str) -> str:
        name = f"{self.prefix}{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def pointer(self, node: Node) -> str:
        if node not in self.leaves:
            self.leaves.append(node)
        return f"p{self.leaves.index(node)}"

    def address(self, stored: Node) -> str:
        """Where a value in memory begins."""
        return self.pointer(stored)

    def whole(self, width: int) -> Frame:
        """All of one row of this width."""
        column, size = f"c{width}", max(self.least, padded(width))
        line = f"{column} = tl.arange(0, {size})[None, :]"
        if line not in self.lines:
            self.lines.append(line)
        return Frame(column=column, column_inside="" if size == width else f"{column} < {width}")

    def value(self, node: Any, frame: Frame) -> str:
        """The variable that holds a value in its own type.

        Raises:
            CannotFuse: it is made by an operation that has no expression, or of a type that has none.
        """
        if not isinstance(node, Node):
            return number(node)
        if (node, frame) not in self.made:
            held = self._stored(node)
            self.made[node, frame] = self._compute(node, frame) if held is None else self._load(node, held, frame)
        return self.made[node, frame]

    def _stored(self, node: Node) -> Node | None:
        """What stands in memory with the same numbers in the same order."""
        source: Any = node
        while not self.is_stored(source):
            if source.target not in VIEWS:
                return None
            self._check_order(source, source.args[0])
            source = source.args[0]
        return source  # type: ignore[no-any-return]

    def _load(self, node: Node, stored: Node, frame: Frame) -> str:
        held = stored.meta["val"]
        if not held.is_contiguous() or held.dtype not in TYPES:
            raise refuse(stored, f"it stands in memory as {held.dtype} with strides {held.stride()}")
        place = " + ".join(x for x in (f"{frame.row} * {extent(node)[1]}" if frame.row != "0" else "", frame.column) if x)
        mask = f", mask={frame.inside}, other=0" if frame.inside else ""
        return self.assign(f"tl.load({self.address(stored)} + {place}{mask})")

    def _compute(self, node: Node, frame: Frame) -> str:
        dtype = node.meta["val"].dtype if isinstance(node.meta.get("val"), Tensor) else None
        if node.target not in KNOWN or dtype not in TYPES:
            raise refuse(node, f"{getattr(node.target, '__name__', node.target)} of {dtype} has no expression")
        if node.target in (aten.matmul.default, aten.bmm.default) and node.args[0].meta["val"].shape[-1] != 1:  # type: ignore[union-attr]
            raise refuse(node, "it is a product with what is no matrix of the model")
        if node.target in VIEWS:
            return self._view(node, frame)
        if node.target is aten.expand.default:
            return self.operand(node.args[0], node, frame)
        if node.target in COLUMNS:
            return self._columns(node, frame)
        if node.target in JOINS:
            return self._joined(node, frame) if node.target is aten.cat.default else self._stacked(node, frame)
        if node.target is token_positions:
            return self.value(node.args[0], Frame())
        if node.target is aten.embedding.default:
            return self._gather(node, frame)
        if node.target in REDUCTIONS:
            return self._reduce(node, frame)
        return self.assign(f"({self._formula(node, frame)}).to({TYPES[dtype]})")

    def _formula(self, node: Node, frame: Frame) -> str:
        """A pointwise operation, of its operands in float32 unless it is one of whole numbers."""
        args: Any = node.args
        if node.target in CASTS:
            return self.operand(args[0], node, frame)
        floating = node.meta["val"].dtype.is_floating_point
        operands = [self._wide(x, node, frame, floating) for x in args[:2] if isinstance(x, (Node, int, float))]
        if node.target in SUMS:
            alpha = node.kwargs.get("alpha", 1)
            return SCALED.format(*operands, op=SUMS[node.target], alpha=number(alpha)) if alpha != 1 else (
                f"{operands[0]} {SUMS[node.target]} {operands[1]}"
            )  # fmt: skip
        if node.target is aten.pow.Tensor_Scalar:
            if float(args[1]) not in POWERS:
                raise refuse(node, f"the power {args[1]} has no expression")
            return POWERS[float(args[1])].format(operands[0])
        if node.target is aten.gelu.default:
            return GELU[str(node.kwargs.get("approximate", "none"))].format(operands[0])
        return POINTWISE[node.target].format(*operands)

    def _wide(self, x: Any, node: Node, frame: Frame, floating: bool) -> str:
        name = self.operand(x, node, frame)
        if not floating or not isinstance(x, Node) or x.meta["val"].dtype == torch.float32:
            return name
        return f"{name}.to(tl.float32)"

    def operand(self, x: Any, node: Node, frame: Frame) -> str:
        """An operand where the result is in `frame`: what has one row or one column is repeated."""
        if not isinstance(x, Node):
            return number(x)
        (rows, width), (all_rows, all_width) = extent(x), extent(node)
        if width not in (1, all_width) or rows not in (1, all_rows):
            raise refuse(node, f"an operand of {tuple(x.meta['val'].shape)} is repeated in an unusual way")
        if width == 1 and all_width != 1:
            frame = replace(frame, column="0", column_inside="")
        if rows == 1 and all_rows != 1:
            frame = replace(frame, row="0", row_inside="")
        return self.value(x, frame)

    def _view(self, node: Node, frame: Frame) -> str:
        source: Any = node.args[0]
        self._check_order(node, source)
        (rows, width), (_, own) = extent(source), extent(node)
        if width == own:
            return self.value(source, frame)
        flat = frame.column if frame.row == "0" else self.assign(f"{frame.row} * {own} + {frame.column}")
        if rows == 1:
            return self.value(source, Frame(column=flat, column_inside=frame.inside))
        row, column = (self.assign(f"{flat} {op} {width}") for op in ("//", "%"))
        return self.value(source, Frame(row, column if width > 1 else "0", frame.inside))

    def _check_order(self, node: Node, source: Node) -> None:
        """A view may move axes of size 1 only."""
        shape = source.meta["val"].shape
        order = list(range(len(shape)))
        if node.target is aten.transpose.int:
            i, j = (int(x) % len(shape) for x in node.args[1:3])  # type: ignore[arg-type]
            order[i], order[j] = order[j], order[i]
        if node.target is aten.permute.default:
            order = [int(i) % len(shape) for i in node.args[1]]  # type: ignore[union-attr, arg-type]
        moved = [i for i in order if shape[i] != 1]
        if moved != sorted(moved) or numel(node) != numel(source):
            raise refuse(node, "it moves or drops axes that are longer than 1")

    def _columns(self, node: Node, frame: Frame) -> str:
        """A slice, or a repetition, along the last axis."""
        source, place = source_column(node)
        moved = frame.column if place == "{0}" else self.assign(place.format(frame.column))
        return self.value(source, replace(frame, column=moved))

    def _stacked(self, node: Node, frame: Frame) -> str:
        """Values side by side along a new last axis."""
        pieces: Any = node.args[0]
        axis, rank = node.args[1] if len(node.args) > 1 else 0, node.meta["val"].dim()
        if int(axis) % rank != rank - 1:  # type: ignore[arg-type]
            raise refuse(node, "it stacks along another axis than the last")
        rows, width = extent(pieces[0])
        row = "0" if rows == 1 else self.assign(f"{frame.row} // {width}")
        column = frame.row if rows == 1 else self.assign(f"{frame.row} % {width}")
        made = ""
        for number_of, piece in enumerate(pieces):
            name = self.value(piece, Frame(row, column, "", frame.inside))
            made = name if not made else self.assign(f"tl.where({frame.column} < {number_of}, {made}, {name})")
        return made

    def _joined(self, node: Node, frame: Frame) -> str:
        pieces: Any = node.args[0]
        axis, rank = node.args[1] if len(node.args) > 1 else 0, node.meta["val"].dim()
        if int(axis) % rank != rank - 1:  # type: ignore[arg-type]
            raise refuse(node, "it is a concatenation along another axis than the last")
        made, begin = "", 0
        for piece in pieces:
            width = extent(piece)[1]
            column = self.assign(f"{frame.column} - {begin}") if begin else frame.column
            own = f"({column} >= 0) & ({column} < {width})"
            inside = f"({frame.column_inside}) & {own}" if frame.column_inside else own
            name = self.value(piece, replace(frame, column=column, column_inside=inside))
            made = name if not made else self.assign(f"tl.where({frame.column} < {begin}, {made}, {name})")
            begin += width
        return made

    def _gather(self, node: Node, frame: Frame) -> str:
        table, index = node.args[:2]
        if not isinstance(table, Node) or not isinstance(index, Node) or numel(index) != 1 or not self.is_stored(table):
            raise refuse(node, "it looks up more than one token")
        place = self.assign(f"{self.value(index, Frame())}.to(tl.int64) * {extent(table)[1]} + {frame.column}")
        mask = f", mask={frame.inside}, other=0" if frame.inside else ""
        return self.assign(f"tl.load({self.pointer(table)} + {place}{mask})")

    def _reduce(self, node: Node, frame: Frame) -> str:
        """A mean over the last axis, or a layer norm."""
        args: Any = node.args
        source, dtype = args[0], TYPES[node.meta["val"].dtype]
        width = extent(source)[1]
        all_of = replace(self.whole(width), row=frame.row, row_inside=frame.row_inside)
        if node.target is aten.mean.dim:
            rank = source.meta["val"].dim()
            if [int(d) % rank for d in args[1]] != [rank - 1] or not args[2:3] == (True,):
                raise refuse(node, "it is a mean over another axis than the last, or drops that axis")
            return self.assign(f"({self._sum(self.value(source, all_of), all_of)} / {width}).to({dtype})")
        if list(args[1]) != [width]:
            raise refuse(node, "it is a norm over several axes")
        x = self.assign(f"{self.value(source, all_of)}.to(tl.float32)")
        mean = self.assign(f"{self._sum(x, all_of)} / {width}")
        off = self.assign(f"{x} - {mean}")
        spread = self.assign(f"tl.rsqrt({self._sum(f'({off} * {off})', all_of)} / {width} + {number(args[4])})")
        made = self.assign(f"({self.operand(source, node, frame)}.to(tl.float32) - {mean}) * {spread}")
        for op, extra in zip((operator.mul, operator.add), (*args[2:4], None, None), strict=False):
            if extra is not None:
                sign = "*" if op is operator.mul else "+"
                made = self.assign(
                    f"{made} {sign} {self.operand(extra, node, replace(frame, row='0', row_inside=''))}.to(tl.float32)"
                )
        return self.assign(f"{made}.to({dtype})")

    def _sum(self, name: str, frame: Frame) -> str:
        held = f"tl.where({frame.column_inside}, {name}, 0)" if frame.column_inside else name
        return f"tl.sum({held}.to(tl.float32), 1)[:, None]"
