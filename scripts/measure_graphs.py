#!/usr/bin/env python3
"""What CUDA graphs of prompts cost: of each size a prompt as it is, captured, and replayed, and the memory of all graphs.

scripts/measure_graphs.py [MODEL] [--layers N] [--length 2048] [--json FILE]
"""

from __future__ import annotations

import json as json_module
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import trilithon
from trilithon.report.versions import versions
from trilithon.runtime.prompt import BUCKET, MOST_GRAPHS

NAMES = ("as_it_is_ms", "captured_ms", "replayed_ms")


def used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 2048,
    json: Annotated[Path | None, typer.Option(help="Save the times.")] = None,
) -> None:
    device = torch.device("cuda")
    module = trilithon.load_model(model, device="cuda", layers=layers, dtype=torch.float16)
    decoder = trilithon.compile(module, max_tokens=length + 256).decoder
    pad = torch.zeros(1, dtype=torch.int64, device=device)
    decoder.prefill(torch.randint(3, 1000, (1, length), device=device), pad)  # caches have their full size from here on
    before, rows = used(), []
    for tokens in range(BUCKET, length + 1, BUCKET):
        ids = torch.randint(3, 1000, (1, tokens), device=device)
        row: dict[str, float] = {"tokens": tokens}
        for name in NAMES:
            torch.cuda.synchronize()
            began = time.perf_counter()
            decoder.prefill(ids, pad)
            torch.cuda.synchronize()
            row[name] = (time.perf_counter() - began) * 1e3
        rows.append({**row, "memory_mb": (used() - before) / 1e6})
        print(", ".join(f"{name} {value:.1f}" for name, value in rows[-1].items()), flush=True)
    if json is not None:
        saved = {"model": model, "gpu": torch.cuda.get_device_name(), "most_graphs": MOST_GRAPHS, "sizes": rows}
        json.write_text(json_module.dumps({**saved, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
