"""What eager gave for a canary input when a model was compiled: a loaded model, which has no eager, is held to that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trilithon.errors import VerificationFailed


@dataclass(frozen=True)
class Canary:
    """One run.

    Attributes:
        given: inputs by name; of a decoder `ids` and `pads`, and what its context takes.
        wanted: what eager, or the model in a wider type, gives; of a decoder logits `[b n v]` of the prompt's last token and
            those behind it.
        limits: the relative error that each of them may have.
    """

    given: Mapping[str, Tensor]
    wanted: tuple[Tensor, ...]
    limits: tuple[float, ...]


def kept(given: Mapping[str, Tensor], wanted: Sequence[Tensor], limits: Sequence[float]) -> Canary:
    """A canary on the CPU."""
    return Canary(
        {name: x.detach().cpu().clone() for name, x in given.items()},
        tuple(x.detach().cpu().clone() for x in wanted),
        tuple(limits),
    )


def require_same(name: str, got: Sequence[Tensor], canary: Canary) -> float:
    """The largest relative error.

    Raises:
        VerificationFailed: an output has another shape, or is off by more than it may be.
    """
    errors = [0.0]
    for mine, theirs, limit in zip(got, canary.wanted, canary.limits, strict=True):
        a, b = mine.detach().double().cpu(), theirs.double()
        error = float((a - b).norm() / b.norm().clamp_min(1e-30)) if a.shape == b.shape else float("inf")
        if not error <= limit or not bool(torch.isfinite(a).all()):
            raise VerificationFailed(
                f"{name} does not give what eager gave when it was compiled",
                why=f"the relative error on the canary input is {error:.2e}, and {limit:.0e} is allowed",
                todo="nothing was loaded. Compile the model on this machine, and report this with trilithon doctor",
            )
        errors.append(error)
    return max(errors)
