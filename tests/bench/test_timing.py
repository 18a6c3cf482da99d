"""How a call is timed: the number of runs, their order, and what memory is read."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console

from trilithon.bench.roofline import DecoderSize, Job, Machine
from trilithon.bench.rows import Bench, Candidate, Run, run_rows
from trilithon.bench.table import Table
from trilithon.bench.timing import Timing, measure, outside_bytes
from trilithon.errors import InputError

CPU = torch.device("cpu")


def test_runs_are_counted_and_warmup_is_not_timed() -> None:
    events: list[str] = []
    timing = measure(lambda: events.append("run"), repeats=3, warmup=2, device=CPU, before_run=lambda: events.append("before"))
    assert events == ["run", "run"] + ["before", "run"] * 3
    assert len(timing.seconds) == 3


def test_time_before_a_run_is_not_part_of_it() -> None:
    timing = measure(lambda: time.sleep(0.01), repeats=2, warmup=0, device=CPU, before_run=lambda: time.sleep(0.5))
    assert 0.01 <= timing.minimum <= timing.median <= timing.maximum < 0.4


def test_summary() -> None:
    timing = Timing((3.0, 1.0, 2.0, 10.0), None)
    assert (timing.median, timing.minimum, timing.maximum) == (2.5, 1.0, 10.0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak")
def test_peak_is_of_the_runs_alone() -> None:
    large = 2**28
    with_tensor = measure(lambda: torch.zeros(large, dtype=torch.uint8).fill_(1), repeats=1, warmup=0, device=CPU)
    without = measure(lambda: None, repeats=1, warmup=0, device=CPU)
    assert with_tensor.peak_bytes is not None and without.peak_bytes is not None
    assert with_tensor.peak_bytes > without.peak_bytes + large // 2


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    state = Gpu()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state.torch_peak)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state.torch_reserved)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 - state.torch_reserved - state.outside, 1000))
    return state


@dataclass
class Gpu:
    """A device of 1000 bytes."""

    torch_peak: int = 0
    torch_reserved: int = 100
    outside: int = 30  # a context, and another process


def test_peak_on_a_gpu_counts_what_torch_did_not_allocate(gpu: Gpu) -> None:
    before = outside_bytes(torch.device("cuda"))
    assert before == 30
    gpu.outside += 200  # an engine was built
    workspace = iter((50, 70, 10))

    def run() -> None:
        gpu.torch_peak, gpu.torch_reserved = 120, 160  # what is reserved and not allocated is no part of it
        gpu.outside = 230 + next(workspace)

    timing = measure(run, repeats=3, warmup=0, device=torch.device("cuda"), outside_before=before)
    assert timing.outside_bytes == 200 + 70
    assert timing.peak_bytes == 120 + 200 + 70


def test_memory_that_others_give_back_is_not_taken_off_the_peak(gpu: Gpu) -> None:
    def run() -> None:
        gpu.torch_peak, gpu.outside = 120, 5

    timing = measure(run, repeats=1, warmup=0, device=torch.device("cuda"))
    assert (timing.peak_bytes, timing.outside_bytes) == (120, 0)


def test_a_row_counts_what_was_taken_while_it_was_built(gpu: Gpu) -> None:
    device = torch.device("cuda")
    size = DecoderSize(layers=1, hidden=4, heads=1, kv_heads=1, head_dim=4, intermediate=4, vocabulary=4)
    job = Job(size=size, value_bytes=2, prompt_tokens=3, new_tokens=2)
    machine = Machine(name="a test", bytes_per_second=1e9, flops_per_second=1e9)
    bench = Bench(model="tiny", job=job, machine=machine, dtype="float16", device=device, weight_bytes=100)

    def make() -> Run:
        gpu.outside, gpu.torch_peak = gpu.outside + 200, 120
        return lambda new_tokens: torch.zeros(1, 3 + new_tokens, dtype=torch.int64)

    table = run_rows([Candidate(name="engine", make=make)], bench, console=Console(file=io.StringIO()))
    (row,) = table.rows
    assert row.peak_bytes == 120 + 200
    assert (table.weight_bytes, table.cache_bytes) == (100, 5 * 2 * 4 * 2)
    assert row.peak_ratio_to_size == 320 / (100 + 80)
    assert "size: weights 0.00 MB, cache 0.00 MB" in table.to_markdown()
    assert Table.from_json(table.to_json()) == table


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}])
def test_impossible_numbers_of_runs_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"cannot time with repeats=.*\n  pass repeats of 1 or more"):
        measure(lambda: None, device=CPU, **wrong)
