"""Named masks: what a query may attend to, each as a term over `b h q k` and the sizes `s` and `t`.

`True` means "may attend". Equal masks compare equal; `str(mask)` is the canonical text that `parse` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trilithon.errors import InputError
from trilithon.spec import term as t
from trilithon.spec.mask import And, B, Formula, Full, H, K, Mask, Or, Q, S, T, conjunction, parts
from trilithon.spec.term import Sort, Term
from trilithon.spec.traverse import substitute, tables

__all__ = [
    "And",
    "B",
    "CacheLength",
    "Causal",
    "Chunked",
    "Documents",
    "Formula",
    "Full",
    "H",
    "K",
    "LocalWindow",
    "Mask",
    "Or",
    "Padding",
    "PrefixLM",
    "Q",
    "S",
    "Shifted",
    "SlidingWindow",
    "T",
    "conjunction",
    "parse",
    "parts",
]

Align = Literal["upper_left", "lower_right"]


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
class LocalWindow(Mask):
    """Keys from `before` tokens before the query to `after` tokens after it, the query's own included."""

    before: int
    after: int

    def term(self) -> Term:
        return (K >= Q - self.before) & (K <= Q + self.after)

    def near_misses(self) -> tuple[Mask, ...]:
        wider = (LocalWindow(self.before + 1, self.after), LocalWindow(self.before, self.after + 1))
        return (*wider, SlidingWindow(self.before + 1)) if self.after else wider

    def __str__(self) -> str:
        return f"local({self.before}, {self.after})"


@dataclass(frozen=True)
class Chunked(Mask):
    """Only keys of the query's own chunk: tokens are cut into chunks of `chunk_keys` from token 0 on (Llama 4).

    With a `position`, a term over `b`, `q` and inputs, tokens are cut by that instead of by their index.
    """

    chunk_keys: int
    align: Align = "upper_left"
    position: Term | None = None

    def term(self) -> Term:
        own, size = Q if self.align == "upper_left" else Q + T - S, t.integer(self.chunk_keys)
        if self.position is None:
            return t.floor_div(own, size).eq(t.floor_div(K, size))
        return t.floor_div(self.position, size).eq(t.floor_div(substitute(self.position, {Q: K}), size))

    def near_misses(self) -> tuple[Mask, ...]:
        sizes = [n for n in (self.chunk_keys + 1, self.chunk_keys - 1) if n > 0]
        return (*(Chunked(n, self.align, self.position) for n in sizes), Full())

    def __str__(self) -> str:
        if self.position is not None:
            return f"chunked({self.chunk_keys}, {', '.join(sorted(tables(self.position)))})"
        return f"chunked({self.chunk_keys})" if self.align == "upper_left" else f"chunked({self.chunk_keys}, lower_right)"


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Causal, and every query sees the first `length` keys: a term over `b`, sizes and inputs."""

    length: Term

    def term(self) -> Term:
        return (K <= Q) | (K < self.length)

    def near_misses(self) -> tuple[Mask, ...]:
        return (Causal(), PrefixLM(self.length + 1), PrefixLM(self.length - 1))

    def __str__(self) -> str:
        return f"prefix_lm({self.length})"


@dataclass(frozen=True)
class CacheLength(Mask):
    """Keys of a static cache up to the query's own `position`: a term over `b`, `q` and inputs such as the write position.

    With `window_keys` only the last so many of them, the query's own included.
    """

    position: Term
    window_keys: int | None = None

    def term(self) -> Term:
        visible = self.position >= K
        return visible if self.window_keys is None else visible & (K > self.position - self.window_keys)

    def near_misses(self) -> tuple[Mask, ...]:
        late, early = (CacheLength(self.position + by, self.window_keys) for by in (1, -1))
        wider = (
            () if self.window_keys is None else (CacheLength(self.position, self.window_keys + 1), CacheLength(self.position))
        )
        return (late, early, *wider)

    def __str__(self) -> str:
        window = "" if self.window_keys is None else f", window {self.window_keys}"
        return f"cache_length({', '.join(sorted(tables(self.position)))}{window})"


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


def parse(text: str) -> Mask:
    """Read the canonical text of a mask that a kernel can be asked for: one whose parts are numbers and a padding.

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
    if (
        name == "chunked"
        and len(arguments) == 1 + (align == "lower_right")
        and arguments[0].isdecimal()
        and int(arguments[0]) > 0
    ):
        return Chunked(int(arguments[0]), align)
    if name == "local" and len(arguments) == 2 and all(a.isdecimal() for a in arguments):
        return LocalWindow(int(arguments[0]), int(arguments[1]))
    if name == "padding" and any(arguments):
        return Padding(arguments[0])
    raise InputError(
        f"{text!r} names no mask", todo="use full, causal, window(n), chunked(n), local(n, n) or padding(table), joined by &"
    )
