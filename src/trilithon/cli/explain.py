"""`trilithon explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilithon.cli.common import Layers, Models, NoCache, app, names
from trilithon.errors import InputError


@app.command()
def explain(
    models: Models,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Inputs of the call, joined by commas: input_ids, position_ids, attention_mask, token_type_ids."
            " Default: input_ids, for an encoder with attention_mask."
        ),
    ] = None,
    attention: Annotated[str, typer.Option(help="transformers' attention: sdpa or eager.")] = "sdpa",
    layers: Layers = None,
    json: Annotated[Path | None, typer.Option(help="Save the report, or what changed, as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Save the report as one self-contained page.")] = None,
    no_cache: NoCache = False,
) -> None:
    """Say what every attention mask of a model means, with proof. Needs no weights.

    With two saved reports: what changed. The exit code is then 3 if a mask means, needs or runs on something else.
    """
    from rich.console import Console

    if len(models) > 1 or models[0].endswith(".json"):
        from trilithon.report.diff import compare

        raise typer.Exit(3 if compare(models, Console(), json, html) else 0)
    from trilithon.capture import hf
    from trilithon.compiler import explain as explain_model
    from trilithon.options import Options
    from trilithon.report.text import render

    if attention not in ("sdpa", "eager"):
        raise InputError(f"unknown attention {attention!r}", todo="choose sdpa or eager")
    module = hf.load_model(models[0], device="meta", layers=layers, attention=attention)
    example, shapes = (None, None) if inputs is None else hf.example_for(module, names(inputs))
    report = explain_model(module, example, shapes, options=Options(proof_cache=not no_cache))
    render(report, Console())
    for path in (json, html):
        if path is not None:
            print(f"saved {report.save(path)}")
