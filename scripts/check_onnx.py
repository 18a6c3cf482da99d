#!/usr/bin/env python3
"""How far ONNX Runtime is off eager on models that `trilithon.export_onnx` wrote.

scripts/check_onnx.py [MODELS] [--layers 2] [--json FILE]
"""

from __future__ import annotations

import json as json_module
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import trilithon
from trilithon.bench.doctor import diagnose
from trilithon.lower.onnx.library import onnx
from trilithon.lower.onnx.session import Session

SIZES = ((1, 1), (2, 9), (3, 64), (1, 300))  # rows, tokens


def inputs(session: Session, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random tokens; row 1 is padded on the right, row 2 on the left, where padding is an input."""
    make = torch.Generator().manual_seed(tokens)
    given = {"input_ids": torch.randint(3, 1000, (rows, tokens), generator=make)}
    if "attention_mask" in session.inputs:
        kept = given["attention_mask"] = torch.ones(rows, tokens, dtype=torch.int64)
        kept[1:2, tokens // 2 + 1 :] = 0
        kept[2:3, : tokens // 2] = 0
    return given


@torch.no_grad()
def check(name: str, layers: int | None, takes: tuple[str, ...]) -> dict[str, Any]:
    model: Any = trilithon.load_model(name, layers=None if name == "minilm" else layers)
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        made = trilithon.export_onnx(model, Path(folder) / "m.onnx", inputs=takes)
        seconds = time.perf_counter() - began
        graph = onnx().load(str(made.path), load_external_data=False).graph
        session = Session(made.path)
        errors = {}
        for rows, tokens in SIZES:
            given = inputs(session, rows, tokens)
            got, want = session(given)[0], model(**given)[0]
            errors[f"{rows} x {tokens}"] = float((got - want).norm() / want.norm())
        size = sum(file.stat().st_size for file in made.files)
    found = [
        {a.name: a.i for a in node.attribute} | {"n": len(node.input)} for node in graph.node if node.op_type == "Attention"
    ]
    forms = Counter("is_causal" if a["is_causal"] else "mask" if a["n"] > 3 else "no mask" for a in found)
    sites = Counter(site.runs_on for site in made.report.sites)
    row = {"model": name, "inputs": takes, "attention": dict(forms), "sites": dict(sites), "errors": errors}
    return row | {"bytes": size, "seconds": round(seconds, 1)}


def main(
    models: Annotated[str, typer.Argument(help="Joined by commas.")] = "qwen2.5-0.5b,qwen3-0.6b,llama-3.2-1b,minilm",
    layers: Annotated[int, typer.Option(help="Of models with random weights.")] = 2,
    json: Annotated[Path | None, typer.Option(help="Save the results.")] = None,
) -> None:
    rows = []
    for name in models.split(","):
        for takes in (("input_ids",), ("input_ids", "attention_mask")):
            rows.append(check(name, layers, takes))
            print(json_module.dumps(rows[-1], indent=2), flush=True)
    if json is not None:
        versions = diagnose()["versions"] | {
            name: __import__(name).__version__ for name in ("onnx", "onnxruntime", "onnxscript")
        }
        json.write_text(json_module.dumps({"layers": layers, "versions": versions, "rows": rows}, indent=2) + "\n")
        print(f"saved {json}")


if __name__ == "__main__":
    typer.run(main)
