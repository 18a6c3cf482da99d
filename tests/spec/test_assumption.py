"""Each kind of assumption: its samples, its run-time check and its fact speak of the same tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from trilithon.spec import term as t
from trilithon.spec.assumption import INT32, KINDS, Assumption, attention_mask, guard, position_ids
from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import B, K

EDGES = {  # the value that a fact knows about a row, as loops over the table would find it
    "start": lambda x: x[:, 0].long(),
    "pad": lambda x: (x == 0).sum(1),
    "length": lambda x: (x == 1).sum(1),
    "one": lambda x: (x == 1).int().argmax(1),
}


def facts(kind: str, table: Tensor) -> Tensor:
    """The fact at every entry, bool `[b t]`."""
    sort = "bool" if table.dtype == torch.bool else "int"
    fact = guard("x", kind).fact(t.read("x", (B, K), sort), t.var("n"))
    rows, columns = table.shape
    env: dict[str, Tensor | int] = {"b": torch.arange(rows)[:, None], "k": torch.arange(columns)[None, :], "n": columns}
    tables = {"x": table, **{f"{name}:x": of(table) for name, of in EDGES.items()}}
    return evaluate(fact, env, tables).expand(rows, columns)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_meet_the_check_and_the_fact(kind: str, dtype: torch.dtype) -> None:
    if dtype == torch.bool and kind in ("consecutive", "bounded", "nonnegative"):
        pytest.skip("flags have no order")
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (3, 7), (2, 12), (4, 2)):
        for _ in range(10):
            table = guard("x", kind).sample(shape, dtype, generator)
            assert table.shape == shape and table.dtype == dtype
            held = guard("x", kind).holds(table)
            assert held.dtype == torch.bool and held.shape == () and bool(held)
            assert bool(facts(kind, table).all())


BROKEN = {
    "consecutive": [[[0, 1, 3]], [[0, 0, 1]], [[2, 1, 0]], [[0, 1, 2], [5, 6, 5]], [[INT32, INT32 + 1]]],
    "nonnegative": [[[0, -1]], [[INT32 + 1, 0]]],
    "bounded": [[[0, INT32 + 1]], [[-INT32 - 1, 0]], [[1 << 62, 0]]],
    "flags": [[[0, 2]], [[-1, 1]], [[0, 1], [1, 3]]],
    "nonempty": [[[0, 0]], [[0, 1], [0, 0]], [[1, 2]], [[-1, 1]]],
    "all_ones": [[[1, 1, 0]], [[1, 1], [0, 1]], [[2, 1]], [[-1]]],
    "left_padded": [[[1, 0, 1]], [[1, 0]], [[0, 0]], [[0, 2]], [[0, 1], [1, 0]], [[-1, 0, 1]]],
    "right_padded": [[[1, 0, 1]], [[0, 1]], [[0, 0]], [[2, 0]], [[1, 0], [0, 1]], [[1, 0, -1]]],
}


@pytest.mark.parametrize(("kind", "rows"), [(kind, rows) for kind, tables in BROKEN.items() for rows in tables], ids=str)
def test_perturbed_tables_fail_the_check(kind: str, rows: list[list[int]]) -> None:
    assert not bool(guard("x", kind).holds(torch.tensor(rows)))


def test_every_kind_has_broken_rows() -> None:
    assert BROKEN.keys() == KINDS.keys()


SMALL = arrays("int64", st.tuples(st.integers(1, 3), st.integers(1, 5)), elements=st.integers(-1, 3))


@settings(max_examples=200, deadline=None)
@given(SMALL, st.sampled_from(list(KINDS)))
def test_a_table_that_passes_the_check_meets_the_fact(numbers: object, kind: str) -> None:
    table = torch.as_tensor(numbers)
    if bool(guard("x", kind).holds(table)):
        assert bool(facts(kind, table).all())


def test_wrapping_steps_are_not_consecutive() -> None:
    high = (1 << 63) - 1
    assert not bool(guard("x", "consecutive").holds(torch.tensor([[high, -high - 1]])))


def test_text_and_source() -> None:
    assert str(position_ids.consecutive()) == "each row of position_ids is consecutive [declared]"
    assert str(guard("attention_mask", "all_ones")) == "attention_mask is all ones [guard]"
    assert attention_mask.left_padded() == Assumption(
        "attention_mask", "left_padded", "declared", "attention_mask is left padding"
    )
    assert attention_mask.right_padded().kind == "right_padded"
    assert attention_mask.all_ones().source == position_ids.bounded().source == "declared"
