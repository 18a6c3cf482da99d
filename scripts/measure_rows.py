#!/usr/bin/env python3
"""What a step of several rows costs: a replay of its CUDA graph, its floor, and its kernels by torch.profiler.

scripts/measure_rows.py [MODEL] [--rows 8] [--layers N] [--length 2048] [--json FILE]
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import torch
import typer

import trilithon
from trilithon.bench.roofline import measure_machine
from trilithon.bench.timing import kernels_of, measure
from trilithon.options import Options
from trilithon.report.versions import versions

REPLAYS = 20


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    rows: Annotated[int, typer.Option(help="Of the batch.", min=1)] = 8,
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = None,
    length: Annotated[int, typer.Option(help="Tokens in the cache.")] = 2048,
    json: Annotated[Path | None, typer.Option(help="Save the times.")] = None,
) -> None:
    device = torch.device("cuda")
    machine = measure_machine(device, torch.float16)
    module = trilithon.load_model(model, device="cuda", layers=layers, dtype=torch.float16)
    llm = trilithon.compile(module, max_tokens=length + 128, options=Options(max_batch=rows))
    decoder = llm.decoder
    decoder.at_once = 1
    ids = torch.randint(3, 1000, (rows, length), device=device)
    llm.generate(ids, max_new_tokens=8, eos_token_id=None)
    graph, _ = decoder._step(rows).recorded[1]

    def replay() -> None:
        for _ in range(REPLAYS):
            graph.replay()

    us = measure(replay, repeats=5, device=device).median / REPLAYS * 1e6
    kernels = kernels_of(graph.replay)
    weights = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in module.parameters()}.values())
    read = weights + decoder.cache_bytes * length / decoder.caches[0].shape[2]
    floor = read / machine.bytes_per_second * 1e6
    print(f"{machine.name}: a step of {rows} rows of {model} with {length} tokens: {us:.0f} us, floor {floor:.0f}")
    print(f"kernels: {sum(k['calls'] for k in kernels)} of {sum(k['us'] for k in kernels):.0f} us")
    for kernel in kernels[:40]:
        print(f"{kernel['us']:9.1f} us x{kernel['calls']:4d} {kernel['kernel'][:100]}")
    if json is not None:
        saved = {"model": model, "rows": rows, "length": length, "machine": machine.name, "us": us, "floor_us": floor}
        json.write_text(json_module.dumps({**saved, "kernels": kernels, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
