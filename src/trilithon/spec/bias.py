"""Names of what is added to attention scores; what a rewritten site carries is in `position_bias.py`."""

from __future__ import annotations

from dataclasses import dataclass

from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.masks import K, Q
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, substitute, tables, walk


@dataclass(frozen=True)
class Bias:
    """Base of all biases: `formula` is what is added to the score at `b h q k`, a float term."""

    formula: Term


@dataclass(frozen=True)
class Alibi(Bias):
    """`slope * position`, where `position` is that of the key, up to a number that is the same for a whole row.

    A softmax does not change when a row is shifted, so `slope * k` and `slope * (k - q)` are the same bias.
    """

    slope: Term
    position: Term

    def __str__(self) -> str:
        return "alibi" if self.position is K else f"alibi(positions {self.position})"


@dataclass(frozen=True)
class RelativeBias(Bias):
    """A function of `k - q` and the head, e.g. a table of distance buckets."""

    def __str__(self) -> str:
        return f"relative({', '.join(sorted(tables(self.formula)))})"


@dataclass(frozen=True)
class Dense(Bias):
    """Any tensor, known only at run time."""

    def __str__(self) -> str:
        return f"dense({', '.join(sorted(tables(self.formula)))})"


def name_bias(formula: Term) -> Bias:
    """The most telling name of a bias. It is read off the formula, so it holds at every index and size."""
    distance = t.var("distance")
    formula = _without_counts(formula)
    vector = _alibi(formula)
    if vector is not None:
        return vector
    if not {"q", "b"} & free_vars(substitute(formula, {K: Q + distance})):
        return RelativeBias(formula)
    return Dense(formula)


def _without_counts(formula: Term) -> Term:
    """A running sum of ones up to token i is i + 1."""
    counts = [x for x in walk([formula]) if x.op == "prefix_sum" and x.args[0].op == "int" and x.args[1] in (Q, K)]
    return substitute(formula, {x: t.scale(x.args[1] + 1, x.args[0].value) for x in counts}) if counts else formula


def _alibi(formula: Term) -> Alibi | None:
    """A product of one integer that depends on the key and of factors that do not, or a sum of such, or None."""
    if formula.op == "float_op" and formula.args[0] == "add":
        a, b = _alibi(formula.args[2]), _alibi(formula.args[3])
        if a is None or b is None or a.position is not b.position:
            return None
        return Alibi(formula, float_term.apply("add", formula.args[1], a.slope, b.slope), a.position)
    factors = _factors(formula)
    moving = [f for f in factors if {"q", "k"} & free_vars(f)]
    if len(moving) != 1 or moving[0].op != "to_float":
        return None
    coefficients, _ = t.linear(moving[0].args[1])
    of_key = {x: c for x, c in coefficients.items() if "k" in free_vars(x)}
    if any("q" in free_vars(x) for x in of_key) or not of_key or all(c < 0 for c in of_key.values()):
        return None
    slope = next((f for f in factors if f is not moving[0]), t.real(1.0))
    return Alibi(formula, slope, t.from_linear(of_key, 0))


def _factors(formula: Term) -> list[Term]:
    if formula.op == "float_cast":
        return _factors(formula.args[1])
    if formula.op == "float_op" and formula.args[0] == "mul":
        return [*_factors(formula.args[2]), *_factors(formula.args[3])]
    if formula.op == "float_op" and formula.args[0] == "div" and formula.args[3].is_literal:
        return _factors(formula.args[2])
    return [formula]
