"""Biases, caps and sinks: recognised by what they compute, carried where they are positions', their neighbours refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from trilithon.capture.export import capture
from trilithon.errors import CannotLift
from trilithon.lift.meaning import Meaning
from trilithon.prove.mask_graph import MaskGraph
from trilithon.prove.program import Examined, examine_program
from trilithon.prove.validate import validate
from trilithon.prove.verdict import Verdict
from trilithon.spec import float_term
from trilithon.spec import term as t
from trilithon.spec.masks import Causal, Full, H, K, Q
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars

HEADS, LONGEST = 2, 64
SLOPES = torch.tensor([0.5, 0.25])[:, None, None]
Scores = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # scores [b h s t], q [s 1], k [1 t], an input table [b t]


class Eager(nn.Module):
    """Attention written out, whose scores `change` turns into what the softmax sees."""

    def __init__(self, change: Scores, softmax: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.change, self.softmax = change, softmax or (lambda x: torch.softmax(x, dim=-1))
        self.table = nn.Parameter(torch.randn(2 * LONGEST + 1, HEADS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
        scores = self.change((q @ k.transpose(2, 3)) * 0.5, rows, keys, x if x is not None else self.table)
        return self.softmax(scores) @ v


class Relative(Eager):
    """A table of distances, as T5 has it."""

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(lambda a, q, k, x: a + self.table[distance(q, k) + LONGEST].permute(2, 0, 1)[None])


def causal(q: Tensor, k: Tensor, low: float = -torch.inf) -> Tensor:
    return torch.where(k <= q, 0.0, low)


def examined(module: nn.Module) -> Examined:
    example: dict[str, Any] = {name: torch.randn(2, HEADS, 6, 4) for name in "qkv"} | {"x": torch.randn(2, 6)}
    b, s = Dim("b", min=1, max=8), Dim("s", min=1, max=LONGEST)
    shapes = {name: {0: b, 2: s} for name in "qkv"} | {"x": {0: b, 1: s}}
    (found,) = examine_program(capture(module.eval(), example, shapes).program)
    return found


def meaning_of(module: nn.Module) -> Meaning:
    found = examined(module)
    assert found.meaning is not None, found.refusal
    assert found.finding is not None
    assert found.finding.proof.verdict is Verdict.PROVED, found.finding.proof.reason
    return found.meaning


BIASES: dict[str, tuple[nn.Module, str]] = {
    "slope_times_distance": (Eager(lambda a, q, k, x: a + SLOPES * (k - q) + causal(q, k)), "alibi"),
    "slope_times_key": (Eager(lambda a, q, k, x: a + SLOPES * k + causal(q, k)), "alibi"),
    "twice": (Eager(lambda a, q, k, x: a + SLOPES * k + SLOPES * (k - q) + causal(q, k)), "alibi"),
    "slope_times_positions": (
        Eager(lambda a, q, k, x: a + SLOPES * (x > 0).long().cumsum(-1)[:, None, None]),
        "alibi(positions",
    ),
    "symmetric": (Eager(lambda a, q, k, x: a - SLOPES * (k - q).abs() + causal(q, k)), "relative("),
    "buckets": (Relative(lambda q, k: (k - q).clamp(-8, 8)), "relative(p_table)"),
    "buckets_of_sums": (Relative(lambda q, k: (k + q).clamp(-8, 8)), "dense(p_table)"),
    "of_a_row": (Eager(lambda a, q, k, x: a + x[:, None, None, :] + causal(q, k)), "dense(x)"),
    "falls_with_the_key": (Eager(lambda a, q, k, x: a - SLOPES * (q * k) + causal(q, k)), "dense("),
}


@pytest.mark.parametrize("name", BIASES)
def test_bias_is_named(name: str) -> None:
    module, text = BIASES[name]
    bias = meaning_of(module).bias
    assert str(bias).startswith(text), bias


@pytest.mark.parametrize("cap", [5.0, 50.0])
def test_softcap(cap: float) -> None:
    meaning = meaning_of(Eager(lambda a, q, k, x: torch.tanh(a / cap) * cap + causal(q, k)))
    assert meaning.softcap == pytest.approx(cap)
    assert meaning.scale == pytest.approx(0.5)


def test_a_cap_on_the_masked_scores_blocks_nothing() -> None:
    found = examined(Eager(lambda a, q, k, x: torch.tanh((a + causal(q, k)) / 5.0) * 5.0))
    assert isinstance(found.refusal, CannotLift)


def with_sinks(cut: slice = slice(None, -1)) -> Callable[[Tensor], Tensor]:
    def softmax(scores: Tensor) -> Tensor:
        column = torch.tensor([0.3, -0.2]).view(1, HEADS, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        joined = torch.cat([scores, column], dim=-1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        return torch.softmax(joined, dim=-1)[..., cut]

    return softmax


def test_sinks_are_seen_through() -> None:
    found = examined(Eager(lambda a, q, k, x: a + causal(q, k), with_sinks()))
    assert found.meaning is not None
    assert found.meaning.sinks
    assert found.finding is not None
    assert found.finding.proof.mask == Causal()


def test_another_column_is_no_sink() -> None:
    """The first column cut off instead of the last: the weights belong to other keys."""
    module = Eager(lambda a, q, k, x: a + causal(q, k), with_sinks(slice(1, None)))
    example: dict[str, Any] = {name: torch.randn(2, HEADS, 6, 4) for name in "qkv"} | {"x": torch.randn(2, 6)}
    assert examine_program(capture(module.eval(), example).program) == []


@pytest.mark.parametrize("by", [1.0, -1.0, -1e4])
def test_a_constant_is_no_bias(by: float) -> None:
    found = examined(Eager(lambda a, q, k, x: a + torch.where(k <= q, 0.0, by)))
    assert found.refusal is not None
    assert "is a bias" in found.refusal.why


def test_a_bias_that_is_all_there_is_is_refused() -> None:
    found = examined(Eager(lambda a, q, k, x: a + x[:, None, None, :]))
    assert found.refusal is not None
    assert "depends on data" in found.refusal.why


def test_an_addend_that_cannot_be_lifted_is_dense() -> None:
    meaning = meaning_of(Eager(lambda a, q, k, x: a + torch.fft.fft(x).real[:, None, None, :] + causal(q, k)))
    assert str(meaning.bias).startswith("dense(computed:")


def test_scores_of_rank_three() -> None:
    class Flat(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
            b, h, s, d = q.shape
            rows, keys = torch.arange(s)[:, None], torch.arange(s)[None, :]
            flat = [y.reshape(b * h, s, d) for y in (q, k, v)]
            slopes = (SLOPES * keys).expand(b, h, 1, s).reshape(b * h, 1, s)
            scores = torch.baddbmm(slopes, flat[0], flat[1].transpose(1, 2), beta=1.0, alpha=0.5)
            weights = torch.softmax(scores.view(b, h, s, s) + causal(rows, keys, torch.finfo(torch.float32).min), dim=-1)
            return torch.bmm(weights.view(b * h, s, s), flat[2]).view(b, h, s, d)

    meaning = meaning_of(Flat())
    assert meaning.flat
    assert str(meaning.bias) == "alibi"
    assert meaning.scale == pytest.approx(0.5)


def test_full_is_still_full() -> None:
    found = examined(Eager(lambda a, q, k, x: a))
    assert found.finding is not None
    assert found.finding.proof.mask == Full()


def validated_with(module: nn.Module, **other: Any) -> str:
    """How the program's own scores differ from a meaning that was changed by hand."""
    found = examined(module)
    assert found.meaning is not None and found.proof is not None
    meaning, graph = replace(found.meaning, **other), MaskGraph.of(found.site, found.meaning.tables)
    ranges = {name: (1, 8) for size in found.meaning.dims for name in free_vars(size)}
    return validate(graph, found.site, meaning, found.proof, ranges).difference


