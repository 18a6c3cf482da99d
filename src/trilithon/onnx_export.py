"""`export_onnx`: a model in, an ONNX model with proved attention out, verified before it stands under its name."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from trilithon.capture import hf
from trilithon.compiler import Analysis, analyse
from trilithon.errors import CannotLower, InputError
from trilithon.lower.onnx.forms import Form, forms
from trilithon.lower.onnx.library import OPSETS, has_runtime, require_onnx
from trilithon.lower.onnx.session import Session
from trilithon.lower.onnx.translate import lower_onnx, save, translate
from trilithon.options import Options
from trilithon.report.build import KEPT
from trilithon.report.report import Report
from trilithon.rewrite.op import ATTENTION
from trilithon.rewrite.unlift import fake_inputs
from trilithon.runtime.verify_onnx import verify_onnx
from trilithon.stages import clocked, stage

ASSERTS = (torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_async.msg, torch.ops.aten._assert_async.default)

KEPT_SDPA, KEPT_OTHER = "ONNX Attention with the mask as exported", "as torch.onnx writes it, with the mask as exported"


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX model that was written.

    Attributes:
        path: of the model.
        files: all that was written: the model, and its weights where they are large.
        report: what was proved; of each site, what it became (`runs_on`).
        opset: of the model.
        error: largest relative error of an output against eager, run by ONNX Runtime; None = it was not run.
        note: of the verification, or why there was none.
    """

    path: Path
    files: tuple[Path, ...]
    report: Report
    opset: int
    error: float | None
    note: str


def export_onnx(
    model: str | nn.Module | ExportedProgram,
    path: str | Path,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    inputs: tuple[str, ...] | None = None,
    dynamic_shapes: Any = None,
    opset: int = 23,
    verify: bool = True,
    options: Options = Options(),  # noqa: B008 (frozen)
) -> OnnxModel:
    """Write a model as ONNX, each proved attention as the operator `Attention`, and compare it with eager.

    Nobody checks the inputs of an ONNX model, so no proof counts here that rests on a guard, on a declared fact, or on the
    greatest size of an input. Where there is no other, the site keeps the mask that it was exported with.

    Args:
        model: a module in eval mode, an exported program, or the name of a preset, folder or hub id.
        path: of the model; weights from 64 MiB on are written to one file beside it, `path` with `.data` behind.
        example_kwargs: keyword arguments of one call; a Hugging Face model has a default.
        inputs: of a Hugging Face model, what it shall take; default: `input_ids`, of an encoder `attention_mask` too.
        dynamic_shapes: as torch.export takes them; default: every axis that export can leave dynamic.
        opset: 23 or 24.
        verify: run the model with ONNX Runtime, where that is installed, before it is written.
        options: solver budget.

    Raises:
        InputError, CaptureError: the model or an argument cannot be used, or a package is missing.
        CannotLower: an operation has no translation to ONNX.
        VerificationFailed: ONNX Runtime disagrees with eager; nothing was written.
    """
    path = check_arguments(path, opset)
    with clocked() as stages:
        if isinstance(model, str):
            with stage("load"):
                model = hf.load_model(model)
        if example_kwargs is None and isinstance(model, nn.Module) and hf.is_hf(model):
            named = inputs or (("input_ids",) if hf.is_causal_lm(model) else hf.usual_inputs(model))
            example_kwargs, dynamic_shapes = hf.example_for(model, named)
        elif inputs is not None:
            why = "they name the inputs of a Hugging Face model's default call"
            raise InputError(f"cannot take inputs={inputs!r}", why=why, todo="pass example_kwargs with these inputs")
        analysis = analyse(model, example_kwargs, dynamic_shapes, (), options, checked=False)
        _check_program(analysis.captured.program)
        with stage("build"):
            made = _write(analysis, path, opset, verify)
    return replace(made, report=replace(made.report, seconds=stages.seconds))


