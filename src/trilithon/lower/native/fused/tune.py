"""Find the fastest settings of the generated kernels on the GPU at hand, once for each kernel; they are kept in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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

REPLAYS = 10
ROUNDS = 3  # of replays; the fastest counts
GAIN = 0.998  # other settings must make the step faster than the present ones by so much
KEY = re.compile("[0-9a-f]{24}-[0-9a-f]{8}")  # of a kernel, and of the step that it is in
log = logging.getLogger(__name__)
Call = tuple[Any, tuple[Any, ...]]  # a kernel, and what it is called with


def tune(
    fused: GraphModule,
    inputs: list[Tensor],
    measure: Callable[[list[Any]], float] | None = None,
    chosen: dict[str, dict[str, int]] | None = None,
) -> int:
    """Give each kernel of a step the settings that make the step fastest; how many were measured, and not found in the file.

    A kernel alone tells little: it runs while those beside it load their weights.

    Args:
        fused: made by `fuse_step`.
        inputs: what it takes, of the size to be fast at.
        measure: seconds of a step where these kernels, all of one source, have the settings to try; None = by CUDA graph
            replays.
        chosen: takes in the settings, by the key of their file.
    """

    def of_step(_: list[Any]) -> float:
        return seconds_of([(fused, tuple(inputs))])

    found = {key: calls for key, calls in calls_of(fused, inputs).items() if len(calls[0][0].candidates()) > 1}
    step = hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:8]
    keys = {f"{key}-{step}": calls for key, calls in found.items()}
    unknown: dict[str, list[Call]] = {}
    for key, calls in keys.items():
        settings = _read(_path(key), calls[0][0])
        if settings is None:
            unknown[key] = calls
            continue
        for kernel, _ in calls:
            kernel.use(settings)
    if inputs[0].is_cuda:
        _compile([calls[0] for calls in unknown.values()])
    for key, calls in sorted(unknown.items(), key=lambda x: -len(x[1])):  # first what is called most
        _write(_path(key), _fastest([kernel for kernel, _ in calls], measure or of_step))
    if chosen is not None:
        chosen |= {key: dict(calls[0][0].settings()) for key, calls in keys.items()}
    return len(unknown)


def _path(key: str) -> Path:
    return kernel_folder() / f"{key}.json"


def _compile(calls: list[Call]) -> None:
    """All candidates, on all cores at once where Triton can; the first launch compiles what is missing, or says why not."""
    import triton

    if not hasattr(triton, "AsyncCompileMode"):
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True) as mode:
        for kernel, args in calls:
            own = kernel.settings()
            for settings in kernel.candidates():
                kernel.use(settings)
                with suppress(Exception):
                    kernel.prepare(*args)
            kernel.use(own)
    for future in mode.raw_futures:
        _forget_frames(future.exception())


def _forget_frames(error: BaseException | None) -> None:
    """Triton keeps the error of a kernel that does not compile, and an error the frames it went through, with all they hold."""
    while error is not None:
        error.__traceback__, error = None, error.__cause__


def keep(settings: Mapping[str, Mapping[str, int]]) -> None:
    """Write settings that were found elsewhere, on a GPU of the same name, where there are none yet.

    Raises:
        ValueError: they are none.
    """
    for key, held in settings.items():
        if not KEY.fullmatch(key) or not all(isinstance(x, str) and type(n) is int for x, n in held.items()):
            raise ValueError(f"{key!r}: {held!r} are no settings of a kernel")
        if not _path(key).exists():
            _write(_path(key), dict(held))


def calls_of(fused: GraphModule, inputs: list[Tensor]) -> dict[str, list[Call]]:
    """The calls of one run, by what decides how fast they are: source, tensors, settings, GPU, versions of compilers."""
    record = _Record(fused)
    record.run(*inputs)
    return record.found


class _Record(Interpreter):
    """Not a class of `calls_of` itself: with its closure it would keep the caches of `inputs` until Python looks for cycles."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, list[Call]] = defaultdict(list)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kernel = self.fetch_attr(target)
        if hasattr(kernel, "source"):
            self.found[_key(kernel, [x for x in args if isinstance(x, Tensor)])].append((kernel, args))
        return super().call_module(target, args, kwargs)


def _key(kernel: Any, tensors: list[Tensor]) -> str:
    held = [(tuple(x.shape), x.stride(), str(x.dtype)) for x in tensors]
    device = torch.cuda.get_device_name(tensors[0].device) if tensors[0].is_cuda else "cpu"
    known = repr((kernel.source, held, kernel.candidates(), device, torch.__version__, triton_version()))
    return hashlib.sha256(known.encode()).hexdigest()[:24]


@cache
def triton_version() -> str:
    """Its version; it comes with PyTorch, and may be another."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def _fastest(kernels: list[Any], measure: Callable[[list[Any]], float]) -> dict[str, int]:
    """The settings that are fastest; the kernels have them afterwards."""
    own = kernels[0].settings()
    best, least = own, float("inf")
    for settings in kernels[0].candidates():
        for kernel in kernels:
            kernel.use(settings)
        try:
            seconds = measure(kernels)
        except Exception as error:  # Triton's errors have no common class; e.g. too much shared memory
            log.debug("%s cannot run with %s: %s", kernels[0].name, settings, error)
            _forget_frames(error)
            continue
        if seconds < least * (1.0 if settings == own else GAIN):
            best, least = settings, seconds
    for kernel in kernels:
        kernel.use(best)
    log.info("%s: %s, a step of %.1f us", kernels[0].name, best, least * 1e6)
    return dict(best)


def seconds_of(calls: list[Call]) -> float:
    """Of all calls, one behind the other in a CUDA graph."""

    def run() -> None:
        for kernel, args in calls:
            kernel(*args)

    graph, _ = captured(run)
    graph.replay()
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found) / REPLAYS


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
