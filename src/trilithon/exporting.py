"""Write a rewritten program as an ONNX model, verified with ONNX Runtime before it stands under its name."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from trilithon.errors import CannotLower, InputError
from trilithon.lower.onnx.forms import Form, forms
from trilithon.lower.onnx.library import has_runtime, require_onnx
from trilithon.lower.onnx.session import Session
from trilithon.lower.onnx.translate import OPSETS, lower_onnx, save, translate
from trilithon.report.build import KEPT
from trilithon.report.report import Report
from trilithon.rewrite.op import ATTENTION
from trilithon.rewrite.unlift import fake_inputs
from trilithon.runtime.verify_onnx import verify_onnx

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


def check_program(program: ExportedProgram) -> None:
    """Raises InputError if it was rewritten already, by proofs that rest on guards or on the sizes of its export."""
    if any(node.target is ATTENTION for node in program.graph.nodes):
        why = "it was rewritten already, by proofs that may rest on sizes and guards, which nobody checks in an ONNX model"
        raise InputError("cannot export this program", why=why, todo="export the program that trilithon.lower was given")


def write_onnx(
    program: ExportedProgram, general: GraphModule, report: Report, path: Path, *, opset: int, verify: bool
) -> OnnxModel:
    """Translate, verify and write.

    Args:
        program: rewritten, by proofs that rest on nothing that a run would have to check.
        general: the program as it was captured.
        report: of the program.

    Raises:
        CannotLower: an operation has no translation.
        VerificationFailed: ONNX Runtime disagrees with eager; then nothing was written.
    """
    report = _with_forms(report, forms(program.graph_module))
    made = translate(lower_onnx(program), opset, _output_names(program))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        files = save(made, Path(folder) / path.name, _notes(report))
        error, note = _verified(files[0], general, program, report) if verify else (None, "not verified")
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


def _verified(path: Path, general: GraphModule, program: ExportedProgram, report: Report) -> tuple[float | None, str]:
    """The error against eager, and what to say of it."""
    if not has_runtime():
        return None, "not verified: onnxruntime is not installed"
    try:
        session = Session(path, torch.get_num_threads())
    except CannotLower as refused:
        return None, f"not verified: {refused.why}"
    masks = {site.mask for site in report.sites if site.mask is not None}
    error = verify_onnx(session, general, fake_inputs(program), report.ranges, masks)
    return error, f"verified with ONNX Runtime: the relative error is {error:.1e} against eager"
