"""The engine of many machines: Ray starts workers, starts them anew when they die, and carries lines and answers."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from trilithon.artefact.manifest import read_manifest
from trilithon.batch.dispatch import Dispatch
from trilithon.batch.jobs import Job, Result
from trilithon.batch.load import Setup
from trilithon.batch.worker import Worker
from trilithon.errors import CannotLower, InputError

STORE_BYTES = 100 << 20  # of Ray's object store, where it is started for one run: lines and answers are small


@dataclass(frozen=True)
class RayEngine:
    """See `run.Engine`. Each worker is a Ray actor that holds the model, for as long as `answers` runs.

    Ray starts a worker that died anew, on any machine that has room. The lines that it held go to the other workers.

    Attributes:
        setup: of all workers.
        folder: gives the path of an artefact, the same on each machine.
        device: None = of the kind that it was compiled for.
        workers: how many; each has a core, and a GPU where it runs on one.
        address: of a running cluster; None = that of `$RAY_ADDRESS`, else Ray is started on this machine.
    """

    setup: Setup
    folder: Callable[[], str]
    device: str | None
    workers: int
    address: str | None = None

    def answers(self, jobs: Iterator[Job]) -> Generator[list[Result], None, None]:
        """
        Raises:
            CannotLower: Ray is not installed.
            TrilithonError: workers cannot be made, or die again and again and answer nothing.
        """
        _library()  # before a model is compiled
        folder = self.folder()
        device = self.device or str(read_manifest(Path(folder))["target"]["device"])
        gpus = int(device.startswith("cuda"))
        with _connected(self.address, self.workers, gpus) as ray:
            remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1)(RayWorker)
            actors = [remote.remote(self.setup, folder, self.device) for _ in range(self.workers)]
            dispatch = Dispatch(ray, actors, jobs)
            try:
                yield from dispatch.answers()
            finally:  # those that are still to come end by themselves, with the last reference to them
                for place in dispatch.pids:
                    ray.kill(actors[place])


class RayWorker:
    """A process that holds a compiled model. A thread makes the tokens; calls wait for their lines."""

    def __init__(self, setup: Setup, folder: str, device: str | None) -> None:
        self._setup, self._folder, self._device = setup, folder, device
        self._rows = 0
        self._inbox = SimpleQueue[tuple[Job, "Future[Result]"]]()
        self._waiting: dict[int, list[Future[Result]]] = {}
        self._failed: Exception | None = None

    async def ready(self) -> tuple[int, int]:
        """Load the model; how many lines it takes at once, and the number of the process.

        A process that has failed ends: Ray starts another, and asks that.
        """
        if self._failed is not None:
            os._exit(1)
        if not self._rows:
            worker = self._setup.load(self._folder, self._device)
            self._rows = len(worker.rows)
            threading.Thread(target=self._serve, args=(worker,), daemon=True).start()
        return self._rows, os.getpid()

    async def answer(self, job: Job) -> Result:
        future = Future[Result]()
        self._inbox.put((job, future))
        if self._failed is not None:
            raise self._failed
        return await asyncio.wrap_future(future)

    def _serve(self, worker: Worker) -> None:
        try:
            while True:
                self._take(worker)
                for result in worker.step():
                    for future in self._waiting.pop(result.line, []):
                        future.set_result(result)
        except Exception as error:  # whatever it is, those who wait must hear of it
            self._failed = error
            waiting = [future for futures in self._waiting.values() for future in futures]
            while not self._inbox.empty():
                waiting.append(self._inbox.get()[1])
            for future in waiting:
                future.set_exception(error)

    def _take(self, worker: Worker) -> None:
        """Give free rows the lines that have come; while there is none at all, wait for one."""
        for _ in range(worker.free):
            try:
                job, future = self._inbox.get(block=not worker.is_busy)
            except Empty:
                return
            self._waiting.setdefault(job.line, []).append(future)
            worker.add(job)


@contextmanager
def _connected(address: str | None, workers: int, gpus: int) -> Iterator[Any]:
    """Ray, connected to the cluster; it is left as it was found."""
    ray = _library()
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _connect(ray, address)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
        size = {"num_cpus": workers, "object_store_memory": STORE_BYTES}
        ray.init(address="local", include_dashboard=False, log_to_driver=False, **size)
    try:
        if not address:
            _check_gpus(ray, workers * gpus)
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False)
    except ConnectionError as error:
        todo = "start it with ray start, or leave --address and $RAY_ADDRESS out"
        raise InputError(f"cannot reach the Ray cluster {address}", why=str(error), todo=todo) from error


def _check_gpus(ray: Any, wanted: int) -> None:
    """A cluster may grow; on one machine a worker without a GPU would be waited for in vain."""
    found = int(ray.cluster_resources().get("GPU", 0))
    if wanted > found:
        raise InputError(
            f"{wanted} workers need a GPU each, and Ray finds {found} here", todo="pass fewer --workers, or --address"
        )


def _library() -> Any:
    try:
        import ray
    except ImportError as error:
        raise CannotLower(
            "cannot use the engine ray",
            why=f"Ray is not installed: {error}",
            todo="pip install 'trilithon[ray]', or --engine local",
        ) from error
    return ray
