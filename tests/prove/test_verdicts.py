"""The four verdicts: what each one needs, what it lists, and what it never claims."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

import trilithon
from masks import Case, export_case, packed
from trilithon.errors import InputError
from trilithon.lift.meaning import Meaning
from trilithon.prove.program import examine_program, size_ranges
from trilithon.prove.prove import Ranges, claim
from trilithon.prove.verdict import Proof, Verdict
from trilithon.report.report import Report
from trilithon.spec.assumption import KINDS, Assumption, Kind, guard
from trilithon.spec.masks import Causal, Full, SlidingWindow

INT = torch.int64


def lifted(case: Case) -> tuple[Meaning, Ranges]:
    program = export_case(case).program
    (found,) = examine_program(program)
    assert found.meaning is not None
    return found.meaning, size_ranges(program)


PADDED = Case(lambda q, k, x: (k <= q) & x["attention_mask"][:, None, None, :].bool(), None, {"attention_mask": INT})


def test_contradicting_assumptions_are_vacuous(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = Kind("{0} is all zeros", lambda e, _: e.eq(0), lambda x: (x == 0).all(), lambda shape, g: torch.zeros(shape))
    monkeypatch.setitem(KINDS, "all_zeros", zeros)
    meaning, ranges = lifted(PADDED)
    both = (guard("attention_mask", "all_ones"), guard("attention_mask", "all_zeros"))
    for mask in (Causal(), Full()):
        proof = claim(meaning, mask, ranges, both)
        assert proof.verdict is Verdict.VACUOUS
        assert proof.mask == mask
        assert proof.reason == "the assumptions contradict each other: no input meets them"
        assert proof.assumptions == both
    assert claim(meaning, Causal(), ranges, both[:1]).verdict is Verdict.PROVED


def test_no_time_is_unknown() -> None:
    meaning, ranges = lifted(Case(lambda q, k, x: (k <= q) & (k > q - 5000), None))
    proof = claim(meaning, Causal(), ranges, seconds=0.0)
    assert proof.verdict is Verdict.UNKNOWN
    assert proof.reason == "the time budget of 0 s is spent"
    assert proof.witness == {}


def test_a_proof_has_no_truth_value() -> None:
    proof = Proof(Causal(), Verdict.PROVED)
    with pytest.raises(TypeError, match=r"proof\.verdict is Verdict\.PROVED"):
        assert proof


def test_the_witness_is_small_and_torch_confirms_it() -> None:
    meaning, ranges = lifted(Case(lambda q, k, x: k <= q + 1, None))
    proof = claim(meaning, Causal(), ranges)
    assert proof.verdict is Verdict.REFUTED
    at = proof.witness
    assert at["k"] == at["q"] + 1
    assert at["k"] < at["t"] <= 8 and at["s"] == at["t"]
    assert proof.reason.startswith("not causal: at b=") and "the mask allows what causal blocks" in proof.reason


def test_a_window_longer_than_the_range_is_causal_within_it() -> None:
    program = export_case(Case(lambda q, k, x: (k <= q) & (k > q - 5000), None)).program
    (found,) = examine_program(program)
    assert found.proof is not None and found.proof.verdict is Verdict.PROVED
    assert found.proof.mask == Causal()
    (bound,) = found.proof.assumptions
    assert bound.source == "export range" and bound.kind == "range"
    assert str(bound).endswith("<= 4096 [export range]")


@pytest.mark.parametrize(("window", "proved"), [(4095, False), (4096, True)])
def test_the_edge_of_the_range(window: int, proved: bool) -> None:
    meaning, ranges = lifted(Case(lambda q, k, x: (k <= q) & (k > q - window), None))
    assert (claim(meaning, Causal(), ranges).verdict is Verdict.PROVED) == proved
    exact = claim(meaning, SlidingWindow(window), ranges)
    assert exact.verdict is Verdict.PROVED and exact.assumptions == ()


class Packed(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        mask = packed(i[:, None], i[None, :], {"position_ids": position_ids})
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def explain_packed(*assume: Assumption) -> Report:
    b, s = Dim("b", min=1, max=8), Dim("s", min=1, max=64)
    heads = {0: b, 2: s}
    example = {name: torch.randn(2, 2, 6, 4) for name in "qkv"} | {"position_ids": torch.arange(6).expand(2, 6).contiguous()}
    shapes = {"q": heads, "k": heads, "v": heads, "position_ids": {0: b, 1: s}}
    return trilithon.explain(Packed().eval(), example, shapes, assume=assume)


def test_declared_assumptions_are_listed_as_declared() -> None:
    (site,) = explain_packed(trilithon.position_ids.consecutive()).sites
    assert site.verdict is Verdict.PROVED and site.mask == Causal()
    about = [a for a in site.assumptions if a.table == "position_ids"]
    assert [(a.kind, a.source) for a in about] == [("consecutive", "declared")]
    assert "each row of position_ids is consecutive [declared]" in map(str, site.assumptions)


def test_undeclared_it_is_a_guard() -> None:
    (site,) = explain_packed().sites
    assert site.verdict is Verdict.PROVED and site.mask == Causal()
    assert {a.source for a in site.assumptions if a.table == "position_ids"} == {"guard"}


def test_assuming_about_a_missing_input_is_an_error() -> None:
    with pytest.raises(InputError) as caught:
        explain_packed(trilithon.attention_mask.all_ones())
    assert str(caught.value) == (
        "cannot assume 'attention_mask is all ones'\n"
        "  because this program has no input attention_mask\n"
        "  its inputs are k, position_ids, q, v"
    )
