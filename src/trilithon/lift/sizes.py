"""Size expressions of torch.export (sympy) as terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trilithon.lift.symtensor import GIVEN, UNBACKED
from trilithon.spec import term as t
from trilithon.spec.term import Term


def name_of(symbol: Any) -> str:
    """Its name as a variable of terms. An integer that a caller gives is told by `given_`: torch makes sizes positive."""
    name = str(symbol)
    return name if symbol.is_positive or UNBACKED.fullmatch(name) else f"{GIVEN}{name}"


def from_sympy(expr: Any) -> Term:
    """A size expression of torch.export as a term; an unknown function becomes a symbol of its own."""
    if expr.is_Integer:
        return t.integer(int(expr))
    if expr.is_Symbol:
        return t.var(name_of(expr))
    arguments = [from_sympy(a) for a in expr.args] if not expr.is_Pow else []
    if expr.is_Add:
        return t.add(*arguments)
    if expr.is_Mul and all(a.is_integer for a in expr.args):
        product = t.ONE
        for a in arguments:
            product = t.mul(product, a)
        return product
    if expr.is_Pow and expr.exp.is_Integer and int(expr.exp) > 0:
        power = from_sympy(expr.base)
        return power if int(expr.exp) == 1 else t.mul(power, from_sympy(expr.base ** (int(expr.exp) - 1)))
    name = type(expr).__name__
    if name in ("Max", "Min") and len(arguments) == 2:
        return (t.maximum if name == "Max" else t.minimum)(*arguments)
    if name in ("FloorDiv", "CleanDiv") and expr.args[1].is_positive:
        return t.floor_div(*arguments)
    if name in ("Mod", "PythonMod") and expr.args[1].is_positive:
        return t.mod(*arguments)
    return t.read(f"size:{expr}", (), "int")


COMPARE: dict[str, Callable[[Term, Term], Term]] = {
    "Equality": t.eq,
    "Unequality": lambda a, b: ~t.eq(a, b),
    "LessThan": lambda a, b: a <= b,
    "StrictLessThan": lambda a, b: a < b,
    "GreaterThan": lambda a, b: a >= b,
    "StrictGreaterThan": lambda a, b: a > b,
}


def condition_from_sympy(expr: Any) -> Term | None:
    """A comparison of size expressions as a term, or None if it is something else."""
    name = type(expr).__name__
    if name in ("bool", "BooleanTrue", "BooleanFalse"):
        return t.boolean(bool(expr))
    if name not in COMPARE:
        return None
    return COMPARE[name](from_sympy(expr.args[0]), from_sympy(expr.args[1]))
