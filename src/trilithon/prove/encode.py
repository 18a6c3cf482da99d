"""Terms as z3 expressions: sizes and indices are free integers, tables and prefix sums are uninterpreted functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import z3

from trilithon.spec.term import Term

Expr = Any  # z3 ships no types


class Encoder:
    """Encodes terms into one z3 context, remembering each.

    What z3 does not model (floats) becomes an uninterpreted constant, the same for the same term: that only
    adds models, so a proof stays a proof. Integer `//` and `%` are z3's, which equal floor for positive divisors.
    """

    def __init__(self) -> None:
        self._done: dict[Term, Expr] = {}

    def __call__(self, term: Term) -> Expr:
        if term not in self._done:
            encode = _OPS.get(term.op)
            self._done[term] = encode(self, term) if encode else self._opaque(term)
        return self._done[term]

    def _opaque(self, term: Term) -> Expr:
        sort = {"bool": z3.BoolSort(), "int": z3.IntSort(), "float": z3.RealSort()}[term.sort]
        return z3.Const(f"opaque!{term.serial}", sort)

    def table(self, name: str, rank: int, sort: str) -> Expr:
        result = {"bool": z3.BoolSort(), "int": z3.IntSort(), "float": z3.RealSort()}[sort]
        name = f"table!{name}"  # no input may be taken for an index of the same name
        return z3.Function(name, *[z3.IntSort()] * rank, result) if rank else z3.Const(name, result)

    def read(self, term: Term) -> Expr:
        indices = [self(i) for i in term.args[1:]]
        table = self.table(term.args[0], len(indices), term.sort)
        return table(*indices) if indices else table

    def sum(self, term: Term) -> Expr:
        parts = [self(x) if c == 1 else c * self(x) for x, c in term.args[0]]
        return z3.Sum([*parts, z3.IntVal(term.args[1])])


_OPS: dict[str, Callable[[Encoder, Term], Expr]] = {
    "int": lambda e, x: z3.IntVal(x.args[0]),
    "bool": lambda e, x: z3.BoolVal(x.args[0]),
    "var": lambda e, x: z3.Int(x.args[0]),
    "read": Encoder.read,
    # The counter of a prefix sum is bound; all other variables of the body are constants of the query.
    "prefix_sum": lambda e, x: z3.Function(f"sum!{x.args[0].serial}", z3.IntSort(), z3.IntSort())(e(x.args[1])),
    "sum": Encoder.sum,
    "mul": lambda e, x: e(x.args[0]) * e(x.args[1]),
    "floor_div": lambda e, x: e(x.args[0]) / e(x.args[1]),
    "mod": lambda e, x: e(x.args[0]) % e(x.args[1]),
    "le0": lambda e, x: e(x.args[0]) <= 0,
    "eq0": lambda e, x: e(x.args[0]) == 0,
    "and": lambda e, x: z3.And(*map(e, x.args)),
    "or": lambda e, x: z3.Or(*map(e, x.args)),
    "not": lambda e, x: z3.Not(e(x.args[0])),
    "ite": lambda e, x: z3.If(*map(e, x.args)),
}
