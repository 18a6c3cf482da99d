"""Every family of the zoo, in modes that take turns: each site is proved to be exactly what it is.

`scripts/coverage.py` runs every family in every mode, and writes docs/coverage.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from zoo.families import FAMILIES
from zoo.modes import modes_of
from zoo.run import Case, examine_case

SLOWEST = 5.0  # seconds in the solver, of one mask


def in_turn() -> Iterator[Case]:
    """Each family with padding where it takes one, or in another mode, in turn, with SDPA or with eager attention.

    The other mode is the one that was used least. Half of the unusual decoders, and all of other kinds, have both: the masks
    of the usual ones are made by transformers, for all of them alike.
    """
    used: Counter[tuple[str, str, str]] = Counter()
    for n, (name, family) in enumerate(FAMILIES.items()):
        modes = [mode for mode in modes_of(family) if mode not in family.skip]
        main = "ids+padding" if "ids+padding" in modes else modes[0]
        others = [mode for mode in modes if mode != main] or [main]
        first, second = ("eager", "eager") if family.eager_only else (("sdpa", "eager"), ("eager", "sdpa"))[n % 2]
        both = not family.is_usual and n % 4 in (0, 3)
        if n % 4 >= 2 or both:
            yield Case(name, first, main)
        if n % 4 < 2 or both:
            dtype = "bfloat16" if used.total() % 3 == 0 and family.kind != "seq2seq" else "float32"
            mode = min(others, key=lambda mode: used[family.kind, second, mode])
            used[family.kind, second, mode] += 1
            yield Case(name, second, mode, dtype)


CASES = sorted(set(in_turn()))


def test_the_zoo_is_large() -> None:
    """Every family is there, and each kind of model in every mode, with SDPA and with eager attention."""
    assert len(FAMILIES) >= 45
    assert {case.family for case in CASES} == FAMILIES.keys()
    for kind in {family.kind for family in FAMILIES.values()}:
        of_kind = [family for family in FAMILIES.values() if family.kind == kind]
        modes = {mode for family in of_kind for mode in modes_of(family) if mode not in family.skip}
        tested = {(case.attention, case.mode) for case in CASES if FAMILIES[case.family].kind == kind}
        assert tested == {(attention, mode) for attention in ("sdpa", "eager") for mode in modes}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_site_is_proved_to_be_what_it_is(case: Case) -> None:
    outcomes = examine_case(case)
    assert outcomes, "no attention site was found"
    for outcome in outcomes:
        assert outcome.exact, f"{outcome.site}: expected {outcome.expected}, found {outcome.found}: {outcome.reason}"
        assert outcome.seconds < SLOWEST
