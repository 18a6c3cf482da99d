"""Write an artefact."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from trilithon.artefact import native, weights
from trilithon.artefact.canaries import check_before_saving
from trilithon.artefact.engines import describe, engines_of, plan_of
from trilithon.artefact.environment import versions_of
from trilithon.artefact.manifest import FORMAT
from trilithon.artefact.writer import writing
from trilithon.compiled import Compiled
from trilithon.errors import CannotCache, CannotLower
from trilithon.lower.native.step import NativeStep
from trilithon.lower.tensorrt.module import TensorRTModule
from trilithon.options import Options
from trilithon.report.report import Report
from trilithon.runtime.canary import Canary
from trilithon.runtime.decoder import CachedDecoder, CachedModules
from trilithon.runtime.program import Program, lowered
from trilithon.runtime.seq2seq import Seq2Seq
from trilithon.spec.codec import encode

WEIGHTS, CANARIES, TOKENIZER = "weights.safetensors", "canaries.safetensors", "tokenizer"
LOADED = "loaded: "  # how a note begins that a load adds to a report


def save(compiled: Compiled, folder: str | Path, tokenizer: Any | None = None) -> Path:
    """Write what `load` reads: programs or engines, the weights that they read, once, and a manifest.

    A reader finds what was in the folder before, whole, or the new artefact, whole; a save that is interrupted changes
    nothing. Saving over the folder that the model was loaded from is fine.

    Args:
        tokenizer: of transformers, to be saved with it.

    Raises:
        CannotLower: a part of it cannot be saved; says which.
        VerificationFailed: its weights were changed since it was compiled and verified.
        InputError: the folder cannot be written to, or another process is saving into it.
    """
    if any(program.group is not None for program in compiled.programs):
        why = "this process holds one rank's share of it, and meets the others in collectives of their process group"
        raise CannotLower(
            f"cannot save {compiled!r}", why=why, todo="keep the model's weights, and compile them where they run"
        )
    folder, tensors = Path(folder), weights.Tensors()
    engines = engines_of(_lowered(compiled))
    blueprints = native.blueprints_of(compiled)
    if not engines and not blueprints:
        why = "what its programs were lowered from was not kept"
        raise CannotLower(f"cannot save {compiled!r}", why=why, todo="compile it with trilithon.compile")
    engine_data, readers = describe(engines, tensors)
    texts = {name: native.program_text(name, blueprint, tensors) for name, blueprint in blueprints.items()}
    if not engines or _device(compiled).type == "cuda":  # elsewhere engines are interpreted, slowly
        check_before_saving(compiled, _device(compiled))
    saved = {name: p for p in compiled.programs for name in (_name(p), native.call_name(p)) if name in engines | blueprints}
    canaries = weights.Tensors()
    manifest = {
        **_about(compiled, engines),
        "verified": {name: _canary_data(name, x, canaries) for name, x in _canaries(compiled, saved).items()},
        "engines": engine_data,
        "weights": readers,
        "native": {name: f"{name}.json" for name in texts},
        "programs": [_program_data(p) | {"fast": name} for name, p in saved.items()],
        "cache": _cache_data(compiled),
        "tuned": _tuned(compiled),
    }
    files = _tokenizer_files(tokenizer)
    with writing(folder) as writer:
        for name, module in engines.items():
            writer.add(f"{name}.plan", plan_of(module))
        for name, text in texts.items():
            writer.add(f"{name}.json", [text])
        writer.add(WEIGHTS, weights.chunks(tensors.kept))
        writer.add(CANARIES, weights.chunks(canaries.kept))
        if files:
            writer.add_folder(TOKENIZER, files)
        writer.finish(manifest)
    return folder


def _about(compiled: Compiled, engines: Mapping[str, TensorRTModule]) -> dict[str, Any]:
    """What the model is, and what was proved of it."""
    report, origin = _report_data(compiled.report), compiled.origin
    unknown = {"kind": "module", "id": None, "revision": None, "class": report.model, "config": None}
    options = Options() if origin is None else replace(origin.options, engine_cache=None)
    return {
        "format": FORMAT,
        "model": unknown if origin is None else dict(origin.model),
        "versions": versions_of(compiled, bool(engines)),
        "target": _target(compiled, engines),
        "options": encode(options),
        "proofs": [site.to_dict() for site in report.sites],
        "report": encode(report),
        "max_tokens": compiled.max_tokens,
        "defaults": _plain("the model's defaults of generate", compiled.defaults),
    }


def _target(compiled: Compiled, engines: Mapping[str, TensorRTModule]) -> dict[str, Any]:
    """What it runs on: a backend, a kind of device, and the GPU that engines or kernels were made for."""
    if engines:
        return {"backend": "tensorrt", "device": "cuda", "gpu": next(iter(engines.values())).engine.target}
    backend = "native" if compiled.origin is None else compiled.origin.backend
    device = _device(compiled)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"backend": backend, "device": device.type, "gpu": gpu}


def _device(compiled: Compiled) -> torch.device:
    if isinstance(compiled.cached, CachedDecoder):
        return compiled.cached.device
    found = (x.device for b in native.blueprints_of(compiled).values() for x in b.graph.tensors.values())  # type: ignore[union-attr]
    return next(found, torch.device("cpu"))


def _lowered(compiled: Compiled) -> dict[str, Any]:
    """Each lowered program by name; None for one that is not lowered yet."""
    found = {_name(p): lowered(p.fast) for p in compiled.programs}
    if isinstance(compiled.cached, CachedDecoder):
        found |= {f.name: getattr(compiled.cached.modules, f.name) for f in fields(CachedModules)}
    return found


def _name(program: Program) -> str:
    return "-".join(program.inputs)


def _report_data(report: Report) -> Report:
    """Without what pictures are drawn from, and what a load said."""
    sites: Any = tuple(replace(site, lifted=None) for site in report.sites)
    return replace(report, sites=sites, notes=tuple(note for note in report.notes if not note.startswith(LOADED)))


def _program_data(program: Program) -> dict[str, Any]:
    general = native.general_name(program) if program.blueprint and native.needs_general(program) else None
    return {
        "general": general,
        "expected": encode(dict(program.expected)),
        "guards": encode(program.guards),
        "when_guard_fails": program.when_guard_fails if general else "raise",
    }


def _cache_data(compiled: Compiled) -> dict[str, Any]:
    decoder = compiled.cached
    if isinstance(decoder, CannotCache):
        return {"refused": {"what": decoder.what, "why": decoder.why, "todo": decoder.todo}}
    context = None
    if decoder.context.module is not None:
        context = {"inputs": list(decoder.context.inputs), "has_rows": list(decoder.context.has_rows)}
    return {
        "shapes": encode(tuple(decoder.shapes)),
        "max_batch": decoder.max_batch,
        "first_tokens": decoder.first_tokens,
        "modules": [f.name for f in fields(CachedModules) if getattr(decoder.modules, f.name) is not None],
        "context": context,
        "seq2seq": None if compiled.seq2seq is None else _seq2seq_data(compiled.seq2seq),
    }


def _seq2seq_data(seq2seq: Seq2Seq) -> dict[str, Any]:
    settings = {f.name: getattr(seq2seq.settings, f.name) for f in fields(seq2seq.settings)}
    return {
        "expected": encode(dict(seq2seq.expected)),
        "guards": encode(seq2seq.guards),
        "settings": {name: _plain(f"the generation config's {name}", value) for name, value in settings.items()},
    }


def _plain(what: str, value: Any) -> Any:
    """What JSON holds without a change, save that tuples become lists.

    Raises:
        CannotLower: it cannot hold this.
    """
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(f"{what}: {key}", x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(what, x) for x in value]
    if value is None or type(value) in (bool, int, str) or (type(value) is float and value - value == 0):
        return value
    raise CannotLower(f"cannot save {what}", why=f"a file cannot hold {value!r}", todo="set it to plain data before compiling")


def _canaries(compiled: Compiled, saved: Mapping[str, Program]) -> dict[str, Canary | None]:
    """What each program was verified with, by its name; None = it was not."""
    found = {name: program.canary for name, program in saved.items()}
    return found if isinstance(compiled.cached, CannotCache) else {**found, "decoder": compiled.cached.canary}


def _canary_data(name: str, canary: Canary | None, tensors: weights.Tensors) -> dict[str, Any] | None:
    if canary is None:
        return None
    return {
        "given": {own: tensors.key(f"{name}.given.{own}", x) for own, x in canary.given.items()},
        "wanted": [tensors.key(f"{name}.wanted.{i}", x) for i, x in enumerate(canary.wanted)],
        "limits": encode(canary.limits),
    }


def _tuned(compiled: Compiled) -> dict[str, Any]:
    """Settings of generated kernels by GPU: those that were found here, and those that were loaded."""
    found: dict[str, Any] = {} if compiled.origin is None else {gpu: dict(x) for gpu, x in compiled.origin.tuned.items()}
    if isinstance(compiled.cached, CachedDecoder) and isinstance(step := compiled.cached.modules.decode, NativeStep):
        device = compiled.cached.device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        found[gpu] = found.get(gpu, {}) | {key: dict(settings) for key, settings in step.tuned.items()}
    return found


def _tokenizer_files(tokenizer: Any | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        return {file.name: file.read_bytes() for file in Path(made).iterdir() if file.is_file()}
