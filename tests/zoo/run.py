"""Examine one family in one mode, and say how each of its sites compares with what is expected."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from trilithon.compiler import explain
from trilithon.options import Options
from trilithon.prove.verdict import Verdict
from trilithon.report.report import SiteReport
from zoo.expected import expected
from zoo.families import FAMILIES
from zoo.modes import call_of, modes_of

SAME_IN_EAGER = ("ids+both", "embeds", "static-prefill")


class Case(NamedTuple):
    family: str
    attention: str
    mode: str
    dtype: str = "float32"

    def __str__(self) -> str:
        return "-".join(x for x in self if x != "float32")


@dataclass(frozen=True)
class Outcome:
    """One site: what it had to be and what it was found to be; `exact` if they are the same and proved.

    A padding may be proved away under the guard that it is all ones: eager attention gives a query without keys the mean
    of V, so where padding can leave one, the mask as a whole is not what a kernel computes.
    """

    case: Case
    site: str
    expected: str
    found: str
    guards: tuple[str, ...]
    reason: str
    seconds: float

    @property
    def exact(self) -> bool:
        all_ones = any(text.endswith("is all ones") for text in self.guards)
        return self.found.startswith(self.expected) or (all_ones and self.found.startswith(_unpadded(self.expected)))


def _unpadded(text: str) -> str:
    mask, plus, bias = text.partition(" + ")
    kept = [part.replace(", attention_mask)", ")") for part in mask.split(" & ") if not part.startswith("padding(")]
    return (" & ".join(kept) or "full") + plus + bias


def cases(attentions: tuple[str, ...] = ("sdpa", "eager")) -> Iterator[Case]:
    """Every family in every mode that it has; with eager attention beside SDPA, in those modes that make other masks."""
    for name, family in FAMILIES.items():
        for attention in attentions:
            if attention == "sdpa" and family.eager_only:
                continue
            second = attention == "eager" and not family.eager_only
            modes = [mode for mode in modes_of(family) if mode not in family.skip and not (second and mode in SAME_IN_EAGER)]
            yield from (Case(name, attention, mode) for mode in modes)


def examine_case(case: Case) -> list[Outcome]:
    """Export the model and examine its sites. Fails where it cannot be exported."""
    family = FAMILIES[case.family]
    model = family.make(case.attention, getattr(torch, case.dtype))
    report = explain(*call_of(family, model, case.mode), options=Options(proof_cache=False))
    counts: Counter[str] = Counter()
    outcomes = []
    for site in report.sites:
        path = site.name.split("#")[0]
        kind = re.sub(r"\d+", "*", path)
        wanted = expected(family, case.mode, path, counts[kind])
        counts[kind] += 1
        outcomes.append(Outcome(case, site.name, wanted, _text(site), _guards(site), site.reason, site.solver_seconds))
    return outcomes


def _text(site: SiteReport) -> str:
    if site.verdict is not Verdict.PROVED:
        return site.verdict.value
    return str(site.mask) if site.bias is None else f"{site.mask} + {site.bias}"


def _guards(site: SiteReport) -> tuple[str, ...]:
    return tuple(a.text for a in site.assumptions if a.source == "guard")
