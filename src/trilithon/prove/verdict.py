"""What a proof says: four verdicts, the assumptions it used, and a witness when it failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from trilithon.spec.assumption import Assumption
from trilithon.spec.masks import Mask


class Verdict(Enum):
    """Only `PROVED` rewrites anything."""

    PROVED = "proved"  # equal at every index the assumptions allow
    REFUTED = "refuted"  # and here is one index where they differ
    UNKNOWN = "unknown"  # the solver gave up, or something is not modelled: the reason says which
    VACUOUS = "vacuous"  # the assumptions allow no input at all; a proof would mean nothing


@dataclass(frozen=True)
class Proof:
    """The answer to one claim: "this site's mask is `mask`, under these assumptions".

    Attributes:
        mask: the claim.
        verdict: read it as `proof.verdict is Verdict.PROVED`; a Proof has no truth value.
        assumptions: those the proof used; of a proof that failed, those it was given.
        witness: REFUTED only: indices `b h q k`, sizes, and what the mask and the claim say there.
        reason: one sentence.
        solver_seconds: time in z3.
    """

    mask: Mask
    verdict: Verdict
    assumptions: tuple[Assumption, ...] = ()
    witness: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    solver_seconds: float = 0.0

    def __bool__(self) -> bool:
        raise TypeError("a Proof has no truth value: write proof.verdict is Verdict.PROVED")
