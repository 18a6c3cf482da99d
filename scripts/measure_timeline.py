#!/usr/bin/env python3
"""When the programs of each generated kernel of a decode step start, have waited, and end, by the GPU's own clock.

scripts/measure_timeline.py [MODEL] [--layers 4] [--length 2048] [--json FILE]

Layers share their kernels' sources, so what is printed of a layer is of the last one that has it. Writing down the times
changed no step by more than 2 %, which is printed too. What puts parts of an attention together is no generated kernel: it
stands between the end of `attention` and the wait of the next products.
"""

from __future__ import annotations

import json as json_module
import re
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import trilithon
from trilithon.lower.native.fused import launch
from trilithon.report.versions import versions
from trilithon.runtime.decoder import CachedDecoder

POINTS = ("start", "waited", "end")
MOST = 4096  # programs of a kernel that are looked at
STAMP = """from triton.language.extra.cuda import globaltimer

@triton.jit
def stamp(base: tl.constexpr, pid, point: tl.constexpr):
    at = tl.full([], base, tl.int64) + (pid * 3 + point) * 8
    if pid < {most}:
        tl.store(at.to(tl.pointer_type(tl.int64)), globaltimer())


@triton.jit
"""


class Clock:
    """Kernels that write down when each of their programs is where."""

    def __init__(self, device: torch.device) -> None:
        self.plain = launch._kernel
        self.times = torch.zeros(64, MOST, 3, dtype=torch.int64, device=device)
        self.kernels: dict[str, str] = {}

    def __call__(self, name: str, source: str) -> Any:
        self.kernels.setdefault(source, name)
        base = self.times[list(self.kernels).index(source)].data_ptr()
        text = source.replace("@triton.jit\n", STAMP.format(most=MOST), 1)
        for point, line in enumerate(("let_next_start", "wait")):
            text = re.sub(rf"^( *){line}\(PDL\)$", rf"\g<0>\n\1stamp({base}, pid, {point})", text, flags=re.M)
        return self.plain(name, f"{text}    tl.debug_barrier()\n    stamp({base}, pid, 2)\n")

    def rows(self) -> list[dict[str, Any]]:
        """Of each kernel least, median and most nanoseconds since the first program started; programs that wait alone."""
        found = []
        for name, times in zip(self.kernels.values(), self.times.cpu(), strict=False):
            own = times[(times > 0).all(1)]
            if len(own):
                found.append((name, own))
        first = min(int(own[:, 0].min()) for _, own in found)
        rows = [{"kernel": name, "programs": len(own)} | self._of(own - first) for name, own in found]
        return sorted(rows, key=lambda row: row["end"][0])

    def _of(self, times: Tensor) -> dict[str, list[int]]:
        ends = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        return {point: times[:, i].double().quantile(ends).long().tolist() for i, point in enumerate(POINTS)}


def step_us(decoder: CachedDecoder, ids: Tensor, steps: int = 50) -> float:
    """Microseconds of a replayed step behind the prompt."""
    token = torch.zeros(1, dtype=torch.int64, device=ids.device)
    decoder.prefill(ids, token)
    for _ in range(5):
        decoder.decode(token)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        decoder.decode(token)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps * 1e6


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 2048,
    json: Annotated[Path | None, typer.Option(help="Save the times.")] = None,
) -> None:
    device = torch.device("cuda")
    module = trilithon.load_model(model, device="cuda", layers=layers, dtype=torch.float16)
    llm = trilithon.compile(module, max_tokens=length + 128)
    ids = torch.randint(3, 1000, (1, length), device=device)
    step_us(llm.decoder, ids)
    us = {"plain": step_us(llm.decoder, ids)}
    clock = Clock(device)
    setattr(launch, "_kernel", clock)  # noqa: B010
    llm.decoder.drop_graphs()
    us["with the clock"] = step_us(llm.decoder, ids)
    rows = clock.rows()
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}: {model}, {layers} layers, steps of {', '.join(f'{x:.1f} us {name}' for name, x in us.items())}")
    print(f"{'kernel':32}{'programs':>9}" + "".join(f"{point + ' (least, median, most)':>30}" for point in POINTS))
    for row in rows:
        print(f"{row['kernel']:32}{row['programs']:9}" + "".join(f"{' '.join(map(str, row[p])):>30}" for p in POINTS))
    if json is not None:
        saved = {"model": model, "layers": layers, "length": length, "gpu": gpu, "step_us": us, "kernels": rows}
        json.write_text(json_module.dumps(saved | {"versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
