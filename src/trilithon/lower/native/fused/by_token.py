"""Kernels of a prompt: what is done to each token alone, by one program a token and value.

They are emitted of the graph for one token, as those of a step are: the proof by which a cache was inserted says that a token's
values depend on no other's, but through attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from trilithon.lower.native.fused.expressions import Emitter, Frame
from trilithon.lower.native.fused.launch import Generated, Launch, Made
from trilithon.lower.native.fused.operations import extent, numel, padded, refuse
from trilithon.lower.native.fused.text import MOST_VALUES, Text, arranged, kernel_text, needed_by_others
from trilithon.rewrite.cache_ops import real_positions, token_positions

A_WARP = 512  # numbers that a warp makes
MOST_WARPS = 8
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A value to be made of each token.

    Attributes:
        is_kept: stored for others to read.
        cache: what it is written to as well, `[1 g t d]`.
    """

    node: Node
    is_kept: bool = True
    cache: Node | None = None


@dataclass
class TokenEmitter(Emitter):
    """Emits the values of token number `token`.

    Attributes:
        is_fixed: is this stored value the same for all tokens?
        check: refuses a value that one token's graph does not tell.
    """

    is_fixed: Callable[[Node], bool] = field(default=lambda node: node.op == "get_attr")
    check: Callable[[Node], None] = field(default=lambda node: None)

    def address(self, stored: Node) -> str:
        pointer = self.pointer(stored)
        return pointer if self.is_fixed(stored) else f"({pointer} + token * {numel(stored)})"

    def value(self, node: Any, frame: Frame) -> str:
        if isinstance(node, Node) and (node, frame) not in self.made:
            self.check(node)
        return super().value(node, frame)

    def _compute(self, node: Node, frame: Frame) -> str:
        if node.target is token_positions:
            return self.assign(f"{self.value(node.args[0], Frame())} + token")
        if node.target is real_positions:
            position, start, count = (self.value(x, Frame()) for x in node.args)
            return self.assign(f"tl.minimum({position}, {start} + {count} - 1)")
        return super()._compute(node, frame)


@dataclass(frozen=True)
class Emits:
    """How values of a prompt are read: what stands in memory, see `TokenEmitter`; and the inputs `start` and `counts`."""

    is_stored: Callable[[Node], bool]
    is_fixed: Callable[[Node], bool]
    check: Callable[[Node], None]
    start: Node
    counts: Node

    def emitter(self, leaves: list[Node]) -> TokenEmitter:
        return TokenEmitter(leaves, self.is_stored, is_fixed=self.is_fixed, check=self.check)


def text_of_tokens(pieces: Sequence[Piece], emits: Emits, *, with_others: bool = False) -> Text:
    """Each piece of each token, by the program (token, piece).

    The kernel takes what it reads, what it makes, and of each cache itself, its strides of heads and slots, and its slots.

    Args:
        with_others: of a single piece, store what is made on the way to it and read elsewhere too.

    Raises:
        CannotFuse: a value has no expression, or is not made of its own token alone.
    """
    leaves: list[Node] = []
    makes: list[Node] = []
    caches = 0
    lines = ["token = tl.program_id(0).to(tl.int64)"]
    for number, piece in enumerate(pieces):
        emitter = emits.emitter(leaves)
        frame, made = _made(emitter, piece.node)
        kept = [piece.node] if piece.is_kept else []
        if with_others:
            kept += needed_by_others(emitter, frame, {piece.node})
        for node in kept:
            place = f"o{len(makes)} + token * {numel(node)} + {_place(frame, extent(node)[1])}"
            inside = f", mask={frame.inside}" if frame.inside else ""
            emitter.lines.append(f"tl.store({place}, {emitter.made[node, frame]}{inside})")
            makes.append(node)
        if piece.cache is not None:
            start, count = (emitter.value(x, Frame()) for x in (emits.start, emits.counts))
            inside = frame.inside or f"{frame.column} >= 0"
            names = ", ".join(f"c{caches}{x}" for x in ("", "_g", "_t", "_slots"))
            emitter.lines.append(
                f"attention.write_slot({made}, {frame.row}, {frame.column}, {inside}, token, {start}, {count}, {names})"
            )
            caches += 1
        word = "if" if number == 0 else "elif"
        lines.append(f"{word} tl.program_id(1) == {number}:")
        lines += [f"    {line}" for line in arranged(emitter)]
    more = [f"c{i}{x}" for i in range(caches) for x in ("", "_g", "_t", "_slots")]
    name = "_".join(("tokens", *(str(numel(p.node)) for p in pieces)))
    return kernel_text(name, leaves, makes, lines, ", ".join([*more, "PDL: tl.constexpr"]))


