"""Named masks: what a query may attend to, each as a term over `b h q k` and the sizes `s` and `t`.

`True` means "may attend". Equal masks compare equal; `str(mask)` is the canonical text that `parse` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trilithon.errors import InputError
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Sort, Term
from trilithon.spec.traverse import substitute, tables

Align = Literal["upper_left", "lower_right"]
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
        inputs = dict(inputs or {})
        missing = tables(self.term()) - inputs.keys()
        if missing:
            raise InputError(
                f"cannot materialize {self}",
                why=f"it reads {', '.join(sorted(missing))}, which `inputs` does not hold",
                todo=f"pass inputs={{{', '.join(f'{name!r}: tensor' for name in sorted(missing))}}}",
            )
        device = next((v.device for v in inputs.values()), torch.device("cpu"))
        env: dict[str, Tensor | int] = {"s": s, "t": t}
        for axis, (name, size) in enumerate(zip("bhqk", (b, h, s, t), strict=True)):
            env[name] = torch.arange(size, device=device).view([-1 if i == axis else 1 for i in range(4)])
        return evaluate(self.term(), env, inputs).expand(b, h, s, t)


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def term(self) -> Term:
        return t.TRUE

    def near_misses(self) -> tuple[Mask, ...]:
        return (Causal(),)

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class Causal(Mask):
    """Query i sees keys up to its own position: i when `upper_left` (torch's is_causal), i + t - s when `lower_right`."""

    align: Align = "upper_left"

    def term(self) -> Term:
        return K <= (Q if self.align == "upper_left" else Q + T - S)

    def near_misses(self) -> tuple[Mask, ...]:
        other: Align = "lower_right" if self.align == "upper_left" else "upper_left"
        return (Shifted(1, self.align), Shifted(-1, self.align), Causal(other))

    def __str__(self) -> str:
        return "causal" if self.align == "upper_left" else "causal(lower_right)"


@dataclass(frozen=True)
class Shifted(Mask):
    """`k <= q + by`: never proposed; the off-by-one neighbour of `Causal` in tests."""

    by: int
    align: Align = "upper_left"

    def term(self) -> Term:
        return substitute(Causal(self.align).term(), {Q: Q + self.by})

    def __str__(self) -> str:
        return f"shifted({self.by}, {self.align})"


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Causal, and at most the last `window_keys` keys, the query's own included (Hugging Face's count).

    FlashAttention's `window_left` is one less.
    """

    window_keys: int
    align: Align = "upper_left"

    def term(self) -> Term:
        own = Q if self.align == "upper_left" else Q + T - S
        return (K <= own) & (K > own - self.window_keys)

    def near_misses(self) -> tuple[Mask, ...]:
        fewer = (SlidingWindow(self.window_keys - 1, self.align),) if self.window_keys > 1 else ()
        return (SlidingWindow(self.window_keys + 1, self.align), *fewer, Causal(self.align))

    def __str__(self) -> str:
        return f"window({self.window_keys})" if self.align == "upper_left" else f"window({self.window_keys}, lower_right)"


@dataclass(frozen=True)
class Padding(Mask):
    """Only keys whose entry in the input table `[b, t]` is not zero (or is True)."""

    table: str = "attention_mask"
    sort: Sort = "int"

    def term(self) -> Term:
        entry = t.read(self.table, (B, K), self.sort)
        return entry if self.sort == "bool" else ~entry.eq(0)

    def near_misses(self) -> tuple[Mask, ...]:
        return (Full(), Formula(substitute(self.term(), {K: Q})))

    def __str__(self) -> str:
        return f"padding({self.table})"


@dataclass(frozen=True)
class Documents(Mask):
    """Only keys of the query's own document: `segment` is a term over `b` and the token index `q`."""

    segment: Term

    def term(self) -> Term:
        return t.eq(self.segment, substitute(self.segment, {Q: K}))

    def near_misses(self) -> tuple[Mask, ...]:
        return (Full(),)

    def __str__(self) -> str:
        return f"documents({', '.join(sorted(tables(self.segment)))})"


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


def parse(text: str) -> Mask:
    """Read the canonical text of a mask that a kernel can be asked for (`documents` and `formula` cannot).

    Raises:
        InputError: the text names no such mask.
    """
    return conjunction(tuple(_parse_part(part.strip()) for part in text.split("&")))


def _parse_part(text: str) -> Mask:
    name, _, rest = text.partition("(")
    arguments = [a.strip() for a in rest.rstrip(")").split(",")] if rest else []
    align: Align = "lower_right" if "lower_right" in arguments else "upper_left"
    if name == "full":
        return Full()
    if name == "causal":
        return Causal(align)
    if name == "window" and arguments and arguments[0].isdecimal() and int(arguments[0]) > 0:
        return SlidingWindow(int(arguments[0]), align)
    if name == "padding" and any(arguments):
        return Padding(arguments[0])
    raise InputError(f"{text!r} names no mask", todo="use full, causal, window(n) or padding(table), joined by &")
