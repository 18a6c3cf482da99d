#!/usr/bin/env python3
"""What torch.export takes for a preset, and what making its program functional takes: by a second trace, and by rewriting.

scripts/measure_capture.py [MODEL] [--layers 4] [--json FILE]
"""

from __future__ import annotations

import json as json_module
import logging
import time
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.export import ExportedProgram

import trilithon
from trilithon.capture import hf
from trilithon.capture.functional import functional
from trilithon.report.versions import versions


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "qwen3-0.6b",
    layers: Annotated[int, typer.Option(help="Keep the first layers only.")] = 4,
    json: Annotated[Path | None, typer.Option(help="Save the seconds.")] = None,
) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    module = trilithon.load_model(model, device="cpu", layers=layers, dtype=torch.float16)
    example, shapes, *_ = hf.example_for(module, ("input_ids",))
    seconds: dict[str, float] = {}

    @torch.no_grad()
    def export() -> ExportedProgram:
        options = {"strict": False, "prefer_deferred_runtime_asserts_over_guards": True}
        return torch.export.export(module, (), dict(example), dynamic_shapes=shapes, **options)

    export()  # imports, and first uses of everything
    began = time.perf_counter()
    program = export()
    seconds["export"] = time.perf_counter() - began
    for name, own in (("traced anew", False), ("rewritten", True)):
        began = time.perf_counter()
        functional(program, own=own)
        seconds[name] = time.perf_counter() - began
    for name, value in seconds.items():
        print(f"{value:8.2f} s  {name}")
    if json is not None:
        saved = {"model": model, "layers": layers, "seconds": seconds, "versions": versions()}
        json.write_text(json_module.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
