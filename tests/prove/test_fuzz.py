"""Random masks: whatever is proved must agree with brute force at every small size.

Two kinds: terms, which try the prover, and torch code that is exported (`spelling`), which tries the handlers too.
`pytest tests/prove/test_fuzz.py --hypothesis-profile=long` looks for as long as one likes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from batch import Batch, Run, kept, replays
from spelling import COUNTS, TO_KEYS, masks, run
from trilithon.errors import CannotLift
from trilithon.lift.meaning import Meaning
from trilithon.prove.prove import claim, examine
from trilithon.prove.verdict import Proof, Verdict
from trilithon.spec import term as t
from trilithon.spec.assumption import KINDS, Assumption
from trilithon.spec.evaluate import evaluate
from trilithon.spec.masks import B, Causal, Documents, Full, H, K, Mask, Padding, Q, SlidingWindow
from trilithon.spec.term import Term
from trilithon.spec.traverse import tables as tables_of

S = t.var("s70")
RANGES: dict[str, tuple[int, int | None]] = {"s70": (1, 64)}
TABLES = {"flags": (t.integer(2), S), "segments": (t.integer(2), S)}


def flag(index: Term) -> Term:
    return ~t.read("flags", (B, index), "int").eq(0)


def segment(index: Term) -> Term:
    return t.read("segments", (B, index), "int")


small = st.integers(-2, 4)
atoms = st.one_of(
    st.builds(lambda c: K <= Q + c, small),
    st.builds(lambda c: K > Q - c, small),
    st.builds(lambda c: c + Q < K, small),
    st.builds(lambda c: K < c, small),
    st.builds(lambda a, c: a * Q >= a * K + c, st.integers(1, 3), small),
    st.builds(lambda n: ((Q - K) + 0).eq(n), small),
    st.builds(lambda h: (K <= Q) | H.eq(h), st.integers(0, 2)),
    st.just(flag(K)),
    st.just(flag(Q)),
    st.just(t.eq(segment(Q), segment(K))),
    st.just(t.TRUE),
)
formulas = st.recursive(
    atoms,
    lambda inner: st.one_of(st.builds(t.conj, inner, inner), st.builds(t.disj, inner, inner), st.builds(t.negate, inner)),
    max_leaves=5,
)


def meaning_of(keep: Term) -> Meaning:
    return Meaning(keep, (t.integer(2), t.integer(2), S, S), 1.0, ("False",), False, (), dict(TABLES), {})


def grids(keep: Term, s: int, seed: int, guards: Sequence[Assumption] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """What a term says, and the tables it says it of, of which the guards hold."""
    generator = torch.Generator().manual_seed(seed)
    tables = {name: torch.randint(0, n, (2, s), generator=generator) for name, n in (("flags", 2), ("segments", 3))}
    for guard in guards:
        tables[guard.table] = KINDS[guard.kind].sample((2, s), generator).long()
    assert all(guard.holds(tables[guard.table]) for guard in guards)
    env: dict[str, Tensor | int] = {"s70": s}
    for axis, (name, n) in enumerate(zip("bhqk", (2, 2, s, s), strict=True)):
        env[name] = torch.arange(n).view([-1 if i == axis else 1 for i in range(4)])
    return evaluate(keep, env, tables).expand(2, 2, s, s), tables


@settings(max_examples=25 * settings().max_examples)
@given(formulas)
def test_no_false_proof(keep: Term) -> None:
    """Every proof that `examine` gives, primary or alternative, at all sizes up to 6."""
    finding = examine(meaning_of(keep), RANGES, seconds=5.0)
    for proof in (finding.proof, *finding.alternatives):
        if proof.verdict is not Verdict.PROVED:
            assert proof.mask is not None
            continue
        guards = [a for a in proof.assumptions if a.source == "guard"]
        for s in range(1, 7):
            for seed in range(3):
                says, tables = grids(keep, s, seed, guards)
                assert torch.equal(proof.mask.materialize(2, 2, s, s, tables), says), (keep, proof)


CLAIMS: list[Mask] = [
    Full(),
    Causal(),
    SlidingWindow(1),
    SlidingWindow(3),
    Padding("flags"),
    Causal() & Padding("flags"),
    Documents(segment(Q)),
    Causal() & Documents(segment(Q)),
]


@settings(max_examples=20 * settings().max_examples)
@given(formulas, st.sampled_from(CLAIMS))
def test_claims_agree_with_brute_force(keep: Term, mask: Mask) -> None:
    """PROVED never where brute force finds a difference; REFUTED never where the two are the same term."""
    proof = claim(meaning_of(keep), mask, RANGES, seconds=5.0)
    same = all(
        torch.equal(mask.materialize(2, 2, s, s, tables), says)
        for s in range(1, 7)
        for seed in range(3)
        for says, tables in [grids(keep, s, seed)]
    )
    if not same:
        assert proof.verdict is Verdict.REFUTED, (keep, mask, proof)
    if proof.verdict is Verdict.PROVED:
        assert same
    if proof.verdict is Verdict.REFUTED:
        assert set(proof.witness) == {"b", "h", "q", "k", "s", "t"}


SITES = 10  # exporting is slow, so one program holds many masks
SHORT = ((1, 1), (2, 2), (1, 3), (2, 4), (2, 5), (1, 6))
EXPORTED_CLAIMS: list[Mask] = [
    Causal(),
    Padding("visible", "bool"),
    Full(),
    SlidingWindow(2),
    Causal() & Padding("visible", "bool"),
    Documents(t.read("segments", (B, Q), "int")),
]


def short_runs(batch: Batch) -> list[Run]:
    """Every size, with random tables and with tame ones, but for sizes that the program itself asserts against."""
    runs = []
    for seed, (b, s) in enumerate(SHORT):
        for tame in (False, True):
            try:
                runs.append(batch.run(b, s, s, seed, tame))
            except RuntimeError as stopped:
                if "Runtime assertion failed" not in str(stopped):
                    raise
    return runs


def check_lifted(batch: Batch, n: int, runs: list[Run]) -> None:
    for r in runs:
        says = kept(r.masks[n])
        assert says is not None
        assert torch.equal(batch.lifted(n, r, batch.meaning(n).keep), says)


def check_proof(batch: Batch, n: int, proof: Proof, runs: list[Run]) -> None:
    """A proof holds in every run, and a witness is one that torch confirms."""
    if proof.verdict is Verdict.PROVED:
        batch.assert_holds(n, proof, runs)
    if proof.verdict is Verdict.REFUTED:
        witness = batch.witness(n, proof.mask)
        assert witness is not None
        assert replays(batch.makes[n], proof.mask, witness.cell, witness.sample)


@given(st.lists(masks, min_size=SITES, max_size=SITES))
def test_exported_masks_agree_with_brute_force(texts: list[str]) -> None:
    batch = Batch(tuple(map(run, texts)))
    runs = short_runs(batch)
    for n, text in enumerate(texts):
        note(text)
        if isinstance(batch.meanings[n], CannotLift):
            continue
        meaning = batch.meaning(n)
        check_lifted(batch, n, runs)
        finding = examine(meaning, batch.ranges, seconds=2.0)
        for proof in (finding.proof, *finding.alternatives):
            check_proof(batch, n, proof, runs)
        mask = EXPORTED_CLAIMS[len(text) % len(EXPORTED_CLAIMS)]
        if tables_of(mask.term()) <= meaning.tables.keys():
            check_proof(batch, n, claim(meaning, mask, batch.ranges, seconds=2.0), runs)


def test_every_spelling_of_the_keys_is_understood() -> None:
    """A refusal would prove nothing."""
    texts = [f"{TO_KEYS[n % len(TO_KEYS)].format(count)} <= torch.arange(s)[:, None]" for n, count in enumerate(COUNTS)]
    batch = Batch(tuple(map(run, texts)))
    assert not {text: m.why for text, m in zip(texts, batch.meanings, strict=True) if isinstance(m, CannotLift)}
    runs = short_runs(batch)
    for n, text in enumerate(texts):
        check_lifted(batch, n, runs)
        assert claim(batch.meaning(n), Causal(), batch.ranges).verdict in (Verdict.PROVED, Verdict.UNKNOWN), text
