"""Build, verify, and where that fails build again in a more exact form."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch.fx import Graph

from trilithon.errors import VerificationFailed
from trilithon.lower.tensorrt.converters.matmul import PARTS
from trilithon.options import Options
from trilithon.runtime.agree import verified_by_all

log = logging.getLogger(__name__)
Built = TypeVar("Built")


def build_right(
    build: Callable[[Options, int], Built],
    verify: Callable[[Built, Options, int], None],
    backend: str,
    options: Options,
    graph: Graph,
) -> tuple[Built, tuple[str, ...]]:
    """What `build` makes and `verify` accepts, and what a report says of it.

    An engine that is wrong is built again in forms that are more exact.

    Raises:
        VerificationFailed: so is the most exact.
    """
    forms = [(options, 0)]
    if backend == "tensorrt":
        forms += [(options, 1), (options, 2)]
        if options.attention == "auto":
            forms.append((replace(options, attention="decomposed"), 2))
    notes: tuple[str, ...] = ()
    for form, (chosen, exact) in enumerate(forms):
        built = build(chosen, exact)
        try:
            verified_by_all(graph, partial(verify, built, chosen, exact))
            return built, notes
        except VerificationFailed as error:
            if form + 1 == len(forms):
                raise
            following, more = forms[form + 1]
            name = f"products of halves are added up in float32, in parts of {PARTS[more]} numbers"
            name += ", and attention='decomposed'" if following.attention != options.attention else ""
            notes = (f"{name}, since engines in a faster form were refused: {error.what}, {error.why}",)
            log.warning("%s", notes[0])
    raise AssertionError("unreachable")
