"""No near miss is taken for the mask it was made from, nor proved to be anything that torch does not agree with."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

from adversarial import GENUINE, NEAR_MISSES, NearMiss
from batch import LONGEST, Batch, MaskFn, kept, loses_a_row, replays
from trilithon.capture.export import capture
from trilithon.errors import CannotLift
from trilithon.prove.program import examine_program
from trilithon.prove.prove import Finding, claim, examine
from trilithon.prove.verdict import Proof, Verdict
from trilithon.spec.masks import Causal

SQUARE = [name for name, case in NEAR_MISSES.items() if case.square]
RECTANGULAR = [name for name, case in NEAR_MISSES.items() if not case.square]
SITES = 50  # of one exported program


@cache
def batch(names: tuple[str, ...]) -> Batch:
    cases = [NEAR_MISSES[name] for name in names]
    return Batch(tuple(case.make for case in cases), cases[0].square)


def of(name: str) -> tuple[Batch, int]:
    """The program that holds a case, and its place there."""
    alike = SQUARE if NEAR_MISSES[name].square else RECTANGULAR
    at = alike.index(name)
    start = at - at % SITES
    return batch(tuple(alike[start : start + SITES])), at - start


@cache
def finding_of(name: str) -> Finding:
    program, n = of(name)
    return examine(program.meaning(n), program.ranges)


UNKNOWN = ("may overflow its integer type", "a row may have no key left", "no counterexample was confirmed")
LIFTED = [name for name, case in NEAR_MISSES.items() if case.outcome != "refused"]


@pytest.mark.parametrize("name", [name for name, case in NEAR_MISSES.items() if case.outcome == "refused"])
def test_what_is_no_mask_is_refused(name: str) -> None:
    program, n = of(name)
    refusal = program.meanings[n]
    assert isinstance(refusal, CannotLift)
    assert refusal.why


@pytest.mark.parametrize("name", LIFTED)
def test_every_proof_agrees_with_torch(name: str) -> None:
    """Also the alternatives; and none of them is the mask that the near miss was made from."""
    program, n = of(name)
    finding = finding_of(name)
    for proof in proofs_in(finding):
        assert not is_unguarded(proof) or proof.mask != NEAR_MISSES[name].of
        program.assert_holds(n, proof)


def proofs_in(finding: Finding) -> list[Proof]:
    return [p for p in (finding.proof, *finding.alternatives) if p.verdict is Verdict.PROVED]


def is_unguarded(proof: Proof) -> bool:
    return not any(a.source == "guard" for a in proof.assumptions)


@pytest.mark.parametrize("name", [name for name, case in NEAR_MISSES.items() if case.form is not None])
def test_what_it_is_instead_is_proved(name: str) -> None:
    proof = finding_of(name).proof
    assert proof.verdict is Verdict.PROVED, proof.reason
    assert proof.mask == NEAR_MISSES[name].form


@pytest.mark.parametrize("name", LIFTED)
def test_lifted_mask_agrees_with_torch(name: str) -> None:
    """Where the proof does not rest on an obligation that fails."""
    program, n = of(name)
    if NEAR_MISSES[name].outcome == "unknown":
        return
    meaning = program.meaning(n)
    for run in program.runs:
        says = kept(run.masks[n])
        assert says is not None
        assert torch.equal(program.lifted(n, run, meaning.keep), says)


@pytest.mark.parametrize("name", LIFTED)
def test_the_genuine_mask_is_not_it(name: str) -> None:
    """The explicit claim is refuted with a witness that torch confirms, or unknown for the reason expected."""
    case, (program, n) = NEAR_MISSES[name], of(name)
    proof = claim(program.meaning(n), case.of, program.ranges)
    if case.outcome == "unknown":
        assert proof.verdict is Verdict.UNKNOWN
        assert any(reason in proof.reason for reason in UNKNOWN)
        return
    assert proof.verdict is Verdict.REFUTED, proof.reason
    witness = program.witness(n, case.of)
    assert witness is not None
    assert replays(case.make, case.of, witness.cell, witness.sample)


@pytest.mark.parametrize("name", [name for name, case in NEAR_MISSES.items() if case.outcome != "refused"])
def test_it_is_a_near_miss(name: str) -> None:
    """Else the case shows nothing: somewhere torch makes another mask than the genuine one."""
    case, (program, n) = NEAR_MISSES[name], of(name)
    assert any(differs(program, n, case, i) for i in range(len(program.runs)))


def differs(program: Batch, n: int, case: NearMiss, i: int) -> bool:
    run = program.runs[i]
    genuine = program.lifted(n, run, case.of.at_sizes(*program.meaning(n).dims[2:]))
    says = kept(run.masks[n])
    return says is None or not torch.equal(genuine, says) or loses_a_row(run.masks[n])


def test_genuine_masks_are_proved() -> None:
    """What is mutated is recognised as it stands."""
    for square in (True, False):
        genuine = [g for g in GENUINE.values() if g.square == square]
        program = Batch(tuple(g.make for g in genuine), square)
        for n, g in enumerate(genuine):
            proof = claim(program.meaning(n), g.form, program.ranges)
            assert proof.verdict is Verdict.PROVED, proof.reason
            program.assert_holds(n, proof)


class Layers(nn.Module):
    """Four layers of attention; `odd` is the mask of the third."""

    def __init__(self, odd: MaskFn) -> None:
        super().__init__()
        causal = GENUINE["causal"].make
        self.layers = nn.ModuleList(Attention(mask) for mask in (causal, causal, odd, causal))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Attention(nn.Module):
    def __init__(self, mask: MaskFn) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[2])
        return scaled_dot_product_attention(x, x, x, attn_mask=self.mask(i[:, None], i[None, :], {}))


@pytest.mark.parametrize("name", ["causal-one_cell", "causal-query_later", "causal-where_swapped", "window_5"])
def test_one_odd_layer_is_told_from_the_others(name: str) -> None:
    """And its mask is its own: no other layer's proof is taken for it."""
    case = NEAR_MISSES[name]
    example, shapes = {"x": torch.randn(1, 2, 6, 4)}, {"x": {2: Dim("s", min=1, max=LONGEST)}}
    found = examine_program(capture(Layers(case.make).eval(), example, shapes).program)
    assert [site.site.name for site in found] == [f"layers.{n}" for n in range(4)]
    proofs = [site.proof for site in found]
    assert all(proof is not None and proof.verdict is Verdict.PROVED for n, proof in enumerate(proofs) if n != 2)
    assert [n for n, proof in enumerate(proofs) if proof is not None and proof.mask == Causal()] == [0, 1, 3]
