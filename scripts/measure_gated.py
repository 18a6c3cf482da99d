#!/usr/bin/env python3
"""Gate, up and activation of a prompt in one kernel, by shapes of its tiles, beside PyTorch's product and what follows.

scripts/measure_gated.py [--tokens 2048] [--json FILE]
"""

from __future__ import annotations

import itertools
import json as json_module
from pathlib import Path
from typing import Annotated

import torch
import typer

from trilithon.bench.timing import per_call
from trilithon.lower.native import gated
from trilithon.report.versions import versions

SIZES = {"qwen3-0.6b": (1024, 3072), "qwen2.5-0.5b": (896, 4864), "llama-3.2-1b": (2048, 8192)}  # k, n
TILES = [(128, 128, 8), (256, 64, 8), (64, 256, 8), (128, 64, 4), (64, 128, 4)]  # rows, columns, warps
DEPTHS = [(64, 3), (64, 4), (32, 5)]  # numbers of a step, stages


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    json: Annotated[Path | None, typer.Option(help="Save the times.")] = None,
) -> None:
    found: dict[str, dict[str, float | str]] = {}
    for name, (k, n) in SIZES.items():
        x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
        weight = torch.randn(2 * n, k, device="cuda", dtype=torch.float16) / k**0.5
        row: dict[str, float | str] = {"product alone": per_call(lambda x=x, w=weight: torch.nn.functional.linear(x, w)) * 1e6}
        row["and what follows"] = per_call(lambda x=x, w=weight: gated._plain(x, w, "silu")) * 1e6
        for (gated.BLOCK_M, gated.BLOCK_N, warps), (gated.BLOCK_K, stages) in itertools.product(TILES, DEPTHS):
            gated.SETTINGS.update(num_warps=warps, num_stages=stages)
            shape = f"{gated.BLOCK_M} x {gated.BLOCK_N} x {gated.BLOCK_K}, {warps} warps, {stages} stages"
            try:
                row[shape] = per_call(lambda x=x, w=weight: gated.gated_by_kernel(x, w, "silu")) * 1e6
            except Exception as refusal:  # Triton's errors have no common class, e.g. of too little shared memory
                row[shape] = type(refusal).__name__
        found[name] = row
        print(f"{torch.cuda.get_device_name()}: {name}, {tokens} tokens, k {k}, n {n}")
        for what, value in sorted(row.items(), key=lambda item: (isinstance(item[1], str), item[1])):
            told = value if isinstance(value, str) else f"{value:8.1f} us {4 * tokens * n * k / value / 1e6:5.0f} TFLOP/s"
            print(f"  {told}  {what}")
    if json is not None:
        saved = {"gpu": torch.cuda.get_device_name(), "tokens": tokens, "us": found, "versions": versions()}
        json.write_text(json_module.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
