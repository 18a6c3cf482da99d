"""No near miss is taken for the mask it was made from, nor proved to be anything that torch does not agree with."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from adversarial import GENUINE, NEAR_MISSES, NearMiss
from batch import Batch, kept, loses_a_row, replays
from trilithon.errors import CannotLift
from trilithon.prove.prove import Finding, claim, examine
from trilithon.prove.verdict import Proof, Verdict

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
