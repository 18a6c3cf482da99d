#!/usr/bin/env python3
"""Causal attention of a prompt by the kernel of our own, beside SDPA's, and the error of both against float64.

scripts/measure_attention.py [--tokens 512,2048,8192] [--json FILE]
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from trilithon.bench.timing import per_call
from trilithon.lower.native import causal
from trilithon.lower.native.attention import attend
from trilithon.report.versions import versions
from trilithon.spec.masks import Causal

SIZES = {"qwen3-0.6b": (16, 8, 128), "qwen2.5-0.5b": (14, 2, 64), "llama-3.2-1b": (32, 8, 64), "llama-3.1-8b": (32, 8, 128)}
EXACT = 2048  # tokens up to which float64's scores have room


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def main(
    tokens: Annotated[str, typer.Option(help="Of the prompt; joined by commas.")] = "512,2048,8192",
    json: Annotated[Path | None, typer.Option(help="Save the times.")] = None,
) -> None:
    found: list[dict[str, Any]] = []
    for model, (heads, groups, width) in SIZES.items():
        for count in map(int, tokens.split(",")):
            q, k, v = (torch.randn(1, count, n, width, device="cuda").half().transpose(1, 2) for n in (heads, groups, groups))
            scale = width**-0.5
            forms = {
                "kernel": lambda q=q, k=k, v=v, scale=scale: causal.attend_by_kernel(q, k, v, Causal(), scale),
                "SDPA": lambda q=q, k=k, v=v, scale=scale: attend(q, k, v, "causal", scale, None),
            }
            row: dict[str, Any] = {"model": model, "tokens": count, "us": {n: per_call(f) * 1e6 for n, f in forms.items()}}
            if count <= EXACT:
                exact = attend(q.double(), k.double(), v.double(), "causal", scale, None)
                row["error"] = {name: error(form(), exact) for name, form in forms.items()}
            found.append(row)
            rate = 2 * heads * width * count * (count + 1) / row["us"]["kernel"] / 1e6
            errors = ", ".join(f"{name} {x:.1e}" for name, x in row.get("error", {}).items())
            times = ", ".join(f"{name} {us:.1f} us" for name, us in row["us"].items())
            print(f"{model}, {count} tokens: {times}; {rate:.0f} TFLOP/s; off by {errors or 'not measured'}", flush=True)
    if json is not None:
        gpu = torch.cuda.get_device_name()
        json.write_text(json_module.dumps({"gpu": gpu, "rows": found, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
