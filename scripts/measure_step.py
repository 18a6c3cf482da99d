#!/usr/bin/env python3
"""Where the time of a decode step goes: each generated kernel, beside the time that its weights take at the copy bandwidth.

scripts/measure_step.py [MODEL] [--layers N] [--length 2048] [--json FILE]

A kernel is measured over as many layers as the step has, one call behind the other in a CUDA graph, with the weights of each.
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import trilithon
from trilithon import Options
from trilithon.bench.roofline import measure_machine
from trilithon.lower.native.fused.launch import Products
from trilithon.lower.native.fused.tune import calls_of, seconds_of
from trilithon.lower.native.step import NativeStep
from trilithon.report.versions import versions


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = None,
    length: Annotated[int, typer.Option(help="Tokens in the cache.")] = 2048,
    json: Annotated[Path | None, typer.Option(help="Save the times.")] = None,
) -> None:
    machine = measure_machine(torch.device("cuda"), torch.float16)
    module = trilithon.load_model(model, device="cuda", layers=layers, dtype=torch.float16)
    decoder = trilithon.compile(module, max_tokens=length + 128, options=Options(cuda_graphs=False)).decoder
    step = decoder.modules.decode
    if not isinstance(step, NativeStep) or step.one_row is None:
        raise SystemExit(getattr(step, "note", "the step is not made of generated kernels"))
    decoder.prefill(torch.ones(1, length, dtype=torch.int64, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda"))
    one = torch.ones(1, dtype=torch.int64, device="cuda")
    inputs = [one[:, None], decoder.lengths, one, *decoder.caches]
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        whole = seconds_of([(step.one_row, tuple(inputs))])
        for calls in calls_of(step.one_row, inputs).values():
            kernel, given = calls[0]
            matrices = [x for x in given if isinstance(x, Tensor) and x.dim() == 2] if isinstance(kernel, Products) else []
            weights = sum(x.nbytes for x in matrices)
            rows.append(
                {
                    "kernel": kernel.name,
                    "calls": len(calls),
                    "us": seconds_of(calls) / len(calls) * 1e6,
                    "floor_us": weights / machine.bytes_per_second * 1e6,
                    "settings": kernel.settings(),
                }
            )
    print(f"{machine.name}: copy {machine.bytes_per_second / 1e12:.2f} TB/s; a step of {model} takes {whole * 1e6:.0f} us")
    for row in rows:
        times = f"{row['us']:8.2f} us each, weights {row['floor_us']:7.2f}"
        print(f"{row['kernel']:32s} x{row['calls']:3d} {times}  {row['settings']}")
    if json is not None:
        saved = {"model": model, "length": length, "machine": machine.name, "copy_bytes_per_second": machine.bytes_per_second}
        json.write_text(json_module.dumps({**saved, "step_us": whole * 1e6, "kernels": rows, "versions": versions()}, indent=1))


if __name__ == "__main__":
    typer.run(main)
