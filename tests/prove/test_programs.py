"""Whole programs that look like attention under one mask and compute something else: the false claim is never proved.

Each row is checked twice: the prover must not prove the claim, and the lowered program must give what eager gives on
inputs that tell the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import scaled_dot_product_attention

import trilithon
from trilithon.capture.export import capture
from trilithon.capture.sites import find_sites
from trilithon.errors import CannotLift
from trilithon.lift.meaning import lift_site
from trilithon.prove.program import size_ranges
from trilithon.prove.prove import claim
from trilithon.prove.verdict import Verdict
from trilithon.spec.masks import Causal, Full, Mask, Padding

X = dict[str, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, X], Tensor]
INF, TOKENS, FOUR = math.inf, 64, torch.arange(4)


def cells(q: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(q.shape[2])
    return i[:, None], i[None, :]


def fused(mask: Callable[[Tensor, Tensor, X], Tensor]) -> Attend:
    """Attention by the fused op."""
    return lambda q, k, v, x: scaled_dot_product_attention(q, k, v, attn_mask=mask(*cells(q), x))


def eager(logits: Callable[[Tensor, Tensor, Tensor, X], Tensor]) -> Attend:
    """Attention written out; `logits` gets the scores, the indices and the other inputs."""
    return lambda q, k, v, x: logits(q @ k.transpose(-1, -2) * 0.5, *cells(q), x).softmax(-1) @ v


def counts_at_step(i: Tensor, j: Tensor, x: X) -> Tensor:
    """A running sum of ones at two tokens only; with `step0` the variable of an induction it would be of ones."""
    n = j[0]
    return j < ((n == x["step0"]) | (n == 0)).long().cumsum(-1)[:, None]


def threes_but_for_step(i: Tensor, j: Tensor, x: X) -> Tensor:
    return torch.where(j == x["step"], 0, 3).cumsum(-1) <= j + 1


def far_apart(i: Tensor, j: Tensor, x: X) -> Tensor:
    number = x["huge_float"].long()
    return j * (1 << 50) + number <= i * (1 << 50) + number


def one_head(q: Tensor, k: Tensor, v: Tensor, x: X) -> Tensor:
    attend = eager(lambda w, i, j, x: torch.where((j <= i) | (FOUR[:, None, None] > 0), w, -INF))
    return attend(q[:, :1], k[:, :1], v[:, :1], x)


def one_flat_row(q: Tensor, k: Tensor, v: Tensor, x: X) -> Tensor:
    i, j = cells(q)
    flat = [y[:1, :1].reshape(1, y.shape[2], y.shape[3]) for y in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2))
    return torch.where((j <= i) | (FOUR[:, None, None] > 0), scores, -INF).softmax(-1) @ flat[2]


def two_softmaxes(q: Tensor, k: Tensor, v: Tensor, x: X) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).masked_fill(~x["attention_mask"][:, None, None, :], -INF)
    return (scores.softmax(-1) @ v).nan_to_num(7.0) + torch.ops.aten._safe_softmax(scores, -1) @ v


def below_row_maximum(q: Tensor, k: Tensor, v: Tensor, x: X) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).masked_fill(~x["attention_mask"][:, None, None, :], -INF)
    return (torch.ops.aten._safe_softmax(scores - scores.amax(-1, keepdim=True), -1) @ v).nan_to_num(7.0)


def over_queries(q: Tensor, k: Tensor, v: Tensor, x: X) -> Tensor:
    i, j = cells(q)
    return (q @ k.transpose(-1, -2)).masked_fill(j > i, -INF).softmax(-2) @ v


# name: (program, what its mask is not)
ROWS: dict[str, tuple[Attend, Mask]] = {
    "remainder_by_a_negative_size": (fused(lambda i, j, x: (j <= i) & (7 % (41 - 2 * j) >= 0)), Causal()),
    "quotient_by_a_negative_index": (fused(lambda i, j, x: (i + 1) // (-1 - j) <= -1), Causal()),
    "number_below_zero": (fused(lambda i, j, x: (j <= i) | (torch.full_like(j, x["below"].item()) < 0)), Causal()),
    "number_that_wraps": (fused(lambda i, j, x: j + x["huge"].item() <= i + x["huge"].item()), Causal()),
    "float_number_that_wraps": (fused(far_apart), Causal()),
    "input_named_as_an_index": (fused(lambda i, j, x: (j <= i) & (j - 1000 <= x["k"])), Causal()),
    "input_named_as_a_step": (fused(counts_at_step), Causal()),
    "input_named_as_another_step": (fused(threes_but_for_step), Full()),
    "input_named_as_the_scores": (eager(lambda w, i, j, x: torch.where(j <= i, w, x["score"] * 0.5)), Full()),
    "scores_with_fewer_heads": (one_head, Causal()),
    "flat_scores_with_fewer_rows": (one_flat_row, Causal()),
    "float_number_beside_a_bias": (fused(lambda i, j, x: torch.where(far_apart(i, j, x), x["score"], -INF)), Causal()),
    "scores_lost_in_a_sum": (eager(lambda w, i, j, x: w + torch.where(j <= i, 1e30, -INF) - 1e30), Causal()),
    "signed_zeros": (fused(lambda i, j, x: (1.0 / torch.where(j <= i, 0.0, -0.0)).clamp(max=0.0)), Full()),
    "two_softmaxes": (two_softmaxes, Padding("attention_mask", "bool")),
    "below_row_maximum": (below_row_maximum, Padding("attention_mask", "bool")),
    "scores_times_mask": (eager(lambda w, i, j, x: w * (j <= i)), Causal()),
    "filled_with_zero": (eager(lambda w, i, j, x: w.masked_fill(j > i, 0.0)), Causal()),
    "filled_where_kept": (eager(lambda w, i, j, x: w.masked_fill(j <= i, -INF)), Causal()),
    "fills_weakly": (eager(lambda w, i, j, x: w.masked_fill(j > i, -3.0)), Causal()),
    "own_key_counts_twice": (eager(lambda w, i, j, x: torch.where(j == i, w * 2, w).masked_fill(j > i, -INF)), Causal()),
    "scores_of_another_head": (eager(lambda w, i, j, x: w.flip(1).masked_fill(j > i, -INF)), Causal()),
    "scores_transposed": (eager(lambda w, i, j, x: w.transpose(-1, -2).masked_fill(j > i, -INF)), Causal()),
    "softmax_over_queries": (over_queries, Causal()),
    "all_negated": (eager(lambda w, i, j, x: -(w.masked_fill(j > i, -INF))), Causal()),
}
OTHER_INPUTS: X = {
    "below": torch.tensor(-5),
    "huge": torch.tensor((1 << 63) - 9),
    "huge_float": torch.tensor([2.0**63 - 2.0**40]),
    "k": torch.tensor(-990),
    "step": torch.tensor(3),
    "step0": torch.tensor(3),
    "score": torch.full((2, 2, TOKENS, TOKENS), -9.0),
    "attention_mask": torch.zeros(2, TOKENS, dtype=torch.bool),
}
ALONE = ("two_softmaxes", "below_row_maximum")  # their guards would hold up the others
NO_SITE = ("scores_of_another_head", "scores_transposed", "softmax_over_queries", "all_negated")  # not seen as attention
TOGETHER = tuple(name for name in ROWS if name not in ALONE)


class Attends(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: X) -> Tensor:
        return self.attend(q, k, v, x)


class Program(nn.Module):
    """Several rows, each a module of its own, so that a site tells whose it is."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: Attends(ROWS[name][0]) for name in names})

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        below: Tensor,
        huge: Tensor,
        huge_float: Tensor,
        k: Tensor,
        step: Tensor,
        step0: Tensor,
        score: Tensor,
        attention_mask: Tensor,
    ) -> dict[str, Tensor]:
        x = dict(zip(OTHER_INPUTS, (below, huge, huge_float, k, step, step0, score, attention_mask), strict=True))
        return {name: part(query, key, value, x) for name, part in self.parts.items()}


