"""The engine without machines: one worker, in this process."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice

from trilithon.batch.jobs import Job, Result
from trilithon.batch.worker import Worker


@dataclass(frozen=True)
class LocalEngine:
    """See `run.Engine`."""

    make_worker: Callable[[], Worker]

    def answers(self, jobs: Iterator[Job]) -> Generator[list[Result], None, None]:
        worker = self.make_worker()
        while True:
            for job in islice(jobs, worker.free):
                worker.add(job)
            if not worker.is_busy:
                return
            yield worker.step()
