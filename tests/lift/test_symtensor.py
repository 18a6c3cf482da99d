"""What is known without a solver to be at least 0, and how obligations on one term come together."""

from __future__ import annotations

import itertools

import pytest
import torch

from lift.programs import fixed_sizes
from trilithon.lift.registry import Call
from trilithon.lift.symtensor import is_nonnegative
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.term import Term

X, Y, DATA, READ = t.var("x"), t.var("y"), t.var("u0"), t.read("table", (t.ZERO,), "int")

# term: is it known to be at least 0 wherever `x` and `y` are?
KNOWN: dict[str, tuple[Term, bool]] = {
    "zero": (t.ZERO, True),
    "number": (t.integer(3), True),
    "negative_number": (t.integer(-1), False),
    "index": (X, True),
    "from_data": (DATA, False),
    "table": (READ, False),
    "sum": (X + Y, True),
    "sum_and_number": (2 * X + 3, True),
    "twice": (2 * X, True),
    "below": (X - 1, False),
    "difference": (X - Y, False),
    "with_data": (X + DATA, False),
    "product": (t.mul(X, Y), True),
    "product_with_data": (t.mul(X, DATA), False),
    "quotient": (t.floor_div(X, Y), True),
    "quotient_of_difference": (t.floor_div(X - Y, t.integer(2)), False),
    "remainder": (t.mod(X - Y, Y), True),
    "remainder_of_data": (t.mod(DATA, t.integer(5)), True),
    "remainder_by_data": (t.mod(X, DATA), False),
    "choice": (t.ite(X <= Y, X, t.integer(4)), True),
    "choice_of_negative": (t.ite(X <= Y, X, t.integer(-4)), False),
    "other_choice_of_negative": (t.ite(X <= Y, t.integer(-4), X), False),
    "longer": (t.maximum(X, Y), True),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_to_be_nonnegative(name: str) -> None:
    term, known = KNOWN[name]
    assert is_nonnegative(term) == known
    if known:
        for x, y, u in itertools.product(range(4), range(1, 4), (-7, 3)):
            assert int(evaluate(term, {"x": x, "y": y, "u0": u})) >= 0


Span = tuple[int, int]
REQUIRED: dict[str, tuple[Term, list[Span], Span | None]] = {
    "one": (X, [(0, 5)], (0, 5)),
    "narrower": (X, [(0, 9), (2, 5)], (2, 5)),
    "wider": (X, [(2, 5), (0, 9)], (2, 5)),
    "overlapping": (X, [(0, 5), (2, 9)], (2, 5)),
    "overlapping_below": (X, [(2, 9), (0, 5)], (2, 5)),
    "same": (X, [(0, 5), (0, 5)], (0, 5)),
    "low_end": (t.ZERO, [(0, 5)], None),
    "high_end": (t.integer(5), [(0, 5)], None),
    "too_low": (t.integer(-1), [(0, 5)], (0, 5)),
    "too_high": (t.integer(6), [(0, 5)], (0, 5)),
}


@pytest.mark.parametrize("name", REQUIRED)
def test_obligations_come_together(name: str) -> None:
    term, spans, expected = REQUIRED[name]
    call = Call(next(iter(fixed_sizes()[1].values())), (), torch.int64, {})
    for span in spans:
        call.require(term, *span)
    assert [(o.low, o.high) for o in call.obligations.values()] == ([] if expected is None else [expected])
