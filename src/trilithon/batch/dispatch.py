"""Which of Ray's workers holds which lines, and what becomes of them when it dies."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trilithon.batch.jobs import Job, Refusal, Result
from trilithon.errors import TrilithonError

ALONE = 2  # so many workers died with a line: it is answered when the others are, beside no other
MOST_DEATHS = 5  # of workers that held one and the same line


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

    A worker holds twice as many lines as it has rows, so that a free row never waits for the next one. A line with which
    workers die again and again is told from those that were beside it: in the end it is alone with one. A worker that fails
    is one that died.

    Attributes:
        calls: those without an answer yet, by Ray's reference to it.
        size: how many lines each worker takes.
        room: how many more it takes now.
        again: lines whose worker died.
        alone: those of them that no other line may stand beside.
        deaths: of workers, by the number of a line that they held.
        in_a_row: of workers, since a line was answered.
        pids: processes of the workers that are ready.
    """

    ray: Any
    actors: list[Any]
    jobs: Iterator[Job]
    calls: dict[Any, Call] = field(default_factory=dict)
    size: Counter[int] = field(default_factory=Counter)
    room: Counter[int] = field(default_factory=Counter)
    again: deque[Job] = field(default_factory=deque)
    alone: deque[Job] = field(default_factory=deque)
    deaths: Counter[int] = field(default_factory=Counter)
    in_a_row: int = 0
    pids: dict[int, int] = field(default_factory=dict)

    def answers(self) -> Iterator[list[Result]]:
        for place in range(len(self.actors)):
            self._ask(place)
        while True:
            ended = [result for reference in self._ready() for result in self._take(reference)]
            self._give()
            if ended:
                yield ended
            if not self.again and not self.alone and all(call.job is None for call in self.calls.values()) and self.pids:
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
        call, errors = self.calls.pop(reference), self.ray.exceptions
        try:
            found = self.ray.get(reference)
        except errors.RayError as error:  # its process or machine is gone, or what it sent; or it failed
            cause = error.cause if isinstance(error, errors.RayTaskError) else error
            if call.job is None:
                raise _failed(cause) from error
            return self._lost(call, call.job, cause)
        if call.job is None:
            rows, self.pids[call.place] = found
            self.size[call.place] = self.room[call.place] = 2 * rows
            return []
        self.in_a_row = 0
        if call.pid == self.pids.get(call.place):
            self.room[call.place] = self.size[call.place] if self.deaths[call.job.line] >= ALONE else self.room[call.place] + 1
        return [found]

    def _lost(self, call: Call, job: Job, cause: BaseException) -> list[Result]:
        """The worker died that held a line."""
        if call.pid == self.pids.get(call.place):  # the first of its lines to say so
            self.in_a_row += 1
            del self.pids[call.place]
            self._ask(call.place)
        if self.in_a_row > MOST_DEATHS * len(self.actors):
            raise _failed(cause)
        self.deaths[job.line] += 1
        if self.deaths[job.line] > MOST_DEATHS:
            self.in_a_row = 0
            return [Refusal(job.line, job.id, f"{self.deaths[job.line]} workers died while they held it; {_text(cause)}")]
        (self.alone if self.deaths[job.line] >= ALONE else self.again).append(job)
        return []

    def _give(self) -> None:
        """Give lines to the workers that are ready, one each in turn; then those that are to be alone."""
        while places := [place for place in self.pids if self.room[place] > 0]:
            for place in places:
                job = self.again.popleft() if self.again else next(self.jobs, None)
                if job is None:
                    self._give_alone()
                    return
                self.room[place] -= 1
                self._call(place, job)

    def _give_alone(self) -> None:
        for place in self.pids:
            if self.alone and self.room[place] == self.size[place]:
                self.room[place] = 0
                self._call(place, self.alone.popleft())

    def _call(self, place: int, job: Job) -> None:
        self.calls[self.actors[place].answer.remote(job)] = Call(place, job, self.pids[place])


def _failed(cause: BaseException) -> TrilithonError:
    if isinstance(cause, TrilithonError):
        return cause
    todo = "what is written stays; the same command goes on from there"
    return TrilithonError("a worker failed", why=_text(cause), todo=todo)


def _text(cause: BaseException) -> str:
    return f"{type(cause).__name__}: {str(cause).strip()}"
