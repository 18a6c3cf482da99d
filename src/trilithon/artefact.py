"""Compiled models on disk: engines, their weights, what they take, the guards, and the report, in one folder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trilithon.compiled import Compiled
from trilithon.errors import CannotCache, CannotLower, InputError
from trilithon.lower.tensorrt.engine import from_data, to_data
from trilithon.lower.tensorrt.lower import Split
from trilithon.lower.tensorrt.module import TensorRTModule
from trilithon.prove.verdict import Proof, Verdict
from trilithon.report.report import Report, SiteReport
from trilithon.rewrite.cache_shape import CacheShape
from trilithon.runtime import program as runtime
from trilithon.runtime.decoder import CachedDecoder, CachedModules
from trilithon.spec.codec import decode, encode, readable_classes

MANIFEST = "trilithon.json"
WEIGHTS = "weights.safetensors"
FORMAT = 4
CLASSES = (Report, SiteReport, Proof, Verdict, CacheShape, runtime.Expected, runtime.ExpectedAxis)
BROKEN = (ValueError, TypeError, KeyError, AttributeError, IndexError, OSError, SafetensorError)
HOW = "write one with trilithon compile MODEL --backend tensorrt --out FOLDER, or Compiled.save(FOLDER)"


def save(compiled: Compiled, folder: str | Path) -> Path:
    """Write what `load` reads: each engine that was built, the weights that they read, once, and a manifest.

    Raises:
        CannotLower: it was not compiled for TensorRT.
    """
    folder = Path(folder)
    decoder = compiled.cached
    modules = _modules(compiled)
    split = next((m for m in _lowered(compiled).values() if isinstance(m, Split)), None)
    if split is not None:
        kept = ", ".join(f"{node} ({why})" for node, why in split.kept.items())
        raise CannotLower(f"cannot save {compiled!r}", why=f"a part of it stays in PyTorch: {kept}", todo="keep it in memory")
    if not modules:
        raise CannotLower(
            f"cannot save {compiled!r}",
            why="only TensorRT engines can be saved so far, and it has none",
            todo="compile with backend='tensorrt'",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        if module.engine.plan.resolve() != (folder / f"{name}.plan").resolve():
            shutil.copyfile(module.engine.plan, folder / f"{name}.plan")
    weights, readers = _weights(modules)
    fresh = folder / f".new-{os.getpid()}-{WEIGHTS}"  # the old file may be what the weights are mapped from
    save_file(weights, fresh)
    shutil.copymode(folder / f"{next(iter(modules))}.plan", fresh)  # safetensors gives it to its owner alone
    os.replace(fresh, folder / WEIGHTS)
    manifest = {
        "format": FORMAT,
        "report": encode(_report_data(compiled.report)),
        "max_tokens": compiled.max_tokens,
        "defaults": compiled.defaults,
        "engines": {name: to_data(module.engine) for name, module in modules.items()},
        "weights": readers,
        "programs": [_program_data(p) for p in compiled.programs if _name(p) in modules],
        "cache": _refusal_data(decoder) if isinstance(decoder, CannotCache) else _cache_data(decoder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def load(folder: str | Path, device: str | torch.device = "cuda") -> Compiled:
    """What `Compiled.save` wrote, ready to run on a GPU of the kind it was built for.

    Raises:
        InputError: there is no such folder, or another version wrote it.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} holds no compiled model", why=f"there is no {MANIFEST} in it", todo=HOW)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']}, this version reads {FORMAT}")
        return _compiled(data, folder, torch.device(device))
    except BROKEN as error:
        raise InputError(f"cannot read {path}", why=f"{type(error).__name__}: {error}", todo=HOW) from error


def is_artefact(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


# ---------------------------------------------------------------- to plain data


def _lowered(compiled: Compiled) -> dict[str, Any]:
    """Each lowered program by name; None for one that is not lowered yet."""
    found = {_name(p): runtime.lowered(p.fast) for p in compiled.programs}
    if isinstance(compiled.cached, CachedDecoder):
        found |= {f.name: getattr(compiled.cached.modules, f.name) for f in fields(CachedModules)}
    return found


def _modules(compiled: Compiled) -> dict[str, TensorRTModule]:
    return {name: module for name, module in _lowered(compiled).items() if isinstance(module, TensorRTModule)}


def _weights(modules: dict[str, TensorRTModule]) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """The tensors that engines read, each once, by key; and for each engine which key each of its names stands for."""
    kept: dict[Any, tuple[str, Tensor]] = {}
    readers: dict[str, dict[str, str]] = {}
    for name, module in modules.items():
        readers[name] = {
            x: kept.setdefault((tensor.data_ptr(), tensor.shape), (f"{name}.{x}", tensor))[0]
            for x, tensor in module.weights.items()
        }
    return dict(kept.values()), readers


def _name(program: runtime.Program) -> str:
    return "-".join(program.inputs)


def _report_data(report: Report) -> Report:
    """Without what pictures are drawn from."""
    sites: Any = tuple(replace(site, lifted=None) for site in report.sites)
    return replace(report, sites=sites)


def _program_data(program: runtime.Program) -> dict[str, Any]:
    return {"engine": _name(program), "expected": encode(dict(program.expected)), "guards": encode(program.guards)}


def _cache_data(decoder: CachedDecoder) -> dict[str, Any]:
    modules = [f.name for f in fields(CachedModules) if getattr(decoder.modules, f.name) is not None]
    return {"shapes": encode(tuple(decoder.shapes)), "max_batch": decoder.max_batch, "modules": modules}


def _refusal_data(refusal: CannotCache) -> dict[str, Any]:
    return {"refused": {"what": refusal.what, "why": refusal.why, "todo": refusal.todo}}


# ---------------------------------------------------------------- and back


def _compiled(data: dict[str, Any], folder: Path, device: torch.device) -> Compiled:
    classes = readable_classes(*CLASSES)
    modules = _engines(data, folder, device)
    report: Report = decode(data["report"], classes)
    programs = [
        runtime.Program(
            expected=decode(p["expected"], classes),
            fast=modules[p["engine"]],
            general=None,
            guards=decode(p["guards"], classes),
            when_guard_fails="raise",
        )
        for p in data["programs"]
    ]
    return Compiled(
        programs={p.inputs: p for p in programs},
        report=replace(report, sites=list(report.sites)),
        build=None,
        decoder=_decoder(data["cache"], data["max_tokens"], modules, device, classes),
        max_tokens=data["max_tokens"],
        defaults=data["defaults"],
    )


def _engines(data: dict[str, Any], folder: Path, device: torch.device) -> dict[str, TensorRTModule]:
    kept = load_file(folder / WEIGHTS, str(device))
    made: dict[str, TensorRTModule] = {}
    for name, engine in data["engines"].items():
        weights = {own: kept[key] for own, key in data["weights"][name].items()}
        made[name] = TensorRTModule(from_data(engine, folder / f"{name}.plan"), weights=weights)
    return made


def _decoder(
    cache: dict[str, Any], max_tokens: int, modules: dict[str, TensorRTModule], device: torch.device, classes: dict[str, type]
) -> CachedDecoder | CannotCache:
    if "refused" in cache:
        refused = cache["refused"]
        return CannotCache(refused["what"], why=refused["why"], todo=refused["todo"])
    used: dict[str, Any] = {name: modules[name] for name in cache["modules"]}
    shapes = list(decode(cache["shapes"], classes))
    return CachedDecoder(CachedModules(**used), shapes, max_tokens, cache["max_batch"], device, device.type == "cuda")
