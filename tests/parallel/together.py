"""Several ranks as copies of the test's process, so that none imports anything again; they live through several tests."""

from __future__ import annotations

import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 280


class Together:
    """Ranks of one group.

    Args:
        ranks: how many.
        folder: where they may find each other.
    """

    def __init__(self, ranks: int, folder: Path) -> None:
        self.ranks, self.folder, self.groups = ranks, folder, 0
        self.processes: list[Any] = []
        self.pipes: list[Any] = []

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work(*arguments)` gives on each rank; plain data. After an error the next call starts a new group."""
        if not self.processes:
            self._start()
        found: list[Any] = []
        try:
            for pipe in self.pipes:
                pipe.send((work, arguments))
            found = [pipe.recv() if pipe.poll(SECONDS) else "it did not end" for pipe in self.pipes]
        finally:
            failed = [x for x in found if isinstance(x, str)]
            if failed or not found:
                self.end()
        assert not failed, "\n".join(failed)
        return [value for (value,) in found]

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)).run_decompositions({})  # imports what each rank would import
        self.groups += 1
        store = self.folder / f"store-{self.groups}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of copies of a process with threads
            for rank in range(self.ranks):
                own, other = context.Pipe()
                process = context.Process(target=_serve, args=(rank, self.ranks, store, other), daemon=True)
                process.start()
                self.processes.append(process)
                self.pipes.append(own)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def _serve(rank: int, ranks: int, store: Path, pipe: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    while True:
        work, arguments = pipe.recv()
        torch.manual_seed(rank)  # what is drawn may differ
        try:
            pipe.send((work(*arguments),))
        except BaseException:
            pipe.send(f"rank {rank}: {traceback.format_exc()}")
