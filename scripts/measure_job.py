#!/usr/bin/env python3
"""Where the time of a job goes: its prompt, its steps, what stands between them; tokens one by one and several at once.

scripts/measure_job.py [MODEL] [--layers N] [--length 2048] [--new 128] [--json FILE]
"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import trilithon
from trilithon.bench.timing import measure
from trilithon.report.versions import versions
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.step import AT_ONCE

REPEATS = 5


def step_seconds(decoder: CachedDecoder, ids: Tensor, steps: int, new: int) -> float:
    """Of one step, of so many in a graph, by replays alone, over the tokens of the job."""
    pad, replays = torch.zeros(1, dtype=torch.int64, device=ids.device), (new - 1) // steps
    graph, _ = decoder._step(1).recorded[steps]

    def run() -> None:
        for _ in range(replays):
            graph.replay()

    timed = measure(run, repeats=REPEATS, warmup=0, device=ids.device, before_run=lambda: decoder.prefill(ids, pad))
    return timed.minimum / replays / steps


def weight_bytes(model: nn.Module) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()}.values())


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    new: Annotated[int, typer.Option(help="Tokens to make.", min=2 * AT_ONCE + 2)] = 128,
    json: Annotated[Path | None, typer.Option(help="Save the times.")] = None,
) -> None:
    device = torch.device("cuda")
    module = trilithon.load_model(model, device="cuda", layers=layers, dtype=torch.float16)
    llm = trilithon.compile(module, max_tokens=length + new)
    decoder = llm.decoder
    ids, pad = torch.randint(3, 1000, (1, length), device=device), torch.zeros(1, dtype=torch.int64, device=device)
    ms: dict[str, float] = {}
    tokens, peak = list[Tensor](), 0
    for at_once in dict.fromkeys((decoder.at_once, 1)):
        decoder.at_once = at_once
        for _ in range(3):  # a prompt as it is, captured, replayed
            tokens.append(llm.generate(ids, max_new_tokens=new, eos_token_id=None))
        timed = measure(lambda: llm.generate(ids, max_new_tokens=new, eos_token_id=None), repeats=REPEATS, device=device)
        ms[f"job, {at_once} at once"], peak = timed.median * 1e3, max(peak, timed.peak_bytes or 0)
    ms["first token"] = measure(lambda: llm.generate(ids, max_new_tokens=1), repeats=REPEATS, device=device).median * 1e3
    ms["prompt"] = measure(lambda: decoder.prefill(ids, pad), repeats=REPEATS, device=device).median * 1e3
    for steps in decoder._step(1).recorded:
        ms[f"step, of {steps} in a graph"] = step_seconds(decoder, ids, steps, new) * 1e3
    needed = weight_bytes(module) + decoder.cache_bytes
    gpu, same = torch.cuda.get_device_name(), all(torch.equal(x, tokens[0]) for x in tokens)
    print(f"{gpu}: {model}, {length} tokens in, {new} out; tokens are {'the same' if same else 'NOT THE SAME'} each time")
    for name, value in ms.items():
        print(f"{value:9.3f} ms  {name}")
    print(f"peak {peak / 1e9:.2f} GB, weights and cache {needed / 1e9:.2f} GB; {llm.start_up}")
    if json is not None:
        saved: dict[str, Any] = {
            "model": model,
            "layers": layers,
            "length": length,
            "new": new,
            "gpu": gpu,
            "same_tokens": same,
        }
        saved |= {"ms": ms, "peak_bytes": peak, "weights_and_cache_bytes": needed, "start_up": dict(llm.start_up.seconds)}
        json.write_text(json_module.dumps(saved | {"notes": llm.report.notes, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