def inputs() -> X:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 2, TOKENS, 4, generator=g) for name in ("query", "key", "value")} | OTHER_INPUTS


@cache
def exported(names: tuple[str, ...]) -> ExportedProgram:
    s = Dim("s", min=1, max=1024)
    shapes = {name: {d: s for d, n in enumerate(x.shape) if n == TOKENS} for name, x in inputs().items()}
    return capture(Program(names).eval(), inputs(), shapes).program


def group_of(name: str) -> tuple[str, ...]:
    return (name,) if name in ALONE else TOGETHER


@pytest.mark.parametrize("name", ROWS)
def test_the_false_claim_is_not_proved(name: str) -> None:
    program = exported(group_of(name))
    sites = [site for site in find_sites(program.graph) if site.name == f"parts.{name}"]
    assert len(sites) == (name not in NO_SITE)
    with suppress(CannotLift):
        for site in sites:
            meaning = lift_site(program, site)
            assert claim(meaning, ROWS[name][1], size_ranges(program)).verdict is not Verdict.PROVED


@cache
def outputs(names: tuple[str, ...]) -> tuple[X, X]:
    """What eager gives, and what the lowered program gives; the same where a guard stops that."""
    eager_ones = Program(names).eval()(**inputs())
    try:
        return eager_ones, trilithon.lower(exported(names)).module()(**inputs())
    except RuntimeError as stopped:
        if "does not hold" not in str(stopped):
            raise
        return eager_ones, eager_ones


