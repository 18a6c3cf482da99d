"""Named masks against loops, their canonical text, and their errors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from trilithon.errors import InputError
from trilithon.spec import term as t
from trilithon.spec.masks import (
    And,
    B,
    Causal,
    Documents,
    Formula,
    Full,
    K,
    Mask,
    Padding,
    Q,
    Shifted,
    SlidingWindow,
    conjunction,
    parse,
    parts,
)

Cell = Callable[[int, int, int, int, int, int], bool]  # b h q k s t
FLAGS = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 1, 0, 1]])
SEGMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 0], [5, 5, 5, 4, 4, 4, 4]])
TABLES = {"attention_mask": FLAGS, "flags": FLAGS.bool(), "segments": SEGMENTS}

ROWS: dict[str, tuple[Mask, Cell]] = {
    "full": (Full(), lambda b, h, q, k, s, t: True),
    "causal": (Causal(), lambda b, h, q, k, s, t: k <= q),
    "causal_lower_right": (Causal("lower_right"), lambda b, h, q, k, s, t: k <= q + t - s),
    "shifted": (Shifted(2), lambda b, h, q, k, s, t: k <= q + 2),
    "shifted_lower_right": (Shifted(-1, "lower_right"), lambda b, h, q, k, s, t: k <= q + t - s - 1),
    "window_1": (SlidingWindow(1), lambda b, h, q, k, s, t: k == q),
    "window_3": (SlidingWindow(3), lambda b, h, q, k, s, t: 0 <= q - k < 3),
    "window_lower_right": (SlidingWindow(2, "lower_right"), lambda b, h, q, k, s, t: 0 <= q + t - s - k < 2),
    "padding": (Padding(), lambda b, h, q, k, s, t: bool(FLAGS[b, k])),
    "padding_bool": (Padding("flags", "bool"), lambda b, h, q, k, s, t: bool(FLAGS[b, k])),
    "documents": (
        Documents(t.read("segments", (B, Q), "int")),
        lambda b, h, q, k, s, t: int(SEGMENTS[b, q]) == int(SEGMENTS[b, k]),
    ),
    "formula": (Formula(t.mod(Q - K, t.integer(3)).eq(0)), lambda b, h, q, k, s, t: (q - k) % 3 == 0),
    "causal_and_padding": (Causal() & Padding(), lambda b, h, q, k, s, t: k <= q and bool(FLAGS[b, k])),
    "three_parts": (
        SlidingWindow(3) & Padding() & Documents(t.read("segments", (B, Q), "int")),
        lambda b, h, q, k, s, t: 0 <= q - k < 3 and bool(FLAGS[b, k]) and int(SEGMENTS[b, q]) == int(SEGMENTS[b, k]),
    ),
}
SIZES = ((1, 1, 1, 1), (2, 3, 5, 5), (2, 1, 4, 7), (1, 2, 7, 4))


def loops(cell: Cell, b: int, h: int, s: int, t: int) -> Tensor:
    made = torch.zeros(b, h, s, t, dtype=torch.bool)
    for index in product(range(b), range(h), range(s), range(t)):
        made[index] = cell(*index, s, t)
    return made


@pytest.mark.parametrize("name", ROWS)
def test_materialize_agrees_with_loops(name: str) -> None:
    mask, cell = ROWS[name]
    for sizes in SIZES:
        assert torch.equal(mask.materialize(*sizes, TABLES), loops(cell, *sizes)), sizes


@pytest.mark.parametrize("name", [name for name in ROWS if name != "three_parts"])  # its parts overlap at small sizes
def test_near_misses_are_other_masks(name: str) -> None:
    mask, _ = ROWS[name]
    ours = [mask.materialize(*sizes, TABLES) for sizes in SIZES]
    for other in mask.near_misses():
        assert any(not torch.equal(x, other.materialize(*sizes, TABLES)) for x, sizes in zip(ours, SIZES, strict=True)), other


CANONICAL = [
    Full(),
    Causal(),
    Causal("lower_right"),
    SlidingWindow(1),
    SlidingWindow(4096),
    SlidingWindow(7, "lower_right"),
    Padding(),
    Padding("encoder_mask"),
    Causal() & Padding(),
    SlidingWindow(5) & Padding("m") & Causal("lower_right"),
]


@pytest.mark.parametrize("mask", CANONICAL, ids=str)
def test_parse_reads_the_canonical_text(mask: Mask) -> None:
    assert parse(str(mask)) == mask
    assert str(parse(str(mask))) == str(mask)


@pytest.mark.parametrize("text", ["", "causl", "shifted(1, upper_left)", "causal & documents(m)", "Full"])
def test_parse_refuses_other_text(text: str) -> None:
    with pytest.raises(InputError, match="names no mask"):
        parse(text)


@pytest.mark.parametrize("text", ["window", "window()", "window(x)", "window(0)", "padding", "padding()"])
def test_parse_refuses_wrong_arguments(text: str) -> None:
    with pytest.raises(InputError, match="names no mask"):
        parse(text)


def test_conjunction_is_canonical() -> None:
    a, b, c = Causal(), Padding(), SlidingWindow(3)
    assert a & b == b & a
    assert (a & b) & c == a & (b & c) == conjunction((c, a, b))
    assert a & a == a
    assert a & Full() == a == Full() & a
    assert Full() & Full() == Full() == conjunction(())
    assert conjunction((And((a, b)), And((b, c)))) == a & b & c
    assert parts(a & b) == (a, b) and parts(a) == (a,) and parts(Full()) == ()
    assert str(b & a) == "causal & padding(attention_mask)"


def test_equal_masks_hash_equal() -> None:
    assert len({Causal() & Padding(), Padding() & Causal(), Causal()}) == 2


def test_missing_table_names_it() -> None:
    with pytest.raises(InputError) as caught:
        (Causal() & Padding()).materialize(1, 1, 2, 2)
    assert str(caught.value) == (
        "cannot materialize causal & padding(attention_mask)\n"
        "  because it reads attention_mask, which `inputs` does not hold\n"
        "  pass inputs={'attention_mask': tensor}"
    )


def test_at_sizes_puts_the_lengths_in() -> None:
    assert Causal("lower_right").at_sizes(t.integer(3), t.integer(5)) is (K <= Q + 2)
    n = t.var("n")
    assert Causal("lower_right").at_sizes(n, n) is (K <= Q)
