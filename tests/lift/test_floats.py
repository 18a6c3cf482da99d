"""Floats that stand for integers: compared exactly where the dtype is exact, and as torch does everywhere."""

from __future__ import annotations

import itertools

import pytest
import torch

from lift.programs import fixed_sizes
from trilithon.lift.lifter import Lifter
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.traverse import walk

X, Y = t.var("x"), t.var("y")
COMPARE = {"eq": torch.eq, "le": torch.le, "lt": torch.lt}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", COMPARE)
def test_integers_compare_as_floats_do(name: str, dtype: str) -> None:
    limit, kind = float_term.EXACT_INTEGERS[dtype], float_term.DTYPES[dtype]
    near = torch.tensor([sign * limit + by for sign in (-1, 0, 1) for by in range(-3, 4)])
    term = float_term.compare(name, float_term.to_float(X, dtype), float_term.to_float(Y, dtype))
    env = {"x": near[:, None], "y": near}
    assert torch.equal(evaluate(term, env), COMPARE[name](near[:, None].to(kind), near.to(kind)))
    exact = {"eq": t.eq(X, Y), "le": X <= Y, "lt": X < Y}[name]
    in_range = t.conj(*(bound for z in (X, Y) for bound in (z >= -limit, z <= limit)))
    opaque = t.make("float_compare", (name, float_term.to_float(X, dtype), float_term.to_float(Y, dtype)), "bool")
    assert term is t.ite(in_range, exact, opaque)


@pytest.mark.parametrize(("name", "number"), [*itertools.product(COMPARE, (2.0, -3.0, 0.5, torch.inf, -torch.inf, torch.nan))])
def test_integers_compare_with_numbers(name: str, number: float) -> None:
    x = torch.arange(-5, 6)
    for swapped in (False, True):
        sides = (float_term.to_float(X, "float32"), t.real(number))
        term = float_term.compare(name, *(reversed(sides) if swapped else sides))
        floats = (x.float(), torch.tensor(number))
        assert torch.equal(evaluate(term, {"x": x}), COMPARE[name](*(reversed(floats) if swapped else floats)))
        whole = number in (2.0, -3.0)
        assert (term.op == "float_compare") != whole, "only whole numbers compare as integers"


def test_two_float_types_are_not_compared_as_integers() -> None:
    assert float_term.compare("le", float_term.to_float(X, "float16"), float_term.to_float(Y, "float32")).op == "float_compare"


@pytest.mark.parametrize("number", [2.75, -2.75, 0.0, 2.0**53 - 1, -(2.0**53) + 1])
def test_floats_lose_their_fraction(number: float) -> None:
    assert float_term.to_int(t.real(number)) is t.integer(int(number))


@pytest.mark.parametrize("number", [2.0**53, -(2.0**60), torch.inf, torch.nan])
def test_floats_that_no_integer_may_hold_stay(number: float) -> None:
    assert float_term.to_int(t.real(number)).op == "to_int"


def test_the_sign_of_zero_is_not_forgotten() -> None:
    assert float_term.fold("div", "float32", 1.0, 0.0) == torch.inf
    assert float_term.fold("div", "float32", 1.0, -0.0) == -torch.inf


KINDS = ("ints", "int_scalar", "int_size", "bools", "bool_int", "mixed_ints")


@pytest.mark.parametrize("name", [f"{op}_{kind}" for op in ("eq", "ne", "lt", "le", "gt", "ge") for kind in KINDS])
def test_integers_are_compared_as_integers(name: str) -> None:
    program, nodes = fixed_sizes()
    symbolic = Lifter(program).lift(nodes[name])
    term = symbolic.at(tuple(t.var(f"i{d}") for d in range(symbolic.rank)))
    assert not any(x.op == "float_compare" for x in walk([term]))
