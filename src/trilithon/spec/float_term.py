"""Floating-point terms: folded exactly in their own dtype, so `min + min` is -inf and `0 * -inf` is NaN.

Operations are pushed below `ite`, so an additive mask ends as a tree of conditions with literal leaves.
A dtype is its torch name: "float32", "bfloat16", ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, reduce

import torch

from trilithon.spec import term as t
from trilithon.spec.term import Term

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXACT_INTEGERS = {"float64": 1 << 53, "float32": 1 << 24, "float16": 1 << 11, "bfloat16": 1 << 8}

BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "min": torch.minimum,
    "max": torch.maximum,
}
COMPARE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"eq": torch.eq, "le": torch.le, "lt": torch.lt}


def rounded(value: float, dtype: str) -> float:
    """`value` as the nearest number of `dtype`."""
    return float(torch.tensor(value, dtype=torch.float64).to(DTYPES[dtype]))


def literal(value: float, dtype: str) -> Term:
    return t.real(rounded(value, dtype))


def apply(name: str, dtype: str, a: Term, b: Term) -> Term:
    """`a name b` computed in `dtype`; the operands are already values of that dtype."""
    if a.op == "ite":
        return t.ite(a.args[0], apply(name, dtype, a.args[1], b), apply(name, dtype, a.args[2], b))
    if b.op == "ite":
        return t.ite(b.args[0], apply(name, dtype, a, b.args[1]), apply(name, dtype, a, b.args[2]))
    if a.is_literal and b.is_literal:
        return t.real(fold(name, dtype, a.value, b.value))
    return t.make("float_op", (name, dtype, a, b), "float")


def fold(name: str, dtype: str, a: float, b: float) -> float:
    return _fold(name, dtype, a.hex(), b.hex())


@lru_cache(maxsize=4096)
def _fold(name: str, dtype: str, a: str, b: str) -> float:
    """By the bits of its operands: 0.0 equals -0.0, but not below 1."""
    kind = DTYPES[dtype]
    return float(BINARY[name](*(torch.tensor(float.fromhex(x), dtype=kind) for x in (a, b))))


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "log": torch.log,
    "log2": torch.log2,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "tanh": torch.tanh,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "sign": torch.sign,
    "pow": torch.pow,
}


def function(name: str, dtype: str, *args: Term) -> Term:
    """A function of `FUNCTIONS` computed in `dtype`. Never folded: devices differ in the last digit."""
    return t.make("float_fn", (name, dtype, *args), "float")


def to_int(a: Term) -> Term:
    """A float without its fraction, as an integer."""
    if a.op == "ite":
        return t.ite(a.args[0], to_int(a.args[1]), to_int(a.args[2]))
    if a.is_literal and math.isfinite(a.value) and abs(a.value) < 1 << 53:
        return t.integer(int(a.value))
    return t.make("to_int", (a,), "int")


def to_float(a: Term, dtype: str) -> Term:
    """An integer or bool as a float of `dtype`."""
    if a.sort == "bool":
        return t.ite(a, t.real(1.0), t.real(0.0))
    if a.op == "ite":
        return t.ite(a.args[0], to_float(a.args[1], dtype), to_float(a.args[2], dtype))
    if a.op == "int":
        return literal(float(a.value), dtype)
    return t.make("to_float", (dtype, a), "float")


def cast(a: Term, dtype: str) -> Term:
    """A float term rounded to `dtype`; only literals below conditions can be rounded exactly."""
    if a.op == "ite":
        return t.ite(a.args[0], cast(a.args[1], dtype), cast(a.args[2], dtype))
    if a.is_literal:
        return literal(a.value, dtype)
    return t.make("float_cast", (dtype, a), "float")


def compare(name: str, a: Term, b: Term) -> Term:
    """`a name b` for name in eq, le, lt. Integers turned into floats compare exactly only in range."""
    if a.op == "ite":
        return t.ite(a.args[0], compare(name, a.args[1], b), compare(name, a.args[2], b))
    if b.op == "ite":
        return t.ite(b.args[0], compare(name, a, b.args[1]), compare(name, a, b.args[2]))
    if a.is_literal and b.is_literal:
        x, y = a.value, b.value
        return t.boolean({"eq": x == y, "le": x <= y, "lt": x < y}[name])
    opaque = t.make("float_compare", (name, a, b), "bool")
    integers = _as_integers(a, b)
    if integers is None:
        return opaque
    x, y, limit = integers
    in_range = t.conj(*(bound for z in (x, y) for bound in (t.integer(-limit) <= z, z <= limit)))
    exact = t.eq(x, y) if name == "eq" else t.le(x, y if name == "le" else y - 1)
    return t.ite(in_range, exact, opaque)


def _as_integers(a: Term, b: Term) -> tuple[Term, Term, int] | None:
    """Both sides as integers, and the bound up to which the conversion was exact."""
    dtypes = {x.args[0] for x in (a, b) if x.op == "to_float"}
    if len(dtypes) != 1:
        return None
    limit = EXACT_INTEGERS[dtypes.pop()]
    sides = []
    for x in (a, b):
        if x.op == "to_float":
            sides.append(x.args[1])
        elif x.is_literal and math.isfinite(x.value) and float(x.value).is_integer():
            sides.append(t.integer(int(x.value)))
        else:
            return None
    return sides[0], sides[1], limit


def value_dtype(term: Term, tables: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """The dtype in which a float term has its value: the widest of its cases; None for numbers alone.

    Args:
        tables: dtypes of the tables that it reads.
    """
    if term.op == "ite":
        cases = [found for x in term.args[1:] if (found := value_dtype(x, tables)) is not None]
        return reduce(torch.promote_types, cases) if cases else None
    if term.op == "read":
        return tables[term.args[0]]
    if term.op in ("float_op", "float_fn"):
        return DTYPES[term.args[1]]
    return DTYPES[term.args[0]] if term.op in ("to_float", "float_cast") else None


def fits(term: Term, tables: Mapping[str, torch.dtype], dtype: torch.dtype) -> bool:
    """Does a float term lose nothing if its value is rounded to `dtype`?"""
    own = value_dtype(term, tables)
    return own is None or torch.promote_types(own, dtype) == dtype
