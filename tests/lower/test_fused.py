"""A step as generated kernels: which these are, and, in Triton's interpreter, that they give what the step itself gives."""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from trilithon.capture import hf
from trilithon.compiler import analyse
from trilithon.errors import VerificationFailed
from trilithon.lower.graph_data import from_data, to_data
from trilithon.lower.inputs import Input, cached_inputs
from trilithon.lower.native.fused.fuse import fuse_step
from trilithon.lower.native.fused.launch import Attention, Largest, Products, Values, tile
from trilithon.lower.native.fused.operations import VIEWS, CannotFuse
from trilithon.lower.native.fused.tune import tune
from trilithon.lower.native.lower import lower_native
from trilithon.lower.native.split_kv import has_bounds
from trilithon.lower.native.step import _compare, make_step
from trilithon.options import Options
from trilithon.rewrite.insert_cache import cache_shapes, insert_cache
from trilithon.spec.masks import parse
from zoo.families import FAMILIES

launch = importlib.import_module("trilithon.lower.native.fused.launch")
text_module = importlib.import_module("trilithon.lower.native.fused.text")
tune_module = importlib.import_module("trilithon.lower.native.fused.tune")
step_module = importlib.import_module("trilithon.lower.native.step")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="for Triton's interpreter"
)
FUSED = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt-neox", "phi", "glm")
SLOTS = 40
TESTS = Path(__file__).parent.parent


@cache
def step_of(name: str, stored: torch.dtype | None = None) -> tuple[GraphModule, tuple[Input, ...], int]:
    """A step of two layers in halves, what it takes, and how many layers it has."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.make("eager" if family.eager_only else "sdpa").half()
    program = analyse(model, *hf.example_for(model, ("input_ids",)), (), Options()).rewritten
    shapes = cache_shapes(program, stored=stored)
    gm = lower_native(insert_cache(program, "step", stored=stored), split=True)
    return gm, cached_inputs(gm, shapes, SLOTS, 1, most_tokens=1), len(shapes)


def given(inputs: tuple[Input, ...], start: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(start)
    shapes = [[axis.high if i else 1 for i, axis in enumerate(x.axes)] for x in inputs]
    caches = [torch.randn(s, generator=generator).to(x.dtype) for s, x in zip(shapes[3:], inputs[3:], strict=True)]
    return [torch.tensor([[5]]), torch.tensor([start]), torch.tensor([1]), *caches]


def few_programs(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter runs them one by one."""
    for name, value in (("FILLED", 4), ("TUNED_SLOTS", SLOTS)):
        patch.setattr(launch, name, value)


