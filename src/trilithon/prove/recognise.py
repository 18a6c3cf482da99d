"""Propose a name for a mask from samples, then prove it for all sizes; a counterexample becomes a new sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trilithon.lift.meaning import Meaning
from trilithon.prove.samples import Sample, draw_samples
from trilithon.spec import term as t
from trilithon.spec.assumption import Assumption
from trilithon.spec.masks import (
    B,
    Causal,
    Documents,
    Full,
    K,
    Mask,
    Padding,
    Q,
    SlidingWindow,
    conjunction,
)
from trilithon.spec.term import Term
from trilithon.spec.traverse import free_vars, substitute, tables, walk


@dataclass
class Proposer:
    """Holds the samples of one mask and picks the simplest conjunction of named masks that explains them.

    `rows` has one bool row for each distinct observation: what the mask says, then what each atom says.
    """

    keep: Term
    meaning: Meaning
    atoms: list[Mask]
    rows: Tensor

    @classmethod
    def of(
        cls, keep: Term, meaning: Meaning, ranges: dict[str, tuple[int, int | None]], given: Iterable[Assumption]
    ) -> Proposer:
        proposer = cls(keep, meaning, propose_atoms(keep, meaning), torch.zeros(0, 0, dtype=torch.bool))
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
        kept = self.rows[self.rows[:, 0]]
        blocked = self.rows[~self.rows[:, 0]]
        implied = [i for i in range(len(self.atoms)) if bool(kept[:, 1 + i].all())]
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
        return conjunction(tuple(self.atoms[i] for i in chosen))

    def nearest(self) -> Mask:
        """The single atom, or Full, that disagrees with the mask on the fewest observations."""
        wrong = [int((self.rows[:, 0] != self.rows[:, 1 + i]).sum()) for i in range(len(self.atoms))]
        full = int((~self.rows[:, 0]).sum())
        best = min(range(len(wrong)), key=wrong.__getitem__, default=None)
        return Full() if best is None or full < wrong[best] else self.atoms[best]


def propose_atoms(keep: Term, meaning: Meaning) -> list[Mask]:
    """Named masks worth trying, simplest first. What is proposed is only a guess; the proof decides."""
    s, total = meaning.dims[2], meaning.dims[3]
    aligns = ["upper_left"] if s is total else ["upper_left", "lower_right"]
    atoms: list[Mask] = [Causal(a) for a in aligns]  # type: ignore[arg-type]
    atoms += [SlidingWindow(w, a) for a in aligns for w in _window_widths(keep)]  # type: ignore[arg-type]
    atoms += _paddings(keep)
    atoms += _documents(keep)
    return atoms


def _window_widths(keep: Term) -> list[int]:
    """Constants of the formula, and their neighbours: `k > q - w` is `q - k + 1 - w <= 0`."""
    constants = {abs(x.args[1]) for x in walk([keep]) if x.op == "sum"} | {abs(x.value) for x in walk([keep]) if x.op == "int"}
    return sorted({w for c in constants | {0} for w in (c - 1, c, c + 1) if w > 0})


def _paddings(keep: Term) -> list[Mask]:
    entries = {x for x in walk([keep]) if x.op == "read" and x.args[1:] == (B, K) and x.sort in ("int", "bool")}
    return [Padding(x.args[0], x.sort) for x in sorted(entries, key=lambda x: x.serial)]


def _documents(keep: Term) -> list[Mask]:
    """`f(q) == f(k)` for some f that a table decides: segment numbers, or a prefix sum of breaks."""
    found: list[Mask] = []
    for x in walk([keep]):
        if x.op != "eq0":
            continue
        coefficients, constant = t.linear(x.args[0])
        of_q = [y for y in coefficients if "q" in free_vars(y) and "k" not in free_vars(y)]
        if (
            constant == 0
            and len(coefficients) == 2
            and len(of_q) == 1
            and tables(of_q[0])
            and substitute(of_q[0], {Q: K}) in coefficients
        ):
            found.append(Documents(of_q[0]))
    return found