TO_END = Eager(lambda a, q, k, x: a + SLOPES * (k - k.shape[1]) + causal(q, k))
SLOPE = t.read("c_lifted_tensor_0", (H, t.ZERO, t.ZERO), "float")


def slope_times(position: Term) -> Term:
    return float_term.apply("mul", "float32", SLOPE, float_term.to_float(position, "float32"))


@pytest.mark.parametrize(
    ("position", "is_same"),
    [(K, True), (K - Q, True), (K + 7 * H - 3, True), (K * 2, False), (K + t.mod(K, t.integer(2)), False), (Q, False)],
    ids=str,
)
def test_a_bias_may_differ_by_a_number_a_row(position: Term, is_same: bool) -> None:
    difference = validated_with(TO_END, position_bias=slope_times(position))
    assert ("not the one by position" in difference) is not is_same
    assert is_same is (difference == "")


def test_a_wrong_bias_by_position_is_seen_in_one_head() -> None:
    wrong = t.ite(H.eq(0), slope_times(K), slope_times(K * 2))
    assert "not the one by position" in validated_with(TO_END, position_bias=wrong)


def test_other_sinks_are_seen() -> None:
    module = Eager(lambda a, q, k, x: a + causal(q, k), with_sinks())
    assert validated_with(module) == ""
    assert "its sinks are not" in validated_with(module, sinks_table="p_table")