def check_arguments(path: str | Path, opset: int) -> Path:
    """The path to write to.

    Raises:
        InputError: a package is missing, or an argument means nothing.
    """
    require_onnx()
    if opset not in OPSETS:
        raise InputError(f"opset {opset} is not supported", todo=f"choose one of {', '.join(map(str, OPSETS))}")
    path = Path(path).expanduser()
    if path.is_dir() or not path.name:
        raise InputError(f"cannot write {path}", why="it is a folder", todo="name a file, such as model.onnx")
    return path


def _check_program(program: ExportedProgram) -> None:
    """Raises InputError if it was rewritten already, or takes a number: then nothing that is written could be verified."""
    numbers = [
        n.name
        for n in program.graph.find_nodes(op="placeholder")
        if isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat))
    ]
    if numbers:
        todo = "pass it as a tensor"
        raise InputError(
            f"cannot export {', '.join(numbers)}", why="inputs of an ONNX model are tensors, and it is a number", todo=todo
        )
    if any(node.target is ATTENTION for node in program.graph.nodes):
        why = "it was rewritten already, by proofs that may rest on sizes and guards, which nobody checks in an ONNX model"
        raise InputError("cannot export this program", why=why, todo="export the program that trilithon.lower was given")


def _write(analysis: Analysis, path: Path, opset: int, verify: bool) -> OnnxModel:
    """Translate, verify and write the rewritten program."""
    program = analysis.rewritten
    report = _with_forms(analysis.report, forms(program.graph_module))
    made = translate(lower_onnx(program), opset, _output_names(program))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        files = save(made, Path(folder) / path.name, _notes(report))
        error, note = _verified(files[0], analysis) if verify else (None, "not verified")
        for file in reversed(files):  # the weights first: a model stands there only with them
            os.replace(file, path.with_name(file.name))
    written = tuple(path.with_name(file.name) for file in files)
    notes = (*report.notes, f"ONNX opset {opset}", *_left_out(program), note)
    return OnnxModel(path, written, replace(report, notes=notes), opset, error, note)


def _left_out(program: ExportedProgram) -> list[str]:
    """What the program checks and ONNX cannot."""
    count = sum(node.target in ASSERTS for node in program.graph.nodes)
    return [f"{count} assertions of the program about its sizes or data are not in the ONNX model"] if count else []


def _with_forms(report: Report, made: Mapping[str, Form]) -> Report:
    """What each site became in ONNX, in place of the kernel that would run it here."""
    sites = []
    for site in report.sites:
        kept = KEPT_SDPA if site.kind == "sdpa" else KEPT_OTHER
        text = str(made[site.name]) if site.name in made else site.runs_on.replace(KEPT, kept)
        grouped = ", grouped heads" if site.heads is not None and site.heads[1] not in (None, site.heads[0]) else ""
        sites.append(replace(site, runs_on=text + grouped))
    return replace(report, sites=sites)


def _output_names(program: ExportedProgram) -> list[str] | None:
    """Of a Hugging Face output, its own names; None where there are none."""
    spec = program.call_spec.out_spec
    names = spec.context if spec is not None and isinstance(spec.context, (list, tuple)) else []
    count = len(program.graph_signature.user_outputs)
    inputs = set(fake_inputs(program))
    is_named = len(names) == count and all(isinstance(name, str) and name not in inputs for name in names)
    return [str(name) for name in names] if is_named and count else None


def _notes(report: Report) -> dict[str, str]:
    """What the file says of itself: what each site is, and for which sizes the program was captured."""
    sites = {s.name: {"mask": str(s.mask) if s.mask is not None else None, "form": s.runs_on} for s in report.sites}
    return {"trilithon.sites": json.dumps(sites), "trilithon.ranges": json.dumps(report.ranges)}


def _verified(path: Path, analysis: Analysis) -> tuple[float | None, str]:
    """The error against eager, and what to say of it."""
    if not has_runtime():
        return None, "not verified: onnxruntime is not installed"
    try:
        session = Session(path, torch.get_num_threads())
    except CannotLower as refused:
        return None, f"not verified: {refused.why}"
    masks = {site.mask for site in analysis.report.sites if site.mask is not None}
    error = verify_onnx(session, analysis.general, fake_inputs(analysis.rewritten), analysis.report.ranges, masks)
    return error, f"verified with ONNX Runtime: the relative error is {error:.1e} against eager"
