"""Sweeps over batches and contexts: what is built and how often, what becomes of sizes that do not fit, and the files."""

from __future__ import annotations

import io
import json
from itertools import groupby
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from torch import nn

from trilithon import compiler
from trilithon.bench import sweep as sweeping
from trilithon.bench.roofline import Machine
from trilithon.bench.sweep import measure_sweep
from trilithon.bench.sweep_plot import save_sweep_plot
from trilithon.bench.sweep_table import Sweep, context_of, step_floor
from trilithon.bench.table import Table
from trilithon.capture import hf
from trilithon.errors import InputError

POSITIONS = 64


@pytest.fixture(scope="module")
def model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        pad_token_id=3,  # which random prompts have too
        architectures=["LlamaForCausalLM"],
    )
    return hf.from_config(config)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    known = Machine(name="a test", bytes_per_second=1e9, flops_per_second=1e9, versions={"torch": "9"})
    monkeypatch.setattr(sweeping, "measure_machine", lambda device, dtype: known)


@pytest.fixture
def compiled(monkeypatch) -> list[tuple[int, int]]:
    """Rows and tokens of each program that was compiled."""
    real, calls = compiler.compile, []

    def compile(model, *, max_tokens, backend, options):
        calls.append((options.max_batch, max_tokens))
        return real(model, max_tokens=max_tokens, backend=backend, options=options)

    monkeypatch.setattr(compiler, "compile", compile)
    return calls


def swept(model: nn.Module, **arguments: Any) -> Sweep:
    console = Console(file=io.StringIO())
    defaults: dict[str, Any] = {"batches": (1, 2), "contexts": (16, 24), "repeats": 1, "console": console}
    return measure_sweep(model, "tiny", 3, **(defaults | arguments))


def test_a_program_is_built_once_a_batch_for_the_largest_context_that_fits(model, compiled):
    seen: list[Sweep] = []
    sweep = swept(model, batches=(2, 1), contexts=(24, 16, 4096), after_row=seen.append)
    assert compiled == [(1, 24), (2, 24)]
    assert [(t.batch, context_of(t)) for t in sweep.tables] == [(b, c) for b in (1, 2) for c in (16, 24, 4096)]
    assert [len(part.tables) for part in seen] == [1, 2, 3, 4, 5, 6]
    for table in sweep.tables:
        (row,) = table.rows
        if context_of(table) == 4096:
            assert row.error == f"a context of 4096 tokens does not fit\n  because the model has {POSITIONS} positions"
        else:
            assert not row.error and row.seconds_per_token is not None
            assert row.token_ratio_to_floor == pytest.approx(row.seconds_per_token / step_floor(table))
            assert row.tokens == 3 * table.batch


def test_where_the_largest_context_cannot_be_built_each_has_a_program_of_its_own(model, compiled, monkeypatch):
    counted = compiler.compile

    def compile(model, *, max_tokens, **others):
        if max_tokens == 32:
            raise torch.OutOfMemoryError("no room")
        return counted(model, max_tokens=max_tokens, **others)

    monkeypatch.setattr(compiler, "compile", compile)
    sweep = swept(model, batches=(1,), contexts=(16, 24, 32))
    assert compiled == [(1, 16), (1, 24)]
    assert [t.rows[0].error for t in sweep.tables] == ["", "", "OutOfMemoryError: no room"]


def test_hugging_faces_row_has_the_first_as_its_baseline_and_a_cache_of_its_own_size(model, monkeypatch):
    sizes: list[int] = []
    real = transformers.StaticCache.__init__

    def init(self, *words, max_cache_len, **others):
        sizes.append(max_cache_len)
        real(self, *words, max_cache_len=max_cache_len, **others)

    monkeypatch.setattr(transformers.StaticCache, "__init__", init)
    sweep = swept(model, rows=("hf-static", "static"))
    assert [size for size, _ in groupby(sizes)] == [15, 23, 15, 23]  # the second batch has small ones again
    for table in sweep.tables:
        ours, theirs = table.rows
        assert (ours.name, theirs.name) == ("Trilithon static cache", "HF static cache")
        assert not ours.error and not theirs.error
        assert ours.timing is not None and theirs.timing is not None
        assert theirs.ratio_to_baseline == ours.timing.median / theirs.timing.median


def test_files_of_a_sweep(model, tmp_path):
    sweep = swept(model, contexts=(16, 24, 4096))
    read = Sweep.from_json(sweep.to_json())
    assert read.tables == sweep.tables
    assert Table.from_json(json.dumps(json.loads(sweep.to_json())["tables"][0])) == sweep.tables[0]
    with pytest.raises(InputError, match="this is no sweep"):
        Sweep.from_json(sweep.tables[0].to_json())
    console = Console(file=io.StringIO(), width=80)
    console.print(read.to_rich())
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:5] == ["2", "x", "4k", "Trilithon", "failed"] for line in lines)
    text = sweep.to_markdown()
    assert "| 1 x 16 | Trilithon | " in text and "| 2 x 4k | Trilithon | failed | " in text
    assert "Trilithon static cache, batch 2, context 4k: a context of 4096 tokens does not fit" in text
    assert "floor of the job" not in text  # each has its own
    path = save_sweep_plot(read, tmp_path / "new" / "chart.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rows": ("pytorch",)}, "cannot sweep row 'pytorch'\n  the rows are static, hf-static"),
        ({"rows": ()}, "no row to sweep"),
        ({"batches": (0, 1)}, "a batch must be 1 or more"),
        ({"contexts": (3, 16)}, "each context must be larger than 3"),
    ],
)
def test_what_cannot_be_swept_is_refused(model, arguments, match):
    with pytest.raises(InputError, match=match):
        swept(model, **arguments)


def test_one_new_token_is_refused(model):
    with pytest.raises(InputError, match="no time per token with one new token"):
        measure_sweep(model, "tiny", 1)
