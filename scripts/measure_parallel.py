#!/usr/bin/env python3
"""What ranks that share a model take for a token, how near that is to reading their memory, and whether tokens are one GPU's.

torchrun --nproc-per-node N scripts/measure_parallel.py [MODEL] [--layers N] [--batches 1,32] [--json FILE]

The floor of a token is the time to read a rank's weights and the keys and values that it keeps, at the bandwidth of a copy on
that rank; sums over ranks are not in it. Of an embedding one row a token is read, which is left out.
"""

from __future__ import annotations

import gc
import json as json_module
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

import trilithon
from trilithon.bench.roofline import copy_bandwidth

BEGAN = time.perf_counter()
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if ON_GPU else torch.device("cpu")


def weight_bytes(model: nn.Module) -> int:
    """Of what a token reads: all but embeddings; one that makes logits too is of that layer as well."""
    layers = [m for m in model.modules() if not isinstance(m, nn.Embedding)]
    found = {(x.data_ptr(), x.shape): x.nbytes for m in layers for x in m.parameters(recurse=False)}
    return sum(found.values())


def cache_bytes(llm: trilithon.Compiled, tokens: int) -> int:
    """Of the keys and values that a row sees."""
    decoder: Any = llm.decoder
    return sum(shape.bytes_of(tokens) for shape in decoder.shapes)


def measured(model: nn.Module, prompts: list[Tensor], new: int, repeats: int, bandwidth: float) -> list[dict[str, Any]]:
    """For each batch of prompts milliseconds a step behind the first token, its floor, and the new tokens."""
    rows, weights = max(len(x) for x in prompts), weight_bytes(model)
    options = trilithon.Options(max_batch=rows)
    say(f"compiling for {rows} rows")
    llm = trilithon.compile(model, max_tokens=prompts[0].shape[1] + new, backend="native", options=options)
    decode = next((note for note in llm.report.notes if note.startswith("decode:")), "")
    found = []
    for ids in prompts:
        say(f"{len(ids)} rows of {ids.shape[1]} tokens")
        made = llm.generate(ids, max_new_tokens=new, eos_token_id=None)  # compiles
        llm.generate(ids, max_new_tokens=new, eos_token_id=None)  # captures the prompt
        seconds = [_seconds(llm, ids, new) - _seconds(llm, ids, 1) for _ in range(repeats)]
        seen = [cache_bytes(llm, ids.shape[1] + i) for i in range(1, new)]
        read = weights + len(ids) * statistics.mean(seen)
        result = {"batch": len(ids), "ms_per_token": statistics.median(seconds) / (new - 1) * 1e3, "bytes_per_token": read}
        found.append(
            result | {"floor_ms": read / bandwidth * 1e3, "decode": decode, "tokens": made[:, ids.shape[1] :].tolist()}
        )
    return found


