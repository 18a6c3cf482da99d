"""The engine of many machines: Ray starts workers, starts them anew when they die, and carries lines and answers."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from trilithon.artefact.manifest import read_manifest
from trilithon.batch.jobs import Job, Result
from trilithon.batch.load import Setup
from trilithon.batch.worker import Worker
from trilithon.errors import CannotLower, InputError, TrilithonError

STORE_BYTES = 100 << 20  # of Ray's object store, where it is started for one run: lines and answers are small
MOST_DEATHS = 10  # of workers that held one and the same line


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
            TrilithonError: workers cannot be made, or die again and again with the same line.
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
        """Load the model; how many lines it takes at once, and the number of the process."""
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


@dataclass(frozen=True)
class Call:
    """What was asked of a worker.

    Attributes:
        place: of the worker in the list of them.
        job: None = whether it is ready.
        pid: the process that it was then.
    """

    place: int
    job: Job | None = None
    pid: int | None = None


@dataclass
class Dispatch:
    """Which worker holds which lines.

    A worker holds twice as many lines as it has rows, so that a free row never waits for the next one.

    Attributes:
        calls: those without an answer yet, by Ray's reference to it.
        room: how many lines more each worker takes.
        again: lines whose worker died.
        pids: processes of the workers that are ready.
    """

    ray: Any
    actors: list[Any]
    jobs: Iterator[Job]
    calls: dict[Any, Call] = field(default_factory=dict)
    room: Counter[int] = field(default_factory=Counter)
    again: deque[Job] = field(default_factory=deque)
    deaths: Counter[int] = field(default_factory=Counter)
    pids: dict[int, int] = field(default_factory=dict)

    def answers(self) -> Iterator[list[Result]]:
        for place in range(len(self.actors)):
            self._ask(place)
        while True:
            ended = [result for reference in self._ready() for result in self._take(reference)]
            self._give()
            if ended:
                yield ended
            if not self.again and all(call.job is None for call in self.calls.values()) and self.pids:
                return  # lines would have been given to those who are ready

    def _ask(self, place: int) -> None:
        """Ask a worker whether it is ready; after a death it is so once Ray has started it anew."""
        ready = self.actors[place].ready.options(max_task_retries=-1).remote()
        self.calls[ready] = Call(place)

    def _ready(self) -> list[Any]:
        """The calls that have an answer; waits for the first."""
        references = list(self.calls)
        self.ray.wait(references, num_returns=1)
        found: list[Any] = self.ray.wait(references, num_returns=len(references), timeout=0)[0]
        return found

    def _take(self, reference: Any) -> list[Result]:
        call = self.calls.pop(reference)
        try:
            found = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise _failed(error.cause) from error
        except self.ray.exceptions.RayActorError as error:
            if call.job is None:
                raise _failed(error) from error
            self._lost(call, call.job)
            return []
        if call.job is None:
            rows, self.pids[call.place] = found
            self.room[call.place] = 2 * rows
            return []
        if call.pid == self.pids.get(call.place):
            self.room[call.place] += 1
        return [found]

    def _lost(self, call: Call, job: Job) -> None:
        """The worker died that held a line."""
        self.again.append(job)
        self.deaths[job.line] += 1
        if self.deaths[job.line] > MOST_DEATHS:
            raise TrilithonError(
                f"line {job.line} cannot be answered",
                why=f"{self.deaths[job.line]} workers died while they held it",
                todo="see Ray's logs for how they died; what is written stays, and the same command goes on from there",
            )
        if call.pid == self.pids.get(call.place):  # the first of its lines to say so
            del self.pids[call.place]
            self._ask(call.place)

    def _give(self) -> None:
        """Give lines to the workers that are ready, one each in turn."""
        while places := [place for place in self.pids if self.room[place] > 0]:
            for place in places:
                job = self.again.popleft() if self.again else next(self.jobs, None)
                if job is None:
                    return
                self.room[place] -= 1
                self.calls[self.actors[place].answer.remote(job)] = Call(place, job, self.pids[place])


def _failed(cause: BaseException) -> TrilithonError:
    if isinstance(cause, TrilithonError):
        return cause
    todo = "what is written stays; the same command goes on from there"
    return TrilithonError("a worker failed", why=f"{type(cause).__name__}: {cause}", todo=todo)


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
