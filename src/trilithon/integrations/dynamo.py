"""`torch.compile(model, backend="trilithon")`: Inductor, after masks that were proved causal or full became a flag.

What a proof rests on is what Dynamo guards: the sizes of inputs. The values of inputs, weights and buffers it does not
guard, so nothing is assumed of them: a mask with padding keeps its name `causal & padding(attention_mask)`, and stays.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import CompileContext
from torch.fx import GraphModule

from trilithon.capture.dynamo import masked_calls, trace_calls
from trilithon.errors import InputError, TrilithonError
from trilithon.integrations.masks import drop_proved_masks
from trilithon.options import Options
from trilithon.report.report import Report
from trilithon.report.versions import versions
from trilithon.stages import clocked, stage

log = logging.getLogger(__name__)
NAME = "trilithon"
PREFIX = f"{NAME}."
OURS = ("solver_seconds", "proof_cache")  # fields of `Options` that this backend reads
MOST_REPORTS = 256

Compile = Callable[..., Any]
_reports: deque[Report] = deque(maxlen=MOST_REPORTS)


def trilithon(gm: GraphModule, example_inputs: list[Any], *, mode: str | None = None, options: Any = None) -> Any:
    """The backend: prove the masks of one Dynamo graph, change what was proved, and hand it to the next backend.

    Args:
        gm, example_inputs: as Dynamo gives them. A graph of which nothing is proved is not changed at all.
        mode, options: as `torch.compile` takes them, for Inductor; and `trilithon.solver_seconds`, `trilithon.proof_cache`
            (see `Options`) and `trilithon.backend`, the name of a backend, or one itself, to use in place of Inductor.
    """
    ours, theirs = _split_options(options or {})
    following = ours.pop("backend", "inductor")
    _reports.append(_prove(gm, example_inputs, Options(**ours)))
    log.info("%s", _reports[-1])
    return _following(following, mode, theirs)(gm, example_inputs)


def _reset() -> None:
    """What Inductor's own backend does at `torch.compiler.reset`."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


trilithon.reset = _reset  # type: ignore[attr-defined]


def register() -> None:
    """Make the name "trilithon" known to torch.compile. An installed package is known without this, by its entry point."""
    from torch._dynamo.backends.registry import register_backend

    if not is_known():
        register_backend(trilithon, name=NAME)


def is_known() -> bool:
    """Whether torch.compile knows the name."""
    from torch._dynamo.backends.registry import list_backends

    return NAME in list_backends(exclude_tags=())


def reports() -> tuple[Report, ...]:
    """What was found in each graph that was compiled, oldest first: the last 256, or those since `clear_reports`."""
    return tuple(_reports)


def clear_reports() -> None:
    """Forget what was compiled."""
    _reports.clear()


# ------------------------------------------------------------ options


def _split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours, without the prefix, and those of the backend that follows."""
    ours = {key.removeprefix(PREFIX): value for key, value in options.items() if key.startswith(PREFIX)}
    known = [f.name for f in fields(Options) if f.name in OURS] + ["backend"]
    for name in ours:
        if name not in known:
            raise InputError(
                f"torch.compile was given the option {PREFIX}{name}", todo=f"known are {', '.join(PREFIX + n for n in known)}"
            )
    return ours, {key: value for key, value in options.items() if not key.startswith(PREFIX)}


def _following(backend: str | Compile, mode: str | None, options: dict[str, Any]) -> Compile:
    """The backend that takes the graph; Inductor gets mode and options as torch.compile itself gives them."""
    if backend == "inductor":
        return torch._TorchCompileInductorWrapper(mode, options, None)
    from torch._dynamo.backends.registry import lookup_backend

    compile: Compile = lookup_backend(backend)
    given = {name: value for name, value in (("mode", mode), ("options", options)) if value}
    return lambda gm, inputs: compile(gm, inputs, **given)


# ------------------------------------------------------------ one graph


def _prove(gm: GraphModule, inputs: list[Any], options: Options) -> Report:
    """Prove and change one graph, in place; says what was done, or why nothing was."""
    compiled = CompileContext.current_compile_id()
    report = Report(model=f"graph {compiled}", inputs=(), route="torch.compile", sites=[], versions=versions())
    with clocked() as stages:
        reason = _why_unchanged(gm, inputs)
        if reason is None:
            try:
                report = _change(gm, report, options)
            except Exception as error:  # the user's program must run all the same
                reason = error.why if isinstance(error, TrilithonError) and error.why else f"{type(error).__name__}: {error}"
                log.warning("%s runs as it is: %s", report.model, reason)
                log.debug("where that came from", exc_info=True)
    if reason is not None:
        report = replace(report, notes=(f"unchanged: {reason}",))
    return replace(report, seconds=stages.seconds)


def _why_unchanged(gm: GraphModule, inputs: list[Any]) -> str | None:
    if not masked_calls(gm.graph):
        return "it has no call of scaled_dot_product_attention with a mask"
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return "it may be differentiated, and this backend is for inference: call the model under torch.no_grad()"
    return None


def _change(gm: GraphModule, report: Report, options: Options) -> Report:
    with stage("export"):
        traced = trace_calls(gm)
    why = "the graph writes to its inputs, which may be views of each other" if traced.writes else ""
    report = replace(report, inputs=tuple(traced.inputs))
    return drop_proved_masks(gm, traced.program, traced.calls, report, options, lambda *_: why)
