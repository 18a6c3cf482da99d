"""Which worker gets which line when workers die, fail, or never come; and what a worker does with calls."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from trilithon import CannotLower, InputError
from trilithon.batch.dispatch import ALONE, MOST_DEATHS, Dispatch
from trilithon.batch.jobs import Answer, Job, Refusal
from trilithon.batch.load import Setup
from trilithon.batch.ray import RayEngine, RayWorker, _check_gpus, _connect
from trilithon.errors import TrilithonError


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class RayActorError(RayError):
    pass


class OutOfMemoryError(RayError):
    """What Ray says of a worker that it killed for its memory, and of an answer that was lost with its machine."""


class Reference:
    """A call, and what came of it; None = it is under way."""

    outcome: Any = None


class FakeActor:
    """A worker of two rows. `play` says what comes of a call, a line or None; until it does, nothing does."""

    def __init__(self, play: Callable[[Job | None], Any]) -> None:
        self.calls: list[tuple[Reference, Job | None]] = []
        self.play, self.asked = play, 0
        self.ready = SimpleNamespace(options=lambda max_task_retries: SimpleNamespace(remote=self._ready))
        self.answer = SimpleNamespace(remote=self._call)

    def _ready(self) -> Reference:
        self.asked += 1
        return self._call(None)

    def _call(self, job: Job | None) -> Reference:
        reference = Reference()
        self.calls.append((reference, job))
        return reference

    def go_on(self) -> None:
        for reference, job in self.calls:
            if reference.outcome is None:
                reference.outcome = self.play(job)


class FakeRay:
    """Of Ray what `Dispatch` calls."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, *actors: FakeActor) -> None:
        self.actors = actors

    def wait(self, references: list[Reference], num_returns: int, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        if timeout is None:
            for _ in range(3):
                if not any(x.outcome for x in references):
                    for actor in self.actors:
                        actor.go_on()
            assert any(x.outcome for x in references), "it waits for what never comes"
        return [x for x in references if x.outcome], [x for x in references if not x.outcome]

    def get(self, reference: Reference) -> Any:
        if isinstance(reference.outcome, Exception):
            raise reference.outcome
        return reference.outcome


def jobs(count: int) -> list[Job]:
    return [Job(n, n, (n,)) for n in range(1, count + 1)]


def answer(job: Job) -> Answer:
    return Answer(job.line, job.id, (job.line,), None, "length")


def well(pid: int) -> Callable[[Job | None], Any]:
    return lambda job: (2, pid) if job is None else answer(job)


def answered(actors: list[FakeActor], asked: list[Job]) -> list[int]:
    dispatch = Dispatch(FakeRay(*actors), actors, iter(asked))
    return sorted(result.line for ended in dispatch.answers() for result in ended)


def test_each_line_is_answered_once():
    actors = [FakeActor(well(1)), FakeActor(well(2))]
    assert answered(actors, jobs(20)) == list(range(1, 21))
    assert all(len(actor.calls) > 5 for actor in actors), "both take part"


def test_a_worker_holds_twice_as_many_lines_as_it_has_rows():
    actor = FakeActor(lambda job: (2, 1) if job is None else None)
    dispatch = Dispatch(FakeRay(actor), [actor], iter(jobs(20)))
    with pytest.raises(AssertionError, match="never comes"):
        next(dispatch.answers())
    assert [job.line for _, job in actor.calls if job] == [1, 2, 3, 4]


class Dying:
    """Its first process dies with four calls, of which `late` say so only when the next process is ready."""

    def __init__(self, late: int, error: RayError) -> None:
        self.error = error
        self.pid, self.left, self.late = 1, 4 - late, list[Job]()

    def __call__(self, job: Job | None) -> Any:
        if job is None:
            self.pid += 1
            return 2, self.pid
        if self.pid > 2:
            is_late = any(job is other for other in self.late)
            self.late = [other for other in self.late if other is not job]
            return self.error if is_late else answer(job)
        if self.left:
            self.left -= 1
            return self.error
        self.late.append(job)
        return None


@pytest.mark.parametrize("error", [RayActorError(), OutOfMemoryError(), RayTaskError(ZeroDivisionError())], ids=type)
@pytest.mark.parametrize("late", [0, 3])
def test_the_lines_of_a_worker_that_died_or_failed_are_answered_and_it_is_asked_once(late, error):
    actor = FakeActor(Dying(late, error))
    assert answered([actor], jobs(30)) == list(range(1, 31))
    assert actor.asked == 2 and len(actor.calls) == 2 + 4 + 30


def test_a_worker_that_never_comes_back_is_not_waited_for():
    """Its machine is gone: the other does it all, the lines that were lost too."""
    state: list[int] = []

    def play(job: Job | None) -> Any:
        if job is None:
            state.append(1)
            return (2, 1) if len(state) == 1 else None
        return RayActorError()

    actors = [FakeActor(play), FakeActor(well(9))]
    assert answered(actors, jobs(30)) == list(range(1, 31))


def test_a_line_that_kills_every_worker_is_refused_and_the_others_are_answered():
    """In the end it is alone, so that no other line is taken for the one."""
    pids, beside = iter(range(1000)), list[set[int]]()

    class Killed(FakeActor):
        def go_on(self) -> None:
            waiting = [(reference, job) for reference, job in self.calls if reference.outcome is None]
            lines = {job.line for _, job in waiting if job}
            if 3 in lines:
                beside.append(lines - {3})
            for reference, job in waiting:
                reference.outcome = RayActorError("it is gone") if 3 in lines and job else self.play(job)

    actors = [Killed(lambda job: (2, next(pids)) if job is None else answer(job)) for _ in range(2)]
    results = [x for ended in Dispatch(FakeRay(*actors), actors, iter(jobs(30))).answers() for x in ended]
    assert sorted(x.line for x in results) == list(range(1, 31))
    assert [x for x in results if isinstance(x, Refusal)] == [results[-1]]
    assert results[-1] == Refusal(3, 3, f"{MOST_DEATHS + 1} workers died while they held it; RayActorError: it is gone")
    assert [bool(x) for x in beside] == [True] * ALONE + [False] * (MOST_DEATHS + 1 - ALONE)


def test_workers_that_die_with_whatever_they_hold_end_the_run():
    pids = iter(range(1000))
    failed = RayTaskError(ZeroDivisionError("by zero"))
    actors = [FakeActor(lambda job: (1, next(pids)) if job is None else failed) for _ in range(2)]
    with pytest.raises(TrilithonError, match=r"a worker failed\n.*ZeroDivisionError: by zero"):
        answered(actors, jobs(10_000))
    assert next(pids) < 20


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (RayTaskError(InputError("there is no folder x")), "there is no folder x"),
        (RayTaskError(ZeroDivisionError("by zero")), "a worker failed\n.*ZeroDivisionError: by zero"),
        (RayActorError("its class cannot be imported"), "a worker failed\n.*cannot be imported"),
    ],
)
def test_a_worker_that_cannot_be_made_ends_the_run_with_its_reason(outcome, said):
    with pytest.raises(TrilithonError, match=said):
        answered([FakeActor(lambda job: outcome)], jobs(3))


