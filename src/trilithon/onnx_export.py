"""`export_onnx`: a model in, an ONNX model with proved attention out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from trilithon.capture import hf
from trilithon.compiler import analyse
from trilithon.errors import InputError
from trilithon.exporting import OnnxModel, check_arguments, check_program, write_onnx
from trilithon.options import Options
from trilithon.stages import clocked, stage


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
    if isinstance(model, ExportedProgram):
        check_program(model)
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
        with stage("build"):
            made = write_onnx(analysis.rewritten, analysis.general, analysis.report, path, opset=opset, verify=verify)
    return replace(made, report=replace(made.report, seconds=stages.seconds))
