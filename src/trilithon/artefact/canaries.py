"""Canaries of a compiled model: run before it is saved, and where it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch

from trilithon.compiled import Compiled
from trilithon.errors import CannotCache, VerificationFailed
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.program import Program, lowered
from trilithon.runtime.verify import check_decoder, check_program


def check(
    programs: Iterable[Program], decoder: CachedDecoder | CannotCache, device: torch.device, visit: Any = nullcontext
) -> list[float]:
    """Run each program that has a canary; its relative errors.

    Args:
        visit: makes a context in which the decoder may be used.

    Raises:
        VerificationFailed: one is off by more than it may be.
    """
    errors = [check_program(p.fast, p.canary, device) for p in programs if p.canary is not None and lowered(p.fast) is not None]
    if isinstance(decoder, CachedDecoder) and decoder.canary is not None:
        with visit():
            errors.append(check_decoder(decoder, decoder.canary))
    return errors


def check_before_saving(compiled: Compiled, device: torch.device) -> None:
    """What a load would refuse is not saved.

    Raises:
        VerificationFailed: it gives something else than when it was compiled, so its weights were changed.
    """
    visit = nullcontext if isinstance(compiled.cached, CannotCache) else compiled.memory.visit
    try:
        check(compiled.programs, compiled.cached, device, visit)
    except VerificationFailed as error:
        raise VerificationFailed(
            f"cannot save {compiled!r}",
            why=f"it no longer gives what eager gave when it was compiled: {error.why}",
            todo="if its weights were changed since, compile it again; else report this with trilithon doctor",
        ) from error
