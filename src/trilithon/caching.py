"""The KV cache of a compiled model: prefill and decode made from its proved program, or the reason why not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.export import ExportedProgram

from trilithon.capture import hf
from trilithon.errors import CannotCache, InputError, VerificationFailed
from trilithon.lower.backend import Role, lower_module
from trilithon.lower.inputs import cached_inputs
from trilithon.lower.tensorrt.diagnose import first_diverging_site
from trilithon.lower.tensorrt.lower import Split
from trilithon.lower.tensorrt.module import TensorRTModule
from trilithon.options import Options
from trilithon.rewrite.cache_ops import STORED
from trilithon.rewrite.fuse_attention import SITE
from trilithon.rewrite.insert_cache import CacheShape, Mode, cache_shapes, insert_cache
from trilithon.rewrite.op import ATTENTION
from trilithon.runtime.decoder import CachedDecoder, CachedModules
from trilithon.runtime.verify import TOLERANCE, verify_decoder
from trilithon.spec.assumption import Assumption
from trilithon.spec.masks import SlidingWindow, parse, parts

DEFAULT_TOKENS = 4096
TIMES = 3.0  # most times the error of eager, both against a wider type, that logits of an engine may have
EXACT = "products of halves are added up in float32 parts"
Built = TypeVar("Built")
log = logging.getLogger(__name__)


def make_decoder(
    model: Any, program: ExportedProgram, guards: tuple[Assumption, ...], max_tokens: int, backend: str, options: Options
) -> tuple[CachedDecoder | CannotCache, tuple[str, ...]]:
    """Prefill and decode with a static KV cache, or the reason why not; and what the report says of it."""
    made = _make(model, program, guards, max_tokens, backend, options)
    return made if isinstance(made, tuple) else (made, cache_notes(made))


def _make(
    model: Any, program: ExportedProgram, guards: tuple[Assumption, ...], max_tokens: int, backend: str, options: Options
) -> CannotCache | tuple[CachedDecoder, tuple[str, ...]]:
    if not hf.is_causal_lm(model):
        return _no_cache(model, "it is not a Hugging Face causal LM")
    for assumption in guards:  # the decoder makes position_ids itself, so these it meets by construction
        if (assumption.table, assumption.kind) not in (("position_ids", "consecutive"), ("position_ids", "bounded")):
            return _no_cache(model, f"its masks were proved only if {assumption.text}")
    rings = backend != "tensorrt"  # its cache layer writes consecutive slots
    errors: list[float] = []
    try:
        kept = cache_shapes(program, rings=rings, stored=_stored(options))
    except CannotCache as refusal:
        return refusal
    device = next(model.parameters()).device

    def build(options: Options, exact: bool) -> CachedDecoder:
        return _build(program, kept, max_tokens, backend, options, device, exact)

    def verify(decoder: CachedDecoder, options: Options, exact: bool) -> None:
        if not options.verify:
            return
        times = allowed_times(decoder.modules.decode, device, options)
        try:
            errors.append(verify_decoder(decoder, model, (6,) if times is None else _canary_lengths(program), times))
        except VerificationFailed as error:
            raise _located(error, decoder, program, options, exact) from error

    decoder, notes = build_right(build, verify, backend, options)
    return decoder, (*cache_notes(decoder), *kept_notes(options.cache_dtype, errors), *notes)


def _stored(options: Options) -> torch.dtype | None:
    return None if options.cache_dtype is None else STORED[options.cache_dtype]


def build_right(
    build: Callable[[Options, bool], Built], verify: Callable[[Built, Options, bool], None], backend: str, options: Options
) -> tuple[Built, tuple[str, ...]]:
    """What `build` makes and `verify` accepts, and what a report says of it.

    An engine that is wrong is built again in forms that are more exact.

    Raises:
        VerificationFailed: so is the most exact.
    """
    forms: list[tuple[Options, bool]] = [(options, False)]
    if backend == "tensorrt":
        forms.append((options, True))
        if options.attention == "auto":
            forms.append((replace(options, attention="decomposed"), True))
    notes: tuple[str, ...] = ()
    for form, (chosen, exact) in enumerate(forms):
        built = build(chosen, exact)
        try:
            verify(built, chosen, exact)
            return built, notes
        except VerificationFailed as error:
            if form + 1 == len(forms):
                raise
            name = EXACT if not exact else f"{EXACT}, and attention='decomposed'"
            notes = (f"{name}, since engines in a faster form were refused: {error.what}, {error.why}",)
            log.warning("%s", notes[0])
    raise AssertionError("unreachable")


def _build(
    program: ExportedProgram,
    kept: list[CacheShape],
    max_tokens: int,
    backend: str,
    options: Options,
    device: torch.device,
    exact: bool,
) -> CachedDecoder:
    native = backend != "tensorrt"

    def lowered(name: str, mode: Mode) -> Callable[..., Any]:
        gm = insert_cache(program, mode, all_logits=mode == "extend", rings=native, stored=_stored(options))
        inputs = cached_inputs(gm, kept, max_tokens, options.max_batch, most_tokens=1 if mode == "step" else None)
        role: Role = "step" if mode == "step" else "sequence"
        return lower_module(gm, backend, options, role=role, name=name, inputs=inputs, exact=exact)

    modules = CachedModules(
        prefill=lowered("prefill", "prompt"),
        decode=lowered("decode", "step"),
        extend=lowered("extend", "extend") if native else None,  # an engine more would hold the weights once more
    )
    graphs = device.type == "cuda" if options.cuda_graphs is None else options.cuda_graphs
    return CachedDecoder(modules, kept, max_tokens, options.max_batch, device, graphs, grows=native)


def allowed_times(module: Any, device: torch.device, options: Options) -> float | None:
    """How many times the error of eager a lowered module may have; None where a rule of thumb for rounding serves.

    An engine on a GPU is held to eager's error: what it is made of is not ours.
    """
    if device.type != "cuda" or not isinstance(module, (TensorRTModule, Split)):
        return None
    return TIMES if options.verify is True else float(options.verify)


def _located(
    error: VerificationFailed, decoder: CachedDecoder, program: ExportedProgram, options: Options, exact: bool
) -> VerificationFailed:
    """The error with the name of the first attention whose result is wrong, where a prompt shows one."""
    if not isinstance(decoder.modules.prefill, TensorRTModule):
        return error
    b, t = decoder.max_batch, decoder.cache_tokens
    ids = torch.arange(min(17, t), device=decoder.device).expand(b, -1) % 5
    start = torch.zeros(b, dtype=torch.int64, device=decoder.device)
    tensors = (ids, start, start + ids.shape[1], *decoder.caches)
    gm = insert_cache(program, "prompt", rings=False)
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


def capacity(model: Any, max_tokens: int | None) -> int:
    """The capacity of the KV cache: within the positions that the masks are proved for."""
    most = hf.max_positions(model) if hf.is_hf(model) else max(DEFAULT_TOKENS, max_tokens or 0)
    if max_tokens is None:
        return min(DEFAULT_TOKENS, most)
    if not 2 <= max_tokens <= most:
        raise InputError(
            f"max_tokens={max_tokens} must be between 2 and {most}",
            why="the model has no more positions" if max_tokens > most else "a prompt and one generated token need two",
            todo=f"pass max_tokens={min(max(max_tokens, 2), most)}",
        )
    return max_tokens


def _no_cache(model: Any, why: str) -> CannotCache:
    return CannotCache(f"{type(model).__name__} has no KV cache", why=why, todo="call it for its output instead of generate")


def cache_notes(decoder: CachedDecoder | CannotCache) -> tuple[str, ...]:
    if isinstance(decoder, CannotCache):
        return (f"no KV cache: {decoder.why}" + (f" (at {decoder.where})" if decoder.where else ""),)
    rows = "1 row" if decoder.max_batch == 1 else f"{decoder.max_batch} rows"
    return (f"KV cache: {decoder.cache_tokens} tokens x {rows}, {decoder.most_cache_bytes / 1e6:.1f} MB",)


def kept_notes(cache_dtype: str | None, errors: Sequence[float]) -> tuple[str, ...]:
    """What a report says of a cache of 8 bits: that it is an approximation, and how good a one.

    Args:
        errors: what `verify_decoder` gave; none where the options ask for no verification.
    """
    if cache_dtype is None:
        return ()
    found = f"{errors[-1]:.1e} on the canary prompts" if errors else "not measured, since verify=False"
    return (f"K and V are kept in {cache_dtype}, an approximation: relative error of the logits against eager {found}",)
