"""Find the fastest settings of the generated kernels on the GPU at hand, once for each kernel; they are kept in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.folders import replace_file
from trilithon.lower.cuda_graph import captured
from trilithon.lower.native.fused.ahead import Args, dry_run, forget_frames, on_all_cores, prepare
from trilithon.lower.native.fused.launch import Kernel, kernel_folder

REPLAYS = 10
ROUNDS = 3  # of replays; the fastest counts
GAIN = 0.998  # other settings must make the step faster than the present ones by so much
KEY = re.compile("[0-9a-f]{24}-[0-9a-f]{8}")  # of a kernel, and of the step that it is in
log = logging.getLogger(__name__)
Call = tuple[Kernel, Args]  # and what it is called with


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

    calls = calls_of(fused, inputs)
    found = {key: same for key, same in calls.items() if len(same[0][0].candidates()) > 1}
    step = hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:8]
    keys = {f"{key}-{step}": same for key, same in found.items()}
    unknown: dict[str, list[Call]] = {}
    for key, same in keys.items():
        settings = _read(_path(key), same[0][0])
        if settings is None:
            unknown[key] = same
            continue
        for kernel, _ in same:
            kernel.use(settings)
    if inputs[0].is_cuda:
        _compile([same[0] for same in calls.values()], {id(same[0][0]) for same in unknown.values()})
        fused(*inputs)  # raises where a kernel cannot run at all
    for key, same in sorted(unknown.items(), key=lambda x: -len(x[1])):  # first what is called most
        _write(_path(key), _fastest([kernel for kernel, _ in same], measure or of_step))
    if chosen is not None:
        chosen |= {key: dict(same[0][0].settings()) for key, same in keys.items()}
    return len(unknown)


def _path(key: str) -> Path:
    return kernel_folder() / f"{key}.json"


def _compile(calls: list[Call], tuned: Collection[int]) -> None:
    """Kernels with their settings, and all candidates of those whose ids are `tuned`."""
    with on_all_cores():
        for kernel, args in calls:
            own = kernel.settings()
            for settings in kernel.candidates() if id(kernel) in tuned else [own]:
                kernel.use(settings)
                prepare(kernel, args)
            kernel.use(own)


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
    found: dict[str, list[Call]] = defaultdict(list)

    def seen(kernel: Kernel, args: Args) -> None:
        found[_key(kernel, [x for x in args if isinstance(x, Tensor)])].append((kernel, args))

    dry_run(fused, inputs, seen)
    return found


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
            forget_frames(error)
            continue
        if seconds < least * (1.0 if settings == own else GAIN):
            best, least = settings, seconds
    for kernel in kernels:
        kernel.use(best)
    log.info("%s: %s, a step of %.1f us", kernels[0].name, best, least * 1e6)
    return dict(best)


def seconds_of(calls: Sequence[tuple[Callable[..., Any], Args]]) -> float:
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
