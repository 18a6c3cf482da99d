"""Prompts as CUDA graphs, on a CPU: a graph is a stand-in whose replay runs the function again, on the same tensors."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import trilithon
from runtime import test_decoder as schedules
from runtime.tiny_llama import VOCABULARY, tiny_llama
from trilithon import Options
from trilithon.lower.native.prompt import Prompt
from trilithon.runtime import prompt as prompt_module
from trilithon.runtime import step as step_module
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.prompt import PromptGraphs, bucket

TOKENS = 220


@dataclass
class Recorder:
    """Takes the place of `captured`; counts."""

    captures: int = 0
    replays: int = 0
    pools: list[Any] = field(default_factory=list)

    def captured(self, run: Callable[[], Any], undo: Callable[[], None] = lambda: None, pool: Any = None) -> tuple[Any, Any]:
        made = run()
        undo()
        self.captures += 1
        self.pools.append(pool)
        return Graph(self, run, made), made


@dataclass
class Graph:
    recorder: Recorder
    run: Callable[[], Any]
    made: Any

    def replay(self) -> None:
        self.recorder.replays += 1
        for kept, fresh in zip(tree_leaves(self.made), tree_leaves(self.run()), strict=True):
            kept.copy_(fresh)

    def pool(self) -> str:
        return "the first graph's"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(prompt_module, "captured", recorder.captured)
    monkeypatch.setattr(step_module, "captured", recorder.captured)
    return recorder


@cache
def made(rows: int = 1, layers: int = 2, **options: Any) -> trilithon.Compiled:
    model = tiny_llama(num_hidden_layers=layers)
    return trilithon.compile(model, max_tokens=TOKENS, options=Options(max_batch=rows, verify=False, **options))


def fresh(first_tokens: int | None = None, **options: Any) -> CachedDecoder:
    """A decoder of its own over programs that tests share."""
    kept = made(**options).decoder
    prompts = None if kept.prompts is None else PromptGraphs(kept.modules.prefill)
    sizes = (kept.cache_tokens, kept.max_batch, kept.device, kept.cuda_graphs, first_tokens)
    return CachedDecoder(kept.modules, kept.shapes, *sizes, prompts=prompts)


def ids_of(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_buckets() -> None:
    sizes = [1, 63, 64, 65, 128, 129, 192, 193, 200]
    assert [bucket(n, 200) for n in sizes] == [64, 64, 64, 128, 128, 192, 192, 193, 200]
    assert bucket(1, 63) == 1 and bucket(1, 64) == 64


@pytest.mark.parametrize("family", schedules.FAMILIES)
def test_schedules_with_graphs(family: str, monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    """Rows of unlike lengths, rings, caches that grow: logits are those of the model, whatever is replayed."""
    monkeypatch.setattr(schedules, "compiled", lambda family: _with_graphs(family))
    schedules.test_schedules(family, monkeypatch)
    assert recorder.captures and recorder.replays > recorder.captures


def _with_graphs(family: str) -> CachedDecoder:
    options = Options(max_batch=schedules.ROWS, verify=False, cuda_graphs=True)
    return trilithon.compile(schedules.model(family), max_tokens=schedules.TOKENS, options=options).decoder


def test_tokens_are_those_without_graphs(recorder: Recorder) -> None:
    plain, graphs = made(), made(cuda_graphs=True)
    for seed, length in enumerate([1, 64, 63, 65, 200, 65, 130, 200, 1]):
        ids = ids_of(length, seed=seed)
        assert torch.equal(graphs.generate(ids, max_new_tokens=8), plain.generate(ids, max_new_tokens=8))
    assert set(graphs.decoder.prompts._graphs) == {(1, 64), (1, 128), (1, 200)}  # 192 came once; 256 is too many


def test_the_second_prompt_of_a_size_is_captured(recorder: Recorder) -> None:
    decoder, pad = fresh(cuda_graphs=True), torch.tensor([0])
    seen = []
    for length in (5, 70, 64, 1, 40):
        decoder.prefill(ids_of(length), pad)
        seen.append((recorder.captures, recorder.replays))
    assert seen == [(0, 0), (0, 0), (1, 1), (1, 2), (1, 3)]
    decoder.prefill(ids_of(128), pad)
    assert recorder.pools == [None, "the first graph's"]
    assert decoder.lengths.tolist() == [128] and decoder._used == 128


def test_without_graphs_nothing_is_padded() -> None:
    decoder = fresh()
    assert decoder.prompts is None
    shapes = []
    run = decoder.modules.prefill

    def seen(tokens: Tensor, *rest: Tensor) -> Tensor:
        shapes.append(tokens.shape)
        return run(tokens, *rest)

    decoder.modules = replace(decoder.modules, prefill=seen)
    decoder.prefill(ids_of(5), torch.tensor([2]))
    assert shapes == [(1, 3)]


def test_graphs_are_dropped_when_the_cache_moves(recorder: Recorder) -> None:
    """A stale graph would write into the old caches."""
    plain, decoder = fresh(), fresh(64, cuda_graphs=True)
    for _ in range(3):
        decoder.prefill(ids_of(20), torch.tensor([0]))
    assert set(decoder.prompts._graphs) == {(1, 64)} and decoder.cache_bytes < decoder.most_cache_bytes
    decoder.prefill(ids_of(100), torch.tensor([0]))
    assert not decoder.prompts._graphs
    for each in (plain, decoder):
        each.prefill(ids_of(20, seed=3), torch.tensor([0]))
    assert recorder.captures == 2
    step = torch.tensor([7])
    torch.testing.assert_close(decoder.decode(step), plain.decode(step))


def test_the_graphs_that_are_used_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_module, "MOST_GRAPHS", 4)
    calls: list[int] = []
    graphs = PromptGraphs(lambda tokens, start, counts: calls.append(tokens.shape[1]) or torch.zeros(1, 1, 3))
    start = torch.zeros(1, dtype=torch.int64)

    def run(tokens: int) -> None:
        graphs(torch.zeros(1, tokens, dtype=torch.int64), start, start + tokens)

    recorder = Recorder()
    monkeypatch.setattr(prompt_module, "captured", recorder.captured)
    for tokens in (1, 2, 3, 4):
        run(tokens), run(tokens)
    run(1)
    assert recorder.captures == 4 == len(graphs._graphs)
    run(5), run(5)
    assert [size[1] for size in graphs._graphs] == [3, 4, 1, 5]  # 2 was used least recently
    run(2)
    assert recorder.captures == 5
    run(2)
    assert recorder.captures == 6 and [size[1] for size in graphs._graphs] == [4, 1, 5, 2]


def test_what_a_graph_reads_outlives_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows addresses alone: a tensor that is freed would be read as what stands there next."""
    read: list[list[weakref.ref[Tensor]]] = []

    def prefill(*given: Tensor) -> Tensor:
        read.append([weakref.ref(x) for x in given])
        return torch.zeros(1, 1, 3)

    def captured(run: Callable[[], Tensor], pool: Any = None) -> tuple[Any, Tensor]:
        return SimpleNamespace(replay=lambda: None, pool=lambda: None), run()

    monkeypatch.setattr(prompt_module, "captured", captured)
    graphs, one = PromptGraphs(prefill), torch.ones(1, dtype=torch.int64)
    for _ in range(2):
        graphs(one[None], one - 1, one)
    assert len(read) == 2 and all(tensor() is not None for tensor in read[1])


