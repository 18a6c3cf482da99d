#!/usr/bin/env python3
"""What ranks that share a model take for a token, and whether they give the tokens of one GPU.

torchrun --nproc-per-node N scripts/measure_parallel.py [MODEL] [--layers N] [--batches 1,32] [--json FILE]
"""

from __future__ import annotations

import json as json_module
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

import trilithon


def measured(model: nn.Module, prompts: list[Tensor], new: int, repeats: int) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """For each prompt milliseconds per token behind the first, and the tokens."""
    rows, found = max(len(x) for x in prompts), list[Tensor]()
    options = trilithon.Options(max_batch=rows)
    llm = trilithon.compile(model, max_tokens=prompts[0].shape[1] + new, backend="native", options=options)
    results = []
    for ids in prompts:
        made = llm.generate(ids, max_new_tokens=new, eos_token_id=None)  # compiles
        llm.generate(ids, max_new_tokens=new, eos_token_id=None)  # captures the prompt
        seconds = [_seconds(llm, ids, new) - _seconds(llm, ids, 1) for _ in range(repeats)]
        results.append({"batch": len(ids), "ms_per_token": statistics.median(seconds) / (new - 1) * 1e3})
        found.append(made.cpu())
    return results, found


def _seconds(llm: trilithon.Compiled, ids: Tensor, new: int) -> float:
    _wait()
    began = time.perf_counter()
    llm.generate(ids, max_new_tokens=new, eos_token_id=None)
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = None,
    batches: Annotated[str, typer.Option(help="Rows, joined by commas.")] = "1,32",
    prompt_tokens: Annotated[int, typer.Option()] = 512,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    repeats: Annotated[int, typer.Option()] = 3,
    dtype: Annotated[str | None, typer.Option(help="Default: float16 on GPUs; tokens are compared best in float32.")] = None,
    alone: Annotated[bool, typer.Option(help="Also run the whole model on the first rank, and compare tokens.")] = True,
    json: Annotated[Path | None, typer.Option(help="Save the numbers.")] = None,
) -> None:
    on_gpu, rank = torch.cuda.is_available(), int(os.environ["RANK"])
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    kind = getattr(torch, dtype or ("float16" if on_gpu else "float32"))
    device = "cuda" if on_gpu else "cpu"
    generator = torch.Generator().manual_seed(0)
    sizes = [int(x) for x in batches.split(",")]
    prompts = [torch.randint(3, 1000, (b, prompt_tokens), generator=generator).to(device) for b in sizes]

    whole = trilithon.load_model(model, device=device, layers=layers, dtype=kind)
    share = trilithon.tensor_parallel(whole)
    del whole
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    results, tokens = measured(share, prompts, new_tokens, repeats)
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, (_peak(), [x.tolist() for x in tokens]))
    record = {"model": model, "layers": layers, "dtype": str(kind), "ranks": len(peaks), "torch": torch.__version__}
    record |= {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "together": results}
    record |= {"peak_bytes": [peak for peak, _ in peaks], "ranks_agree": all(x == peaks[0][1] for _, x in peaks)}
    dist.destroy_process_group()
    if rank:
        return
    del share
    if alone:
        whole = trilithon.load_model(model, device=device, layers=layers, dtype=kind)
        record["one"], expected = measured(whole, prompts, new_tokens, repeats)
        record["equal_tokens"] = [float((a == b).float().mean()) for a, b in zip(tokens, expected, strict=True)]
    text = json_module.dumps(record, indent=2)
    print(text)
    if json is not None:
        json.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
