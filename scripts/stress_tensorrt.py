#!/usr/bin/env python3
"""Do processes that run TensorRT's engines side by side on one GPU end well, and what makes them (docs/backends.md, "A crash")?

scripts/stress_tensorrt.py [MODEL] [--processes 6] [--variants plain,ahead,...] [--json FILE] [-- WORDS OF BENCH]

Each process is `trilithon bench MODEL`, by default of rows without a cache, which run an engine at as many lengths as there are
new tokens. A variant changes one thing:

    plain    nothing
    ahead    an engine is given other shapes while it may still run, as before it waited for the GPU there
    after    wait for the GPU behind each run
    kept     an engine's file stays mapped after it was read
    alone    one process at a time runs an engine, to its end
    caches   each process has its own folder for what CUDA's driver compiles
"""

from __future__ import annotations

import fcntl
import json as json_module
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from mmap import mmap
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import Tensor

from trilithon.cli import main as trilithon
from trilithon.lower.tensorrt import execute, library
from trilithon.report.versions import versions

VARIANTS = ("plain", "ahead", "after", "kept", "alone", "caches")
HERE = f"{Path(__file__).resolve().parents[1]}/"
STACK = 16  # lines of where Python was when a process crashed
VARIANT, LOCK = "TRILITHON_STRESS", "TRILITHON_STRESS_LOCK"
DEFAULT = ["--rows", "pytorch,trt-mask,trt-causal", "--repeats", "1"]


class Kept(mmap):
    """Is not closed when its `with` ends."""

    held: ClassVar[list[Kept]] = []

    def __exit__(self, *_: Any) -> None:
        self.held.append(self)


@contextmanager
def turn() -> Iterator[None]:
    """Of this process, on the GPU."""
    with open(os.environ[LOCK], "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.synchronize()


def change(variant: str) -> None:
    """Make this process one of a variant."""
    run = execute.Executor.__call__

    def changed(self: execute.Executor, *tensors: Tensor) -> tuple[Tensor, ...]:
        with turn() if variant == "alone" else nullcontext():
            made = run(self, *tensors)
        if variant == "after":
            torch.cuda.synchronize()
        return made

    execute.Executor.__call__ = changed  # type: ignore[method-assign]
    if variant == "ahead":
        execute.Executor._wait_for_other_shapes = lambda *_: None  # type: ignore[method-assign]
    if variant == "kept":
        execute.mmap = Kept  # type: ignore[attr-defined]


def ended(variant: str, words: list[str], processes: int, folder: Path) -> list[dict[str, Any]]:
    """How each of so many processes at a time ended."""
    environment = os.environ | {VARIANT: variant, LOCK: str(folder / "lock"), "PYTHONFAULTHANDLER": "1"}
    logs = [folder / f"{variant}-{i}.log" for i in range(processes)]
    began = time.perf_counter()
    running = []
    for i, log in enumerate(logs):
        own = {"CUDA_CACHE_PATH": str(folder / f"cache-{i}")} if variant == "caches" else {}
        command = [sys.executable, __file__, *words]
        running.append(subprocess.Popen(command, env=environment | own, stdout=log.open("wb"), stderr=subprocess.STDOUT))
    least, seconds = room(), dict[int, float]()
    while len(seconds) < processes:
        time.sleep(0.2)
        least = {name: min(value, least[name]) for name, value in room().items()}
        seconds |= {i: time.perf_counter() - began for i, x in enumerate(running) if i not in seconds and x.poll() is not None}
    found = []
    for i, (process, log) in enumerate(zip(running, logs, strict=True)):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        fatal = next((at for at, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
        last = " | ".join(lines[max(0, fatal - 3) : fatal])
        stack = [line.strip().replace(HERE, "") for line in lines[fatal : fatal + STACK]]
        row = {"variant": variant, "code": process.returncode, "seconds": seconds[i], "last": last[:400], "stack": stack}
        found.append({**row, **least})
    return found


def room() -> dict[str, float]:
    """Gigabytes that are free, of the GPU and of the host: a crash may be how an engine says that there is no more."""
    with open("/proc/meminfo") as file:
        (host,) = (int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    gpu = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return {"gpu_gb_free": gpu / 1e9, "host_gb_free": host / 1e9}


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    words: Annotated[list[str] | None, typer.Argument(help="Behind --: of trilithon bench.")] = None,
    processes: Annotated[int, typer.Option(help="At a time.", min=1)] = 6,
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)}; joined by commas.")] = "plain",
    json: Annotated[Path | None, typer.Option(help="Save how they ended.")] = None,
) -> None:
    asked = variants.split(",")
    if unknown := set(asked) - set(VARIANTS):
        raise typer.BadParameter(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in asked:
            rows = ended(variant, ["bench", model, *(words or DEFAULT)], processes, Path(folder))
            found += rows
            codes = ", ".join(str(row["code"]) for row in rows)
            print(
                f"{variant}: {sum(row['code'] == 0 for row in rows)} of {processes} ended well; exit codes {codes}; at least "
                f"{rows[0]['gpu_gb_free']:.0f} GB of the GPU and {rows[0]['host_gb_free']:.0f} of the host were free",
                flush=True,
            )
            for row in rows:
                if row["code"]:
                    print(f"    {row['code']}: {row['last']}", *row["stack"][:4], sep="\n        ", flush=True)
            if json is not None:  # after each: a later one may be ended by a limit
                gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
                made_with = versions() | {"tensorrt": library.version()}
                saved = {"model": model, "words": words or DEFAULT, "gpu": gpu, "runs": found, "versions": made_with}
                json.write_text(json_module.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    if VARIANT in os.environ:
        change(os.environ[VARIANT])
        trilithon()
    else:
        typer.run(main)
