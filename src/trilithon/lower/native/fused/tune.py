"""Find the fastest settings of the generated kernels on the GPU at hand, once for each kernel; they are kept in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from trilithon.folders import replace_file
from trilithon.lower.cuda_graph import captured
from trilithon.lower.native.fused.launch import kernel_folder

MOST_CALLS = 16  # of one kernel, with different weights: together they are larger than the cache of the GPU
REPLAYS = 10
KEY = re.compile("[0-9a-f]{24}")
GAIN = 0.98  # other settings must be faster than the present ones by so much
log = logging.getLogger(__name__)
Call = tuple[Any, tuple[Any, ...]]  # a kernel, and what it is called with


def tune(
    fused: GraphModule,
    inputs: list[Tensor],
    measure: Callable[[list[Call]], float] | None = None,
    chosen: dict[str, dict[str, int]] | None = None,
) -> int:
    """Give each kernel of a step its fastest settings; how many kernels were measured, and not found in the file.

    Args:
        fused: made by `fuse_step`.
        inputs: what it takes, of the size to be fast at.
        measure: seconds of calls one after another; None = by CUDA graph replays.
        chosen: takes in the settings, by the key of their file.
    """
    folder = kernel_folder()
    measured = 0
    for key, calls in calls_of(fused, inputs).items():
        kernel = calls[0][0]
        if len(kernel.candidates()) < 2:
            continue
        path = folder / f"{key}.json"
        settings = _read(path, kernel)
        if settings is None:
            settings = _fastest(calls[:MOST_CALLS], measure or seconds_of)
            measured += 1
            _write(path, settings)
        for other, _ in calls:
            other.use(settings)
        if chosen is not None:
            chosen[key] = settings
    return measured


def keep(settings: Mapping[str, Mapping[str, int]]) -> None:
    """Write settings that were found elsewhere, on a GPU of the same name, where there are none yet.

    Raises:
        ValueError: they are none.
    """
    folder = kernel_folder()
    for key, held in settings.items():
        if not KEY.fullmatch(key) or not all(isinstance(x, str) and type(n) is int for x, n in held.items()):
            raise ValueError(f"{key!r}: {held!r} are no settings of a kernel")
        path = folder / f"{key}.json"
        if not path.exists():
            _write(path, dict(held))


def calls_of(fused: GraphModule, inputs: list[Tensor]) -> dict[str, list[Call]]:
    """The calls of one run, by what decides how fast they are: source, tensors, settings, GPU, versions of compilers."""
    found: dict[str, list[Call]] = defaultdict(list)

    class Record(Interpreter):
        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kernel = self.fetch_attr(target)
            if hasattr(kernel, "source"):
                found[_key(kernel, [x for x in args if isinstance(x, Tensor)])].append((kernel, args))
            return super().call_module(target, args, kwargs)

    Record(fused).run(*inputs)
    return found


def _key(kernel: Any, tensors: list[Tensor]) -> str:
    held = [(tuple(x.shape), x.stride(), str(x.dtype)) for x in tensors]
    device = torch.cuda.get_device_name(tensors[0].device) if tensors[0].is_cuda else "cpu"
    known = repr((kernel.source, held, kernel.candidates(), device, torch.__version__, _triton()))
    return hashlib.sha256(known.encode()).hexdigest()[:24]


@cache
def _triton() -> str:
    """Its version; it comes with PyTorch, and may be another."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def _fastest(calls: list[Call], measure: Callable[[list[Call]], float]) -> dict[str, int]:
    kernel = calls[0][0]
    own = kernel.settings()
    best, least = own, float("inf")
    for settings in kernel.candidates():
        for other, _ in calls:
            other.use(settings)
        try:
            seconds = measure(calls)
        except Exception as error:  # Triton's errors have no common class; e.g. too much shared memory
            log.debug("%s cannot run with %s: %s", kernel.name, settings, error)
            continue
        if seconds < least * (1.0 if settings == own else GAIN):
            best, least = settings, seconds
    log.info("%s: %s, %.2f us", kernel.name, best, least * 1e6 / len(calls))
    return dict(best)


def seconds_of(calls: list[Call]) -> float:
    def run() -> None:
        for kernel, args in calls:
            kernel(*args)

    graph, _ = captured(run)
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(REPLAYS):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / REPLAYS


def _read(path: Path, kernel: Any) -> dict[str, int] | None:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return held if held in kernel.candidates() else None


def _write(path: Path, settings: dict[str, int]) -> None:
    try:
        replace_file(path, json.dumps(settings))
    except OSError as error:
        log.warning("settings of kernels are not kept: %s", error)
