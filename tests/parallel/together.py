"""Several ranks as copies of the test's process, so that none imports anything again."""

from __future__ import annotations

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 280


def together(ranks: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` gives on each rank of a group of its own; plain data.

    Args:
        folder: where the ranks may find each other.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    store = folder / f"store-{time.monotonic_ns()}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of copies of a process with threads
        processes = [
            context.Process(target=_run, args=(rank, ranks, store, pipes[rank][1], work, arguments)) for rank in range(ranks)
        ]
        for process in processes:
            process.start()
    try:
        found = [own.recv() if own.poll(SECONDS) else "it did not end" for own, _ in pipes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    failed = [text for text in found if isinstance(text, str)]
    assert not failed, "\n".join(failed)
    return [value for (value,) in found]


def _run(rank: int, ranks: int, store: Path, pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.manual_seed(rank)  # what is drawn may differ
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        pipe.send((work(*arguments),))
    except BaseException:
        pipe.send(f"rank {rank}: {traceback.format_exc()}")