@pytest.mark.parametrize("name", ROWS)
def test_the_lowered_program_gives_what_eager_gives(name: str) -> None:
    expected, given = outputs(group_of(name))
    torch.testing.assert_close(given[name], expected[name], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("low", "proved"), [(None, False), (5, True)])
def test_an_integer_that_a_caller_gives_may_be_negative(low, proved):
    """torch.export says that it is 0 or more, and looks at no call; only a range that the user gave is looked at."""

    class Shifted(nn.Module):
        def forward(self, x: torch.Tensor, shift: int) -> torch.Tensor:
            place = torch.arange(x.shape[2])
            allowed = (place <= place[:, None]) | (place + shift < 0) | (place + shift > 1 << 40)
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=allowed)

    x, given = torch.randn(1, 1, 7, 8), Dim.DYNAMIC if low is None else Dim.DYNAMIC(min=low, max=99)
    program = torch.export.export(Shifted(), (x, 6), dynamic_shapes={"x": {2: Dim.AUTO}, "shift": given}, strict=False)
    (site,) = trilithon.explain(program).sites
    assert (str(site.mask) == "causal") is proved
    lowered = trilithon.lower(program).module()
    for shift in (7, *(() if proved else (-3, 1 << 41))):
        torch.testing.assert_close(lowered(x, shift), program.module()(x, shift))


def as_before(captured: ExportedProgram, *calls: dict[str, Any]) -> None:
    """The lowered program gives what the captured one gives."""
    lowered, own = trilithon.lower(captured).module(), captured.module()
    for given in calls:
        torch.testing.assert_close(lowered(**given), own(**given))


def test_an_integer_that_a_caller_gives_is_no_size() -> None:
    """Sums with it may wrap around, and as an index it may count from the end."""

    class Given(nn.Module):
        def forward(self, x: Tensor, step: int, last: int) -> tuple[Tensor, ...]:
            place = torch.arange(x.shape[2])
            masks = [(place <= place[:, None]) | differs for differs in (place + step < step, place[last] != last)]
            return tuple(scaled_dot_product_attention(x, x, x, mask) for mask in masks)

    x, shapes = torch.randn(1, 1, 7, 8), {"x": {2: Dim.AUTO}, "step": Dim.DYNAMIC, "last": Dim.DYNAMIC}
    captured = capture(Given().eval(), {"x": x, "step": 3, "last": 4}, shapes).program
    assert [str(site.mask) == "causal" for site in trilithon.explain(captured).sites] == [False, False]
    as_before(captured, {"x": x, "step": 3, "last": 4}, {"x": x, "step": (1 << 63) - 1, "last": -1})


def test_what_a_program_asserts_of_data_stays_asserted() -> None:
    """A proof may rest on it, so it is no proof of itself."""

    class Asserted(nn.Module):
        def forward(self, x: Tensor, count: Tensor) -> Tensor:
            place, number = torch.arange(x.shape[2]), count.item()
            torch._check(number >= 0)
            torch._check(number <= 5)
            return scaled_dot_product_attention(x, x, x, (place <= place[:, None]) | (place + number < 0))

    x = torch.randn(1, 1, 7, 8)
    captured = capture(Asserted().eval(), {"x": x, "count": torch.tensor(3)}, {"x": {2: Dim.AUTO}, "count": {}}).program
    (site,) = trilithon.explain(captured).sites
    assert str(site.mask) == "causal"
    as_before(captured, {"x": x, "count": torch.tensor(5)})
    for beyond in (-3, 6):
        with pytest.raises(RuntimeError, match="u0"):
            trilithon.lower(captured).module()(x=x, count=torch.tensor(beyond))


def test_a_scale_that_follows_from_an_input_is_no_number() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scaled_dot_product_attention(x, x, x, is_causal=True)

    shapes = {"x": {2: Dim.AUTO, 3: Dim.AUTO}}
    captured = capture(Wide().eval(), {"x": torch.randn(1, 1, 7, 8)}, shapes).program
    (site,) = trilithon.explain(captured).sites
    assert str(site.mask) == "causal"
    assert "its scale is not a number of the program" in site.runs_on
    as_before(captured, {"x": torch.randn(1, 1, 7, 16)})


def test_one_head_of_queries_over_several_of_keys_is_broadcasting() -> None:
    class OneHead(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, k, is_causal=True)

    q, k = torch.randn(1, 1, 7, 8), torch.randn(1, 4, 7, 8)
    captured = capture(OneHead().eval(), {"q": q, "k": k}, {"q": {2: Dim.AUTO}, "k": {2: Dim.AUTO}}).program
    (site,) = trilithon.explain(captured).sites
    assert "fit only by broadcasting" in site.reason
    as_before(captured, {"q": q, "k": k})
