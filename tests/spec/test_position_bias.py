"""A bias by position: its text survives, and only what is one number a row is taken out of it."""

from __future__ import annotations

import pytest
import torch

from trilithon.errors import InputError
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.bias_text import parse_bias, write_bias
from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import B, H, K, Q
from trilithon.spec.position_bias import NOTHING, position_bias
from trilithon.spec.term import Term

S, FOUR = t.var("s70"), t.integer(4)
OWN = ("slopes", "table")
SLOPE = t.read("slopes", (H,), "float")


def number(x: Term, dtype: str = "float32") -> Term:
    return float_term.to_float(x, dtype)


def op(name: str, a: Term, b: Term) -> Term:
    return float_term.apply(name, "float32", a, b)


FAR = float_term.to_int(float_term.function("log", "float32", number(t.maximum(Q - K, t.ONE))))
NESTED = t.read("table", (t.read("places", (K,), "int"), H), "float")
STAY: dict[str, Term] = {
    "key": op("mul", SLOPE, number(K)),
    "distance": op("mul", number(K - Q), SLOPE),
    "buckets": t.read("table", (t.ite(K > Q - 3, Q - K, FAR), H), "float"),
    "of_rows_beside_keys": op("add", number(K), number(Q * Q)),
    "in_bfloat16": float_term.cast(float_term.apply("mul", "bfloat16", t.real(0.25), number(K, "bfloat16")), "float32"),
}
ROWS: dict[str, tuple[Term, Term]] = {  # what is taken out, and what is left
    "from_the_end": (op("mul", SLOPE, number(K - S + 1)), op("mul", SLOPE, number(K - Q))),
    "from_an_input": (op("mul", SLOPE, number(K - t.read("x", (B, Q), "int"))), op("mul", SLOPE, number(K - Q))),
    "beside": (op("add", op("mul", SLOPE, number(K)), op("mul", SLOPE, number(1 - S))), op("mul", SLOPE, number(K))),
    "divided": (op("div", number(2 * K + S), t.real(3.0)), op("div", number(2 * K - 2 * Q), t.real(3.0))),
    "flat_heads": (op("mul", number(t.mod(4 * B + H, FOUR)), number(K)), op("mul", number(t.mod(H, FOUR)), number(K))),
    "by_the_size_of_the_row": (t.ite(S <= 9, number(K - S), number(K - 9 + S)), number(K - Q)),
    "for_one_head": (t.ite(H.eq(0), number(K - S), number(K)), t.ite(H.eq(0), number(K - Q), number(K))),
    "nothing_else": (op("mul", SLOPE, number(S)), NOTHING),
    "one_number_a_head": (SLOPE, NOTHING),
}
REFUSED: dict[str, Term] = {
    "input": t.read("x", (B, K), "float"),
    "input_of_rows": t.read("x", (B, Q), "float"),
    "scaled_by_the_length": op("mul", number(K), number(S)),
    "divided_by_the_length": op("div", number(K), number(S)),
    "rounded_by_the_length": number(t.floor_div(K + S, FOUR)),
    "one_head": t.ite(H.eq(0), number(K - S), number(K * S)),
    "some_keys": t.ite(K < 3, number(K - S), number(K)),
    "infinite_rows": t.ite(S <= 9, t.real(-torch.inf), t.real(0.0)),
    "overflows": number(S, "float16"),
    "slope_of_rows": op("mul", float_term.function("log", "float32", number(Q)), number(K - S)),
    "a_running_sum": number(t.prefix_sum(t.read("table", (t.counter(0),), "int"), K)),
    "a_row_of_the_batch": number(K * B),
}


@pytest.mark.parametrize("name", STAY)
def test_a_function_of_positions_stays_as_it_is(name: str) -> None:
    assert position_bias(STAY[name], OWN) is STAY[name]


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name][1] is not NOTHING])
def test_what_is_left_differs_by_a_number_a_row(name: str) -> None:
    formula, left = ROWS[name]
    found = position_bias(formula, OWN)
    assert found is not None
    b, h, q, k = torch.meshgrid(*(torch.arange(n) for n in (2, 4, 6, 7)), indexing="ij")
    env, tables = {"b": b, "h": h, "q": q, "k": k}, {"slopes": torch.randn(4).double(), "x": torch.randint(0, 9, (2, 6))}
    assert torch.equal(evaluate(found, env, tables), evaluate(left, env, tables))
    for size in (5, 20):
        rest = evaluate(formula, {**env, "s70": size}, tables) - evaluate(found, env, tables)
        assert (rest - rest[..., :1]).abs().max() < 1e-5


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name][1] is NOTHING])
def test_a_number_a_row_is_nothing(name: str) -> None:
    assert position_bias(ROWS[name][0], OWN) is NOTHING


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_function_of_positions(name: str) -> None:
    assert position_bias(REFUSED[name], OWN) is None


@pytest.mark.parametrize("name", STAY)
def test_a_text_survives(name: str) -> None:
    text = write_bias(STAY[name], OWN)
    assert write_bias(parse_bias(text, 2), ("0", "1")) == text
    h, q, k = torch.meshgrid(*(torch.arange(n) for n in (4, 6, 7)), indexing="ij")
    env, given = {"h": h, "q": q, "k": k}, (torch.randn(4).double(), torch.randn(9, 4).double())
    was = evaluate(STAY[name], env, dict(zip(OWN, given, strict=True)))
    assert torch.equal(evaluate(parse_bias(text, 2), env, dict(zip("01", given, strict=True))), was)


def test_tables_are_called_by_number_at_any_depth() -> None:
    text = write_bias(NESTED, ("places", "table"))
    assert parse_bias(text, 2) is t.read("1", (t.read("0", (K,), "int"), H), "float")


@pytest.mark.parametrize(
    "text", ["", "k", "[]", "[[1]]", '[["var","int",["k"]]]', '[["exec","float",["0"]]]', write_bias(number(K - S), [])]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_bias(text, 0)
