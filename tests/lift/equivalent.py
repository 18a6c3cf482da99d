"""Mutants that make no difference, each with why: no test can notice them."""

from __future__ import annotations

from lift.mutants import Mutant

# (function, start of the text): why
EQUIVALENT: dict[tuple[str, str], str] = {}


def why_equivalent(mutant: Mutant) -> str | None:
    for (function, text), why in EQUIVALENT.items():
        if mutant.function == function and mutant.text.startswith(text):
            return why
    return None
