"""Split what reaches a softmax into kept and blocked cells, the factor on the scores, their cap, and what is added."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from trilithon.capture.sites import Site
from trilithon.errors import CannotLift
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.term import Term
from trilithon.spec.traverse import tables

SCORE = "q@k"  # no input can have this name
MOST_CASES = 256
LOW = -65504.0  # the lowest float16; a bound as low as this bounds no score of any use


@dataclass(frozen=True)
class Leaves:
    """What an additive mask, or masked scores, say.

    Attributes:
        keep: the cells that are not blocked.
        drops: the distinct values that block a cell.
        scale: factor on the scores; None for a mask alone.
        softcap: c of `c * tanh(scores / c)`, or None.
        bias: what is added on kept cells, or None for 0.
    """

    keep: Term
    drops: frozenset[float]
    scale: float | None = None
    softcap: float | None = None
    bias: Term | None = None


@dataclass(frozen=True)
class _Affine:
    """`cap * tanh(factor * score) + offset + addends`; without a cap `factor * score + offset + addends`."""

    factor: float = 0.0
    cap: float | None = None
    offset: float = 0.0
    addends: tuple[Term, ...] = ()

    @property
    def is_literal(self) -> bool:
        return self.factor == 0.0 and not self.addends


def refuse(site: Site, why: str) -> CannotLift:
    return CannotLift(
        f"cannot prove the attention mask of {site.name}", where=site.where, why=why, todo="the mask stays as it is"
    )


def read_leaves(site: Site, value: Term, score: tuple[Term, ...]) -> Leaves:
    """A cell is kept where 0 or a bias is added, and blocked where -inf or a value at the bottom of the dtype's range is.

    Args:
        value: the mask, or the masked scores, at `b h q k`.
        score: the indices at which a score is this cell's own.

    Raises:
        CannotLift: it adds another constant, or scales its scores in more than one way.
    """
    assert site.mask is not None
    lowest = _lowest(site.mask.meta["val"].dtype)
    kept: list[tuple[Term, _Affine]] = []
    drops = set()
    for condition, leaf in _cases(site, value, t.TRUE):
        parsed = _affine(site, leaf, score)
        if (site.score is None and parsed.factor != 0.0) or math.isnan(parsed.offset):
            raise refuse(site, f"it can add {leaf}")
        if parsed.offset <= lowest:
            drops.add(parsed.offset)
        elif parsed.offset == 0.0 and (parsed.factor != 0.0) == (site.score is not None):
            kept.append((condition, parsed))
        else:
            raise refuse(site, f"it adds {parsed.offset:g}, which is a bias: only 0, -inf and the lowest number are a mask")
    ways = {(p.factor, p.cap) for _, p in kept}
    if len(ways) > 1:
        raise refuse(site, f"its scores are scaled by different factors {sorted(f for f, _ in ways)}")
    factor, cap = ways.pop() if ways and site.score is not None else (None, None)
    scale = factor if factor is None or cap is None else factor * cap
    dtype = "float64" if site.mask.meta["val"].dtype == torch.float64 else "float32"
    return Leaves(t.disj(*(condition for condition, _ in kept)), frozenset(drops), scale, cap, _bias(kept, dtype))


def _lowest(dtype: torch.dtype) -> float:
    """What blocks a cell: scores of any use are lost beside it. Models that scale masked scores scale it too."""
    return torch.finfo(dtype).min / (2 if dtype == torch.float16 else 1024)


def _bias(kept: list[tuple[Term, _Affine]], dtype: str) -> Term | None:
    """What is added on kept cells, as one term; several addends are added up in `dtype`.

    A kept cell meets one of the conditions: what they have in common need not be asked, nor the last of them.
    """
    sums = [_sum(parsed.addends, dtype) for _, parsed in kept]
    if all(value is None for value in sums):
        return None
    asked = [frozenset(c.args if c.op == "and" else (c,)) for c, _ in kept]
    common = frozenset.intersection(*asked)
    *first, last = [t.real(0.0) if value is None else value for value in sums]
    for parts, value in reversed(list(zip(asked, first, strict=False))):
        last = t.ite(t.conj(*(parts - common)), value, last)
    return last


def _sum(addends: tuple[Term, ...], dtype: str) -> Term | None:
    total = None
    for a in sorted(addends, key=lambda x: x.serial):
        total = a if total is None else float_term.apply("add", dtype, total, a)
    return total


def _cases(site: Site, value: Term, given: Term) -> Iterator[tuple[Term, Term]]:
    """The leaves of a tree of conditions, each with the condition that leads to it."""
    stack, count = [(given, value)], 0
    while stack:
        condition, x = stack.pop()
        if condition is t.FALSE:
            continue
        if x.op == "ite":
            stack.append((condition & ~x.args[0], x.args[2]))
            stack.append((condition & x.args[0], x.args[1]))
            continue
        count += 1
        if count > MOST_CASES:
            raise refuse(site, f"it has more than {MOST_CASES} cases")
        yield condition, x


def _affine(site: Site, leaf: Term, score: tuple[Term, ...]) -> _Affine:
    """`leaf` by its parts; an offset is exact only if 0, -inf or at the bottom of the range."""
    if leaf.is_literal:
        return _Affine(offset=leaf.value)
    if SCORE not in tables(leaf):
        return _unscored(site, leaf, score)
    if leaf.op == "read":
        if leaf.args[1:] != score:
            raise refuse(site, "its softmax mixes scores of other queries or keys")
        return _Affine(factor=1.0)
    if leaf.op == "float_cast":
        return _affine(site, leaf.args[1], score)
    if leaf.op == "float_fn" and leaf.args[0] == "tanh":
        inner = _affine(site, leaf.args[2], score)
        if inner.cap is None and inner.offset == 0.0 and not inner.addends:
            return replace(inner, cap=1.0)
    if leaf.op == "float_op":
        found = _combined(leaf, *(_affine(site, x, score) for x in leaf.args[2:]))
        if found is not None:
            return found
    raise refuse(site, f"it turns its scores into {leaf}")


def _unscored(site: Site, leaf: Term, score: tuple[Term, ...]) -> _Affine:
    """A leaf without scores: a bias, beside numbers that block."""
    if leaf.op == "float_op" and leaf.args[0] in ("add", "sub"):
        found = _combined(leaf, *(_affine(site, x, score) for x in leaf.args[2:]))
        if found is not None:
            return found
    return _Affine(addends=(leaf,))


def _combined(leaf: Term, a: _Affine, b: _Affine) -> _Affine | None:
    """The sum, difference, product or quotient of two; None where it has another form."""
    name, dtype = leaf.args[:2]
    if name in ("add", "sub") and (a.factor == 0.0 or b.factor == 0.0):
        if name == "sub":
            b = _scaled(b, -1.0, dtype)
        offset = float_term.fold("add", dtype, a.offset, b.offset)
        if offset == 0.0 and (a.offset or b.offset) and not (a.is_literal and b.is_literal):
            return None  # a score beside a large number loses its digits, also if that is taken away again
        return _Affine(a.factor + b.factor, a.cap if a.factor else b.cap, offset, (*a.addends, *b.addends))
    if name == "max" and b.is_literal and b.offset <= LOW:
        return replace(a, offset=max(a.offset, b.offset))
    if name == "max" and a.is_literal and a.offset <= LOW:
        return replace(b, offset=max(a.offset, b.offset))
    if name == "mul" and b.is_literal and (a.offset == 0.0 or b.offset > 0.0):
        return _scaled(a, b.offset, dtype)
    if name == "mul" and a.is_literal and (b.offset == 0.0 or a.offset > 0.0):
        return _scaled(b, a.offset, dtype)
    if name == "div" and b.is_literal and (b.offset > 0.0 or (a.offset == 0.0 and b.offset != 0.0)):
        return _scaled(a, 1.0 / b.offset, dtype)
    return None


def _scaled(a: _Affine, by: float, dtype: str) -> _Affine:
    addends = tuple(float_term.apply("mul", dtype, t.real(by), x) for x in a.addends)
    offset = float_term.fold("mul", dtype, a.offset, by) if a.offset else 0.0
    if a.cap is not None:
        return _Affine(a.factor, a.cap * by, offset, addends)
    return _Affine(a.factor * by, None, offset, addends)
