"""A bias as a function of head and positions alone: a softmax does not see what is the same for all keys of a row."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.bias_text import VARIABLES
from trilithon.spec.masks import K, Q
from trilithon.spec.term import Term
from trilithon.spec.traverse import children, free_vars, rebuild, scan_depth, substitute, tables, walk

NOTHING = t.real(0.0)


def position_bias(formula: Term, own: Collection[str]) -> Term | None:
    """A float term over `h q k` that differs from `formula` by a number a row, beside rounding; None if none was found.

    A formula that is one already stays as it is. Else the rows' own numbers are taken out of sums, and positions are
    counted from the query: `slope * (k - s + 1)` becomes `slope * (k - q)`, whose numbers are no larger.

    Args:
        own: names of the tables that may be read: the program's own tensors.
    """
    rows = _Rows(frozenset(own))
    found = rows.without(_without_rows(formula))
    return NOTHING if found is not None and _is_of_row(found) and rows.is_finite(found) else found


def _without_rows(formula: Term) -> Term:
    """`(n * b + h) % n` is `h % n`, and `(n * b + h) // n` is `b + h // n`: batch and heads that shared an axis."""
    done: dict[Term, Term] = {}

    def go(x: Term) -> Term:
        if x not in done:
            kids = [go(kid) for kid in children(x)]
            done[x] = _divided(rebuild(x, kids) if kids else x)
        return done[x]

    return go(formula)


def _divided(x: Term) -> Term:
    if x.op not in ("mod", "floor_div") or x.args[1].op != "int" or x.args[1].value <= 0:
        return x
    n = x.args[1].value
    coefficients, constant = t.linear(x.args[0])
    whole = {y: c // n for y, c in coefficients.items() if c % n == 0}
    rest = t.from_linear({y: c for y, c in coefficients.items() if c % n}, constant)
    if not whole:
        return x
    return t.mod(rest, x.args[1]) if x.op == "mod" else t.from_linear(whole, 0) + t.floor_div(rest, x.args[1])


@dataclass(frozen=True)
class _Rows:
    """Takes out of float terms what is the same for all keys of a row."""

    own: frozenset[str]

    def is_carried(self, x: Term) -> bool:
        """May it stay: a function of `h q k` and of the program's own tensors?"""
        return free_vars(x) <= VARIABLES and tables(x) <= self.own and not scan_depth(x)

    def is_of_head(self, x: Term) -> bool:
        """Is it one number a head?"""
        return self.is_carried(x) and free_vars(x) <= {"h"}

    def without(self, x: Term) -> Term | None:
        """`x` up to a number a row, as a term that may stay; None if this cannot be shown."""
        if self.is_carried(x):
            return x
        if _is_of_row(x):
            return NOTHING if self.is_finite(x) else None
        take = _TAKE.get(x.op)
        return None if take is None else take(self, x)

    def is_finite(self, x: Term) -> bool:
        """A number that is infinite for a whole row is seen: it makes NaN. Weights are finite, integers are."""
        if self.is_of_head(x):
            return all(math.isfinite(y.value) for y in walk([x]) if y.op == "float")
        if x.op == "float":
            return math.isfinite(x.value)
        if x.op == "to_float":
            return bool(x.args[0] != "float16")
        if x.op == "float_cast":
            return x.args[0] != "float16" and self.is_finite(x.args[1])
        if x.op == "ite":
            return self.is_finite(x.args[1]) and self.is_finite(x.args[2])
        if x.op == "float_op" and x.args[0] in ("add", "sub", "mul"):
            return self.is_finite(x.args[2]) and self.is_finite(x.args[3])
        if x.op == "float_op" and x.args[0] == "div":
            return self.is_finite(x.args[2]) and x.args[3].is_literal and x.args[3].value != 0.0
        return False

    def number(self, x: Term) -> Term | None:
        """`float(k + n)`, n a number of the row, is `float(k - q)` and one."""
        dtype, whole = x.args
        coefficients, _ = t.linear(whole)
        moving = t.from_linear({y: c for y, c in coefficients.items() if "k" in free_vars(y)}, 0)
        if not self.is_carried(moving):
            return None
        return float_term.to_float(moving - substitute(moving, {K: Q}), dtype)

    def cast(self, x: Term) -> Term | None:
        inner = self.without(x.args[1])
        return None if inner is None else float_term.cast(inner, x.args[0])

    def operation(self, x: Term) -> Term | None:
        name, dtype, a, b = x.args
        if name in ("add", "sub"):
            first, second = self.without(a), self.without(b)
            if first is None or second is None:
                return None
            if second is NOTHING:
                return first
            return second if first is NOTHING and name == "add" else float_term.apply(name, dtype, first, second)
        if name == "mul" and self.is_of_head(a):
            a, b = b, a
        if name not in ("mul", "div") or not self.is_of_head(b):
            return None
        inner = self.without(a)
        return None if inner is None else float_term.apply(name, dtype, inner, b)

    def choice(self, x: Term) -> Term | None:
        condition, yes, no = x.args
        if not _is_of_row(condition):
            return None
        first, second = self.without(yes), self.without(no)
        if first is None or second is None:
            return None
        if first is second:
            return first
        return t.ite(condition, first, second) if self.is_carried(condition) else None


_TAKE = {"to_float": _Rows.number, "float_cast": _Rows.cast, "float_op": _Rows.operation, "ite": _Rows.choice}


def _is_of_row(x: Term) -> bool:
    return "k" not in free_vars(x)
