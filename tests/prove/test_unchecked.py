"""Where nobody checks inputs, no proof may rest on a size, a guard, a declared fact, or an assertion of the program."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import scaled_dot_product_attention as sdpa

from trilithon.capture.export import capture
from trilithon.prove.program import Examined, every_size, examine_program, prover_of, size_ranges
from trilithon.spec import term as t
from trilithon.spec.assumption import Input


class X:
    """What a mask is made of: places of tokens, their number, and inputs."""

    def __init__(self, x: Tensor, given: int, count: Tensor, positions: Tensor, kept: Tensor) -> None:
        self.s, self.given, self.positions, self.kept = x.shape[2], given, positions[:, None, None, :], kept[:, None, None, :]
        self.k = torch.arange(self.s)
        self.q = self.k[:, None]
        self.causal = self.k <= self.q
        self.number = count.item()
        torch._check(self.number >= 0)
        torch._check(self.number <= 5)


MASKS: dict[str, tuple[Callable[[X], Tensor], str, str]] = {  # what it is proved to be where sizes are checked, and where not
    "holds always": (lambda x: x.causal, "causal", "causal"),
    "holds for one token too": (lambda x: x.causal | (x.k[-1:] < 0), "causal", "causal"),
    "padding": (lambda x: x.causal & (x.kept != 0), "causal & padding(kept)", "causal & padding(kept)"),
    "from 8 tokens on": (lambda x: x.causal | (x.k[-1:] < 7), "causal", ""),
    "less than 64 tokens": (lambda x: x.causal | (x.k + x.s % 64 != x.k + x.s), "causal", ""),
    "a window that no input is longer than": (
        lambda x: x.causal & (x.k > x.q - torch.sym_min(x.s, 64)),
        "causal",
        "window(64)",
    ),
    "a number that a caller gives": (lambda x: x.causal | (x.k < 5 - x.given), "causal", ""),
    "a number that is read and asserted": (lambda x: x.causal | (x.k < 0 - x.number), "causal", ""),
    "ordered positions": (lambda x: x.positions <= x.positions.mT, "causal", ""),
}


class Masks(nn.Module):
    def forward(self, x: Tensor, given: int, count: Tensor, positions: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        parts = X(x, given, count, positions, kept)
        return tuple(sdpa(x, x, x, make(parts)) for make, _, _ in MASKS.values())


class Softmax(nn.Module):
    """Blocks with the lowest number: a row that is nothing but padding gives the mean of V."""

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        scores = x @ x.mT + torch.where(kept[:, None, None, :] != 0, 0.0, torch.finfo(x.dtype).min)
        return torch.softmax(scores, -1) @ x


@cache
def program() -> ExportedProgram:
    b, s, row = Dim("b", min=1, max=64), Dim("s", min=8, max=63), torch.arange(9).expand(2, 9)
    example = {
        "x": torch.randn(2, 1, 9, 8),
        "given": 6,
        "count": torch.tensor(3),
        "positions": row,
        "kept": torch.ones_like(row),
    }
    shapes = {
        "x": {0: b, 2: s},
        "given": Dim.DYNAMIC(min=5, max=99),
        "count": {},
        "positions": {0: b, 1: s},
        "kept": {0: b, 1: s},
    }
    return capture(Masks().eval(), example, shapes).program


def proved(examined: list[Examined]) -> list[str]:
    return [str(e.proof.mask) if e.proof is not None and e.is_proved else "" for e in examined]


def named(masks: list[str]) -> list[str]:
    """Without those that are their formula, which say what the program says."""
    return ["" if mask.startswith("formula") else mask for mask in masks]


@cache
def found(checked: bool) -> list[str]:
    return named(proved(examine_program(program(), checked=checked)))


@pytest.mark.parametrize("name", MASKS)
def test_near_misses(name: str) -> None:
    place, (_, when_checked, when_not) = list(MASKS).index(name), MASKS[name]
    assert (found(True)[place], found(False)[place]) == (when_checked, when_not)


def test_a_declared_fact_is_no_proof() -> None:
    given = (Input("positions").consecutive(),)
    place = list(MASKS).index("ordered positions")
    for checked, expected in ((True, "causal"), (False, "")):
        assert named(proved(examine_program(program(), given, checked=checked)))[place] == expected


def test_what_is_missing_is_said() -> None:
    example = {"x": torch.randn(2, 1, 5, 8), "kept": torch.ones(2, 5, dtype=torch.int64)}
    captured = capture(Softmax().eval(), example, {"x": {0: Dim.AUTO, 2: Dim.AUTO}, "kept": {0: Dim.AUTO, 1: Dim.AUTO}}).program
    for checked, expected in ((True, "padding(kept)"), (False, "")):
        (site,) = examine_program(captured, checked=checked)
        assert proved([site]) == [expected]
    assert site.proof is not None
    assert "only if each row of kept is zeros and ones, with a one, which nobody checks" in site.proof.reason


def test_every_size() -> None:
    ranges = size_ranges(program())
    every, any_number = every_size(ranges), (-(1 << 63), (1 << 63) - 1)
    (size,) = (name for name, r in ranges.items() if r == (8, 63))
    (given,) = (name for name, r in ranges.items() if r == (5, 99))
    assert {name: every[name] for name in (size, given, "u0")} == {size: (1, None), given: any_number, "u0": any_number}


def test_an_assertion_is_not_proved_by_itself() -> None:
    """What export says of a number that is read from data, it knows from the program's own assertions."""
    for checked in (True, False):
        proves = prover_of(program(), checked=checked)
        assert not proves(t.var("u0") >= 0, {})
        assert not proves(t.var("u0") <= 5, {})
