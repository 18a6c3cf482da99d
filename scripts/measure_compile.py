#!/usr/bin/env python3
"""What compiling for TensorRT takes on a machine without a GPU: seconds by stage, and the most memory of the process.

scripts/measure_compile.py [MODEL] [--layers N] [--gpu sm80] [--json FILE]

The model is read from a folder of safetensors, as those that users have are: its weights are mapped, not copied.
"""

from __future__ import annotations

import json as json_module
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import trilithon
from trilithon import Options
from trilithon.lower.tensorrt.library import version

TOKENS = 2176
FIELDS = ("VmRSS", "RssAnon", "RssFile")  # man 5 proc: all, own memory, mapped files


def watch(most: dict[str, float], done: threading.Event) -> None:
    """Keep the largest of each field, in GB, until it is done."""
    while not done.wait(0.05):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        for name in FIELDS:
            most[name] = max(most.get(name, 0.0), int(status[name].split()[0]) * 1024 / 1e9)


def measured(folder: Path, gpu: str) -> dict[str, Any]:
    most, done = dict[str, float](), threading.Event()
    watcher = threading.Thread(target=watch, args=(most, done))
    watcher.start()
    started = time.perf_counter()
    model = trilithon.load_model(str(folder), dtype=torch.float16)
    llm = trilithon.compile(model, max_tokens=TOKENS, backend="tensorrt", options=Options(gpu=gpu))
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    weights = sum(p.nbytes for p in model.parameters()) / 1e9
    modules: Any = llm.decoder.modules
    return {
        "weights_gb": weights,
        "seconds": seconds,
        "stages": dict(llm.start_up.seconds),
        "most_gb": most,
        "most_over_weights": most["VmRSS"] / weights,
        "plans_mb": {name: getattr(modules, name).engine.plan_bytes / 1e6 for name in ("prefill", "decode")},
    }


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = None,
    gpu: Annotated[str, typer.Option(help="To build for.")] = "sm80",
    json: Annotated[Path | None, typer.Option(help="Save what was measured.")] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    if folder is None:  # written by this process and read by another, which has seen nothing of it
        with tempfile.TemporaryDirectory() as place:
            trilithon.load_model(model, layers=layers, dtype=torch.float16).save_pretrained(place)
            more = ["--gpu", gpu, "--folder", place, *(["--json", str(json)] if json else [])]
            raise SystemExit(subprocess.run([sys.executable, __file__, model, *more], check=False).returncode)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "tensorrt": version()}
    found = {"model": model, "gpu": gpu, "cores": os.cpu_count(), "versions": versions, **measured(folder, gpu)}
    print(json_module.dumps(found, indent=1))
    if json is not None:
        json.write_text(json_module.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
