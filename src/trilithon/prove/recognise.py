"""Propose a name for a mask from samples, then prove it for all sizes; a counterexample becomes a new sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trilithon.lift.meaning import Meaning
from trilithon.prove.atoms import propose_atoms
from trilithon.prove.samples import Sample, draw_samples
from trilithon.spec.assumption import Assumption
from trilithon.spec.masks import Full, Mask, Or, conjunction
from trilithon.spec.term import Term
from trilithon.spec.traverse import tables

MOST_PAIRS = 64


@dataclass
class Proposer:
    """Holds the samples of one mask and picks the simplest conjunction of named masks that explains them.

    `rows` has one bool row for each distinct observation: what the mask says, then what each atom says. The first
    `singles` atoms are named masks, the others one joined to an input's by "or", tried where the first do not explain it.
    """

    keep: Term
    meaning: Meaning
    atoms: list[Mask]
    rows: Tensor
    singles: int

    @classmethod
    def of(
        cls, keep: Term, meaning: Meaning, ranges: dict[str, tuple[int, int | None]], given: Iterable[Assumption]
    ) -> Proposer:
        atoms = propose_atoms(keep, meaning)
        pairs = [Or((a, b)) for i, a in enumerate(atoms) for b in atoms[i + 1 :] if tables(b.term())]
        proposer = cls(keep, meaning, [*atoms, *pairs[:MOST_PAIRS]], torch.zeros(0, 0, dtype=torch.bool), len(atoms))
        proposer.rows = torch.zeros(0, 1 + len(proposer.atoms), dtype=torch.bool)
        for sample in draw_samples([keep], meaning, ranges, tuple(given)):
            proposer.learn(sample)
        return proposer

    def learn(self, sample: Sample) -> bool:
        """Add what one sample shows; False if it shows nothing new."""
        terms = [self.keep, *(a.at_sizes(self.meaning.dims[2], self.meaning.dims[3]) for a in self.atoms)]
        columns = torch.broadcast_tensors(*[sample.evaluate(x) for x in terms])
        seen = torch.stack([c.flatten() for c in columns], dim=1)
        before = len(self.rows)
        self.rows = torch.unique(torch.cat([self.rows, seen]), dim=0)
        return len(self.rows) > before

    def best(self) -> Mask:
        """The fewest atoms that hold on every kept cell and block as many blocked cells as they can."""
        chosen = self._choose(self.singles)
        if not self._explains(chosen):
            chosen = self._choose(len(self.atoms))
        return conjunction(tuple(self.atoms[i] for i in chosen))

    def _explains(self, chosen: list[int]) -> bool:
        """Does the conjunction agree with every observation?"""
        return torch.equal(self.rows[:, [1 + i for i in chosen]].all(1), self.rows[:, 0])

    def _choose(self, count: int) -> list[int]:
        """Of the first `count` atoms, those that are needed."""
        kept = self.rows[self.rows[:, 0]]
        blocked = self.rows[~self.rows[:, 0]]
        implied = [i for i in range(count) if bool(kept[:, 1 + i].all())]
        chosen: list[int] = []
        for i in implied:
            if bool(blocked[:, 1 + i].all()):
                continue
            chosen.append(i)
            blocked = blocked[blocked[:, 1 + i]]
        for i in reversed(chosen):
            rest = [j for j in chosen if j != i]
            outside = self.rows[~self.rows[:, 0]]
            if rest and torch.equal(outside[:, [1 + j for j in chosen]].all(1), outside[:, [1 + j for j in rest]].all(1)):
                chosen = rest
        return chosen

    def nearest(self) -> Mask:
        """The single atom, or Full, that disagrees with the mask on the fewest observations."""
        wrong = [int((self.rows[:, 0] != self.rows[:, 1 + i]).sum()) for i in range(self.singles)]
        full = int((~self.rows[:, 0]).sum())
        best = min(range(len(wrong)), key=wrong.__getitem__, default=None)
        return Full() if best is None or full < wrong[best] else self.atoms[best]
