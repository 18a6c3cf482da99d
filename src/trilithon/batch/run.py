"""A batch run: lines go to an engine, answers to the output, refusals to the file of errors, and counts to whoever watches."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from trilithon.batch.jobs import Answer, Job, Refusal, Result, read_jobs
from trilithon.batch.ledger import InputLines, Ledger, run_file
from trilithon.errors import InputError


class Engine(Protocol):
    """What answers lines, in any order."""

    def answers(self, jobs: Iterator[Job]) -> Generator[list[Result], None, None]:
        """Take jobs as there is room for them; yield what has ended since, one result a job, each once."""
        ...


@dataclass(frozen=True)
class Files:
    """Where a run reads and writes.

    Raises:
        InputError: there is no such input, or two of them are one file.
    """

    input: Path
    output: Path
    errors: Path

    def __post_init__(self) -> None:
        if not self.input.is_file():
            raise InputError(f"there is no file {self.input}", todo="pass a file of one JSON object a line")
        if not self.output.parent.is_dir() or not self.errors.parent.is_dir():
            missing = next(x.parent for x in (self.output, self.errors) if not x.parent.is_dir())
            raise InputError(f"there is no folder {missing}", todo="make it first")
        if len({x.resolve() for x in (self.input, self.output, self.errors, run_file(self.output))}) < 4:
            why = f"{run_file(self.output)} says what the run is of"
            raise InputError(
                "input, output and errors must be three files, and none of the run's", why=why, todo="name each differently"
            )


@dataclass
class Progress:
    """Counts of a run.

    Attributes:
        total: lines of the input.
        before: of them, answered by earlier runs.
        answered, refused: by this run.
        tokens: new tokens of this run.
    """

    total: int = 0
    before: int = 0
    answered: int = 0
    refused: int = 0
    tokens: int = 0

    @property
    def done(self) -> int:
        return self.before + self.answered + self.refused


def run(files: Files, settings: Mapping[str, Any], engine: Engine, watch: Callable[[Progress], object]) -> Progress:
    """Answer each line of the input that the output does not answer yet.

    Args:
        settings: plain data; all that decides what an answer is. A run goes on only with those that it began with.
        watch: called when counts have changed.

    Raises:
        InputError: see `Ledger`; or there is a file of errors, but no run that wrote it.
    """
    if files.errors.exists() and not run_file(files.output).exists():
        raise InputError(f"{files.errors} is there already", why="it is of no batch run", todo="move it, or pass --errors")
    with Ledger(files.output, settings, files.input) as ledger, files.errors.open("w") as errors:
        progress = Progress(total=ledger.lines, before=len(ledger.done))
        watch(progress)

        def refuse(refusal: Refusal) -> None:
            errors.write(json.dumps(refusal.to_json(), ensure_ascii=False) + "\n")
            progress.refused += 1

        jobs = _only_jobs(read_jobs(InputLines(files.input, ledger.input), ledger.done), refuse)
        for results in _answers(engine, jobs):
            answers = [x for x in results if isinstance(x, Answer)]
            ledger.write(answers)
            for refusal in results:
                if isinstance(refusal, Refusal):
                    refuse(refusal)
            progress.answered += len(answers)
            progress.tokens += sum(len(answer.tokens) for answer in answers)
            if results:
                errors.flush()
                watch(progress)
        watch(progress)
    if not progress.refused:
        files.errors.unlink()
    return progress


def _answers(engine: Engine, jobs: Iterator[Job]) -> Iterator[list[Result]]:
    """What the engine answers; without a job it has nothing to load."""
    first = next(jobs, None)
    if first is not None:
        with closing(engine.answers(chain([first], jobs))) as answers:
            yield from answers


def _only_jobs(read: Iterator[Job | Refusal], refuse: Callable[[Refusal], None]) -> Iterator[Job]:
    for found in read:
        if isinstance(found, Job):
            yield found
        else:
            refuse(found)
