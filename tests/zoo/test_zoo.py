"""Every family of the zoo, in modes that take turns: each site is proved to be exactly what it is.

`scripts/coverage.py` runs every family in every mode, and writes docs/coverage.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from zoo.families import FAMILIES
from zoo.modes import modes_of
from zoo.run import Case, examine_case

SLOWEST = 5.0  # seconds in the solver, of one mask


def in_turn() -> Iterator[Case]:
    """Each family with padding where it takes one, and in two other modes, one of them with eager attention."""
    for n, (name, family) in enumerate(FAMILIES.items()):
        modes = [mode for mode in modes_of(family) if mode not in family.skip]
        main = "ids+padding" if "ids+padding" in modes else modes[0]
        others = [mode for mode in modes if mode != main] or [main]
        usual = "eager" if family.eager_only else "sdpa"
        yield Case(name, usual, main)
        yield Case(name, usual, others[n % len(others)], "bfloat16" if n % 3 == 0 and family.kind != "seq2seq" else "float32")
        if usual == "sdpa":
            yield Case(name, "eager", others[(n // 2) % len(others)])


CASES = sorted(set(in_turn()))


def test_the_zoo_is_large() -> None:
    assert len(FAMILIES) >= 45
    assert len(CASES) >= 200


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_site_is_proved_to_be_what_it_is(case: Case) -> None:
    outcomes = examine_case(case)
    assert outcomes, "no attention site was found"
    for outcome in outcomes:
        assert outcome.exact, f"{outcome.site}: expected {outcome.expected}, found {outcome.found}: {outcome.reason}"
        assert outcome.seconds < SLOWEST
