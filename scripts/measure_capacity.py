#!/usr/bin/env python3
"""What a decode step costs by what the cache could hold: it should follow what is in use.

scripts/measure_capacity.py [MODEL] [--layers N] [--length 2048] [--capacities 4096,32768] [--json FILE]
"""

from __future__ import annotations

import json as json_module
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import trilithon
from trilithon.runtime.decoder import CachedDecoder


def decoder_of(made: CachedDecoder, capacity: int, length: int) -> CachedDecoder:
    """A decoder with all of its cache allocated, behind a prompt of `length` tokens."""
    decoder = CachedDecoder(made.modules, made.shapes, capacity, 1, made.device, made.cuda_graphs)
    ids = torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(0)).to(made.device)
    decoder.prefill(ids, torch.zeros(1, dtype=torch.int64, device=made.device))
    step(decoder)
    return decoder


def step(decoder: CachedDecoder) -> float:
    """Seconds of one more token, which is then taken back."""
    start = decoder.lengths
    if decoder.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    decoder.decode(torch.zeros(1, dtype=torch.int64, device=decoder.device))
    if decoder.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    decoder.rewind(start)
    return seconds


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "qwen2.5-0.5b",
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = None,
    length: Annotated[int, typer.Option(help="Tokens in use.")] = 2048,
    capacities: Annotated[str, typer.Option(help="What the caches can hold, joined by commas.")] = "4096,32768",
    repeats: Annotated[int, typer.Option(help="Steps of each, in turns.")] = 40,
    json: Annotated[Path | None, typer.Option(help="Save the times.")] = None,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    sizes = [int(x) for x in capacities.split(",")]
    module = trilithon.load_model(model, device=device, layers=layers, dtype=dtype)
    made = trilithon.compile(module, max_tokens=max(sizes)).decoder
    decoders = {size: decoder_of(made, size, length) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size, decoder in decoders.items():  # in turns, so that what else the machine does meets all alike
            times[size].append(step(decoder))
    rows = {
        size: {"median_seconds": statistics.median(x), "min_seconds": min(x), "max_seconds": max(x)}
        for size, x in times.items()
    }
    first = rows[sizes[0]]["median_seconds"]
    for size, row in rows.items():
        print(f"capacity {size:6}: {row['median_seconds'] * 1e3:8.3f} ms a token, {row['median_seconds'] / first:.3f}x")
    if json is not None:
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        about = {"model": model, "layers": layers, "length": length, "dtype": str(dtype), "device": name}
        about |= {
            "step": getattr(made.modules.decode, "note", ""),
            "torch": torch.__version__,
            "command": f"scripts/measure_capacity.py {model} --layers {layers} --length {length}",
        }
        json.write_text(json_module.dumps(about | {"capacities": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
