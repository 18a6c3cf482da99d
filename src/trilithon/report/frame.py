"""The part of a mask that a picture shows: which queries, keys and heads, at which sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Term, linear
from trilithon.spec.traverse import free_vars


@dataclass(frozen=True)
class Frame:
    """Rows and columns of a picture, and what the variables of a term are there.

    Attributes:
        rows, columns: the query of each row and the key of each column.
        row: batch row.
        every: steps between neighbours.
        sizes: `s`, `t` and the size symbols of the program.
    """

    rows: Tensor
    columns: Tensor
    heads: Sequence[int]
    row: int
    every: int
    sizes: Mapping[str, int]

    @property
    def keys(self) -> int:
        """Tokens up to the last one shown."""
        return max(int(self.rows.max()), int(self.columns.max())) + self.every

    def env(self) -> dict[str, Tensor | int]:
        """What `evaluate` takes: tensors that broadcast to `[heads, rows, columns]`."""
        heads = torch.tensor(list(self.heads)).view(-1, 1, 1)
        return {**self.sizes, "b": self.row, "h": heads, "q": self.rows.view(1, -1, 1), "k": self.columns.view(1, 1, -1)}

    def evaluate(self, term: Term, tables: Mapping[str, Tensor]) -> Tensor:
        """The term's value, bool `[heads, rows, columns]`."""
        return evaluate(term, self.env(), tables).expand(len(self.heads), len(self.rows), len(self.columns)).contiguous()

    def cropped(self) -> tuple[str, ...]:
        """Which part this is, where the program's own sizes are larger."""
        parts = [
            f"{name} {int(shown[0])} to {int(shown[-1])} of {self.sizes[size]}"
            for name, shown, size in (("queries", self.rows, "s"), ("keys", self.columns, "t"))
            if len(shown) * self.every < self.sizes[size]
        ]
        return (", ".join(parts),) if parts else ()


def sizes_near(terms: Iterable[Term], sizes: tuple[Term, Term], wanted: tuple[int, int]) -> dict[str, int]:
    """`s`, `t` and the size symbols of a program with about so many queries and keys.

    A size that is fixed, or that follows from another, is what it is.
    """
    known: dict[str, int] = {}
    s, t = (_solve(size, n, known) for size, n in zip(sizes, wanted, strict=True))
    others = set().union(*map(free_vars, terms)) - set("bhqkst") - known.keys()
    return {**known, **dict.fromkeys(sorted(others), t), "s": s, "t": t}


def frame_at(
    sizes: Mapping[str, int],
    cells: tuple[int, int],
    first: tuple[int, int] = (0, 0),
    every: int = 1,
    heads: Sequence[int] = (0,),
    row: int = 0,
) -> Frame:
    """The frame of at most so many `cells` that starts at the query and key `first`."""
    rows, columns = (torch.arange(first[i], sizes[name], every)[: cells[i]] for i, name in enumerate("st"))
    return Frame(rows, columns, heads, row, every, sizes)


def _solve(size: Term, wanted: int, known: dict[str, int]) -> int:
    """The value of a size near `wanted`; symbols that become known by it are added to `known`."""
    coefficients, constant = linear(size)
    if len(coefficients) == 1:
        ((symbol, factor),) = coefficients.items()
        if symbol.op == "var" and factor == 1:
            known.setdefault(symbol.args[0], max(1, wanted - constant))
    for name in free_vars(size):
        known.setdefault(name, wanted)
    return max(1, int(evaluate(size, known)))
