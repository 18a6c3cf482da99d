"""Each example is short, and runs as its reader would run it; one that needs a GPU is read, and its imports are run."""

from __future__ import annotations

import ast
import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
LINES = 60
GPU = ("torch_tensorrt_plugin",)
SAYS = {
    "explain": "it is not causal as this cell shows: {'b': 0, 'h': 0, 'q': 40, 'k': 3",
    "generate": "same tokens as eager: True",
    "custom_model": "same as the model without a cache: True",
    "torch_compile": "runs on   attention, is_causal=True",
    "build_engine": "on a machine with such a GPU: trilithon generate",
}


def source(name: str) -> str:
    return (EXAMPLES / f"{name}.py").read_text()


def test_every_example_is_tested_and_short():
    found = {path.stem for path in EXAMPLES.glob("*.py")}
    assert found == {*SAYS, *GPU}
    assert {name: n for name in found if (n := len(source(name).splitlines())) >= LINES} == {}


@pytest.mark.parametrize("name", SAYS)
@torch._dynamo.config.patch(fake_tensor_cache_enabled=True)  # as PyTorch has it
def test_an_example_runs(name, capsys, monkeypatch, tmp_path):
    words = [str(tmp_path / "out")] if name == "build_engine" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    torch.compiler.reset()
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert SAYS[name] in printed
    assert "False" not in printed


@pytest.mark.parametrize("name", GPU)
def test_an_example_for_a_gpu_says_so_without_one(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    tree = ast.parse(source(name))
    ours = [(n.module, a.name) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
    assert ours
    for module, attribute in ours:
        whole = f"{module}.{attribute}"
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(whole)
