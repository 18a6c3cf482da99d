"""Capture: which sizes a program is for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from trilithon.capture.export import capture


class Branch(nn.Module):
    """Export takes one branch, and asserts that no size would take the other."""

    def __init__(self, kept: Callable[[int], bool], half: bool = False) -> None:
        super().__init__()
        self.kept, self.half = kept, half

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1] // 2 if self.half else x.shape[1]
        return x + 1 if self.kept(size) else 2 * x


# An assertion that is not decided by the greatest size stays, and what reads it later refuses what it must.
@pytest.mark.parametrize(
    ("kept", "most"),
    [
        (lambda s: max(0, 64 - s) != 0, 63),
        (lambda s: max(0, 65 - s) != 0, 64),
        (lambda s: max(0, 63 - s) != 0, 64),  # two sizes fail
        (lambda s: max(0, 20 - s) + max(0, s - 20) != 0, 64),  # in the middle
        (lambda s: max(0, s - 1) != 0, 64),  # at the other end
    ],
)
def test_the_greatest_size_is_left_out_where_an_assertion_fails(kept: Callable[[int], bool], most: int) -> None:
    sizes = {"x": {0: Dim("b", min=2, max=8), 1: Dim("s", min=1, max=64)}}
    program = capture(Branch(kept).eval(), {"x": torch.zeros(2, 5)}, sizes).program
    size = str(next(n for n in program.graph.nodes if n.op == "placeholder").meta["val"].shape[1])
    assert {str(k): int(v.upper) for k, v in program.range_constraints.items()}[size] == most


def test_a_size_that_no_call_is_checked_for_stays() -> None:
    """The axis is twice the size that the assertion is about."""
    half = Dim("half", min=1, max=64)
    model = Branch(lambda s: max(0, 64 - s) != 0, half=True).eval()
    program = capture(model, {"x": torch.zeros(2, 10)}, {"x": {1: 2 * half}}).program
    assert [int(v.upper) for v in program.range_constraints.values()][-1] >= 64


def test_the_ranges_of_a_given_program_stay() -> None:
    model = Branch(lambda s: max(0, 64 - s) != 0).eval()
    shapes = {"x": {1: Dim("s", min=1, max=64)}}
    with torch.no_grad():
        given = torch.export.export(
            model, (), {"x": torch.zeros(2, 5)}, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
    made = capture(given).program
    assert [int(p.range_constraints[s].upper) for p in (given, made) for s in p.range_constraints] == [64, 63]
