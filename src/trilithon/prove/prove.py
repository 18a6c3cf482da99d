"""Prove what one site's mask means: obligations first, then the claim, then that every row keeps a key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trilithon.lift.meaning import Meaning
from trilithon.lift.registry import Obligation
from trilithon.lift.symtensor import NUMBER
from trilithon.passes import where_of
from trilithon.prove.atoms import in_own_sizes
from trilithon.prove.recognise import Proposer
from trilithon.prove.scans import close_scans, scan_lemmas
from trilithon.prove.solve import UNBOUNDED, Prover
from trilithon.prove.verdict import Proof, Verdict
from trilithon.prove.witness import Witness, find_witness
from trilithon.spec import term as t
from trilithon.spec.assumption import KINDS, Assumption, guard, one_of_row
from trilithon.spec.masks import B, Documents, Formula, Full, K, Mask, Q, parts
from trilithon.spec.term import Term
from trilithon.spec.traverse import substitute, tables, walk

Ranges = Mapping[str, tuple[int, int | None]]
FLAGS = ("flags", "nonempty", "right_padded", "left_padded", "all_ones")
POSITIONS = ("bounded", "nonnegative", "consecutive")
MOST_ROUNDS = 8  # counterexamples that may correct the proposal


@dataclass(frozen=True)
class Finding:
    """All that was found about one site: the proof to rewrite with, and the others that hold.

    Attributes:
        proof: the primary one: a named mask if that can be, no data-dependent documents, then the fewest guards.
        alternatives: other proved forms, under other assumptions.
        formula: the lifted mask.
        nearest: for a mask without a name: the refuted proof of the named mask nearest to it.
    """

    proof: Proof
    alternatives: tuple[Proof, ...]
    formula: Term
    nearest: Proof | None = None


def examine(meaning: Meaning, ranges: Ranges, assume: tuple[Assumption, ...] = (), seconds: float = 10.0) -> Finding:
    """Find the form of a mask: with no assumption on inputs if possible, else with each guard that may help."""
    proofs: list[Proof] = []
    nearest: Proof | None = None
    left = seconds
    for guards in _guard_sets(meaning, assume):
        if guards and guards[0].kind in ("flags", "nonempty") and any(_is_named(p) for p in proofs):
            continue
        proof, refuted = _recognise(meaning, ranges, (*assume, *guards), max(left, 0.01))
        left -= proof.solver_seconds
        nearest = refuted if nearest is None else nearest
        if not any(p.verdict is Verdict.PROVED and p.mask == proof.mask for p in proofs):
            proofs.append(proof)
    proved = sorted((p for p in proofs if p.verdict is Verdict.PROVED), key=_preference)
    if not proved:
        return Finding(proofs[0], (), meaning.keep)
    unnamed = isinstance(proved[0].mask, Formula)
    return Finding(proved[0], tuple(proved[1:]), meaning.keep, nearest if unnamed else None)


def unguarded(finding: Finding) -> Finding:
    """What is left of a finding where nobody checks inputs: the first proof that needs no such check, or why there is none."""
    proofs = [p for p in (finding.proof, *finding.alternatives) if p.verdict is Verdict.PROVED]
    left = [p for p in proofs if not _checked(p)]
    if left or not proofs:
        return replace(finding, proof=left[0] if left else finding.proof, alternatives=tuple(left[1:]))
    needs = " and ".join(a.text for a in _checked(proofs[0]))
    reason = f"it is {proofs[0].mask} only if {needs}, which nobody checks when this program runs"
    return Finding(replace(proofs[0], verdict=Verdict.UNKNOWN, reason=reason), (), finding.formula)


def _checked(proof: Proof) -> list[Assumption]:
    """What a proof needs that a run must look at."""
    return [a for a in proof.assumptions if a.source != "op contract"]


def _is_named(proof: Proof) -> bool:
    return proof.verdict is Verdict.PROVED and not isinstance(proof.mask, Formula)


def _preference(proof: Proof) -> tuple[bool, bool, int, int, int]:
    unnamed = isinstance(proof.mask, Formula)
    documents = any(isinstance(p, Documents) for p in parts(proof.mask))
    guards = [list(KINDS).index(a.kind) for a in proof.assumptions if a.source == "guard"]
    return unnamed, documents, len(guards), max(guards, default=0), len(parts(proof.mask))


def _guard_sets(meaning: Meaning, assume: tuple[Assumption, ...]) -> list[tuple[Assumption, ...]]:
    """None, then one guard for each input table that the mask reads and nothing is declared about, weaker ones first.

    Guesses, by how a table is used: flags (compared with zero) may be paddings; positions (ordered, or summed up as
    packed documents are) may fit 32 bits or be consecutive.
    """
    given = {a.table for a in assume} | meaning.constants.keys()
    flags: set[str] = set()
    positions: set[str] = set()
    for x in walk([meaning.keep]):
        if x.op == "read" and x.sort == "bool":
            flags.add(x.args[0])
        elif x.op == "eq0" and x.args[0].op in ("read", "mul"):
            flags |= tables(x)
        elif x.op in ("le0", "prefix_sum"):
            positions |= tables(x)
    rank = {name: len(shape) for name, shape in meaning.tables.items() if name not in given | meaning.own}
    sets = [(guard(name, kind),) for name in sorted(flags) if rank.get(name) == 2 for kind in FLAGS]
    sets += [(guard(name, kind),) for name in sorted(positions - flags) if rank.get(name) in (1, 2) for kind in POSITIONS]
    return [(), *sets]


def claim(meaning: Meaning, mask: Mask, ranges: Ranges, assume: tuple[Assumption, ...] = (), seconds: float = 10.0) -> Proof:
    """Prove or refute that the site's mask is exactly `mask`; unknown where that reads a table which the site does not."""
    others = sorted(tables(mask.at_sizes(meaning.dims[2], meaning.dims[3])) - meaning.tables.keys())
    if others:
        return Proof(mask, Verdict.UNKNOWN, assume, reason=f"the site's mask does not read {', '.join(others)}")
    return _Attempt.of(meaning, ranges, assume, seconds).prove(mask)


