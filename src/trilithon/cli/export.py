"""`trilithon export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilithon.cli.common import Dtype, Layers, Model, NoCache, app, load, names


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The ONNX file; large weights go to one file beside it.")],
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Inputs of the model, joined by commas: input_ids, position_ids, attention_mask, token_type_ids."
            " Default: input_ids, for an encoder with attention_mask."
        ),
    ] = None,
    opset: Annotated[int, typer.Option(help="23 or 24.")] = 23,
    verify: Annotated[bool, typer.Option(help="Compare with eager, by ONNX Runtime.")] = True,
    dtype: Dtype = "float32",
    layers: Layers = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    no_cache: NoCache = False,
) -> None:
    """Write a model as ONNX, with proved attention as the operator Attention, and say what became of each site."""
    from rich.console import Console

    from trilithon.onnx_export import check_arguments, export_onnx
    from trilithon.options import Options
    from trilithon.report.text import render

    check_arguments(out, opset)
    module = load(model, dtype, "cpu", layers, seed)
    given = None if inputs is None else names(inputs)
    made = export_onnx(module, out, inputs=given, opset=opset, verify=verify, options=Options(proof_cache=not no_cache))
    render(made.report, Console())
    for file in made.files:
        print(f"saved {file}, {file.stat().st_size / 1e6:.1f} MB")
