"""Print a term as a person would write it: `k <= q and attention_mask[b, k] != 0`."""

from __future__ import annotations

import math
from typing import Any

from trilithon.spec.term import Term

_SIGNS = {"eq": "==", "le": "<=", "lt": "<"}
_LOOSE, _AND, _NOT, _COMPARE, _SUM, _PRODUCT, _ATOM = range(7)
_INFIX = {"add": ("+", _SUM), "sub": ("-", _SUM), "mul": ("*", _PRODUCT), "div": ("/", _PRODUCT)}


def show(term: Term) -> str:
    return _show(term)[0]


def _wrap(term: Term, tightness: int) -> str:
    text, own = _show(term)
    return text if own >= tightness else f"({text})"


def _show(term: Term) -> tuple[str, int]:
    op, args = term.op, term.args
    if op in ("int", "bool"):
        return str(args[0]), _ATOM
    if op == "float":
        return ("-inf" if args[0] == -math.inf else f"{args[0]:g}"), _ATOM
    if op == "var":
        return args[0], _ATOM
    if op == "read":
        return f"{args[0]}[{', '.join(map(show, args[1:]))}]", _ATOM
    if op == "sum":
        return _sum(dict(args[0]), args[1]), _SUM
    if op in ("le0", "eq0"):
        return _comparison(term, "<=" if op == "le0" else "=="), _COMPARE
    if op == "not":
        inner = args[0]
        if inner.op == "eq0":
            return _comparison(inner, "!="), _COMPARE
        return f"not {_wrap(inner, _NOT)}", _NOT
    if op == "and":
        return _joined(" and ", args, _NOT), _AND
    if op == "or":
        return _joined(" or ", args, _AND), _LOOSE
    if op == "ite":
        return f"{_wrap(args[1], _AND)} if {_wrap(args[0], _AND)} else {_wrap(args[2], _AND)}", _LOOSE
    if op in ("mul", "floor_div", "mod"):
        sign = {"mul": "*", "floor_div": "//", "mod": "%"}[op]
        args = tuple(sorted(args, key=show)) if op == "mul" else args
        return f"{_wrap(args[0], _PRODUCT)} {sign} {_wrap(args[1], _ATOM)}", _PRODUCT
    if op == "prefix_sum":
        return f"sum({show(args[0])} for #0 <= {show(args[1])})", _ATOM
    if op == "float_compare":
        return f"{_wrap(args[1], _SUM)} {_SIGNS[args[0]]} {_wrap(args[2], _SUM)}", _COMPARE
    return _show_float(op, args)


def _joined(word: str, terms: tuple[Term, ...], tightness: int) -> str:
    """Short parts first: an order that does not depend on which term was made first."""
    return word.join(sorted((_wrap(term, tightness) for term in terms), key=lambda text: (len(text), text)))


def _show_float(op: str, args: tuple[Any, ...]) -> tuple[str, int]:
    """Casts as `float32(x)`, the four operations as infix, anything else as a call."""
    if op == "float_op" and args[0] in _INFIX:
        sign, own = _INFIX[args[0]]
        return f"{_wrap(args[2], own)} {sign} {_wrap(args[3], own + 1)}", own
    if op in ("to_float", "float_cast"):
        return f"{args[0]}({show(args[1])})", _ATOM
    name, shown = (args[0], args[2:]) if op in ("float_op", "float_fn") else (op, args)
    return f"{name}({', '.join(show(a) if isinstance(a, Term) else str(a) for a in shown)})", _ATOM


def _sum(coefficients: dict[Term, int], constant: int) -> str:
    ordered = sorted(coefficients.items(), key=lambda item: (item[1] < 0, show(item[0])))
    text = ""
    for term, factor in ordered:
        size = abs(factor)
        part = _wrap(term, _PRODUCT) if size == 1 else f"{size} * {_wrap(term, _PRODUCT)}"
        text += (" - " if factor < 0 else " + " if text else "") + part
    if constant or not text:
        text += (" - " if constant < 0 else " + " if text else "") + str(abs(constant))
    return text.strip().replace("- ", "-", 1) if text.startswith(" - ") else text


def _comparison(term: Term, sign: str) -> str:
    """`3*k - q + 2 <= 0` as `3*k + 2 <= q`; the side with `k` comes first."""
    from trilithon.spec.term import linear

    coefficients, constant = linear(term.args[0])
    left = {t: c for t, c in coefficients.items() if c > 0}
    right = {t: -c for t, c in coefficients.items() if c < 0}
    low, high = (constant, 0) if constant > 0 else (0, -constant)
    if any(t.op == "var" and t.args[0] == "k" for t in right):
        sign = {"<=": ">=", "==": "==", "!=": "!="}[sign]
        left, right, low, high = right, left, high, low
    if low and not high and sign != "==" and sign != "!=":
        low, high = 0, -low
    sides = _sum(left, low), _sum(right, high)
    if sign in ("==", "!=") and not any(t.op == "var" and t.args[0] == "k" for t in left):
        sides = min(sides, sides[::-1], key=lambda pair: (pair[0].isdigit(), pair))
    return f"{sides[0]} {sign} {sides[1]}"
