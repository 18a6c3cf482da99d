"""Seconds and peak memory of one call, with the device's queue empty before and after."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from trilithon.errors import InputError
from trilithon.lower.cuda_graph import captured


@dataclass(frozen=True)
class Timing:
    """What repeated runs of one call took.

    Attributes:
        seconds: one wall time a run, in the order of the runs.
        peak_bytes: on CUDA, the sum of two parts: most bytes that torch held allocated on the device during the runs,
            weights included; and `outside_bytes`. On a CPU, most memory of the whole process (resident set) during the
            runs, or since its start where the system cannot reset that (not Linux). None where neither is known.
        outside_bytes: on CUDA, most that was in use on the device beyond what torch has reserved, read after each run, less
            what that was before the program was built (the CUDA context, other processes): engines of TensorRT with
            their weights and workspace, and kernels that were loaded. What others take or give back meanwhile is in it.
    """

    seconds: tuple[float, ...]
    peak_bytes: int | None
    outside_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def maximum(self) -> float:
        return max(self.seconds)


def measure(
    call: Callable[[], object],
    *,
    repeats: int = 3,
    warmup: int = 1,
    device: torch.device,
    before_run: Callable[[], object] | None = None,
    outside_before: int | None = None,
) -> Timing:
    """Run `call` and time it from an idle device to an idle device, host time included.

    Args:
        repeats: timed runs, >= 1.
        warmup: runs before them that are not timed, >= 0.
        device: whose queue is waited for and whose memory is read.
        before_run: called before each timed run, outside its time; for a progress bar.
        outside_before: what `outside_bytes` gave before the program of `call` was built; None = what it gives now.

    Raises:
        InputError: `repeats` or `warmup` is too small.
    """
    if repeats < 1 or warmup < 0:
        raise InputError(
            f"cannot time with repeats={repeats} and warmup={warmup}", todo="pass repeats of 1 or more, warmup of 0 or more"
        )
    before = outside_bytes(device) if outside_before is None else outside_before
    for _ in range(warmup):
        call()
    synchronize(device)
    reset_peak(device)
    seconds: list[float] = []
    outside = before
    for _ in range(repeats):
        if before_run is not None:
            before_run()
            synchronize(device)
        seconds.append(_seconds_of(call, device))
        outside = max(outside, outside_bytes(device))
    peak = peak_bytes(device)
    if device.type != "cuda" or peak is None:
        return Timing(tuple(seconds), peak)
    return Timing(tuple(seconds), peak + outside - before, outside - before)


def per_call(call: Callable[[], object], *, calls: int = 20, repeats: int = 5) -> float:
    """Seconds of one of so many calls in a CUDA graph, without the host's time; of the fastest replay."""
    graph, _ = captured(lambda: [call() for _ in range(calls)])
    return measure(graph.replay, repeats=repeats, device=torch.device("cuda")).minimum / calls


def kernels_of(call: Callable[[], object]) -> list[dict[str, Any]]:
    """What a GPU runs in a call, by torch.profiler: of each `kernel` how many `calls`, and `us` in all; the longest first."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        call()
        torch.cuda.synchronize()
    found = [e for e in profiled.key_averages() if e.self_device_time_total and not e.key.startswith("aten::")]
    found.sort(key=lambda e: -e.self_device_time_total)
    return [{"kernel": e.key, "calls": e.count, "us": e.self_device_time_total} for e in found]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far, so that `peak_bytes` speaks of what follows; without effect where it cannot be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak resident set size
    except OSError:
        return


def peak_bytes(device: torch.device) -> int | None:
    """The peak since `reset_peak`: of torch's own allocator on CUDA, else of the process; see `Timing.peak_bytes`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # man 2 getrusage: kilobytes, except on macOS


def outside_bytes(device: torch.device) -> int:
    """Bytes in use on a GPU, by whomever, beyond what torch has reserved there; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    unused, total = torch.cuda.mem_get_info(device)
    return total - unused - torch.cuda.memory_reserved(device)


def _seconds_of(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start
