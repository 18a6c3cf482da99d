"""Terms: the normal form, substitution and printing never change a value; equal trees are one object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trilithon.spec import term as t
from trilithon.spec.evaluate import OUT_OF_RANGE, evaluate
from trilithon.spec.masks import B, Causal, Chunked, K, Q, S, SlidingWindow, T
from trilithon.spec.show import show
from trilithon.spec.term import Term
from trilithon.spec.traverse import children as children_of
from trilithon.spec.traverse import free_vars, rebuild, substitute, tables, walk

Env = dict[str, int]
TABLE = torch.tensor([3, 0, -2, 7])
FEW = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Pair:
    """A term, and the same expression in plain Python."""

    term: Term
    plain: Callable[[Env], Any]


class Rows:
    """A table whose reads outside give what `evaluate` gives."""

    def __getitem__(self, i: int) -> int:
        return int(TABLE[i]) if 0 <= i < len(TABLE) else OUT_OF_RANGE


def variable(name: str) -> Pair:
    return Pair(t.var(name), lambda e: e[name])


def literal(n: int) -> Pair:
    return Pair(t.integer(n), lambda e: n)


def ite(c: Pair, a: Pair, b: Pair) -> Pair:
    return Pair(t.ite(c.term, a.term, b.term), lambda e: a.plain(e) if c.plain(e) else b.plain(e))


def binary(make: Callable[[Term, Term], Term], plain: Callable[[Any, Any], Any]) -> Callable[[Pair, Pair], Pair]:
    return lambda a, b: Pair(make(a.term, b.term), lambda e: plain(a.plain(e), b.plain(e)))


def read(i: Pair) -> Pair:
    return Pair(t.read("x", (i.term,), "int"), lambda e: Rows()[i.plain(e)])


INT_OPS = [
    binary(lambda a, b: a + b, lambda a, b: a + b),
    binary(lambda a, b: a - b, lambda a, b: a - b),
    binary(lambda a, b: a * b, lambda a, b: a * b),
    binary(t.minimum, min),
    binary(t.maximum, max),
]
BY_POSITIVE = [binary(t.floor_div, lambda a, b: a // b), binary(t.mod, lambda a, b: a % b)]
COMPARISONS = [
    binary(lambda a, b: a <= b, lambda a, b: a <= b),
    binary(lambda a, b: a < b, lambda a, b: a < b),
    binary(lambda a, b: a >= b, lambda a, b: a >= b),
    binary(lambda a, b: a > b, lambda a, b: a > b),
    binary(t.eq, lambda a, b: a == b),
]
BOOL_OPS = [
    binary(t.conj, lambda a, b: a and b),
    binary(t.disj, lambda a, b: a or b),
    binary(t.eq, lambda a, b: a == b),
]


def apply(draw: st.DrawFn, ops: list[Any], a: Pair, b: Pair) -> Pair:
    return draw(st.sampled_from(ops))(a, b)


@st.composite
def ints(draw: st.DrawFn, depth: int = 3) -> Pair:
    kind = draw(st.sampled_from(["leaf", "op", "div", "ite", "read", "negative"])) if depth else "leaf"
    if kind == "leaf":
        return draw(st.one_of(st.sampled_from("qkst").map(variable), st.integers(-5, 5).map(literal)))
    a = draw(ints(depth - 1))
    if kind == "op":
        return apply(draw, INT_OPS, a, draw(ints(depth - 1)))
    if kind == "div":
        return apply(draw, BY_POSITIVE, a, literal(draw(st.integers(1, 6))))
    if kind == "ite":
        return ite(draw(bools(depth - 1)), a, draw(ints(depth - 1)))
    return read(a) if kind == "read" else Pair(-a.term, lambda e: -a.plain(e))


@st.composite
def bools(draw: st.DrawFn, depth: int = 3) -> Pair:
    kind = draw(st.sampled_from(["compare", "op", "not", "ite"])) if depth else "compare"
    if kind == "compare":
        return apply(draw, COMPARISONS, draw(ints(max(depth - 1, 0))), draw(ints(max(depth - 1, 0))))
    a = draw(bools(depth - 1))
    if kind == "not":
        return Pair(~a.term, lambda e: not a.plain(e))
    b = draw(bools(depth - 1))
    return apply(draw, BOOL_OPS, a, b) if kind == "op" else ite(draw(bools(depth - 1)), a, b)


ENVS = st.fixed_dictionaries({name: st.integers(-6, 9) for name in "qkst"})
ANY = st.one_of(ints(), bools())


def value(term: Term, env: Env) -> int:
    return int(evaluate(term, env, {"x": TABLE}))


@FEW
@given(ANY, ENVS)
def test_normal_form_keeps_the_value(pair: Pair, env: Env) -> None:
    assert value(pair.term, env) == pair.plain(env)


@FEW
@given(ANY, ENVS)
def test_rebuilding_every_node_gives_the_same_value(pair: Pair, env: Env) -> None:
    for node in walk([pair.term]):
        if kids := children_of(node):
            assert value(rebuild(node, kids), env) == value(node, env)


@FEW
@given(ANY, ints(depth=2), ENVS)
def test_substitute_is_evaluation_in_another_environment(pair: Pair, put: Pair, env: Env) -> None:
    changed = substitute(pair.term, {Q: put.term})
    assert value(changed, env) == pair.plain({**env, "q": put.plain(env)})


@FEW
@given(ANY)
def test_substituting_nothing_or_itself_gives_the_same_object(pair: Pair) -> None:
    assert substitute(pair.term, {}) is pair.term
    assert substitute(pair.term, {K: K}) is pair.term


@FEW
@given(ANY, ENVS)
def test_shown_text_is_python_of_the_same_value(pair: Pair, env: Env) -> None:
    assert eval(show(pair.term), {"x": Rows(), **env}) == pair.plain(env)


@FEW
@given(bools(), ENVS)
def test_double_negation_and_excluded_middle(pair: Pair, env: Env) -> None:
    assert ~~pair.term is pair.term
    assert value(pair.term & ~pair.term, env) == 0
    assert value(pair.term | ~pair.term, env) == 1


def test_equal_trees_are_one_object() -> None:
    assert K + Q - Q is K
    assert Q + K is K + Q
    assert (K <= Q) is ~(Q < K)
    assert (2 * K <= 2 * Q + 1) is (K <= Q)
    assert (K + 7 < Q + 8) is (K <= Q)
    assert ((K <= Q) & (K >= 0)) is ((K >= 0) & (K <= Q) & (K <= Q))
    assert K.eq(Q) is Q.eq(K)
    assert (2 * K).eq(2 * Q + 1) is t.FALSE


def test_operators_take_python_ints_on_either_side() -> None:
    assert 3 - K is t.integer(3) + (-K)
    assert 2 * K is K + K
    assert (K >= 1) is (K > 0)
    assert (1 + K) - 1 is K


def test_zero_and_minus_zero_are_different_floats() -> None:
    assert t.real(0.0) is not t.real(-0.0)
    assert t.real(0.5) is t.real(0.5)


@pytest.mark.parametrize(
    ("term", "text"),
    [
        (K <= Q, "k <= q"),
        (K < Q, "k <= q - 1"),
        (K <= Q + 3, "k <= q + 3"),
        (Q <= K, "k >= q"),
        (K > Q - 4, "k >= q - 3"),
        (K <= Q + T - S, "k + s <= q + t"),
        (K.eq(Q), "k == q"),
        (~K.eq(Q), "k != q"),
        (~t.read("attention_mask", (B, K), "int").eq(0), "attention_mask[b, k] != 0"),
        (t.floor_div(K, t.integer(4)).eq(3), "k // 4 == 3"),
        (t.mod(Q - K, t.integer(3)).eq(0), "(q - k) % 3 == 0"),
        ((K <= Q) | ~t.read("m", (K,), "bool"), "k <= q or not m[k]"),
        (t.TRUE, "True"),
    ],
    ids=str,
)
def test_show(term: Term, text: str) -> None:
    assert show(term) == text == repr(term)


def test_free_variables_and_tables() -> None:
    term = (K <= Q) & t.read("m", (B, K), "bool")
    assert free_vars(term) == {"b", "k", "q"}
    assert tables(term) == {"m"}


def test_prefix_sum_evaluates_as_a_loop() -> None:
    body = t.read("x", (t.counter(0),), "int")
    total = t.prefix_sum(body, Q)
    got = evaluate(total, {"q": torch.arange(-1, 4)}, {"x": TABLE})
    assert got.tolist() == [0, 3, 3, 1, 8]
    assert free_vars(total) == {"q"}


def test_a_missing_variable_or_table_is_an_error() -> None:
    with pytest.raises(KeyError):
        evaluate(K, {"q": 1})
    with pytest.raises(KeyError):
        evaluate(t.read("x", (K,), "int"), {"k": 1})


def test_constants_are_no_copies_from_the_host() -> None:
    """Which would wait for a GPU: masks are made while CUDA graphs are captured."""
    place = torch.arange(5)
    with Noted() as noted:
        evaluate((Causal() & Chunked(3)).term(), {"q": place[:, None], "k": place})
        evaluate(SlidingWindow(2).term(), {"q": place[:, None], "k": 3})
    assert torch.ops.aten.full.default in noted.ops
    assert not {torch.ops.aten.lift_fresh.default, torch.ops.aten._to_copy.default} & noted.ops


class Noted(TorchDispatchMode):
    """The operations that run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = set[object]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ops.add(func)
        return func(*args, **(kwargs or {}))
