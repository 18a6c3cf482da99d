"""The KV cache of a compiled model: prefill and decode made from its proved program, or the reason why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from trilithon.errors import CannotCache, InputError, VerificationFailed
from trilithon.lower.backend import Blueprint, Role, blueprint_of, lower_module
from trilithon.lower.inputs import Input, cached_inputs, sequence_inputs
from trilithon.lower.native.prompt import Prompt
from trilithon.lower.native.step import NativeStep
from trilithon.lower.tensorrt.diagnose import first_diverging_site
from trilithon.lower.tensorrt.module import Split, TensorRTModule
from trilithon.options import Options
from trilithon.prove.locality import TokenInputs
from trilithon.rewrite.cache_ops import STORED
from trilithon.rewrite.cache_shape import CacheShape
from trilithon.rewrite.fuse_attention import SITE
from trilithon.rewrite.insert_cache import Mode, cache_shapes, insert_cache
from trilithon.rewrite.op import ATTENTION
from trilithon.rewrite.split_context import Context, split_context
from trilithon.rewrite.token_model import POSITIONS, longest, token_inputs
from trilithon.rewrite.unlift import device_of, fake_inputs, unlift
from trilithon.runtime.agree import require_same_choices
from trilithon.runtime.assemble import assemble
from trilithon.runtime.build_right import build_right
from trilithon.runtime.cache_notes import cache_notes, kept_notes
from trilithon.runtime.context import HeldContext
from trilithon.runtime.decoder import CachedDecoder, CachedModules
from trilithon.runtime.original import Original
from trilithon.runtime.program import Expected
from trilithon.runtime.verify import TOLERANCE, canary_inputs, verify_decoder
from trilithon.spec.assumption import Assumption
from trilithon.spec.masks import SlidingWindow, parse, parts
from trilithon.stages import stage, verifying

DEFAULT_TOKENS = 4096
LEAST_SLOTS = 1024  # tokens a row that a cache which grows is allocated for at first
CANARY = (6,)  # tokens of the prompts that a native decoder is verified with
CANARY_8BIT = (6, 70)  # also one that turns short rings over, and goes past the 64 keys that a GPU reads at once
CONTEXT_TOKENS = 9  # of the canary of a context, where it may have any number
TIMES = 3.0  # most times the error of eager, both against a wider type, that logits of an engine may have


@dataclass(frozen=True)
class Source:
    """What a decoder is made of.

    Attributes:
        program: rewritten.
        guards: what its proofs need of the inputs.
        expected: what each of its inputs must be.
        original: from the names of its token inputs, and what it takes beside them, the model to verify against.
    """

    program: ExportedProgram
    guards: tuple[Assumption, ...]
    expected: Mapping[str, Expected]
    original: Callable[[TokenInputs, Mapping[str, Tensor]], Original]


def make_decoder(
    source: Source, max_tokens: int | None, backend: str, options: Options
) -> tuple[CachedDecoder | CannotCache, tuple[str, ...]]:
    """Prefill and decode with a static KV cache, or the reason why not; and what the report says of it.

    Args:
        max_tokens: as the user gave it.

    Raises:
        InputError: it is more than the program is for.
    """
    try:
        with stage("rewrite"):
            plan = _plan(source, max_tokens, backend, options)
    except CannotCache as refusal:
        require_same_choices(source.program.graph, backend, options, None)
        return refusal, cache_notes(refusal)
    require_same_choices(source.program.graph, backend, options, plan.max_tokens)
    decoder, notes = _make(source, plan, backend, options)
    return decoder, (*cache_notes(decoder), *notes)


@dataclass(frozen=True)
class _Plan:
    """That a cache is sound, and what it must hold."""

    inputs: TokenInputs
    kept: list[CacheShape]
    max_tokens: int
    context: Context | None
    device: torch.device


def _plan(source: Source, max_tokens: int | None, backend: str, options: Options) -> _Plan:
    program, plain = source.program, unlift(source.program)
    device, inputs = device_of(plain), token_inputs(plain)
    context = split_context(program, inputs.tokens) if inputs.context else None
    native = backend != "tensorrt"  # its cache layer writes consecutive slots
    kept = cache_shapes(program, rings=native, stored=_stored(options), turned=_turned(backend, options))
    _check_guards(source.guards, context)
    if context is not None and not native:
        why = "its context, e.g. an encoder, runs on native kernels only"
        raise CannotCache("no KV cache for TensorRT", why=why, todo="compile with backend='native'")
    rows = fake_inputs(program)[inputs.tokens].shape[0]
    if isinstance(rows, int) and options.max_batch > rows:
        todo = "export it with a dynamic batch axis, or compile with Options(max_batch=1)"
        raise CannotCache(f"no KV cache of {options.max_batch} rows", why=f"the program is for {rows} row", todo=todo)
    most = capacity(longest(program, inputs.tokens), max_tokens)
    return _Plan(inputs, kept, most, context, device)


def _check_guards(guards: tuple[Assumption, ...], context: Context | None) -> None:
    """The decoder makes positions itself, so it meets their guards by construction; those of the context are checked."""
    for assumption in guards:
        of_context = context is not None and assumption.table in context.inputs
        if not of_context and (assumption.table, assumption.kind) not in ((POSITIONS, "consecutive"), (POSITIONS, "bounded")):
            why = f"its masks were proved only if {assumption.text}"
            raise CannotCache("cannot insert a KV cache", why=why, todo="call it for its output instead of generate")


def _make(source: Source, plan: _Plan, backend: str, options: Options) -> tuple[CachedDecoder, tuple[str, ...]]:
    errors: list[float] = []

    def build(options: Options, exact: int) -> CachedDecoder:
        with stage("build"):
            return _build(source.program, plan, backend, options, exact)

    def verify(decoder: CachedDecoder, options: Options, exact: int) -> None:
        if not options.verify:
            return
        times = allowed_times(decoder.modules.decode, plan.device, options)
        lengths = (CANARY if options.cache_dtype is None else CANARY_8BIT) if times is None else _canary_lengths(source.program)
        given = _given(source, plan, min(2, options.max_batch))
        with verifying():
            if plan.context is not None:
                decoder.take_context(tuple(given.values()), min(2, options.max_batch))
            try:
                errors.append(verify_decoder(decoder, source.original(plan.inputs, given), lengths, times))
            except VerificationFailed as error:
                raise _located(error, decoder, source.program, options, exact) from error

    decoder, notes = build_right(build, verify, backend, options, source.program.graph)
    own = tuple(x.note for x in (decoder.modules.prefill, decoder.modules.decode) if isinstance(x, (Prompt, NativeStep)))
    return decoder, (*own, *kept_notes(options.cache_dtype, errors), *notes)


def _stored(options: Options) -> torch.dtype | None:
    return None if options.cache_dtype is None else STORED[options.cache_dtype]


def _turned(backend: str, options: Options) -> bool:
    """May values be kept turned? The fused layer, and a product of matrices, would copy them back."""
    return backend == "tensorrt" and options.attention == "auto"


def _given(source: Source, plan: _Plan, rows: int) -> dict[str, Tensor]:
    """A canary of what the context takes, by name."""
    if plan.context is None:
        return {}
    held = {name: x for name, x in fake_inputs(source.program).items() if name in plan.context.inputs}
    ranges = {axis.symbol: (axis.low, axis.high) for x in source.expected.values() for axis in x.axes if axis.symbol}
    inputs = sequence_inputs(held, ranges, rows, CONTEXT_TOKENS)
    return canary_inputs(inputs, held, source.guards, rows, CONTEXT_TOKENS, plan.device)


def _build(program: ExportedProgram, plan: _Plan, backend: str, options: Options, exact: int) -> CachedDecoder:
    native, context, turned = backend != "tensorrt", plan.context, _turned(backend, options)
    kept = [replace(shape, turned=shape.turned and turned) for shape in plan.kept]
    first = min(LEAST_SLOTS, plan.max_tokens) if native else None  # engines are built for one size
    blueprints: dict[str, Blueprint] = {}

    def lower(gm: GraphModule, role: Role, name: str, inputs: tuple[Input, ...]) -> Callable[..., Any]:
        if native:
            blueprints[name] = blueprint_of(gm, role, name, inputs)
        return lower_module(gm, backend, options, role=role, name=name, inputs=inputs, exact=exact)

    def lowered(name: str, mode: Mode) -> Callable[..., Any]:
        every, most = mode == "extend", 1 if mode == "step" else None
        with stage("rewrite"):
            gm = insert_cache(program, mode, all_logits=every, rings=native, stored=_stored(options), turned=turned)
        inputs = cached_inputs(gm, kept, plan.max_tokens, options.max_batch, most_tokens=most, first_tokens=first)
        roles: dict[Mode, Role] = {"prompt": "prompt", "step": "step", "extend": "sequence"}
        role = roles[mode] if context is None else "sequence"  # no Inductor for each length of a context
        return lower(gm, role, name, inputs)

    modules = CachedModules(
        prefill=lowered("prefill", "prompt"),
        decode=lowered("decode", "step"),
        extend=lowered("extend", "extend") if native else None,  # an engine more would hold the weights once more
    )
    held = None
    if context is not None:
        own_rows = _has_rows(program, plan.inputs, context)
        held = HeldContext(lower(context.module, "sequence", "context", ()), context.inputs, own_rows)
    return assemble(modules, kept, plan.max_tokens, options, plan.device, first, held, blueprints, program.graph)


def _has_rows(program: ExportedProgram, inputs: TokenInputs, context: Context) -> tuple[bool, ...]:
    """Of each result of a context, whether its axis 0 runs over rows."""
    rows = str(fake_inputs(program)[inputs.tokens].shape[0])
    results: Any = context.module.graph.output_node().args[0]
    return tuple(bool(x.meta["val"].dim()) and str(x.meta["val"].shape[0]) == rows for x in results)


def allowed_times(module: Any, device: torch.device, options: Options) -> float | None:
    """How many times the error of eager a lowered module may have; None where a rule of thumb for rounding serves.

    An engine on a GPU is held to eager's error: what it is made of is not ours.
    """
    if device.type != "cuda" or not isinstance(module, (TensorRTModule, Split)):
        return None
    return TIMES if options.verify is True else float(options.verify)


def _located(
    error: VerificationFailed, decoder: CachedDecoder, program: ExportedProgram, options: Options, exact: int
) -> VerificationFailed:
    """The error with the name of the first attention whose result is wrong, where a prompt shows one."""
    if not isinstance(decoder.modules.prefill, TensorRTModule):
        return error
    b, t = decoder.max_batch, decoder.cache_tokens
    ids = torch.arange(min(17, t), device=decoder.device).expand(b, -1) % 5
    start = torch.zeros(b, dtype=torch.int64, device=decoder.device)
    tensors = (ids, start, start + ids.shape[1], *decoder.caches)
    gm = insert_cache(program, "prompt", rings=False, turned=_turned("tensorrt", options))
    inputs = decoder.modules.prefill.engine.inputs
    limit = TOLERANCE[decoder.shapes[0].dtype]
    found = first_diverging_site(gm, inputs, [x.contiguous() for x in tensors], options, limit, exact)
    site = next((n.meta.get(SITE) for n in gm.graph.nodes if found and n.name == found.node), None)
    where = f"the first attention that differs is {site}: {found}" if found else "no attention of the prompt differs"
    return VerificationFailed(error.what, why=f"{error.why}; {where}", todo=error.todo)


def _canary_lengths(program: ExportedProgram) -> tuple[int, ...]:
    """Prompts to verify engines with: short, long, and past each window."""
    masks = {part for node in program.graph.nodes if node.target is ATTENTION for part in parts(parse(str(node.args[3])))}
    edges = [part.window_keys for part in masks if isinstance(part, SlidingWindow)]
    return (6, 1, 17, 512, *(edge + 3 for edge in edges))


def capacity(most: int | None, wanted: int | None) -> int:
    """The capacity of a row of the KV cache.

    Args:
        most: tokens that the masks are proved for, and the model is for; None = any number.
        wanted: as the user gave it.
    """
    if wanted is None:
        return DEFAULT_TOKENS if most is None else min(DEFAULT_TOKENS, most)
    if wanted < 2 or (most is not None and wanted > most):
        raise InputError(
            f"max_tokens={wanted} must be " + ("2 or more" if most is None else f"between 2 and {most}"),
            why="a prompt and one generated token need two" if wanted < 2 else "the model has no more positions",
            todo=f"pass max_tokens={2 if wanted < 2 else most}",
        )
    return wanted
