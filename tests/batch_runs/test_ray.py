"""Ray's workers on this machine: whatever is killed, each line is answered once, as in one process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from batch_runs.lines import by_id, command, run_here, some_lines, write_lines
from trilithon.batch import ray as engines
from trilithon.batch.load import Setup
from trilithon.batch.local import LocalEngine
from trilithon.batch.ray import Dispatch, RayEngine
from trilithon.batch.run import Files, Progress, run

pytestmark = pytest.mark.timeout(300)  # a worker takes seconds to start, and eight are
SETUP = Setup({"max_new_tokens": 12})
KILLS = 5


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """What Ray's processes find: this source, and nothing of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(engines.__file__).parents[2]))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def cluster(environment: None) -> Iterator[Any]:
    """Ray with two cores, for the runs of this file."""
    with engines._connected(None, 2, 0) as ray:
        yield ray


def files_in(folder: Path, lines: list[dict[str, Any]]) -> Files:
    folder.mkdir(exist_ok=True)
    return Files(write_lines(folder / "in.jsonl", lines), folder / "out.jsonl", folder / "errors.jsonl")


def in_one_process(folder: Path, artefact: Path, lines: list[dict[str, Any]]) -> dict[Any, Any]:
    files = files_in(folder, lines)
    run(files, {}, LocalEngine(lambda: SETUP.load(str(artefact), None)), lambda progress: None)
    return by_id(files.output)


class Killer:
    """Watches a run, and kills its first worker at random moments, each time another process.

    Until the worker has been started anew it holds the run up, which would be done before.
    """

    def __init__(self, patch: pytest.MonkeyPatch, lines: int) -> None:
        self.random, self.killed = random.Random(0), list[int]()
        self.moments = sorted(self.random.sample(range(lines * 9 // 10), KILLS))
        self.dispatch: Any = None
        patch.setattr(engines, "Dispatch", self._made)

    def _made(self, *given: Any) -> Dispatch:
        self.dispatch = Dispatch(*given)
        return self.dispatch

    def __call__(self, progress: Progress) -> None:
        if len(self.killed) == KILLS or progress.answered < self.moments[len(self.killed)] or self.dispatch is None:
            return
        asked = [reference for reference, call in self.dispatch.calls.items() if call.job is None and call.place == 0]
        if asked:
            self.dispatch.ray.wait(asked, timeout=60)
        elif self.dispatch.pids[0] not in self.killed:
            time.sleep(self.random.random() / 50)
            os.kill(self.dispatch.pids[0], signal.SIGKILL)
            self.killed.append(self.dispatch.pids[0])


def test_workers_that_are_killed_lose_and_repeat_nothing(cluster, artefact, tmp_path, monkeypatch):
    """500 lines, two workers; one of them is killed at five random moments."""
    lines = some_lines(500)
    killer = Killer(monkeypatch, len(lines))
    files = files_in(tmp_path, lines)
    progress = run(files, {}, RayEngine(SETUP, lambda: str(artefact), None, 2), killer)
    assert len(killer.killed) == KILLS and killer.dispatch.deaths.total() >= KILLS, "lines were with it"
    assert progress.answered == 500 and not files.errors.exists()
    found = by_id(files.output)
    assert len(found) == 500 and found == in_one_process(tmp_path / "one", artefact, lines)


def workers_below(ancestor: int) -> list[Path]:
    """Processes of Ray's workers that it started, itself or by others."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    below = {ancestor}
    for _ in range(5):
        below |= {pid for pid, parent in parents.items() if parent in below}
    return [process for pid in below if is_worker(process := Path("/proc") / str(pid))]


def is_worker(process: Path) -> bool:
    with suppress(OSError):
        return (process / "cmdline").read_bytes().startswith(b"ray::RayWorker")
    return False


def test_a_driver_that_is_killed_leaves_no_worker_and_its_run_is_gone_on_with(artefact, tmp_path, monkeypatch):
    """SIGKILL once some lines are written; then the same command, in one process."""
    lines = [line | {"max_new_tokens": 30} for line in some_lines(100)]
    write_lines(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    words = [sys.executable, "-c", "from trilithon.cli import main; main()", *command(artefact, tmp_path, "--engine", "ray")]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None and not (output.exists() and output.stat().st_size):
            time.sleep(0.002)
        os.kill(driver.pid, signal.SIGSTOP)  # it writes nothing more while its workers are looked for
        workers = workers_below(driver.pid)
        os.kill(driver.pid, signal.SIGKILL)
    before = output.read_bytes()
    assert 0 < before.count(b"\n") < 100
    assert run_here(monkeypatch, *command(artefact, tmp_path)) == 0
    assert output.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert by_id(output) == in_one_process(tmp_path / "one", artefact, lines)
    until = time.monotonic() + 60
    while any(map(is_worker, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert len(workers) == 1 and not is_worker(workers[0])
