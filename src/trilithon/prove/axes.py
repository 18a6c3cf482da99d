"""What each axis of a tensor runs over, as factors: batch rows, tokens, and plain numbers.

`view(-1, 32)` of a `[b s 32]` tensor has the axes `(rows, tokens)` and `(32,)`: merged axes keep their factors in
row-major order, so that a later view can split them again. An axis of one element has no factor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import gcd
from typing import Any

import torch
from torch.fx import Node

from trilithon.errors import CannotCache
from trilithon.passes import where_of

ROWS, TOKENS = "rows", "tokens"
Factor = str | int  # ROWS, TOKENS, a number, or the text of a size that is neither
Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]


class Source(IntEnum):
    """What the values of a tensor are made of; what is made of several has the greatest."""

    CONSTANT = 0  # equal at every token; at every row too, except where an input of the context has rows
    POSITIONS = 1  # at token i of a row: a function of the token's position
    TOKENS = 2  # at token i of a row: a function of that token (or of what attention gave it) and its position


@dataclass(frozen=True)
class Label:
    """What a tensor's axes run over, and what its values are made of.

    Attributes:
        axes: the factors of each axis; `ROWS` and `TOKENS` stand in at most one axis each.
        source: see `Source`.
        last: made from the last token of each row; it has no token axis.
        order: expert routing: the axis of tokens is sorted by the `aten.sort` that this names (`prove/experts.py`).
        role: expert routing: what the numbers in it mean ("order", "inverse", "count", "ends", ...); "" for plain values.
    """

    axes: Axes
    source: Source
    last: bool = False
    order: Node | None = None
    role: str = ""

    @property
    def factors(self) -> list[Factor]:
        return [factor for axis in self.axes for factor in axis]

    @property
    def is_fixed(self) -> bool:
        """No axis runs over rows or tokens, and no value depends on them."""
        return self.source is Source.CONSTANT and not self.last and is_free(*self.axes)

    def axis_of(self, factor: Factor) -> int | None:
        return next((i for i, axis in enumerate(self.axes) if factor in axis), None)


def refuse(node: Node, why: str) -> CannotCache:
    return CannotCache(
        "cannot insert a KV cache",
        where=where_of(node),
        why=why,
        todo="call it for its logits instead of generate; this model has no cache yet",
    )


def is_free(*axes: Axis) -> bool:
    """Does none of the axes run over rows or tokens?"""
    return not any(factor in (ROWS, TOKENS) for axis in axes for factor in axis)


def merged(factors: Iterable[Factor]) -> Axis:
    """The factors of one axis in normal form: neighbouring numbers multiplied, ones dropped."""
    result: list[Factor] = []
    for factor in factors:
        if isinstance(factor, int) and result and isinstance(result[-1], int):
            result[-1] *= factor
        elif factor != 1:
            result.append(factor)
    return tuple(f for f in result if f != 1)


@dataclass(frozen=True)
class Sizes:
    """Reads sizes of export.

    Attributes:
        rows: the symbol of the number of rows, or None where it is 1.
        tokens: the symbol of the number of tokens.
    """

    rows: str | None
    tokens: str
    _names: dict[str, Factor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._names[self.tokens] = TOKENS
        if self.rows is not None:
            self._names[self.rows] = ROWS

    def product(self, size: Any) -> tuple[int, Counter[Factor]] | None:
        """A size as a number times factors; None where rows or tokens enter it in another way, as in s + 1."""
        if not isinstance(size, torch.SymInt):
            return int(size), Counter()
        count, factors = 1, Counter[Factor]()
        expr = size.node.expr
        for part in expr.args if expr.is_Mul else (expr,):
            base, power = (part.base, part.exp) if part.is_Pow else (part, 1)
            name = self._names.get(str(base), str(base))
            if part.is_Integer:
                count *= int(part)
            elif not str(power).isdecimal() or (name not in (ROWS, TOKENS) and self.names_in(base)):
                return None
            else:
                factors[name] += int(power)
        return count, factors

    def names_in(self, expr: Any) -> set[Factor]:
        """Which of rows and tokens a size expression depends on."""
        return {self._names[str(symbol)] for symbol in expr.free_symbols if str(symbol) in self._names}

    def depends(self, value: Any) -> set[Factor]:
        """Which of rows and tokens a number of export depends on."""
        symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
        return self.names_in(value.node.expr) if symbolic else set()

    def axis(self, size: Any) -> Axis | None:
        """The factors of a new axis of this size; None where their order is not known."""
        found = self.product(size)
        if found is None:
            return None
        count, factors = found
        order = list(factors.elements())
        if len(order) > 1:
            return None
        return merged([*order, count])

    def is_tokens(self, size: Any) -> bool:
        return self.axis(size) == (TOKENS,)

    def regroup(self, factors: Sequence[Factor], shape: Sequence[Any]) -> Axes | None:
        """The axes of a row-major view to `shape`; None where it cuts across rows or tokens."""
        rest = [f for f in factors if f != 1]
        axes = []
        for size in shape:
            wanted = self.product(size)
            axis = None if wanted is None else _take(rest, *wanted)
            if axis is None:
                return None
            axes.append(merged(axis))
        return None if rest else tuple(axes)


def _take(rest: list[Factor], count: int, factors: Counter[Factor]) -> list[Factor] | None:
    """Take from the front of `rest` the factors of one axis of size `count * factors`; a number may be split."""
    axis: list[Factor] = []
    left = Counter(factors)
    while count != 1 or left.total():
        if not rest or count < 1:
            return None
        first = rest.pop(0)
        if isinstance(first, int):
            part = gcd(first, count)
            if part == 1 or (part != first and (part != count or left.total())):
                return None
            axis.append(part)
            count //= part
            if part != first:
                rest.insert(0, first // part)
        elif left[first]:
            axis.append(first)
            left[first] -= 1
        else:
            return None
    return axis


Found = Label | tuple["Label", ...]


@dataclass(frozen=True)
class Scope:
    """What a rule may ask: the labels so far, the sizes, and the values of constants."""

    labels: Mapping[Node, Found]
    sizes: Sizes
    value_of: Callable[[Node], torch.Tensor | None]

    def label(self, node: Any) -> Label:
        found = self.labels[node]
        assert isinstance(found, Label), f"{node} has several results"
        return found

    def plain(self, node: Node, operand: Any) -> Label:
        """The label of an operand whose axis of tokens is in order and whose numbers are plain values.

        Raises:
            CannotCache: it is part of expert routing.
        """
        label = self.label(operand)
        if label.order is not None or label.role:
            raise refuse(node, f"{operand.name} holds tokens sorted by a value: {node.target} does not keep them apart")
        return label


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def widest(labels: Iterable[Label]) -> tuple[Source, bool]:
    """The source of what is made of several, and whether it is of last tokens."""
    labels = list(labels)
    return max((x.source for x in labels), default=Source.CONSTANT), any(x.last for x in labels)