def kernels(gm: GraphModule) -> list[Any]:
    return [gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gpt-neox"])
def test_what_no_kernel_writes_is_loaded_before_the_wait(name: str) -> None:
    """And nothing else; a row of an embedding comes behind the token that says which."""
    gm, inputs, _ = step_of(name)
    fused, seen = fuse_step(gm, inputs), 0
    for call in fused.graph.nodes:
        kernel = fused.get_submodule(str(call.target)) if call.op == "call_module" else None
        if not isinstance(kernel, (Products, Attention)):
            continue
        reads = call.args[3:] if isinstance(kernel, Attention) else call.args
        early = True
        for line in kernel.source.splitlines():
            early = (early and "wait(PDL)" not in line) or line.strip().startswith(("if ", "elif ", "else:"))
            for place in re.findall(r"tl\.load\(p(\d+)", line):
                read = reads[int(place)]
                assert early or read.op != "get_attr" or "embed" in read.target, line
                assert not early or read.op in ("get_attr", "placeholder"), line
                seen += early
    assert seen >= 8


@pytest.mark.parametrize("name", FUSED)
def test_a_layer_is_five_kernels(name: str) -> None:
    """Or four, where attention and the feed-forward read the same vector."""
    gm, inputs, layers = step_of(name)
    fused = fuse_step(gm, inputs)
    kinds = [type(k) for k in kernels(fused)]
    assert kinds.count(Attention) == layers and kinds.count(Values) == kinds.count(Largest) == 1
    assert kinds.count(Products) in (4 * layers + 1, 3 * layers + 1)
    left = {n.target for n in fused.graph.nodes if n.op == "call_function"}
    assert {getattr(x, "__name__", "") for x in left - VIEWS} <= {"getitem"}
    for kernel in kernels(fused):
        if not isinstance(kernel, Largest):
            ast.parse(kernel.source)
    assert len({k.source for k in kernels(fused) if isinstance(k, Attention)}) <= 2  # layers share their kernels


@pytest.mark.parametrize("name", ["gemma3", "glm"])
def test_a_step_from_a_file_is_the_same_kernels(name: str) -> None:
    """A saved graph holds all that lowering and fusing ask for."""
    torch.manual_seed(0)
    model = FAMILIES[name].make("sdpa").half()
    program = analyse(model, *hf.example_for(model, ("input_ids",)), (), Options()).rewritten
    kept = to_data(insert_cache(program, "step"))
    again = from_data(json.loads(json.dumps(kept.nodes)), kept.tensors, torch.device("cpu"))
    gm, inputs, _ = step_of(name)
    mine, theirs = (kernels(fuse_step(x, inputs)) for x in (lower_native(again, split=True), gm))
    assert [getattr(k, "source", "") for k in mine] == [getattr(k, "source", "") for k in theirs]
    assert len(mine) > 5


@pytest.mark.parametrize(
    ("name", "stored", "why"),
    [
        ("gpt2", None, "addmm"),
        ("mixtral", None, "has no"),
        ("bloom", None, "has no"),
        ("qwen3", torch.int8, "write_cache_8bit"),
    ],
)
def test_what_has_no_kernel_is_named(name: str, stored: torch.dtype | None, why: str) -> None:
    gm, inputs, _ = step_of(name, stored)
    with pytest.raises(CannotFuse, match=why) as refusal:
        fuse_step(gm, inputs)
    assert refusal.value.where is not None and refusal.value.where.node


@interpreted
@pytest.mark.parametrize(
    ("name", "few"),
    [("qwen3", 8), ("gemma2", 8), ("gemma3", 8), ("phi3", 8), ("gpt-neox", 8), ("glm", 8), ("qwen3", 1)],
)
@torch.no_grad()
def test_generated_kernels_give_what_the_step_gives(name: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of heads, softcaps, rings that have gone round, packed matrices, layer norms, rotary by pairs.

    Of 39 keys in tiles of 16, two parts hold two tiles and one, three parts one each. Queries are made one by one where
    they are few.
    """
    monkeypatch.setattr(text_module, "FEW_QUERIES", few)
    few_programs(monkeypatch)
    monkeypatch.setattr(launch, "LEAST_SHARE", 4)
    gm, inputs, _ = step_of(name)
    fused = fuse_step(gm, inputs)
    assert {x["share"] for k in kernels(fused) if isinstance(k, Attention) for x in k.candidates()} == {4, 8}
    for start, parts in ((0, 3), (SLOTS // 2, 2), (SLOTS - 1, 2), (SLOTS - 1, 3)):
        for kernel in kernels(fused):
            if isinstance(kernel, Attention):
                kernel.use({"block_n": 16, "splits": parts, "share": 4 if parts == 2 else 8})
        held, own = given(inputs, start), given(inputs, start)
        logits, _ = gm(*held)
        found, best = fused(*own)
        assert float((found - logits).norm() / logits.norm()) < 4e-3
        assert best.tolist() == found[:, 0].argmax(-1).tolist()
        for expected, written in zip(held[3:], own[3:], strict=True):
            torch.testing.assert_close(written, expected, atol=4e-3, rtol=4e-3)


@interpreted
@torch.no_grad()
def test_numbers_that_are_none_stay_so_for_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an attention leaves in memory for the next is written anew."""
    few_programs(monkeypatch)
    gm, inputs, _ = step_of("llama")
    fused, held = fuse_step(gm, inputs), given(inputs, SLOTS - 1)
    for x in held[3:]:
        x.view(torch.int16).fill_(-1)
    logits, _ = fused(*held)
    assert logits.isnan().all()
    held = given(inputs, SLOTS - 1)
    assert not fused(*held)[0].isnan().any()


@interpreted
def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)
    gm, inputs, _ = step_of("llama")
    fused = fuse_step(gm, inputs)
    _compare(gm, fused, inputs)
    attention = next(k for k in kernels(fused) if isinstance(k, Attention))
    assert "RING=False" in attention.source
    attention.source = attention.source.replace("WINDOW=0", "WINDOW=3")
    with pytest.raises(VerificationFailed, match="disagree"):
        _compare(gm, fused, inputs)


@interpreted
def test_parts_that_are_left_out_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A near miss of the comparison: only the first tile of a part is attended over."""
    few_programs(monkeypatch)
    gm, inputs, _ = step_of("llama")
    fused = fuse_step(gm, inputs)
    for kernel in kernels(fused):
        if isinstance(kernel, Attention):
            kernel.use({"block_n": 16, "splits": 3})
    _compare(gm, fused, inputs)  # of two parts one holds two tiles
    for kernel in kernels(fused):
        if isinstance(kernel, Attention):
            kernel.source = kernel.source.replace("begin, stop, group, part", "begin, begin + BLOCK_N, group, part")
    with pytest.raises(VerificationFailed, match="disagree"):
        _compare(gm, fused, inputs)
    assert all(kernel.splits == 3 for kernel in kernels(fused) if isinstance(kernel, Attention))


@pytest.mark.parametrize(
    ("mask", "bounded"),
    [
        ("causal & chunked(4)", True),
        ("causal & chunked(4) & chunked(6)", False),
        ("window(3) & window(5)", True),
        ("chunked(4)", False),
    ],
)
def test_the_kernels_take_chunks_of_one_size(mask: str, bounded: bool) -> None:
    """Of two sizes they would see to one only."""
    assert has_bounds(parse(mask)) is bounded


@interpreted
@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(3000),
        torch.cat([torch.zeros(2047), torch.ones(2), torch.zeros(7)]),
        torch.full((1500,), -torch.inf),
        torch.cat([torch.ones(1100), torch.tensor([torch.nan, 7.0])]),
        torch.arange(5.0),
    ],
    ids=["equal", "two", "infinite", "nan", "short"],
)
def test_the_largest_is_the_first_of_equals(row: torch.Tensor) -> None:
    assert Largest()(row[None]).tolist() == [int(row.argmax())]


def test_tiles_hold_64_numbers_a_thread() -> None:
    for width in (896, 1024, 2048, 4096, 8192, 14336):
        for matrices in (1, 2):
            rows, warps = tile(width, [8192], matrices)
            padded = 1 << (width - 1).bit_length()
            assert rows * padded * matrices / (32 * warps) <= 64 or rows == 1


def test_settings_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By source, tensors, settings to choose from, and versions of the compilers."""
    x = torch.zeros(4, 6, dtype=torch.float16)
    kernel = SimpleNamespace(source="def f(): pass", candidates=lambda: [{"warps": 4}])
    other = SimpleNamespace(source="def g(): pass", candidates=lambda: [{"warps": 4}])
    more = SimpleNamespace(source="def f(): pass", candidates=lambda: [{"warps": 4}, {"warps": 8}])
    keys = [tune_module._key(k, [x]) for k in (kernel, other, more)]
    keys += [tune_module._key(kernel, [y]) for y in (x.bfloat16(), x[:3], torch.zeros(6, 4, dtype=x.dtype).T)]
    monkeypatch.setattr(tune_module, "triton_version", lambda: "0.0")
    keys.append(tune_module._key(kernel, [x]))
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.append(tune_module._key(kernel, [x]))
    assert len(set(keys)) == 8


def sources() -> str:
    gm, inputs, _ = step_of("llama")
    return repr([(k.name, k.source) for k in kernels(fuse_step(gm, inputs)) if hasattr(k, "source")])


def test_sources_are_the_same_in_each_process() -> None:
    """Else settings would be measured, and kernels compiled, anew in each."""
    run = [sys.executable, "-c", "from lower.test_fused import sources; print(sources())"]
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    other = subprocess.run(run, env=env, cwd=TESTS, capture_output=True, check=True, text=True)
    assert "@triton.jit" in sources() and other.stdout == f"{sources()}\n"


@interpreted
@torch.no_grad()
def test_the_fastest_settings_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measured once a kernel; one that cannot run is left out; what the file holds must be one of the candidates."""
    monkeypatch.setenv("TRILITHON_CACHE", str(tmp_path))
    few_programs(monkeypatch)
    gm, inputs, layers = step_of("llama")
    asked = []

    def measure(tried: list[Any]) -> float:
        settings = tried[0].settings()
        asked.append(settings)
        if settings["warps"] == 2:
            raise RuntimeError("out of resource")
        is_fast = settings.get("block_n") == 16 or settings["warps"] == 8
        return 1.0 if settings == tried[0].candidates()[0] else 0.5 if is_fast else 2.0

    fused = fuse_step(gm, inputs)
    measured = tune(fused, given(inputs, 5), measure)
    assert measured == len(list((tmp_path / "kernels").glob("*.json"))) >= 6
    chosen = [k for k in kernels(fused) if isinstance(k, Attention)]
    assert len(chosen) == layers and all(k.block_n == 16 for k in chosen)
    again, before = fuse_step(gm, inputs), len(asked)
    assert tune(again, given(inputs, 5), measure) == 0 and len(asked) == before
    assert [k.settings() for k in kernels(again) if isinstance(k, Products)] == [
        k.settings() for k in kernels(fused) if isinstance(k, Products)
    ]
    for path in (tmp_path / "kernels").glob("*.json"):
        path.write_text('{"rows": 3, "warps": 1}' if path.name < "8" else '{"rows"')
    assert tune(fuse_step(gm, inputs), given(inputs, 5), measure) == measured


@interpreted
@torch.no_grad()
def test_what_a_step_is_tuned_with_is_given_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At once: caches of full size are as large as those in use, and Python may not look for cycles for long."""
    monkeypatch.setenv("TRILITHON_CACHE", str(tmp_path))
    few_programs(monkeypatch)
    gm, inputs, _ = step_of("llama")
    fused, held = fuse_step(gm, inputs), given(inputs, 5)
    gone = [weakref.ref(x) for x in held]
    gc.collect()
    gc.disable()
    try:
        assert tune(fused, held, lambda _: 1.0) >= 6
        del held
        assert [each() for each in gone] == [None] * len(gone)
    finally:
        gc.enable()


@interpreted
def test_a_kernel_that_cannot_run_is_a_note_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """E.g. a GPU without a type. The step is then compiled as any other."""

    def fails(*_: object, **__: object) -> int:
        raise RuntimeError("no such type\nand more")

    monkeypatch.setattr(step_module, "tune", fails)
    for change in ("spread_argmax", "one_product"):
        monkeypatch.setattr(step_module, change, lambda gm: gm)  # the graph is shared by tests
    gm, inputs, _ = step_of("llama")
    step = make_step(gm, inputs)
    assert step.one_row is None and "no generated kernels: RuntimeError: no such type" in step.note
    gm, inputs, _ = step_of("gpt2")
    assert "addmm" in make_step(gm, inputs).note
    (warning,) = [r for r in caplog.records if r.name == step_module.__name__ and r.levelname == "WARNING"]
    assert "cannot be used here" in warning.message


def test_without_a_home_kernels_have_a_folder_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRILITHON_CACHE", str(tmp_path / "file"))
    folder = launch.kernel_folder()
    assert folder.is_dir() and tmp_path not in folder.parents and folder == launch.kernel_folder()
