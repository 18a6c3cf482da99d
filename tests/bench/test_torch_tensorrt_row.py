"""The rows of Torch-TensorRT: what they export, what they say where they cannot run, and that other rows do not need them."""

from __future__ import annotations

import importlib.machinery
import json
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from torch import nn

from trilithon.bench import torch_tensorrt_row
from trilithon.bench.candidates import candidates
from trilithon.bench.roofline import DecoderSize, Job, Machine
from trilithon.bench.rows import Bench, run_rows
from trilithon.capture import hf
from trilithon.errors import TrilithonError

PROMPT, NEW = 6, 5


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return hf.load_model("byte-llama")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, PROMPT), generator=torch.Generator().manual_seed(0))


def library(compile: object = None) -> types.ModuleType:
    """A stand-in for `torch_tensorrt`, whose `dynamo.compile` is `compile`."""
    module = types.ModuleType("torch_tensorrt")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_tensorrt", None)
    module.__version__ = "2.11.0"  # type: ignore[attr-defined]
    module.dynamo = types.SimpleNamespace(compile=compile)  # type: ignore[attr-defined]
    return module


@pytest.fixture
def installed(monkeypatch):
    tensorrt = types.ModuleType("tensorrt")
    tensorrt.__version__, tensorrt._package_name = "1.4.0.76", "tensorrt_rtx"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)

    def install(compile: object = None) -> types.ModuleType:
        monkeypatch.setitem(sys.modules, "torch_tensorrt", library(compile))
        return sys.modules["torch_tensorrt"]

    return install


def measured(model: nn.Module, ids: torch.Tensor, *rows: str):
    size = DecoderSize(layers=1, hidden=8, heads=1, kv_heads=1, head_dim=8, intermediate=8, vocabulary=256)
    job = Job(size=size, value_bytes=4, prompt_tokens=PROMPT, new_tokens=NEW, batch=len(ids))
    machine = Machine(name="here", flops_per_second=1e12, bytes_per_second=1e12, versions={})
    bench = Bench(model="byte-llama", job=job, machine=machine, dtype="float32", device=ids.device, repeats=1)
    return run_rows(candidates(model, ids, NEW, rows=rows), bench).rows


@pytest.mark.parametrize(
    ("row", "settings"), [("torch-tensorrt", {}), ("torch-tensorrt-masked", {"attn_bias_is_causal": False})]
)
def test_a_row_generates_by_what_was_compiled(model, ids, installed, monkeypatch, row, settings):
    calls = []

    def compile(program, inputs=None, *, arg_inputs=None, device=None, **kwargs):
        calls.append(kwargs)
        assert inputs is None
        assert not torch.is_grad_enabled()
        assert arg_inputs == [ids]
        assert device == ids.device
        return program.module()

    fake = installed(compile)
    monkeypatch.setattr(torch_tensorrt_row, "library", lambda device: fake)
    baseline, found = measured(model, ids, "pytorch", row)
    assert not found.error
    assert found.tokens_equal_baseline
    assert calls == [settings]
    assert "2.11.0 on TensorRT-RTX 1.4.0.76: no engines, " in found.note
    assert float(found.note.split("logits off by ")[1].split()[0]) < 1e-5
    assert "1.4" not in baseline.note


def test_the_program_is_the_model_at_each_length(model, ids, installed):
    fake = installed(lambda program, **arguments: program.module())
    built = torch_tensorrt_row.build(fake, model, ids, PROMPT + NEW, {"logits_to_keep": 1}, {})
    for tokens in (2, PROMPT, PROMPT + NEW):
        others = torch.arange(2 * tokens).view(2, tokens) * 7 % 256
        torch.testing.assert_close(built.logits(others), model(input_ids=others, use_cache=False).logits[:, -1:])
    with pytest.raises(Exception, match=str(PROMPT + NEW)):
        built.logits(torch.zeros(2, PROMPT + NEW + 1, dtype=torch.int64))


def test_wrong_logits_show_in_the_note(model, ids, installed):
    class Negated(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            return (-self.inner(ids),)

    fake = installed(lambda program, **arguments: Negated(program.module()))
    built = torch_tensorrt_row.build(fake, model, ids, PROMPT + NEW, {"logits_to_keep": 1}, {})
    assert built.made_of.endswith("logits off by 2.0e+00 of eager's")


def test_a_missing_package_says_what_to_install(model, ids):
    baseline, *rows = measured(model, ids, "pytorch", "torch-tensorrt", "torch-tensorrt-masked")
    assert not baseline.error
    for row in rows:
        assert "torch_tensorrt is not installed" in row.error
        assert "pip install torch-tensorrt-rtx" in row.error


def test_a_cpu_is_refused_before_the_import(installed):
    installed()
    with pytest.raises(TrilithonError, match="the model is on cpu, not on a GPU"):
        torch_tensorrt_row.library(torch.device("cpu"))


def test_an_import_that_fails_names_the_versions(installed, monkeypatch):
    installed()

    def fail(name):
        raise AttributeError("module 'tensorrt_rtx' has no attribute 'IAlgorithmSelector'")

    monkeypatch.setattr(torch_tensorrt_row.importlib, "import_module", fail)
    with pytest.raises(TrilithonError, match="IAlgorithmSelector") as caught:
        torch_tensorrt_row.library(torch.device("cuda", 0))
    assert "tensorrt-rtx<1.5" in str(caught.value)


def test_the_parts_of_a_compiled_module_are_counted():
    class Engine(nn.Module):
        pass

    class Left(nn.Module):
        def forward(self, x):
            return torch.ops.aten.relu.default(x) + 1

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("_run_on_acc_2", (graph.call_module("_run_on_gpu_1", (x,)),)))
    children = {"_run_on_acc_0": Engine(), "_run_on_gpu_1": torch.fx.symbolic_trace(Left()), "_run_on_acc_2": Engine()}
    assert torch_tensorrt_row.parts(torch.fx.GraphModule(children, graph)) == "1 engine, 1 operation in PyTorch"


def test_rows_of_others_need_neither_prover_nor_tensorrt(tmp_path):
    """On a machine without z3 and TensorRT the baseline is measured, and a row of Trilithon's says what is missing."""
    script = f"""
        import sys
        from importlib.machinery import PathFinder

        class Without(PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                missing = name.split(".")[0] in ("z3", "tensorrt", "tensorrt_rtx", "torch_tensorrt", "matplotlib")
                return None if missing else super().find_spec(name, path, target)

        sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
        sys.argv = ["trilithon", "bench", "byte-llama", "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1"]
        sys.argv += ["--rows", "pytorch,causal", "--json", {str(tmp_path / "table.json")!r}]
        from trilithon.cli import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (tmp_path / "table.json").exists(), done.stderr
    baseline, causal = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert not baseline["error"]
    assert "No module named 'z3'" in causal["error"]