def test_a_failing_capture_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tries = []

    def captured(run: Callable[[], Any], pool: Any = None) -> Any:
        run()
        tries.append(1)
        raise RuntimeError("called a synchronizing CUDA operation\nmore of it")

    monkeypatch.setattr(prompt_module, "captured", captured)
    plain, decoder = fresh(), fresh(cuda_graphs=True)
    for length in (9, 9, 9, 100, 100):
        ids, pad = ids_of(length, seed=length), torch.tensor([0])
        torch.testing.assert_close(decoder.prefill(ids, pad), plain.prefill(ids, pad))
        assert torch.equal(decoder.best, plain.best)
    assert len(tries) == 1
    expected = "prompts run without CUDA graphs from now on: RuntimeError: called a synchronizing CUDA operation"
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [expected]


def test_an_error_that_is_no_failed_capture_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(run: Callable[[], Any], pool: Any = None) -> Any:
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(prompt_module, "captured", captured)
    graphs = PromptGraphs(lambda tokens, start, counts: torch.zeros(1, 1, 3))
    one = torch.ones(1, dtype=torch.int64)
    graphs(one[None], one, one)
    with pytest.raises(TypeError):
        graphs(one[None], one, one)


# -------------------------------------------------------------------- Inductor


@pytest.mark.timeout(300)
def test_one_compilation_serves_all_lengths() -> None:
    """8 is a head's width too, and two rows are as many as key heads: neither is taken for the other."""
    plain, decoder = fresh(rows=3, layers=1), fresh(rows=3, layers=1, inductor=True)
    generator = random.Random(0)
    torch._dynamo.reset()
    counters.clear()
    for rows, lengths, compilations in ((1, (8, 1, 40, 130), 1), (2, (9, 33), 2), (3, (17,), 2)):
        for length in lengths:
            ids = ids_of(length, rows, seed=length)
            pad = torch.tensor([generator.randrange(length) for _ in range(rows - 1)] + [0])
            torch.testing.assert_close(decoder.prefill(ids, pad), plain.prefill(ids, pad), rtol=1e-4, atol=1e-4)
            assert decoder.lengths.tolist() == plain.lengths.tolist()
        assert counters["stats"]["unique_graphs"] == compilations
    for mine, other in zip(decoder.caches, plain.caches, strict=True):
        torch.testing.assert_close(mine[:, :, :17], other[:, :, :17], rtol=1e-4, atol=1e-4)


def reads_a_number(tokens: Tensor, counts: Tensor) -> Tensor:
    return tokens if counts.max() > 3 else -tokens


def fits_one_length(tokens: Tensor, counts: Tensor) -> Tensor:
    return tokens + torch.arange(6) * counts[:, None]


@pytest.mark.parametrize("function", [reads_a_number, fits_one_length])
def test_what_inductor_refuses_runs_op_by_op(function: Callable[..., Tensor], caplog: pytest.LogCaptureFixture) -> None:
    """With one warning, which names the reason; so does the note."""
    graph = torch.fx.Graph()
    tokens, _, counts = (graph.placeholder(name) for name in ("tokens", "start", "counts"))
    graph.output(graph.call_function(function, (tokens, counts)))
    prompt = Prompt(torch.fx.GraphModule(nn.Module(), graph))
    ids, count = ids_of(6), torch.tensor([6])
    for _ in range(2):
        assert torch.equal(prompt(ids, count - 6, count), function(ids, count))
    assert prompt.compiled is None
    assert prompt.note.startswith("prefill: runs op by op, since Inductor cannot compile it: ")
    assert [r.getMessage() for r in caplog.records if r.name.startswith("trilithon")] == [prompt.note]


def test_an_error_of_a_compiled_prompt_is_raised() -> None:
    """Only what Dynamo and Inductor refuse falls back."""
    prompt = Prompt(torch.fx.symbolic_trace(lambda tokens, start, counts: tokens))

    def broken(*args: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    prompt.compiled = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        prompt(ids_of(3), torch.tensor([0]), torch.tensor([3]))
    assert prompt.compiled is broken
