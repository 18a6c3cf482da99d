#!/usr/bin/env python3
"""From a configuration, and from a saved artefact, to the first token: seconds of a process, without Python's own start.

scripts/measure_start.py [MODEL] [--layers N] [--length 128] [--json FILE]

All start with empty folders for what Triton, Inductor and Trilithon keep. An artefact is loaded three times, each time by a new
process: twice with the folders of the compilation that saved it, and with empty ones, as on a machine that never saw the model.
"""

from __future__ import annotations

import json as json_module
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

SLOW = ("torch._dynamo", "triton", "sympy", "z3", "transformers")  # to import
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRILITHON_CACHE")


def to_first_token(model: str, layers: int | None, length: int, save: Path | None) -> dict[str, Any]:
    """What each part took; `model` is an artefact if it is a folder."""
    began = time.perf_counter()
    seconds: dict[str, float] = {}

    def until_now(name: str) -> None:
        seconds[name] = time.perf_counter() - began - sum(seconds.values())
        print(f"{seconds[name]:6.1f} s  {name}", file=sys.stderr, flush=True)

    import torch

    import trilithon

    until_now("imports")
    cuda = torch.cuda.is_available()
    if Path(model).is_dir():
        llm = trilithon.load(model)
        until_now("load")
    else:
        dtype = torch.float16 if cuda else torch.float32
        module = trilithon.load_model(model, device="cuda" if cuda else "cpu", layers=layers, dtype=dtype)
        until_now("random weights")
        llm = trilithon.compile(module, max_tokens=length + 128)
        until_now("compile")
    ids = torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(0))
    token = llm.generate(ids.to(llm.decoder.device), max_new_tokens=1)[0, -1].item()
    until_now("first token")
    found: dict[str, Any] = {
        "seconds": seconds,
        "total": sum(seconds.values()),
        "start_up": dict(llm.start_up.seconds),
        "token": token,
    }
    found["imported"] = [name for name in SLOW if name in sys.modules]
    found["bytecode"] = "a folder of the script's own" if sys.pycache_prefix else "beside its modules"
    found["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    if save is not None:
        llm.save(save)
        until_now("save")  # not in the total
    return found


def bytecode(folder: Path) -> dict[str, str]:
    """Python keeps compiled modules, in a folder of ours if pip left none beside torch: else each process compiles them."""
    written, spec = {"PYTHONDONTWRITEBYTECODE": ""}, find_spec("torch")
    beside = spec is not None and spec.cached is not None and Path(spec.cached).exists()
    return written if beside else {**written, "PYTHONPYCACHEPREFIX": str(folder)}


def by_process(caches: Path, *words: str) -> dict[str, Any]:
    print(*words, file=sys.stderr, flush=True)
    environment = os.environ | {name: str(caches / name) for name in CACHES} | bytecode(caches.parent / "bytecode")
    ran = subprocess.run([sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json_module.loads(ran.stdout.splitlines()[-1])
    return found


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    json: Annotated[Path | None, typer.Option(help="Save the seconds.")] = None,
    one: Annotated[bool, typer.Option(hidden=True, help="In this process, once.")] = False,
    save: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    if one:
        print(json_module.dumps(to_first_token(model, layers, length, save)))
        return
    with TemporaryDirectory() as folder:
        here, saved = Path(folder), str(Path(folder, "saved"))
        kept = ["--one", "--length", str(length)]
        words = [model, *kept, "--save", saved, *(["--layers", str(layers)] if layers else [])]
        runs = {"from a configuration": by_process(here / "own", *words)}
        for name in ("from an artefact", "from an artefact, a second time"):
            runs[name] = by_process(here / "own", saved, *kept)
        runs["from an artefact, empty caches"] = by_process(here / "empty", saved, *kept)
    for name, run in runs.items():
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in run["seconds"].items())
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in run["start_up"].items())
        print(f"{run['device']}: {model} {name}: {run['total']:.1f} s ({parts}; stages: {stages})")
    if len({run["token"] for run in runs.values()}) > 1:
        print("THE TOKENS ARE NOT THE SAME")
    if json is not None:
        from trilithon.report.versions import versions

        json.write_text(
            json_module.dumps({"model": model, "length": length, "runs": runs, "versions": versions()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
