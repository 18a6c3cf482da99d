"""Mistakes that handlers must not survive: a wrong axis, an edge off by one, an ignored argument, a dropped obligation.

The first mutant of each of these kinds in every function; `scripts/mutate_handlers.py` tries all of them.
"""

from __future__ import annotations

import pytest

from lift.checks import HANDLERS, all_mutants, relevant
from lift.equivalent import why_equivalent
from lift.mutants import Mutant, applied, killer, notices, target
from lift.mutations import CLASSIC


def sample() -> dict[str, list[Mutant]]:
    """The first of each kind, by function."""
    found: dict[str, dict[str, Mutant]] = {}
    for mutant in all_mutants(HANDLERS):
        if mutant.kind in CLASSIC and why_equivalent(mutant) is None:
            found.setdefault(f"{mutant.module.rpartition('.')[2]}.{mutant.function}", {}).setdefault(mutant.kind, mutant)
    return {function: list(kinds.values()) for function, kinds in found.items()}


SAMPLE = sample()


@pytest.mark.parametrize("function", SAMPLE)
def test_a_classic_mistake_is_noticed(function: str) -> None:
    for mutant in SAMPLE[function]:
        assert killer(mutant, relevant(mutant)) is not None, f"survives: {mutant.name}"


def test_a_mutant_is_gone_afterwards() -> None:
    mutant = SAMPLE["shape.lift_unsqueeze"][0]
    checks, before = relevant(mutant), target(*mutant.place).__code__
    assert not notices(checks[0][1])
    with applied(mutant):
        assert target(*mutant.place).__code__ is not before
        assert any(notices(check) for _, check in checks)
    assert target(*mutant.place).__code__ is before
    assert not notices(checks[0][1])


def test_there_is_a_sample_of_every_handler_file() -> None:
    assert {function.partition(".")[0] for function in SAMPLE} >= {name.rpartition(".")[2] for name in HANDLERS}
