#!/usr/bin/env python3
"""Attention of a step of several rows over their caches (lower/native/split_kv.py), by settings of its kernels.

scripts/measure_split_kv.py [--batches 8,32] [--lengths 2048,8192] [--json FILE]

Each call reads another cache, of as many as a GPU's L2 cannot hold.
"""

from __future__ import annotations

import json as json_module
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from trilithon.bench.roofline import measure_machine
from trilithon.bench.timing import per_call
from trilithon.lower.native import split_kv
from trilithon.report.versions import versions

SIZES = {"qwen3-0.6b": (16, 8, 128), "qwen2.5-0.5b": (14, 2, 64), "llama-3.2-1b": (32, 8, 64)}  # heads, groups, width
CACHES = 1 << 29  # bytes, at least
SETTINGS = {"PROGRAMS": (264, 528, 1056), "WARPS": (4, 8, 2), "STAGES": (2, 3, 4)}  # the first are those of now


def over(caches: list[tuple[Tensor, Tensor]], q: Tensor, start: Tensor) -> None:
    for k, v in caches:
        split_kv.attend_split(q, k, v, "causal", q.shape[3] ** -0.5, start, None, 0.0)


def microseconds(caches: list[tuple[Tensor, Tensor]], q: Tensor, start: Tensor) -> float:
    return per_call(lambda: over(caches, q, start), calls=1) / len(caches) * 1e6


def main(
    batches: Annotated[str, typer.Option(help="Rows; joined by commas.")] = "8,32",
    lengths: Annotated[str, typer.Option(help="Tokens in each cache; joined by commas.")] = "2048,8192",
    json: Annotated[Path | None, typer.Option(help="Save the times.")] = None,
) -> None:
    device = torch.device("cuda")
    machine = measure_machine(device, torch.float16)
    found: list[dict[str, Any]] = []
    for (model, (heads, groups, width)), rows, length in product(
        SIZES.items(), map(int, batches.split(",")), map(int, lengths.split(","))
    ):
        read = 2 * rows * groups * length * width * 2
        shape = rows, groups, length + 128, width
        caches = [
            (torch.randn(shape, device=device).half(), torch.randn(shape, device=device).half())
            for _ in range(max(2, -(-CACHES // read)))
        ]
        q = torch.randn(rows, heads, 1, width, device=device).half()
        start = torch.full((rows,), length - 1, device=device)
        times: dict[str, float] = {}
        for chosen in product(*SETTINGS.values()):
            for name, value in zip(SETTINGS, chosen, strict=True):
                setattr(split_kv, name, value)
            times[", ".join(map(str, chosen))] = microseconds(caches, q, start)
        floor, now = read / machine.bytes_per_second * 1e6, next(iter(times.values()))
        best = min(times, key=times.__getitem__)
        found.append({"model": model, "rows": rows, "length": length, "us": times, "floor_us": floor})
        print(
            f"{model}, {rows} rows of {length}: {now:.1f} us; {times[best]:.1f} with {', '.join(SETTINGS).lower()} {best}; "
            f"floor {floor:.1f}",
            flush=True,
        )
        del caches
    if json is not None:
        saved = {"gpu": machine.name, "settings": list(SETTINGS), "rows": found, "versions": versions()}
        json.write_text(json_module.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