def _recognise(meaning: Meaning, ranges: Ranges, assume: tuple[Assumption, ...], seconds: float) -> tuple[Proof, Proof | None]:
    """Propose, prove, learn from the counterexample, and again. A mask without a name is its formula.

    Returns:
        The proof; and for a formula, that the nearest named mask is another one.
    """
    attempt = _Attempt.of(meaning, ranges, assume, seconds)
    early = attempt.trouble()
    if early is not None:
        return early, None
    proposer = Proposer.of(attempt.keep, meaning, dict(ranges), assume)
    for _ in range(MOST_ROUNDS):
        best = proposer.best()
        proof = attempt.prove(best)
        if proof.verdict is not Verdict.REFUTED or attempt.witness is None or not proposer.learn(attempt.witness.sample):
            break
    if proof.verdict is not Verdict.REFUTED:
        return proof, None
    nearest = attempt.prove(proposer.nearest())
    if attempt.keep.op == "read":  # an input that is the mask: its formula would say nothing
        return nearest, None
    formula = attempt.prove(Formula(in_own_sizes(attempt.keep, meaning)))
    return (formula, nearest) if formula.verdict is Verdict.PROVED else (nearest, None)


@dataclass
class _Attempt:
    """One mask under one set of assumptions."""

    meaning: Meaning
    prover: Prover
    keep: Term
    lemmas: tuple[Term, ...]
    used: tuple[Assumption, ...]
    witness: Witness | None = None
    _trouble: list[Proof | None] = field(default_factory=list)

    @classmethod
    def of(cls, meaning: Meaning, ranges: Ranges, assume: tuple[Assumption, ...], seconds: float) -> _Attempt:
        bounds = dict(zip("bhqk", meaning.dims, strict=True))
        prover = Prover(bounds, ranges, meaning.tables, assume, seconds)
        keep, used = close_scans(meaning.keep, prover)
        lemmas, lemma_used = scan_lemmas(keep, prover)
        return cls(meaning, prover, keep, lemmas, (*used, *lemma_used))

    def trouble(self) -> Proof | None:
        """Why no proof can be had under these assumptions: they contradict, or an integer may wrap around."""
        if not self._trouble:
            self._trouble.append(self._find_trouble())
        return self._trouble[0]

    def _find_trouble(self) -> Proof | None:
        if self.prover.assumptions and self.prover.satisfiable().status == "valid":
            return self._proof(Full(), Verdict.VACUOUS, reason="the assumptions contradict each other: no input meets them")
        for obligation in self.meaning.obligations:
            if _cannot_wrap(obligation):
                continue
            term, used = close_scans(obligation.term, self.prover)
            lemmas, lemma_used = scan_lemmas(term, self.prover)
            fits = self.prover.valid((term >= obligation.low) & (term <= obligation.high), extra=lemmas)
            if fits.status != "valid":
                reason = f"{obligation.node.target} at {where_of(obligation.node)} may overflow its integer type"
                return self._proof(Full(), Verdict.UNKNOWN, reason=reason)
            self.used = (*self.used, *used, *lemma_used, *fits.used)
        return None

    def prove(self, mask: Mask) -> Proof:
        early = self.trouble()
        if early is not None:
            return replace(early, mask=mask)
        self.witness = None
        goal = t.eq(self.keep, mask.at_sizes(self.meaning.dims[2], self.meaning.dims[3]))
        answer = self.prover.valid(goal, extra=self.lemmas)
        if answer.status == "valid":
            return self._rows(mask, answer.used)
        if answer.status == "invalid":
            claimed = mask.at_sizes(self.meaning.dims[2], self.meaning.dims[3])
            self.witness = find_witness(self.meaning.keep, claimed, self.meaning, self.prover, self.keep, self.lemmas)
            if self.witness is not None:
                return self._refuted(mask, self.witness)
            return self._proof(mask, Verdict.UNKNOWN, reason=f"it may differ from {mask}, but no counterexample was confirmed")
        return self._proof(mask, Verdict.UNKNOWN, reason=answer.why)

    def _rows(self, mask: Mask, used: tuple[Assumption, ...]) -> Proof:
        """The last step: where it matters, every row must keep a key, shown by naming the key."""
        if not self.meaning.needs_key:
            return self._proof(mask, Verdict.PROVED, used)
        s, total = self.meaning.dims[2], self.meaning.dims[3]
        nonempty = [a.table for a in self.prover.assumptions if a.kind == "nonempty"]
        ones = [one_of_row(table, B) for table in nonempty]
        about = tuple(t.read(table, (B, t.ZERO), "int") for table in nonempty)
        for key in (Q, t.ZERO, total - 1, Q + total - s, *ones):
            kept = substitute(self.keep, {K: key}) & (key >= 0) & (key < total)
            lemmas, lemma_used = scan_lemmas(kept, self.prover)
            answer = self.prover.valid(kept, extra=lemmas, about=about)
            if answer.status == "valid":
                return self._proof(mask, Verdict.PROVED, (*used, *lemma_used, *answer.used))
        drops = " or ".join(self.meaning.drops)
        reason = (
            f"it is {mask}, but a row may have no key left, and {drops} does not block there but gives the mean of V, or NaN"
        )
        return self._proof(mask, Verdict.UNKNOWN, reason=reason)

    def _refuted(self, mask: Mask, witness: Witness) -> Proof:
        says, other = ("allows", "blocks") if witness.allowed else ("blocks", "allows")
        at = " ".join(f"{name}={value}" for name, value in witness.cell.items())
        reason = f"not {mask}: at {at} the mask {says} what {mask} {other}"
        return self._proof(mask, Verdict.REFUTED, reason=reason, witness=witness.cell)

    def _proof(
        self,
        mask: Mask,
        verdict: Verdict,
        used: tuple[Assumption, ...] = (),
        reason: str = "",
        witness: dict[str, int] | None = None,
    ) -> Proof:
        proved = verdict is Verdict.PROVED
        listed = tuple(dict.fromkeys((*self.used, *used))) if proved else self.prover.assumptions
        text = reason or f"proved equal to {mask} at every index and size"
        return Proof(mask, verdict, listed, witness or {}, text, self.prover.spent)


def _cannot_wrap(obligation: Obligation) -> bool:
    """64-bit sums of indices and sizes are far from the edge, whatever they are."""
    if obligation.high < (1 << 63) - 1 or obligation.low > -(1 << 63):
        return False
    coefficients, constant = t.linear(obligation.term)
    plain = all(x.op == "var" and NUMBER.fullmatch(x.args[0]) is None for x in coefficients)
    return plain and sum(map(abs, coefficients.values())) * UNBOUNDED + abs(constant) < 1 << 62
