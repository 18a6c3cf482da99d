"""A tensor as a function from an index to a term."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.term import Sort, Term

Idx = tuple[Term, ...]
INTEGERS = {torch.int64: 64, torch.int32: 32, torch.int16: 16, torch.int8: 8, torch.uint8: 8}
GIVEN = "given_"  # begins the name of an integer that a caller gives

UNBACKED = re.compile(r"u\d+")  # torch's names for integers read from data
NUMBER = re.compile(rf"u\d+|{GIVEN}\w+")  # any of 64 bits; all other variables are sizes and indices


def integer_range(dtype: torch.dtype) -> tuple[int, int]:
    """The least and the greatest value of an integer dtype."""
    bits = INTEGERS[dtype]
    return (0, 255) if dtype == torch.uint8 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sort_of(dtype: torch.dtype) -> Sort:
    if dtype == torch.bool:
        return "bool"
    return "int" if dtype in INTEGERS else "float"


@dataclass(frozen=True)
class SymTensor:
    """Shape and dtype of a tensor, and `at(index)`: the term that element is.

    `at` is asked for in-range indices only (or inside a conditional that excludes the others).
    """

    shape: Idx
    dtype: torch.dtype
    element: Callable[[Idx], Term]
    _memo: dict[Idx, Term] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def sort(self) -> Sort:
        return sort_of(self.dtype)

    def at(self, index: Idx) -> Term:
        if index not in self._memo:
            assert len(index) == self.rank, f"{len(index)} indices for rank {self.rank}"
            self._memo[index] = self.element(index)
        return self._memo[index]

    def broadcast_at(self, index: Idx) -> Term:
        """The element that broadcasting puts at `index` of a tensor of equal or higher rank."""
        own = index[len(index) - self.rank :]
        return self.at(tuple(t.ZERO if size is t.ONE else i for size, i in zip(self.shape, own, strict=True)))

    def dim(self, dim: int) -> int:
        """A dimension counted from the front."""
        return dim + self.rank if dim < 0 else dim


def is_nonnegative(term: Term) -> bool:
    """Known without a solver to be >= 0: indices, sizes and sums of them."""
    if term.op == "int":
        return bool(term.value >= 0)
    if term.op == "sum":
        return term.args[1] >= 0 and all(c >= 0 and is_nonnegative(x) for x, c in term.args[0])
    if term.op in ("mul", "floor_div"):
        return all(map(is_nonnegative, term.args))
    if term.op == "mod":
        return is_nonnegative(term.args[1])
    if term.op == "ite":
        return is_nonnegative(term.args[1]) and is_nonnegative(term.args[2])
    return term.op == "var" and NUMBER.fullmatch(term.args[0]) is None


def cast(value: Term, dtype: torch.dtype) -> Term:
    """`value` converted to `dtype`. A float becomes the integer towards zero of it."""
    sort = sort_of(dtype)
    if sort == "float":
        name = dtype_name(dtype)
        return float_term.cast(value, name) if value.sort == "float" else float_term.to_float(value, name)
    if value.sort == sort:
        return value
    if sort == "int":
        return t.ite(value, t.ONE, t.ZERO) if value.sort == "bool" else float_term.to_int(value)
    if value.sort == "int":
        return ~value.eq(0)
    return ~float_term.compare("eq", value, t.real(0.0))
