#!/usr/bin/env python3
"""What the forms of a TensorRT engine cost: matrices in it or as its inputs, products whole or in parts, rows by columns.

scripts/measure_engine_forms.py [MODEL] [--layers N] [--json FILE]

Of each form: time of a prompt of 2048 tokens and of a step behind it, GPU memory, files, and the error of logits against
float32, in units of eager's: of the last token of prompts, and with four steps behind it.
"""

from __future__ import annotations

import gc
import importlib
import json as json_module
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn

import trilithon
from trilithon import Options
from trilithon.bench.timing import measure
from trilithon.lower.tensorrt.library import version
from trilithon.report.versions import versions
from trilithon.runtime.verify import relative_error

WEIGHTS, PRODUCTS = (importlib.import_module(f"trilithon.lower.tensorrt.{name}") for name in ("weights", "converters.matmul"))
PROMPTS, STEPS, TOKENS = (6, 17, 512, 2048), 4, 2176
DEVICE = torch.device("cuda")


class Form(NamedTuple):
    """How engines are built.

    Attributes:
        least_bytes: matrices of so many bytes are inputs.
        part: numbers that products of halves are added up over; 0 = all.
        columns: one row times a matrix is added up by columns.
    """

    name: str
    least_bytes: int = 1 << 20
    part: int = 0
    columns: bool = True


FORMS = (
    Form("as built"),
    Form("rows as products", columns=False),
    Form("parts of 2048", part=2048),
    Form("parts of 1024", part=1024),
    Form("parts of 512", part=512),
    Form("matrices in the engine", least_bytes=1 << 60),
)


def compiled(model: nn.Module, form: Form) -> trilithon.Compiled:
    before = WEIGHTS.LEAST_BYTES, PRODUCTS.PARTS, PRODUCTS._is_costly
    WEIGHTS.LEAST_BYTES, PRODUCTS.PARTS = form.least_bytes, (form.part,)
    if not form.columns:
        PRODUCTS._is_costly = lambda net: True
    try:
        return trilithon.compile(model, max_tokens=TOKENS, backend="tensorrt", options=Options(verify=False))
    finally:
        WEIGHTS.LEAST_BYTES, PRODUCTS.PARTS, PRODUCTS._is_costly = before


@torch.no_grad()
def last_logits(model: nn.Module, ids: Tensor, prompt: int) -> Tensor:
    logits: Tensor = model(ids[:, : prompt + STEPS], use_cache=False, logits_to_keep=STEPS + 1).logits
    return logits


def measured(model: nn.Module, form: Form, ids: Tensor, exact: dict[int, Tensor], eager: dict[int, float]) -> dict[str, Any]:
    free, started, zero = torch.cuda.mem_get_info()[0], time.perf_counter(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    decoder = compiled(model, form).decoder
    built, errors = time.perf_counter() - started, {}
    for prompt in PROMPTS:
        got = [decoder.prefill(ids[:, :prompt], zero).clone()]
        got += [decoder.decode(ids[:, i]).clone() for i in range(prompt, prompt + STEPS)]
        pairs = (got[0], exact[prompt][:, 0]), (torch.stack(got, 1), exact[prompt])
        errors[prompt] = [relative_error(*pair) / eager[prompt] for pair in pairs]
    prompt = max(PROMPTS)
    first = measure(lambda: decoder.prefill(ids[:, :prompt], zero), repeats=5, device=DEVICE)
    decoder.prefill(ids[:, :prompt], zero)
    steps = measure(lambda: [decoder.decode(ids[:, 0]) for _ in range(50)], repeats=1, device=DEVICE)
    torch.cuda.empty_cache()
    return {
        "prefill_ms": first.median * 1e3,
        "step_ms": steps.median / 50 * 1e3,
        "memory_gb": (free - torch.cuda.mem_get_info()[0]) / 1e9,
        "plans_mb": [x.engine.plan_bytes / 1e6 for x in (decoder.modules.prefill, decoder.modules.decode)],
        "build_s": built,
        "errors": errors,
    }


def main(
    model: Annotated[str, typer.Argument(help="A preset, a folder or a hub id.")] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(help="Keep the first layers only.")] = None,
    json: Annotated[Path | None, typer.Option(help="Save what was measured.")] = None,
) -> None:
    half = trilithon.load_model(model, device=DEVICE, layers=layers, dtype=torch.float16)
    wide = trilithon.load_model(model, device=DEVICE, layers=layers, dtype=torch.float32)
    wide.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    generator = torch.Generator(DEVICE).manual_seed(1)
    ids = torch.randint(3, 1000, (1, max(PROMPTS) + STEPS), device=DEVICE, generator=generator)
    exact = {prompt: last_logits(wide, ids, prompt) for prompt in PROMPTS}
    del wide
    eager = {prompt: relative_error(last_logits(half, ids, prompt), exact[prompt]) for prompt in PROMPTS}
    found: dict[str, Any] = {}
    for form in FORMS:
        gc.collect()
        torch.cuda.empty_cache()
        found[form.name] = measured(half, form, ids, exact, eager)
        print(form.name, json_module.dumps(found[form.name]), flush=True)
    if json is not None:
        about = {
            "model": model,
            "gpu": torch.cuda.get_device_name(),
            "versions": {**versions(), "tensorrt": version()},
            "eager": eager,
        }
        json.write_text(json_module.dumps({**about, "forms": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
