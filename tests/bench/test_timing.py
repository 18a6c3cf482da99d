"""How a call is timed: the number of runs, their order, and what memory is read."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from trilithon.bench.timing import Timing, measure
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


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": -1}])
def test_impossible_numbers_of_runs_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"cannot time with repeats=.*\n  pass repeats of 1 or more"):
        measure(lambda: None, device=CPU, **wrong)
