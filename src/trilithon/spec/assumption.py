"""Assumptions about inputs: one definition gives the fact for the solver, the run-time check and the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trilithon.spec import term as t
from trilithon.spec.term import Term

Source = Literal["export range", "op contract", "declared", "guard"]
INT32 = 1 << 31


@dataclass(frozen=True)
class Assumption:
    """One fact taken for granted in a proof.

    Attributes:
        table: the input it speaks of, or the size symbol for a range.
        kind: key of `KINDS` for facts about a table's entries; "range" for sizes.
        source: who answers for it. A "guard" is checked at run time before the fast program runs.
        text: readable form.
    """

    table: str
    kind: str
    source: Source
    text: str

    def __str__(self) -> str:
        return f"{self.text} [{self.source}]"

    def fact(self, entry: Term, length: Term) -> Term:
        """What the assumption says about one element that a term reads from the table, whose rows have `length` entries."""
        return KINDS[self.kind].fact(entry, length)

    def holds(self, table: Tensor) -> Tensor:
        """The run-time check: a bool scalar on the table's own device (no synchronisation)."""
        return KINDS[self.kind].holds(table)

    def sample(self, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """A random table for which the assumption holds."""
        return KINDS[self.kind].sample(shape, generator).to(dtype)


@dataclass(frozen=True)
class Kind:
    """Everything Trilithon knows about one kind of assumption; `{0}` in `text` is the table's name."""

    text: str
    fact: Callable[[Term, Term], Term]
    holds: Callable[[Tensor], Tensor]
    sample: Callable[[tuple[int, ...], torch.Generator], Tensor]


def _row(entry: Term, name: str) -> Term:
    """A value that belongs to the whole row an entry stands in, e.g. the first position of row b."""
    return t.read(f"{name}:{entry.args[0]}", entry.args[1:-1], "int")


def _is_set(entry: Term) -> Term:
    return entry if entry.sort == "bool" else entry.eq(1)


def _is_unset(entry: Term) -> Term:
    return ~entry if entry.sort == "bool" else entry.eq(0)


def _bounded(entry: Term) -> Term:
    return (entry >= -INT32) & (entry <= INT32)


def _flags(entry: Term) -> Term:
    return _is_set(entry) | _is_unset(entry)


def one_of_row(table: str, b: Term) -> Term:
    """The index of some one in row b of a table that is assumed "nonempty"."""
    return t.read(f"one:{table}", (b,), "int")


def _nonempty(entry: Term, length: Term) -> Term:
    one = _row(entry, "one")
    return _flags(entry) & (one >= 0) & (one < length) & (~one.eq(entry.args[-1]) | _is_set(entry))


def _left_padded(entry: Term, length: Term) -> Term:
    pad = _row(entry, "pad")
    kept: Term = entry.args[-1] >= pad
    return (pad >= 0) & (pad < length) & ((kept & _is_set(entry)) | (~kept & _is_unset(entry)))


def _right_padded(entry: Term, length: Term) -> Term:
    end = _row(entry, "length")
    kept: Term = entry.args[-1] < end
    return (end >= 1) & (end <= length) & ((kept & _is_set(entry)) | (~kept & _is_unset(entry)))


def _consecutive_sample(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, 4, (*shape[:-1], 1), generator=generator)
    return starts + torch.arange(shape[-1])


def _padded_sample(left: bool) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    def sample(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        kept = torch.randint(1, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
        index = torch.arange(shape[-1])
        return (index >= shape[-1] - kept) if left else (index < kept)

    return sample


def _steps(table: Tensor) -> Tensor:
    return table[..., 1:].long() - table[..., :-1].long()


def _in_int32(table: Tensor) -> Tensor:
    wide = table.long()  # the bounds themselves do not fit an int32 table
    return ((wide >= -INT32) & (wide <= INT32)).all()


def _zeros_and_ones(table: Tensor) -> Tensor:
    return ((table == 0) | (table == 1)).all()


def _some_ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    flags = torch.randint(0, 2, shape, generator=generator)
    one = torch.randint(0, shape[-1], (*shape[:-1], 1), generator=generator)
    return flags.scatter(-1, one, 1)


KINDS: dict[str, Kind] = {  # of those about one table, weaker ones first
    "flags": Kind(
        "{0} holds zeros and ones",
        lambda e, _: _flags(e),
        _zeros_and_ones,
        lambda shape, g: torch.randint(0, 2, shape, generator=g),
    ),
    "nonempty": Kind(
        "each row of {0} is zeros and ones, with a one",
        _nonempty,
        lambda x: _zeros_and_ones(x) & (x == 1).any(-1).all(),
        _some_ones,
    ),
    "right_padded": Kind(
        "{0} is right padding",
        _right_padded,
        lambda x: (_steps(x) <= 0).all() & _zeros_and_ones(x) & (x[..., 0] == 1).all(),
        _padded_sample(left=False),
    ),
    "left_padded": Kind(
        "{0} is left padding",
        _left_padded,
        lambda x: (_steps(x) >= 0).all() & _zeros_and_ones(x) & (x[..., -1] == 1).all(),
        _padded_sample(left=True),
    ),
    "all_ones": Kind(
        "{0} is all ones",
        lambda e, _: _is_set(e),
        lambda x: (x == 1).all(),
        lambda shape, g: torch.ones(shape, dtype=torch.int64),
    ),
    "bounded": Kind(
        "{0} fits 32 bits",
        lambda e, _: _bounded(e),
        _in_int32,
        lambda shape, g: torch.randint(0, max(shape[-1], 2), shape, generator=g),
    ),
    "nonnegative": Kind(
        "{0} holds numbers from 0 to 2**31",
        lambda e, _: (e >= 0) & (e <= INT32),
        lambda x: ((x >= 0) & _in_int32(x)).all(),
        lambda shape, g: torch.randint(0, max(shape[-1], 2), shape, generator=g),
    ),
    "consecutive": Kind(
        "each row of {0} is consecutive",
        lambda e, _: _bounded(e) & e.eq(_row(e, "start") + e.args[-1]),
        lambda x: (_steps(x) == 1).all() & _in_int32(x),
        _consecutive_sample,
    ),
}


@dataclass(frozen=True)
class Input:
    """An input of the model, by name, to declare facts about: `position_ids.consecutive()`."""

    name: str

    def _declare(self, kind: str) -> Assumption:
        return Assumption(self.name, kind, "declared", KINDS[kind].text.format(self.name))

    def consecutive(self) -> Assumption:
        """Entry i of each row is the row's first entry plus i."""
        return self._declare("consecutive")

    def all_ones(self) -> Assumption:
        return self._declare("all_ones")

    def flags(self) -> Assumption:
        """Every entry is 0 or 1."""
        return self._declare("flags")

    def nonempty(self) -> Assumption:
        """Every entry is 0 or 1, and each row has a one."""
        return self._declare("nonempty")

    def left_padded(self) -> Assumption:
        """Each row is zeros, then at least one one."""
        return self._declare("left_padded")

    def right_padded(self) -> Assumption:
        """Each row is ones (at least one), then zeros."""
        return self._declare("right_padded")

    def nonnegative(self) -> Assumption:
        """Every entry is at least 0 and fits 32 bits."""
        return self._declare("nonnegative")

    def bounded(self) -> Assumption:
        """Every entry fits 32 bits."""
        return self._declare("bounded")


position_ids = Input("position_ids")
attention_mask = Input("attention_mask")


def guard(table: str, kind: str) -> Assumption:
    """An assumption that the run time checks before it takes the fast program."""
    return Assumption(table, kind, "guard", KINDS[kind].text.format(table))
