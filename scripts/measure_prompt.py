#!/usr/bin/env python3
"""What a prompt costs: the start-up, a replayed prompt, and its kernels by torch.profiler.

scripts/measure_prompt.py [MODEL] [--layers N] [--length 2048] [--inductor] [--json FILE]
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import trilithon
from trilithon.bench.timing import kernels_of, measure
from trilithon.report.versions import versions
from trilithon.runtime.decoder import CachedDecoder

REPEATS = 5


def replayed(decoder: CachedDecoder, ids: Tensor, pad: Tensor) -> float:
    """Seconds of a prompt that is replayed."""
    for _ in range(3):  # as it is, captured, replayed
        decoder.prefill(ids, pad)
    return measure(lambda: decoder.prefill(ids, pad), repeats=REPEATS, device=ids.device).minimum


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    inductor: Annotated[bool, typer.Option(help="Measure it compiled by Inductor as well.")] = False,
    json: Annotated[Path | None, typer.Option(help="Save the times.")] = None,
) -> None:
    device = torch.device("cuda")
    module = trilithon.load_model(model, device="cuda", layers=layers, dtype=torch.float16)
    llm = trilithon.compile(module, max_tokens=length + 256)
    ids, pad = torch.randint(3, 1000, (1, length), device=device), torch.zeros(1, dtype=torch.int64, device=device)
    whole = replayed(llm.decoder, ids, pad)
    kernels = kernels_of(lambda: llm.decoder.prefill(ids, pad))
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}: {model}, {length} tokens in {whole * 1e3:.2f} ms; {llm.start_up}")
    ms = {"prompt_ms": whole * 1e3}
    if inductor:
        llm.decoder.modules.prefill.one_row = None
        llm.decoder.drop_graphs()
        ms["inductor_ms"] = replayed(llm.decoder, ids, pad) * 1e3
        print(f"compiled by Inductor: {ms['inductor_ms']:.2f} ms")
    for row in kernels:
        print(f"{row['us']:9.1f} us x{row['calls']:4d} {row['kernel'][:100]}")
    if json is not None:
        saved = {"model": model, "length": length, "gpu": gpu, **ms, "start_up": dict(llm.start_up.seconds)}
        json.write_text(json_module.dumps({**saved, "kernels": kernels, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
