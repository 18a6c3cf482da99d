"""Stored data as terms: closed forms are exact, and what has none is a table."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from lift.harness import assert_same
from trilithon.lift.constants import lift_constant
from trilithon.spec import term as t
from trilithon.spec.evaluate import evaluate
from trilithon.spec.traverse import tables

INF, NAN = float("inf"), float("nan")
MIN = torch.finfo(torch.float32).min


def flipped(data: Tensor, *cells: tuple[int, ...]) -> Tensor:
    data = data.clone()
    for cell in cells:
        data[cell] = ~data[cell]
    return data


ONES = torch.ones(12, 12, dtype=torch.bool)
Q, K = torch.arange(12)[:, None], torch.arange(12)
CORNERS = [(0, 0), (0, 11), (11, 0), (11, 11), (0, 5), (5, 0), (5, 11), (6, 6)]
EIGHT = [(0, 0), (0, 11), (11, 0), (0, 5), (5, 0), (5, 11), (6, 7), (3, 9)]
G = torch.Generator().manual_seed(0)

CLOSED: dict[str, Tensor] = {
    "scalar": torch.tensor(3),
    "scalar_bool": torch.tensor(True),
    "scalar_inf": torch.tensor(-INF, dtype=torch.bfloat16),
    "ones": ONES,
    "nans": torch.full((2, 3), NAN),
    "lowest": torch.full((3,), MIN),
    "arange": torch.arange(9),
    "arange_down": torch.arange(9, -9, -3, dtype=torch.int32),
    "position_ids": torch.arange(9).expand(2, -1),
    "column": torch.arange(9)[:, None],
    "relative": Q - K,
    "strides": torch.arange(24).view(2, 3, 4),
    "tril": ONES.tril()[None, None],
    "tril_shifted": ONES.tril(3),
    "window": ONES.tril().triu(-3),
    "wide": torch.ones(5, 9, dtype=torch.uint8).tril(2),
    "tall": torch.ones(9, 5, dtype=torch.int64).triu(-1),
    "triu_inf": torch.full((12, 12), -INF).triu(1),
    "triu_lowest": torch.full((2, 12, 12), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16).triu(1),
    "two_values": torch.where(Q >= K, NAN, 0.5),
    **{f"flipped_{i}_{j}": flipped(ONES.tril(), (i, j)) for i, j in CORNERS},
    "flipped_eight": flipped(ONES.tril(), *EIGHT),
    "flipped_uniform": flipped(ONES, (4, 7)),
}

OPEN: dict[str, Tensor] = {
    "random_bool": torch.randint(0, 2, (12, 12), generator=G).bool(),
    "random_int": torch.randint(0, 9, (7,), generator=G),
    "random_float": torch.randn(3, 4, 5, generator=G),
    "almost_arange": torch.tensor([0, 1, 2, 3, 5]),
    "linspace": torch.linspace(0, 1, 5),
    "two_planes": torch.stack([ONES.tril(), ONES.triu()]),
    "second_plane_flipped": flipped(torch.stack([ONES.tril(), ONES.tril()]), (1, 3, 3)),
    "blocks": (Q // 3) == (K // 3),
    "too_many_flips": flipped(ONES.tril(), *EIGHT, (9, 3), (8, 1), (10, 2)),
    "distances": (Q - K).abs(),
    "signed_zeros": torch.tensor([0.0, -0.0]),
    "wraps": torch.tensor([-(1 << 63), 0, -(1 << 63)]),
    "empty": torch.empty(0, 3),
}


def elements(data: Tensor) -> tuple[t.Term, Tensor]:
    index = tuple(t.var(f"i{d}") for d in range(data.dim()))
    term = lift_constant(data, "buffer").at(index)
    env = {f"i{d}": torch.arange(n).view([-1 if a == d else 1 for a in range(data.dim())]) for d, n in enumerate(data.shape)}
    return term, evaluate(term, env, {"buffer": data}).expand(data.shape)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_is_exact(name: str) -> None:
    term, values = elements(CLOSED[name])
    assert not tables(term), f"no closed form: {term}"
    assert_same(values, CLOSED[name])


@pytest.mark.parametrize("name", OPEN)
def test_other_data_is_a_table(name: str) -> None:
    term, values = elements(OPEN[name])
    assert tables(term) == {"buffer"}
    assert_same(values, OPEN[name])


@pytest.mark.parametrize("data", [*CLOSED.values(), *OPEN.values()], ids=[*CLOSED, *OPEN])
def test_literal_index_gives_the_literal(data: Tensor) -> None:
    if data.numel():
        cell = tuple(n - 1 for n in data.shape)
        value = lift_constant(data, "buffer").at(tuple(map(t.integer, cell)))
        assert value.is_literal
        assert_same(torch.tensor(value.value, dtype=torch.float64 if value.sort == "float" else None), data[cell])


def test_sign_of_zero_is_kept() -> None:
    value = lift_constant(torch.tensor(-0.0), "buffer").at(())
    assert value is t.real(-0.0) and value is not t.real(0.0)


def test_text_of_a_causal_buffer() -> None:
    q, k = t.var("q"), t.var("k")
    causal = lift_constant(ONES.tril(), "buffer").at((q, k))
    assert causal is (k <= q)
    odd = lift_constant(flipped(ONES.tril(), (2, 1)), "buffer").at((q, k))
    assert odd is t.ite(q.eq(2) & k.eq(1), t.FALSE, k <= q)


def test_large_buffers_are_quick() -> None:
    data = torch.ones(2048, 2048, dtype=torch.bool).tril()[None, None]
    start = time.perf_counter()
    assert not tables(lift_constant(data, "buffer").at(tuple(t.var(f"i{d}") for d in range(4))))
    assert time.perf_counter() - start < 3.0