def say(what: str) -> None:
    """On the first rank, to standard error, with the seconds since the script began."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{time.perf_counter() - BEGAN:6.1f} s  {what}", file=sys.stderr, flush=True)


def _seconds(llm: trilithon.Compiled, ids: Tensor, new: int) -> float:
    _wait()
    began = time.perf_counter()
    llm.generate(ids, max_new_tokens=new, eos_token_id=None)
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _freed() -> None:
    """Give back what is no longer used, and count the peak anew."""
    torch._dynamo.reset()
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if ON_GPU else 0


def _all_ranks(value: Any) -> list[Any]:
    """What each rank has; all wait here for the slowest, in the host's memory."""
    data = torch.frombuffer(bytearray(json_module.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor(len(data))
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    padded[: len(data)] = data
    held = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(held, padded)
    return [json_module.loads(bytes(x[: int(n)].tolist())) for x, n in zip(held, sizes, strict=True)]


def _summary(of_ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The slowest rank of each batch, and that of the highest floor."""
    found = []
    for batch in zip(*of_ranks, strict=True):
        ms, floor = (max(x[name] for x in batch) for name in ("ms_per_token", "floor_ms"))
        sizes = {
            "batch": batch[0]["batch"],
            "decode": batch[0]["decode"],
            "bytes_per_token": [x["bytes_per_token"] for x in batch],
        }
        found.append(sizes | {"ms_per_token": ms, "floor_ms": floor, "efficiency": floor / ms})
    return found


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = None,
    batches: Annotated[str, typer.Option(help="Rows, joined by commas.")] = "1,32",
    prompt_tokens: Annotated[int, typer.Option()] = 512,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    repeats: Annotated[int, typer.Option()] = 3,
    dtype: Annotated[str | None, typer.Option(help="Default: float16 on GPUs; tokens are compared best in float32.")] = None,
    alone: Annotated[bool, typer.Option(help="First run the whole model on the first rank, and compare tokens.")] = True,
    load_on: Annotated[str | None, typer.Option(help="cpu: a GPU never holds the whole model. Default: the GPU.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Bytes a second, for the floor. Default: measured on each rank.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Save the numbers.")] = None,
) -> None:
    if ON_GPU:
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("cpu:gloo,cuda:nccl" if ON_GPU else "gloo")
    kind = getattr(torch, dtype or ("float16" if ON_GPU else "float32"))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 1000, (int(b), prompt_tokens), generator=generator).to(DEVICE) for b in batches.split(",")]
    speed = bandwidth or copy_bandwidth(DEVICE, copied_bytes=2**30 if ON_GPU else 2**27)
    record: dict[str, Any] = {"model": model, "layers": layers, "dtype": str(kind), "torch": torch.__version__}
    record |= {"device": torch.cuda.get_device_name() if ON_GPU else "cpu", "ranks": dist.get_world_size()}
    record |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "bandwidth": _all_ranks(speed)}

    def load() -> nn.Module:
        return trilithon.load_model(model, device=load_on or DEVICE, layers=layers, dtype=kind)

    expected = []
    _freed()
    say("the whole model on the first rank")
    if alone and dist.get_rank() == 0:
        expected = measured(load().to(DEVICE), prompts, new_tokens, repeats, speed)
        record["one"], record["one_peak_bytes"] = _summary([expected]), _peak()
    _freed()
    _all_ranks(0)
    say(f"shared by {dist.get_world_size()} ranks")
    share = trilithon.tensor_parallel(load(), device=DEVICE)
    peaks = {"share": _peak()}
    _freed()
    held = torch.cuda.memory_allocated() if ON_GPU else weight_bytes(share)
    results = measured(share, prompts, new_tokens, repeats, speed)
    of_ranks = _all_ranks(results)
    record["together"] = _summary(of_ranks)
    record["peak_bytes"] = _all_ranks(peaks | {"held": held, "run": _peak()})
    record["ranks_agree"] = all([x["tokens"] for x in rank] == [x["tokens"] for x in results] for rank in of_ranks)
    if expected:
        pairs = [(x["tokens"], y["tokens"]) for x, y in zip(results, expected, strict=True)]
        record["equal_tokens"] = [_equal(a, b) for a, b in pairs]
        say("looking at what differs")
        del share
        _freed()
        whole = load().to(DEVICE).eval()
        rounded = [_first_differences(whole, ids, a, b) for ids, (a, b) in zip(prompts, pairs, strict=True)]
        exact = [_first_differences(whole.float(), ids, a, b) for ids, (a, b) in zip(prompts, pairs, strict=True)]
        record["differences"] = [_ties(x, y) for x, y in zip(rounded, exact, strict=True)]
    if dist.get_rank() == 0:
        text = json_module.dumps(record, indent=2)
        print(text)
        if json is not None:
            json.write_text(text + "\n")
    _all_ranks(0)


@torch.no_grad()
def _first_differences(model: nn.Module, ids: Tensor, one: list[list[int]], other: list[list[int]]) -> list[Tensor]:
    """For each row whose new tokens differ, the model's logits `[v]` where they first do."""
    found = []
    for row, a, b in zip(ids, one, other, strict=True):
        if a == b:
            continue
        place = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        given = torch.cat([row, torch.tensor(a[:place], dtype=row.dtype, device=row.device)])
        logits = model(given[None], use_cache=False, logits_to_keep=1).logits[0, -1]
        found.append(torch.cat([logits[[a[place], b[place]]], logits]))
    return found


def _ties(rounded: list[Tensor], exact: list[Tensor]) -> dict[str, Any]:
    """How near the two tokens are where a row first differs, in units of what logits of this type are off.

    Args:
        rounded: logits of eager in the type that was measured, the two tokens' before them.
        exact: in float32.
    """
    found = []
    for near, true in zip(rounded, exact, strict=True):
        off = (near.double() - true.double()).abs().max()
        found.append(float((true[0] - true[1]).abs().double() / off))
    return {"rows": len(found), "largest_gap_in_errors_of_eager": max(found, default=0.0)}


def _equal(found: list[list[int]], expected: list[list[int]]) -> float:
    return float((torch.tensor(found) == torch.tensor(expected)).float().mean())


if __name__ == "__main__":
    code = 0
    try:
        typer.run(main)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what Python and NCCL do at their end may wait for other ranks, or for CUDA graphs that hold collectives
