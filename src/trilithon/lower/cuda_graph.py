"""A CUDA graph of a function whose tensors stand at fixed addresses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

Made = TypeVar("Made")
_KEPT: WeakKeyDictionary[Any, list[Tensor]] = WeakKeyDictionary()  # a graph -> memory that it may read


def captured(run: Callable[[], Made], undo: Callable[[], object] = lambda: None, pool: Any = None) -> tuple[Any, Made]:
    """A graph whose `replay()` does what `run` does, and the tensors that each replay writes.

    `run` is called twice before, so that all it needs is loaded; nothing is run while the graph is captured.

    Args:
        undo: called after each of these, where a call changes what the next one reads.
        pool: of another graph (`graph.pool()`), whose memory is shared: a replay of either overwrites what the other made.

    Raises:
        RuntimeError: `run` waits for the device, or does something else that a graph cannot hold.
    """
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            run()
            undo()
            with _waits_are_errors():
                run()
            undo()
    finally:
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # where ranks meet, a thread that watches NCCL asks for events, which would end a capture that all threads mind
    mode = "thread_local" if dist.is_available() and dist.is_initialized() else "global"
    with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode=mode):
        made = run()
    _KEPT[graph] = []
    return graph, made


def keep_for_graphs(memory: Tensor) -> None:
    """Call it with memory that is about to be given up: it lives as long as graphs that were captured so far, by address."""
    for kept in _KEPT.values():
        kept.append(memory)


def free_workspaces() -> None:
    """Those of cuBLAS, 32 MB on Hopper for each stream that anything was multiplied on; none while any graph may read them."""
    torch.cuda.empty_cache()  # with it goes the memory of graphs that are gone
    if all(tuple(segment["segment_pool_id"]) == (0, 0) for segment in torch.cuda.memory_snapshot()):
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace for each stream, 32 MB on Hopper."""
    return torch.cuda.Stream(device)


@contextmanager
def _waits_are_errors() -> Iterator[None]:
    """Found before the capture: one that breaks off midway leaves torch's random numbers unusable."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
