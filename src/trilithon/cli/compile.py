"""`trilithon compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilithon.cli.common import Dtype, Layers, Model, NoCache, app, load


@app.command()
def compile(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="Folder for what is built; trilithon generate FOLDER runs it, inspect FOLDER shows it.")
    ],
    backend: Annotated[
        str, typer.Option(help="tensorrt, or native: its programs are compiled anew where they are loaded.")
    ] = "tensorrt",
    gpu: Annotated[
        str | None, typer.Option(help="What engines are for: sm75, sm80, sm86, sm89, sm120, sm121. Default: the GPU at hand.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Capacity of the KV cache, or longest input. Default: 4096.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Most rows.")] = 1,
    attention: Annotated[str, typer.Option(help="auto, fused or decomposed.")] = "auto",
    verify: Annotated[bool, typer.Option(help="Compare with eager: on a GPU the engines, else their networks.")] = True,
    dtype: Dtype = "float16",
    layers: Layers = None,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    no_cache: NoCache = False,
) -> None:
    """Compile a model and save it. Engines need no GPU here: name the one that will run them with --gpu."""
    from rich.console import Console

    from trilithon.artefact.files import bytes_of
    from trilithon.capture.hf import load_tokenizer
    from trilithon.compiler import compile as compile_model
    from trilithon.options import Options
    from trilithon.report.text import render

    options = Options(
        proof_cache=not no_cache,
        gpu=gpu,
        attention=attention,  # type: ignore[arg-type]
        max_batch=max_batch,
        verify=verify,
    )
    module = load(model, dtype, None, layers, seed)
    compiled = compile_model(module, max_tokens=max_tokens, backend=backend, options=options)
    render(compiled.report, Console())
    folder = compiled.save(out, load_tokenizer(model))
    print(f"saved {folder}, {bytes_of(folder) / 1e6:.1f} MB")
