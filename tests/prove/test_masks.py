"""Every row of the table three ways: it evaluates as torch does, its name is proved, its neighbours are refuted."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from masks import NEVER, PROVED, Attend, Case, export_case, table_shape
from trilithon.prove.program import Examined, examine_program, size_ranges
from trilithon.prove.prove import claim
from trilithon.prove.verdict import Verdict
from trilithon.spec.assumption import guard
from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import Causal, Documents, Formula, Mask

CASES = {**PROVED, **NEVER}
SIZES = ((1, 5, 5), (2, 7, 7), (3, 12, 12))


@cache
def examined(name: str) -> tuple[Examined, dict[str, tuple[int, int | None]]]:
    program = export_case(CASES[name]).program
    (found,) = examine_program(program)
    return found, size_ranges(program)


def random_tables(case: Case, b: int, s: int, t: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tables = {}
    for name, dtype in case.tables.items():
        shape = table_shape(name, b, case.heads, s, t)
        kind = guard(name, case.guard) if case.guard else None
        if kind is not None:
            tables[name] = kind.sample(shape, dtype, generator)
        elif dtype == torch.float32:
            tables[name] = torch.randn(shape, generator=generator)
        else:
            tables[name] = torch.randint(0, 2, shape, generator=generator).to(dtype)
    return tables


def torch_says(case: Case, b: int, s: int, t: int, tables: dict[str, Tensor]) -> Tensor:
    """May attend, as torch evaluates the row: bool [b, h, s, t]."""
    mask = Attend(case).mask(s, t, tables)
    allowed = mask if mask.dtype == torch.bool else mask == 0
    return allowed.expand(b, case.heads, s, t)


@pytest.mark.parametrize("name", PROVED)
def test_mask_is_proved(name: str) -> None:
    case, (found, _) = PROVED[name], examined(name)
    assert found.finding is not None, found.refusal
    proof = found.finding.proof
    assert proof.verdict is Verdict.PROVED, proof.reason
    if isinstance(case.expected, Mask):
        assert proof.mask == case.expected
    else:
        assert case.expected is Documents
        assert isinstance(proof.mask, Documents)
    guards = {a.kind for a in proof.assumptions if a.source == "guard"}
    assert guards == ({case.guard} if case.guard else set())


@pytest.mark.parametrize("name", PROVED)
def test_proved_mask_agrees_with_torch(name: str) -> None:
    case, (found, _) = PROVED[name], examined(name)
    assert found.finding is not None
    for seed, (b, s, t) in enumerate(SIZES):
        t = t if case.square else t + 3
        tables = random_tables(case, b, s, t, seed)
        got = found.finding.proof.mask.materialize(b, case.heads, s, t, tables)
        assert torch.equal(got, torch_says(case, b, s, t, tables))


def neighbours() -> list[tuple[str, Mask]]:
    """Each proved row with each near miss of its mask."""
    rows = []
    for name, case in PROVED.items():
        if isinstance(case.expected, Mask):
            for other in case.expected.near_misses():
                if case.square and "lower_right" in str(other):
                    continue  # the same mask when s == t
                rows.append((name, other))
    return rows


@pytest.mark.parametrize(("name", "other"), neighbours(), ids=str)
def test_near_miss_is_refuted_with_a_witness(name: str, other: Mask) -> None:
    case, (found, ranges) = PROVED[name], examined(name)
    assert found.meaning is not None
    assume = tuple(guard(table, case.guard) for table in case.tables) if case.guard else ()
    proof = claim(found.meaning, other, ranges, assume)
    assert proof.verdict is Verdict.REFUTED, proof.reason
    at = proof.witness
    assert set(at) == {"b", "h", "q", "k", "s", "t"}
    assert 0 <= at["q"] < at["s"]
    assert 0 <= at["k"] < at["t"]
    if not case.tables:
        says = torch_says(case, at["b"] + 1, at["s"], at["t"], {})[at["b"], at["h"], at["q"], at["k"]]
        claimed = other.materialize(at["b"] + 1, case.heads, at["s"], at["t"])[at["b"], at["h"], at["q"], at["k"]]
        assert bool(says) != bool(claimed)


@pytest.mark.parametrize("name", NEVER)
def test_never_proved(name: str) -> None:
    found, ranges = examined(name)
    if found.finding is None:
        assert found.refusal is not None
        assert found.refusal.why
        return
    proofs = (found.finding.proof, *found.finding.alternatives)
    for proof in proofs:
        assert proof.reason
        assert proof.verdict is not Verdict.PROVED or isinstance(proof.mask, Formula), proof.mask
    if proofs[0].verdict is Verdict.PROVED:
        assert found.finding.nearest is not None
        assert found.finding.nearest.verdict is not Verdict.PROVED
    assert found.meaning is not None
    assert claim(found.meaning, Causal(), ranges).verdict is not Verdict.PROVED


@pytest.mark.parametrize(
    "name", ["one_more", "strict", "swapped", "one_head_full", "flipped_cell", "dilated", "full_when_long"]
)
def test_refuted_with_a_witness_that_torch_confirms(name: str) -> None:
    case, (found, _) = NEVER[name], examined(name)
    assert found.finding is not None
    assert isinstance(found.finding.proof.mask, Formula)
    proof = found.finding.nearest
    assert proof is not None
    assert proof.verdict is Verdict.REFUTED
    at = proof.witness
    index = (at["b"], at["h"], at["q"], at["k"])
    says = torch_says(case, at["b"] + 1, at["s"], at["t"], {})[index]
    claimed = proof.mask.materialize(at["b"] + 1, case.heads, at["s"], at["t"])[index]
    assert bool(says) != bool(claimed)


@pytest.mark.parametrize("name", CASES)
def test_lifted_mask_agrees_with_torch(name: str) -> None:
    """The lifted term itself, also of masks without a name, at random sizes and inputs."""
    case, (found, _) = CASES[name], examined(name)
    if found.meaning is None:
        pytest.skip("refused: nothing was lifted")
    for seed, (b, s, t) in enumerate(SIZES):
        t = t if case.square else t + 2
        tables = random_tables(case, b, s, t, 100 + seed)
        env: dict[str, Tensor | int] = {}
        dims = dict(zip(found.meaning.dims, (b, case.heads, s, t), strict=True))
        env.update({size.args[0]: n for size, n in dims.items() if size.op == "var"})
        for axis, (index, n) in enumerate(zip("bhqk", (b, case.heads, s, t), strict=True)):
            env[index] = torch.arange(n).view([-1 if i == axis else 1 for i in range(4)])
        got = evaluate(found.meaning.keep, env, tables).expand(b, case.heads, s, t)
        assert torch.equal(got, torch_says(case, b, s, t, tables))