def _made(emitter: TokenEmitter, node: Node) -> tuple[Frame, str]:
    rows, width = extent(node)
    if padded(rows) * padded(width) > MOST_VALUES:
        raise refuse(node, f"{rows} x {width} numbers of a token do not fit one program")
    frame = emitter.whole(width)
    if rows > 1:
        emitter.lines.append(f"r = tl.arange(0, {padded(rows)})[:, None]")
        frame = replace(frame, row="r", row_inside="" if padded(rows) == rows else f"r < {rows}")
    return frame, emitter.value(node, frame)


def _place(frame: Frame, width: int) -> str:
    return frame.column if frame.row == "0" else f"{frame.row} * {width} + {frame.column}"


class ByToken(Generated):
    """See `text_of_tokens`.

    Attributes:
        results: shape of each value for one token, and its type.
        axes: which of the axes of each runs over tokens.
        caches: how many it writes.
    """

    def __init__(self, text: Text, pieces: Sequence[Piece], axis_of: Callable[[Node], int]) -> None:
        super().__init__(text)
        self.axes = [axis_of(x) for x in text.makes]
        self.caches, self.pieces = sum(p.cache is not None for p in pieces), len(pieces)
        numbers = max(padded(a) * padded(b) for a, b in (extent(p.node) for p in pieces))
        self.warps = max(1, min(MOST_WARPS, numbers // A_WARP))

    def call(self, *reads: Tensor) -> tuple[list[Launch], Made]:
        """The values, with all tokens.

        Args:
            reads: tokens, `[1 s]`; what stands in memory, token by token; then the caches.
        """
        tokens, *others = reads
        s = tokens.shape[1]
        leaves, caches = others[: len(others) - self.caches], others[len(others) - self.caches :]
        shapes = [(s, *_without(shape, axis)) for (shape, _), axis in zip(self.results, self.axes, strict=True)]
        made = [tokens.new_empty(shape, dtype=dtype) for shape, (_, dtype) in zip(shapes, self.results, strict=True)]
        kept = [x for c in caches for x in (c, c.stride(1), c.stride(2), c.shape[2])]
        options = {"num_warps": self.warps, "PDL": False}  # an early start gains nothing beside PyTorch's products
        launch = self.function, (s, self.pieces), (*(x.contiguous() for x in leaves), *made, *kept), options
        return [launch], tuple(x.movedim(0, axis) for x, axis in zip(made, self.axes, strict=True))


def _without(shape: Sizes, axis: int) -> Iterator[int]:
    return (n for i, n in enumerate(shape) if i != axis)


def token_major(x: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """What one token has, token by token, in the shape `[.. -1 ..]`, where all axes before the tokens' are of size 1."""
    return x.movedim(axis, 0).reshape(shape)


def parts_of_rows(x: Tensor, shape: Sequence[int], axis: int, strides: Sequence[int], offset: int) -> Tensor:
    """A view of `x [1 s c]`: of each row as one row is viewed.

    Args:
        shape, strides, offset: of the view of a single row.
        axis: which of its axes runs over tokens.
    """
    sizes, steps = list(shape), list(strides)
    sizes[axis], steps[axis] = x.shape[1], x.stride(1)
    return x.as_strided(sizes, steps, x.storage_offset() + offset)
