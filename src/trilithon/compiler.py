"""The main path: capture, lift and prove, rewrite, lower. Only the order of the stages; the work is theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from trilithon.caching import Source, allowed_times, capacity, make_decoder
from trilithon.capture import hf
from trilithon.capture.export import Captured, capture
from trilithon.capture.generation import generation_settings
from trilithon.compiled import Compiled, Origin
from trilithon.errors import CannotCache, CaptureError
from trilithon.lower.backend import backend_note, blueprint_of, lower_module, resolve_backend
from trilithon.lower.inputs import sequence_inputs
from trilithon.lower.tensorrt.lower import split_notes
from trilithon.lower.tensorrt.module import site_forms
from trilithon.options import Options
from trilithon.parallel.share import shares_of, to_capture
from trilithon.parallel.sites import agreed_sites
from trilithon.prove.cache import default_cache
from trilithon.prove.program import examine_program, prover_of, size_ranges
from trilithon.report.build import canonical_heads, site_report, size_names
from trilithon.report.promises import broken_promises
from trilithon.report.report import Report
from trilithon.report.versions import versions
from trilithon.rewrite.fuse_attention import Proved, canonical_sites
from trilithon.rewrite.pipeline import assert_guards, rewrite
from trilithon.rewrite.unlift import device_of, fake_inputs, input_names, unlift
from trilithon.runtime.build_right import build_right
from trilithon.runtime.canary import Canary
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.original import original_model, original_program
from trilithon.runtime.program import Deferred, Program, expected_inputs, lowered
from trilithon.runtime.seq2seq import seq2seq_of
from trilithon.runtime.verify import verify_program
from trilithon.spec.assumption import Assumption
from trilithon.stages import clocked, stage, verifying

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Analysis:
    """One captured call of a model, what was found in it, and the program with the proved sites rewritten."""

    captured: Captured
    proved: tuple[Proved, ...]
    rewritten: ExportedProgram
    report: Report

    @cached_property
    def general(self) -> GraphModule:
        """The program as it was captured, dense masks and all."""
        with stage("rewrite"):
            program, _ = rewrite(self.captured.program, (), prover_of(self.captured.program))
            return unlift(program)

    @property
    def guards(self) -> tuple[Assumption, ...]:
        """What must hold at run time for the rewritten sites to be right."""
        names = {p.site.name for p in self.proved}
        return tuple(
            dict.fromkeys(
                a for s in self.report.sites if s.name in names for a in s.assumptions if a.source in ("guard", "declared")
            )
        )


def analyse(
    model: nn.Module | ExportedProgram,
    example: Example | None,
    dynamic_shapes: Any,
    assume: tuple[Assumption, ...],
    options: Options,
    checked: bool = True,
) -> Analysis:
    """Capture one call, lift and prove each mask, `checked` as in `examine_program`, and rewrite the proved sites."""
    with stage("export"):
        captured = capture(model, example, dynamic_shapes)
    with stage("prove"):
        cache = default_cache() if options.proof_cache else None
        examined = examine_program(captured.program, assume, options.solver_seconds, cache, checked=checked)
    proved = canonical_sites(examined)
    with stage("rewrite"):
        rewritten, outcomes = rewrite(captured.program, proved, prover_of(captured.program, checked=checked))
    heads, ranges = canonical_heads(rewritten), size_ranges(captured.program)
    sites = agreed_sites(captured.program.graph, captured.route, examined, [site_report(e, heads) for e in examined])
    report = Report(
        model=type(model).__name__,
        inputs=input_names(captured.program),
        route=captured.route,
        failures=captured.failures,
        ranges=ranges,
        sizes=size_names(captured.program),
        sites=sites,
        passes={name: outcome.changed for name, outcome in outcomes.items()},
        versions=versions(),
        warnings=broken_promises(hf.text_config(model), sites, ranges),
        notes=shares_of(model),
    )
    return Analysis(captured, proved, rewritten, report)


def explain(
    model: str | nn.Module | ExportedProgram,
    example_kwargs: Example | None = None,
    dynamic_shapes: Any = None,
    assume: tuple[Assumption, ...] = (),
    options: Options = Options(),  # noqa: B008 (frozen)
) -> Report:
    """Say what every attention mask of a model means, with proof, and what it could run on.

    Args:
        model: a module, an exported program, or the name of a preset, folder or hub id (then no weights are loaded).
        example_kwargs: keyword arguments of one call; a Hugging Face model has a default.
        dynamic_shapes: as torch.export takes them; default: every axis that export can leave dynamic.
        assume: declared facts about inputs, e.g. `[trilithon.position_ids.consecutive()]`.
        options: solver budget.

    Raises:
        InputError, CaptureError: the model or the example cannot be captured.
    """
    model = hf.load_model(model, device="meta") if isinstance(model, str) else to_capture(model, example_kwargs)
    if example_kwargs is None and hf.is_hf(model):
        inputs = ("input_ids",) if hf.is_causal_lm(model) else hf.usual_inputs(model)
        example_kwargs, dynamic_shapes = hf.example_for(model, inputs)
    with clocked() as stages:
        report = analyse(model, example_kwargs, dynamic_shapes, tuple(assume), options).report
    return replace(report, seconds=stages.seconds)


def lower(
    program: ExportedProgram,
    assume: tuple[Assumption, ...] = (),
    options: Options = Options(),  # noqa: B008
) -> ExportedProgram:
    """Rewrite every proved attention of an exported program to `trilithon::attention`.

    What a proof needs of the inputs is asserted in the program (`_assert_async`), so that it fails on inputs that
    break it, and never gives a wrong answer. `explain(program).guards` lists these.

    Args:
        program: as torch.export gives it.
        assume: declared facts about inputs.
        options: solver budget.
    """
    analysis = analyse(program, None, None, tuple(assume), options)
    return assert_guards(analysis.rewritten, analysis.guards)


def compile(
    model: str | nn.Module | ExportedProgram,
    example_kwargs: Example | None = None,
    *,
    max_tokens: int | None = None,
    backend: str = "auto",
    dynamic_shapes: Any = None,
    assume: tuple[Assumption, ...] = (),
    options: Options = Options(),  # noqa: B008 (frozen)
) -> Compiled:
    """Compile a model: prove its masks, rewrite its attention, insert a static KV cache, lower it.

    Args:
        model: a module in eval mode, an exported program, or the name of a preset, folder or hub id.
        example_kwargs: keyword arguments of one call; a Hugging Face model has a default.
        max_tokens: capacity of a row of the KV cache, prompt and generated tokens together; default: 4096, or the
            model's number of positions if that is less.
        backend: "auto" (chooses, and the report says what), "native" (PyTorch kernels), "eager" (the canonical op
            written out), "tensorrt".
        dynamic_shapes: as torch.export takes them.
        assume: declared facts about inputs; a guard checks them in every call.
        options: see `Options`.

    Returns:
        A `Compiled`: call it for logits, `generate` tokens, read its `report`.

    Raises:
        InputError, CaptureError: the model or an argument cannot be used.
        CannotLower: a backend named by the user cannot serve the model.
        VerificationFailed: a compiled program disagreed with eager.
    """
    with clocked() as stages:
        module: nn.Module | ExportedProgram = to_capture(model, example_kwargs)
        most = capacity(hf.max_positions(module) if isinstance(module, nn.Module) and hf.is_hf(module) else None, max_tokens)
        backend = resolve_backend(backend, options.cache_dtype)
        analysis, decoder, notes = _with_decoder(
            module, _examples(module, example_kwargs, dynamic_shapes), max_tokens, backend, tuple(assume), options
        )
        defer = backend == "tensorrt" and isinstance(decoder, CachedDecoder)  # an engine of all weights that few need
        program, report = compile_program(analysis, backend, options, most, defer=defer)
        report = _as_lowered(report, {} if isinstance(decoder, CannotCache) else vars(decoder.modules), notes)

    def build(inputs: tuple[str, ...]) -> tuple[Program, Report]:
        example, shapes = hf.example_for(module, inputs)  # type: ignore[arg-type]
        with clocked() as stages:
            analysis = analyse(module, example, shapes, tuple(assume), options)
            program, report = compile_program(analysis, backend, options, most)
        return program, replace(report, seconds=stages.seconds)

    return Compiled(
        programs={program.inputs: program},
        report=replace(report, seconds=stages.seconds),
        build=build if hf.is_hf(module) else None,
        decoder=decoder,
        max_tokens=most if isinstance(decoder, CannotCache) else decoder.cache_tokens,
        defaults=hf.generation_defaults(module),
        seq2seq=seq2seq_of(program, decoder, generation_settings(module)),
        origin=Origin(hf.source_of(module), backend, options),
    )


def _examples(model: Any, example: Example | None, dynamic_shapes: Any) -> list[tuple[Example | None, Any]]:
    """The calls to capture, best first, with their dynamic shapes."""
    usual = hf.input_choices(model) if example is None and hf.is_hf(model) else ()
    return [hf.example_for(model, inputs) for inputs in usual] or [(example, dynamic_shapes)]


def _with_decoder(
    model: Any,
    examples: list[tuple[Example | None, Any]],
    max_tokens: int | None,
    backend: str,
    assume: tuple[Assumption, ...],
    options: Options,
) -> tuple[Analysis, CachedDecoder | CannotCache, tuple[str, ...]]:
    """Capture the first example that gives a cache, or where none does the first; notes are of the cache."""
    found: list[tuple[Analysis, CachedDecoder | CannotCache, tuple[str, ...]]] = []
    for example, shapes in examples:
        try:
            analysis = analyse(model, example, shapes, assume, options)
        except CaptureError:
            if not found:
                raise
            continue
        decoder, notes = make_decoder(_source(model, example, analysis), max_tokens, backend, options)
        found.append((analysis, decoder, notes))
        if isinstance(decoder, CachedDecoder):
            return found[-1]
    return found[0]


def _source(model: Any, example: Example | None, analysis: Analysis) -> Source:
    """What a decoder is made of; it is verified against the user's module where that can be called by its inputs' names."""
    held = fake_inputs(analysis.captured.program)
    original = partial(original_program, analysis.general, held)
    if isinstance(model, nn.Module) and example is not None and held.keys() <= example.keys():
        original = partial(original_model, model, {name: x for name, x in example.items() if name not in held}, held)
    return Source(analysis.rewritten, analysis.guards, expected_inputs(held, analysis.report.ranges), original)


def _as_lowered(report: Report, modules: Mapping[str, Any], notes: tuple[str, ...] = ()) -> Report:
    """The report with what lowered programs say of themselves, and these notes."""
    forms = site_forms(modules)
    sites = [replace(site, runs_on=forms.get(site.name, site.runs_on)) for site in report.sites]
    parts = (f"{name}: {note}" for name, module in modules.items() for note in split_notes(module))
    return replace(report, sites=sites, notes=(*report.notes, *notes, *parts))


def compile_program(
    analysis: Analysis, backend: str, options: Options, max_tokens: int, *, defer: bool = False
) -> tuple[Program, Report]:
    """Lower one captured call, rewritten, and verify it against the captured program; with `defer` when first called."""
    held, fast, always = fake_inputs(analysis.captured.program), unlift(analysis.rewritten), analysis.general
    inputs, device = sequence_inputs(held, analysis.report.ranges, options.max_batch, max_tokens), device_of(fast)
    blueprint = None if backend == "tensorrt" else blueprint_of(fast, "sequence", "sequence", inputs)
    notes, canaries = list[str](), list[Canary]()

    def build(chosen: Options, exact: int) -> Callable[..., Any]:
        with stage("build"):
            return lower_module(fast, backend, chosen, role="sequence", name="sequence", inputs=inputs, exact=exact)

    def verify(made: Callable[..., Any], chosen: Options, exact: int) -> None:
        if chosen.verify:
            times = allowed_times(made, device, chosen)
            with verifying():
                verify_program(made, always, held, analysis.guards, inputs, device, times, canaries)

    def make() -> Callable[..., Any]:
        made, found = build_right(build, verify, backend, options, always.graph)
        notes.extend(found)
        return made

    program = Program(
        expected=expected_inputs(held, analysis.report.ranges),
        fast=Deferred(make) if defer else make(),
        general=always,
        guards=analysis.guards,
        when_guard_fails=options.when_guard_fails,
        blueprint=blueprint,
        canaries=canaries,
    )
    report = replace(analysis.report, notes=(*analysis.report.notes, backend_note(backend, options, device), *notes))
    return program, _as_lowered(report, {"call": lowered(program.fast)})
