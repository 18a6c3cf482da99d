"""What a mask is: what a query may attend to, as a term over `b h q k` and the sizes `s` and `t`; and how masks combine.

`True` means "may attend". Equal masks compare equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trilithon.errors import InputError
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Term
from trilithon.spec.traverse import substitute, tables

B, H, Q, K, S, T = (t.var(name) for name in "bhqkst")


@dataclass(frozen=True)
class Mask:
    """Base of all masks."""

    def term(self) -> Term:
        """May query `q` attend to key `k`, in batch row `b` and head `h`, with `s` queries and `t` keys?"""
        raise NotImplementedError

    def near_misses(self) -> tuple[Mask, ...]:
        """Neighbours that a proof must tell apart from this mask (an edge moved by one, another alignment)."""
        return ()

    def __and__(self, other: Mask) -> Mask:
        return conjunction((*parts(self), *parts(other)))

    def at_sizes(self, s: Term, t: Term) -> Term:
        """The term with the query and key lengths of one site put in."""
        return substitute(self.term(), {S: s, T: t})

    def materialize(self, b: int, h: int, s: int, t: int, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """The mask as a bool tensor `[b, h, s, t]`, True = may attend.

        Args:
            b, h, s, t: batch rows, query heads, queries, keys.
            inputs: the tables this mask reads, by name, e.g. `{"attention_mask": ...}`.

        Raises:
            InputError: a table is missing.
        """
        inputs = check_inputs(self, inputs)
        device = next((v.device for v in inputs.values()), torch.device("cpu"))
        env: dict[str, Tensor | int] = {"s": s, "t": t}
        for axis, (name, size) in enumerate(zip("bhqk", (b, h, s, t), strict=True)):
            env[name] = torch.arange(size, device=device).view([-1 if i == axis else 1 for i in range(4)])
        return evaluate(self.term(), env, inputs).expand(b, h, s, t)


def check_inputs(mask: Mask, inputs: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """`inputs`, if it holds every table that `mask` reads; raises InputError otherwise."""
    given = dict(inputs or {})
    missing = tables(mask.term()) - given.keys()
    if missing:
        raise InputError(
            f"cannot materialize {mask}",
            why=f"it reads {', '.join(sorted(missing))}, which `inputs` does not hold",
            todo=f"pass inputs={{{', '.join(f'{name!r}: tensor' for name in sorted(missing))}}}",
        )
    return given


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def term(self) -> Term:
        return t.TRUE

    def near_misses(self) -> tuple[Mask, ...]:
        return (Formula(K <= Q),)

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class Formula(Mask):
    """A mask without a name, given by its term."""

    formula: Term

    def term(self) -> Term:
        return self.formula

    def __str__(self) -> str:
        return f"formula({self.formula})"


@dataclass(frozen=True)
class And(Mask):
    """All of several masks."""

    parts: tuple[Mask, ...]

    def term(self) -> Term:
        return t.conj(*(part.term() for part in self.parts))

    def near_misses(self) -> tuple[Mask, ...]:
        """One part replaced by its neighbour, or left out."""
        changed = [
            conjunction((*self.parts[:i], other, *self.parts[i + 1 :]))
            for i, part in enumerate(self.parts)
            for other in part.near_misses()
        ]
        dropped = [conjunction((*self.parts[:i], *self.parts[i + 1 :])) for i in range(len(self.parts))]
        return (*changed, *dropped)

    def __str__(self) -> str:
        return " & ".join(map(str, self.parts))


@dataclass(frozen=True)
class Or(Mask):
    """Any of several masks."""

    parts: tuple[Mask, ...]

    def term(self) -> Term:
        return t.disj(*(part.term() for part in self.parts))

    def near_misses(self) -> tuple[Mask, ...]:
        """One part replaced by its neighbour, or left out."""
        changed = [
            Or((*self.parts[:i], other, *self.parts[i + 1 :]))
            for i, part in enumerate(self.parts)
            for other in part.near_misses()
        ]
        return (*changed, *self.parts)

    def __str__(self) -> str:
        return f"({' | '.join(map(str, self.parts))})"


def parts(mask: Mask) -> tuple[Mask, ...]:
    """The conjuncts of a mask; none for `Full`."""
    if isinstance(mask, And):
        return mask.parts
    return () if isinstance(mask, Full) else (mask,)


def conjunction(masks: tuple[Mask, ...]) -> Mask:
    """The conjunction in canonical form: sorted by name, nested `And` and `Full` dissolved, repeats dropped."""
    flat = tuple(dict.fromkeys(part for mask in masks for part in parts(mask)))
    if len(flat) < 2:
        return flat[0] if flat else Full()
    return And(tuple(sorted(flat, key=str)))
