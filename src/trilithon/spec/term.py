"""Terms: what one element of a mask is, as an immutable tree over indices, sizes and input tables.

Terms are hash-consed (equal trees are the same object) and kept in a normal form: integer sums are
linear combinations, comparisons are `sum <= 0` or `sum == 0`. Most index arithmetic folds away while a
term is built, so that a mask printed, evaluated or proved is small. No torch graph and no solver here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union
from weakref import WeakValueDictionary

Sort = Literal["int", "bool", "float"]
Index = Union["Term", int]


class Term:
    """A node of the tree: `op`, `args` (terms or plain data) and the `sort` of its value.

    Python's arithmetic, ordering and `& | ~` operators build terms. `==` stays identity, because equal
    trees are one object; write `a.eq(b)` for the term that compares two values.
    """

    __slots__ = ("__weakref__", "args", "op", "serial", "sort")
    op: str
    args: tuple[Any, ...]
    sort: Sort
    serial: int

    def __repr__(self) -> str:
        from trilithon.spec.show import show

        return show(self)

    def __add__(self, other: Index) -> Term:
        return add(self, as_int(other))

    def __radd__(self, other: Index) -> Term:
        return add(as_int(other), self)

    def __sub__(self, other: Index) -> Term:
        return add(self, scale(as_int(other), -1))

    def __rsub__(self, other: Index) -> Term:
        return add(as_int(other), scale(self, -1))

    def __mul__(self, other: Index) -> Term:
        return mul(self, as_int(other))

    def __rmul__(self, other: Index) -> Term:
        return mul(as_int(other), self)

    def __neg__(self) -> Term:
        return scale(self, -1)

    def __le__(self, other: Index) -> Term:
        return le(self, as_int(other))

    def __lt__(self, other: Index) -> Term:
        return le(self + 1, as_int(other))

    def __ge__(self, other: Index) -> Term:
        return le(as_int(other), self)

    def __gt__(self, other: Index) -> Term:
        return le(as_int(other) + 1, self)

    def eq(self, other: Index) -> Term:
        return eq(self, as_int(other))

    def __and__(self, other: Term) -> Term:
        return conj(self, other)

    def __or__(self, other: Term) -> Term:
        return disj(self, other)

    def __invert__(self) -> Term:
        return negate(self)

    @property
    def is_literal(self) -> bool:
        return self.op in ("int", "bool", "float")

    @property
    def value(self) -> Any:
        """The Python value of a literal."""
        assert self.is_literal
        return self.args[0]


_interned: WeakValueDictionary[tuple[Any, ...], Term] = WeakValueDictionary()
_serials = iter(range(1 << 62))


def make(op: str, args: tuple[Any, ...], sort: Sort) -> Term:
    """The one constructor: returns the existing term when an equal tree is alive."""
    key = (op, args[0].hex() if op == "float" else args, sort)
    term = _interned.get(key)
    if term is None:
        term = Term()
        term.op, term.args, term.sort, term.serial = op, args, sort, next(_serials)
        _interned[key] = term
    return term


def integer(value: int) -> Term:
    return make("int", (int(value),), "int")


def boolean(value: bool) -> Term:
    return make("bool", (bool(value),), "bool")


def real(value: float) -> Term:
    return make("float", (float(value),), "float")


def var(name: str) -> Term:
    """An integer variable: an index (`b h q k`) or a size."""
    return make("var", (name,), "int")


def read(table: str, indices: Iterable[Term], sort: Sort) -> Term:
    """The element of an input table (a tensor known only by name) at `indices`."""
    return make("read", (table, *indices), sort)


TRUE, FALSE = boolean(True), boolean(False)
ZERO, ONE = integer(0), integer(1)


def as_int(value: Index) -> Term:
    if isinstance(value, Term):
        return value
    return integer(value)


def linear(term: Term) -> tuple[dict[Term, int], int]:
    """The coefficients and the constant of an integer sum."""
    if term.op == "int":
        return {}, term.args[0]
    if term.op == "sum":
        return dict(term.args[0]), term.args[1]
    return {term: 1}, 0


def from_linear(coefficients: Mapping[Term, int], constant: int) -> Term:
    kept = {t: c for t, c in coefficients.items() if c}
    if not kept:
        return integer(constant)
    if constant == 0 and len(kept) == 1:
        ((only, factor),) = kept.items()
        if factor == 1:
            return only
    return make("sum", (tuple(sorted(kept.items(), key=lambda item: item[0].serial)), constant), "int")


def add(*terms: Term) -> Term:
    coefficients: dict[Term, int] = {}
    constant = 0
    for term in terms:
        parts, c = linear(term)
        constant += c
        for t, factor in parts.items():
            coefficients[t] = coefficients.get(t, 0) + factor
    for rest in [t for t in coefficients if t.op == "mod" and t.args[1].op == "int"]:
        whole, factor = make("floor_div", rest.args, "int"), coefficients[rest]
        if coefficients.get(whole) == factor * rest.args[1].value:  # x % n + n * (x // n) is x
            del coefficients[whole], coefficients[rest]
            coefficients[rest.args[0]] = coefficients.get(rest.args[0], 0) + factor
    return from_linear(coefficients, constant)


def scale(term: Term, factor: int) -> Term:
    coefficients, constant = linear(term)
    return from_linear({t: c * factor for t, c in coefficients.items()}, constant * factor)


def mul(a: Term, b: Term) -> Term:
    if b.op == "int":
        return scale(a, b.args[0])
    if a.op == "int":
        return scale(b, a.args[0])
    return make("mul", (a, b) if a.serial <= b.serial else (b, a), "int")


def floor_div(a: Term, b: Term) -> Term:
    """Floor division. Callers must know that `b` is positive (see `lift`); z3 and torch agree only there."""
    if b is ONE:
        return a
    if a.op == "int" and b.op == "int" and b.value > 0:
        return integer(a.value // b.value)
    return make("floor_div", (a, b), "int")


def mod(a: Term, b: Term) -> Term:
    """Remainder of floor division by a positive `b`."""
    if b is ONE:
        return ZERO
    if a.op == "int" and b.op == "int" and b.value > 0:
        return integer(a.value % b.value)
    return make("mod", (a, b), "int")


def minimum(a: Term, b: Term) -> Term:
    return ite(le(a, b), a, b)


def maximum(a: Term, b: Term) -> Term:
    return ite(le(b, a), a, b)


def prefix_sum(body: Term, upper: Term) -> Term:
    """`sum of body over its counter = 0 .. upper`; the counter of `body` is `counter(depth)`."""
    return make("prefix_sum", (body, upper), "int")


def counter(depth: int) -> Term:
    """The bound variable of a prefix sum whose body holds `depth` nested sums."""
    return var(f"#{depth}")


def le(a: Term, b: Term) -> Term:
    coefficients, constant = linear(a - b)
    if not coefficients:
        return boolean(constant <= 0)
    divisor = math.gcd(*coefficients.values())
    scaled = {t: c // divisor for t, c in coefficients.items()}
    return make("le0", (from_linear(scaled, -(-constant // divisor)),), "bool")


def eq(a: Term, b: Term) -> Term:
    if a.sort == "bool":
        return disj(conj(a, b), conj(negate(a), negate(b)))
    for x, y in ((a, b), (b, a)):
        if x.op == "ite" and y.op == "int" and "int" in (x.args[1].op, x.args[2].op):
            return ite(x.args[0], eq(x.args[1], y), eq(x.args[2], y))
    coefficients, constant = linear(a - b)
    if not coefficients:
        return boolean(constant == 0)
    divisor = math.gcd(*coefficients.values())
    if constant % divisor:
        return FALSE
    first = min(coefficients, key=lambda t: t.serial)
    sign = 1 if coefficients[first] > 0 else -1
    scaled = {t: sign * c // divisor for t, c in coefficients.items()}
    return make("eq0", (from_linear(scaled, sign * constant // divisor),), "bool")


def negate(a: Term) -> Term:
    if a.op == "bool":
        return boolean(not a.value)
    if a.op == "not":
        return a.args[0]  # type: ignore[no-any-return]
    if a.op == "le0":
        return le(ONE, a.args[0])
    return make("not", (a,), "bool")


def _flatten(op: str, terms: Iterable[Term]) -> list[Term]:
    flat: dict[Term, None] = {}
    for term in terms:
        for part in term.args if term.op == op else (term,):
            flat[part] = None
    return sorted(flat, key=lambda t: t.serial)


def conj(*terms: Term) -> Term:
    parts = [t for t in _flatten("and", terms) if t is not TRUE]
    if FALSE in parts or any(negate(t) in parts for t in parts):
        return FALSE
    if len(parts) < 2:
        return parts[0] if parts else TRUE
    return make("and", tuple(parts), "bool")


def disj(*terms: Term) -> Term:
    parts = [t for t in _flatten("or", terms) if t is not FALSE]
    if TRUE in parts or any(negate(t) in parts for t in parts):
        return TRUE
    if len(parts) < 2:
        return parts[0] if parts else FALSE
    return make("or", tuple(parts), "bool")


def ite(condition: Term, yes: Term, no: Term) -> Term:
    """`yes` where `condition` holds, else `no`."""
    if condition is TRUE or yes is no:
        return yes
    if condition is FALSE:
        return no
    if yes.sort == "bool":
        return disj(conj(condition, yes), conj(negate(condition), no))
    return make("ite", (condition, yes, no), yes.sort)
