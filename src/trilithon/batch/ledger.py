"""The output of a run, which is also its memory: what stands there is done. Lines are appended, and never touched again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from trilithon.batch.jobs import Answer, Id
from trilithon.errors import InputError

FORMAT = 1
SYNC_SECONDS = 1.0  # between two calls of fsync, which holds up whoever writes
BLOCK = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class InputFile:
    """What the input of a run is known by.

    Attributes:
        whole_lines: whether it ends with the end of a line: only then it may grow.
    """

    bytes: int
    sha256: str
    whole_lines: bool


def read_input(path: Path, most: int | None = None) -> tuple[InputFile, int]:
    """Of the first `most` bytes of a file, None = of all: what it is known by, and how many lines it has."""
    digest, size, lines, last = hashlib.sha256(), 0, 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(BLOCK if most is None else min(BLOCK, most - size)):
            digest.update(block)
            size, lines, last = size + len(block), lines + block.count(b"\n"), block[-1:]
    return InputFile(size, digest.hexdigest(), last == b"\n"), lines + (last != b"\n")


class InputLines:
    """The lines of an input as it is known: not those that come to it in the meantime.

    Raises:
        InputError: at the end, if they were not those.
    """

    def __init__(self, path: Path, known: InputFile) -> None:
        self.path, self.known = path, known

    def __iter__(self) -> Iterator[bytes]:
        digest, left = hashlib.sha256(), self.known.bytes
        with self.path.open("rb") as file:
            while left and (line := file.readline(left)):
                digest.update(line)
                left -= len(line)
                yield line
        if digest.hexdigest() != self.known.sha256:
            raise InputError(
                f"{self.path} was changed while it was read",
                why="lines may have been answered that are no longer there",
                todo="remove the output and begin again",
            )


def run_file(output: Path) -> Path:
    """The file beside an output that says what run it is of."""
    return output.with_name(f"{output.name}.run.json")


class Ledger:
    """The lines that are written, and those to come.

    Beside the output stands `OUTPUT.run.json`: what was asked, so that a run goes on only with what it began with. A line that
    was cut off (its writer was killed) is removed.

    Args:
        output: is made if it is not there.
        settings: plain data; all that decides what an answer is.
        source: the input.

    Attributes:
        done: ids that have been answered.
        input, lines: what the input is known by, and how many lines it has.

    Raises:
        InputError: another run writes there at this moment, or the output is of another one or of no run at all.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], source: Path) -> None:
        self.output, self.beside = output, run_file(output)
        self.done: set[Id] = set()
        self._synced = monotonic()
        self._file = os.open(output, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._begin(json.loads(json.dumps(settings)), source)
        except BaseException:
            self.close()
            raise

    def write(self, answers: Iterable[Answer]) -> None:
        """Append lines. They outlive this process at once; its machine once `_sync` has brought them to the disk."""
        text = "".join(json.dumps(answer.to_json(), ensure_ascii=False) + "\n" for answer in answers)
        rest = memoryview(text.encode())
        if not rest:
            return
        while rest:
            rest = rest[os.write(self._file, rest) :]
        if monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        try:
            self._sync()
        finally:
            os.close(self._file)

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = monotonic()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another run writes to {self.output}", why="each line is written once", todo="wait for it, or end it first"
            ) from error

    def _begin(self, settings: Mapping[str, Any], source: Path) -> None:
        """Find what is done; on the disk stands what this run is, before a line of it does."""
        size, before = os.fstat(self._file).st_size, self._saved()
        if size and before is None:
            raise InputError(
                f"{self.output} is there already",
                why=f"it is of no batch run: there is no {self.beside.name} beside it",
                todo="choose another output, or remove it",
            )
        if size and before is not None:
            self._check_settings(before, settings)
            self._check_input(before, source)
            self._read()
        self.input, self.lines = read_input(source)
        now = {"format": FORMAT, "settings": settings, "input": asdict(self.input)}
        if now != before:
            write_whole(self.beside, json.dumps(now, indent=1) + "\n")

    def _saved(self) -> dict[str, Any] | None:
        try:
            data: dict[str, Any] = json.loads(self.beside.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(
                f"{self.beside} is not as it was written", why=str(error), todo="choose another output, or remove both"
            ) from error
        if data.get("format") != FORMAT:
            raise InputError(f"{self.beside} is of another version", todo="finish the run with the version that began it")
        return data

    def _check_settings(self, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        old = before["settings"]
        changed = [name for name in sorted({*old, *settings}) if old.get(name) != settings.get(name)]
        if changed:
            raise InputError(
                f"{self.output} was begun with other settings",
                why="; ".join(f"{name} was {old.get(name)!r} and is {settings.get(name)!r}" for name in changed),
                todo="go on with those, or choose another output",
            )

    def _check_input(self, before: Mapping[str, Any], source: Path) -> None:
        """The input may have grown by whole lines."""
        old = InputFile(**before["input"])
        same, _ = read_input(source, most=old.bytes)
        if same != old or (not old.whole_lines and source.stat().st_size > old.bytes):
            raise InputError(
                f"{self.output} was begun with another input",
                why=f"the first {old.bytes} bytes of {source} are not those that were there",
                todo="go on with that input, to which lines may have been added, or choose another output",
            )

    def _read(self) -> None:
        whole = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                self.done.add(self._id(number, line))
                whole += len(line)
        if whole < os.fstat(self._file).st_size:
            os.ftruncate(self._file, whole)
            os.fsync(self._file)

    def _id(self, number: int, line: bytes) -> Id:
        try:
            found: Id = json.loads(line)["id"]
            if found not in self.done:
                return found
            why = f"the id {found!r} stands there twice"
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
        todo = "remove that line and those behind it, and they are made again"
        raise InputError(f"line {number} of {self.output} is not as it was written", why=why, todo=todo)


def write_whole(path: Path, text: str) -> None:
    """Replace a file; it is the old one or the new one at any moment."""
    made = path.with_name(f"{path.name}.tmp")
    with made.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(made, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