def test_without_ray_it_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    engine = RayEngine(Setup({}), lambda: pytest.fail("no model is compiled for nothing"), None, 1)
    with pytest.raises(CannotLower, match=r"cannot use the engine ray\n.*not installed.*\n.*trilithon\[ray\]"):
        next(engine.answers(iter(jobs(1))))


def test_a_cluster_that_is_not_there_is_named():
    def init(address: str, log_to_driver: bool) -> None:
        raise ConnectionError(f"nobody listens at {address}")

    with pytest.raises(InputError, match=r"cannot reach the Ray cluster here:1\n.*nobody listens at here:1"):
        _connect(SimpleNamespace(init=init), "here:1")


def test_one_machine_has_as_many_gpus_as_it_has():
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": 2.0})
    _check_gpus(ray, 2)
    with pytest.raises(InputError, match="3 workers need a GPU each, and Ray finds 2 here"):
        _check_gpus(ray, 3)


# ------------------------------------------------------------ a worker


@pytest.fixture
def worker(artefact) -> RayWorker:
    return RayWorker(Setup({"max_new_tokens": 5}, rows=2), str(artefact), None)


def test_calls_wait_for_their_own_lines(worker):
    async def calls() -> tuple[Any, Any, list[Any]]:
        first, again = await worker.ready(), await worker.ready()
        return first, again, await asyncio.gather(*(worker.answer(job) for job in jobs(9)))

    first, again, answers = asyncio.run(calls())
    assert first == again and first[0] == 2
    assert [x.line for x in answers] == list(range(1, 10)) and all(len(x.tokens) <= 5 for x in answers)


def test_a_worker_that_fails_tells_all_who_wait(worker, monkeypatch):
    async def calls() -> list[Any]:
        await worker.ready()
        monkeypatch.setattr("trilithon.batch.worker.Worker.step", lambda self: 1 / 0)
        waiting = [worker.answer(job) for job in jobs(9)]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        return [*found, *await asyncio.gather(worker.answer(jobs(1)[0]), return_exceptions=True)]

    found = asyncio.run(calls())
    assert len(found) == 10 and all(isinstance(x, ZeroDivisionError) for x in found)


def test_a_worker_that_failed_ends_so_that_ray_starts_it_anew(worker, monkeypatch):
    ended = list[int]()
    monkeypatch.setattr("os._exit", ended.append)

    async def calls() -> None:
        await worker.ready()
        monkeypatch.setattr("trilithon.batch.worker.Worker.step", lambda self: 1 / 0)
        await asyncio.gather(worker.answer(jobs(1)[0]), return_exceptions=True)
        assert not ended
        await worker.ready()

    asyncio.run(calls())
    assert ended == [1]
