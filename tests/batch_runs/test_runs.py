"""Runs in one process: what is written, gone on with, refused, and what a driver that is killed leaves."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest

from batch_runs.lines import ARGUMENTS, by_id, command, read_lines, run_here, some_lines, write_lines
from trilithon import InputError
from trilithon.batch import ledger
from trilithon.batch.jobs import Refusal
from trilithon.batch.ledger import run_file
from trilithon.batch.load import Setup
from trilithon.batch.local import LocalEngine
from trilithon.batch.run import Files, Progress, run
from trilithon.cli.batch_model import BatchModel

SETTINGS = {"model": "x", **Setup(ARGUMENTS).decides()}


class Place:
    """A folder with an input, and runs in it; what is called after each step may be changed."""

    def __init__(self, folder: Path, llm: Any, lines: list[dict[str, Any]]) -> None:
        self.llm, self.loads = llm, 0
        self.seen: Callable[[Progress], object] = lambda progress: None
        self.files = Files(write_lines(folder / "in.jsonl", lines), folder / "out.jsonl", folder / "errors.jsonl")

    def run(self, settings: dict[str, Any] = SETTINGS, stop_after: int | None = None) -> Progress:
        """A run, which is broken off when so many lines are answered."""

        def watch(progress: Progress) -> None:
            self.seen(progress)
            if stop_after is not None and progress.answered >= stop_after:
                raise KeyboardInterrupt

        return run(self.files, settings, LocalEngine(self._worker), watch)

    def _worker(self) -> Any:
        self.loads += 1
        return Setup(ARGUMENTS).worker(self.llm, None)


def ids_only(count: int) -> list[dict[str, Any]]:
    return [line for line in some_lines(2 * count) if "input_ids" in line]


@pytest.fixture
def place(tmp_path, llm) -> Place:
    return Place(tmp_path, llm, ids_only(20))


@pytest.fixture
def whole(tmp_path, llm) -> dict[Any, Any]:
    """The output of a run that nothing interrupts."""
    (tmp_path / "whole").mkdir()
    other = Place(tmp_path / "whole", llm, ids_only(20))
    assert other.run().answered == 20
    return by_id(other.files.output)


def test_a_run_answers_each_line_once(place, whole):
    assert next(iter(whole.values())).keys() == {"id", "tokens", "finish"}
    assert whole.keys() == {line["id"] for line in read_lines(place.files.input)}
    assert not place.files.errors.exists()


@pytest.mark.parametrize("torn", [b"", b'{"id": "line 0', b'{"id": "line 0", "tokens": [5], "finish": "length"}', b"\0" * 40])
def test_a_run_goes_on_where_it_was_broken_off(place, whole, torn):
    """The last line was cut off, in the middle or before its end of line."""
    with pytest.raises(KeyboardInterrupt):
        place.run(stop_after=7)
    before = place.files.output.read_bytes()
    assert 7 <= before.count(b"\n") < 20 and before.endswith(b"\n")
    place.files.output.write_bytes(before + torn)
    progress = place.run()
    assert progress.before == before.count(b"\n") and progress.before + progress.answered == 20
    assert by_id(place.files.output) == whole
    assert place.files.output.read_bytes().startswith(before), "what is written stays as it is"


def test_a_run_that_is_done_loads_no_model(place):
    place.run()
    written = place.files.output.read_bytes()
    assert place.run() == Progress(total=20, before=20)
    assert place.loads == 1 and place.files.output.read_bytes() == written


def test_lines_may_be_added(place, whole):
    place.run()
    with place.files.input.open("a") as file:
        file.write('{"id": "new", "input_ids": [99]}\n{"input_ids": [99]}')
    assert place.run().answered == 2
    found = by_id(place.files.output)
    assert found.pop("new")["tokens"] == found.pop(22)["tokens"] and found == whole
    with place.files.input.open("a") as file:
        file.write("5]}\n")  # of a line that was answered
    with pytest.raises(InputError, match="was begun with another input"):
        place.run()


def test_lines_that_come_during_a_run_are_of_the_next(place, whole):
    """Such as one that is not whole yet."""
    added = list[int]()

    def add(progress: Progress) -> None:
        if progress.answered and not added:
            with place.files.input.open("a") as file:
                file.write('{"id": "new", "input_')
            added.append(1)

    place.seen = add
    assert place.run() == Progress(total=20, answered=20, tokens=sum(len(x["tokens"]) for x in whole.values()))
    with place.files.input.open("a") as file:
        file.write('ids": [99]}\n')
    assert place.run().answered == 1 and by_id(place.files.output).keys() == {*whole, "new"}


def test_an_input_that_changes_while_it_is_read_is_told(place):
    lines = place.files.input.read_bytes()

    def change(progress: Progress) -> None:
        with place.files.input.open("r+b") as file:
            file.write(lines.replace(b"line 3", b"line X"))

    place.seen = change
    for said in ("was changed while it was read", "was begun with another input"):
        with pytest.raises(InputError, match=said):
            place.run()


def test_lines_are_brought_to_the_disk_together(place, monkeypatch):
    """Not each on its own, which would hold the next step up; but before the run ends."""
    synced, during, sync = list[int](), set[int](), os.fsync

    def counted(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        sync(file)

    place.seen = lambda progress: during.add(synced.count(place.files.output.stat().st_ino))
    monkeypatch.setattr(os, "fsync", counted)
    monkeypatch.setattr(ledger, "SYNC_SECONDS", 1e9)
    place.run()
    assert during == {0} and synced.count(place.files.output.stat().st_ino) == 1
    monkeypatch.setattr(ledger, "SYNC_SECONDS", 0.0)
    place.files.output.unlink()
    place.run()
    assert len(during) > 3


def test_lines_are_not_gathered(place, monkeypatch):
    """A thousand bad ones, one after the other: each is written and forgotten."""
    held, most = WeakSet[Refusal](), list[int]()

    def read(lines: Any, done: Any) -> Iterator[Refusal]:
        for number in range(1, 1001):
            held.add(refusal := Refusal(number, None, "it is bad"))
            most.append(len(held))
            yield refusal

    monkeypatch.setattr("trilithon.batch.run.read_jobs", read)
    assert place.run().refused == 1000 and max(most) < 5
    assert [x["line"] for x in read_lines(place.files.errors)] == list(range(1, 1001))


def test_a_run_goes_on_with_what_it_began_with(place):
    place.run()
    written = place.files.output.read_bytes()
    with pytest.raises(InputError, match=r"begun with other settings\n.*model was 'x' and is 'y'; seed was 0 and is 1"):
        place.run(SETTINGS | {"model": "y", "seed": 1})
    lines = place.files.input.read_text()
    place.files.input.write_text(lines.replace("line 0", "line x"))
    with pytest.raises(InputError, match="was begun with another input"):
        place.run()
    assert place.files.output.read_bytes() == written
    place.files.output.unlink()  # from the beginning, with whatever
    assert place.run(SETTINGS | {"seed": 1}).answered == 20


def test_no_file_of_others_is_written_to(place):
    place.files.output.write_text("precious")
    with pytest.raises(InputError, match=r"out\.jsonl is there already"):
        place.run()
    assert place.files.output.read_text() == "precious"
    place.files.output.unlink()
    place.files.errors.write_text("precious")
    for _ in range(2):
        with pytest.raises(InputError, match=r"errors\.jsonl is there already"):
            place.run()
    assert place.files.errors.read_text() == "precious"


@pytest.mark.parametrize("line", ["{}", "no JSON", '{"id": "line 0"}\n{"id": "line 0"}'])
def test_an_output_that_was_changed_is_not_gone_on_with(place, line):
    place.run(SETTINGS)
    place.files.output.write_text(line + "\n")
    with pytest.raises(InputError, match=r"line \d of .* is not as it was written"):
        place.run()
    assert place.files.output.read_text() == line + "\n"


def test_what_a_run_was_begun_with_must_be_readable(place):
    place.run()
    run_file(place.files.output).write_text('{"format": 1,')
    with pytest.raises(InputError, match=r"out.jsonl.run.json is not as it was written"):
        place.run()


def test_two_runs_do_not_write_to_one_output(place):
    with place.files.output.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run writes to"):
            place.run()


def test_files_must_differ(place):
    with pytest.raises(InputError, match="must be three files"):
        Files(place.files.input, place.files.input, place.files.errors)
    with pytest.raises(InputError, match="must be three files, and none of the run's"):
        Files(place.files.input, place.files.output, run_file(place.files.output))
    with pytest.raises(InputError, match="there is no file"):
        Files(place.files.output, place.files.input, place.files.errors)
    with pytest.raises(InputError, match="there is no folder"):
        Files(place.files.input, place.files.output.parent / "none" / "x", place.files.errors)


def test_bad_lines_are_told_with_number_and_reason(place):
    good = place.files.input.read_text().splitlines()
    bad = {
        3: "{",
        5: '{"id": "b"}',
        8: good[0],
        11: '{"id": "long", "input_ids": [7], "max_new_tokens": 96}',
        14: '{"prompt": "x"}',
    }
    for number, line in bad.items():
        good.insert(number - 1, line)
    place.files.input.write_text("\n".join(good))
    for again in range(2):  # they are told in each run, and never twice
        progress = place.run()
        assert (progress.answered, progress.refused, progress.total) == (0 if again else 20, 5, 25)
        refused = {line["line"]: line for line in read_lines(place.files.errors)}
        assert len(read_lines(place.files.errors)) == 5 and refused.keys() == bad.keys()
        assert refused[5] == {"line": 5, "id": "b", "reason": "it has neither prompt nor input_ids"}
        assert "do not fit: 1 tokens too many" in refused[11]["reason"] and "no tokenizer" in refused[14]["reason"]
        assert 'an earlier line has the id "line 0" too' == refused[8]["reason"]
    assert len(by_id(place.files.output)) == 20


# ------------------------------------------------------------ the command line


def test_the_command_writes_text_and_tokens(artefact, tmp_path, monkeypatch, capsys):
    write_lines(tmp_path / "in.jsonl", [*some_lines(6), {"id": "bad"}])
    assert run_here(monkeypatch, *command(artefact, tmp_path)) == 0
    out, err = capsys.readouterr()
    assert "6 of 7 lines are answered" in out and "1 were refused" in out and "out.jsonl.errors.jsonl says why" in out
    assert "7/7 lines" in err and "tokens/s" in err
    found = by_id(tmp_path / "out.jsonl")
    assert found.keys() == {f"line {n}" for n in range(6)} and all("text" in line for line in found.values())
    assert run_here(monkeypatch, *command(artefact, tmp_path, "--seed", "5")) == 1
    assert "was begun with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--engine", "spark"), "unknown engine 'spark'"),
        (("--workers", "2"), "--workers and --address are of the engine ray"),
        (("--dtype", "float16"), "--dtype was given with a compiled model"),
    ],
)
def test_the_command_refuses(artefact, tmp_path, monkeypatch, capsys, more, said):
    write_lines(tmp_path / "in.jsonl", some_lines(1))
    assert run_here(monkeypatch, *command(artefact, tmp_path, *more)) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_a_model_is_compiled_for_the_run_and_for_workers_saved_once(llm, tmp_path, monkeypatch):
    made = list[BatchModel]()
    monkeypatch.setattr(BatchModel, "_compiled", lambda self: made.append(self) or llm)
    model = BatchModel("byte-llama", "eager", layers=2, rows=4)
    assert model.worker(Setup(ARGUMENTS)).tokenizer is not None
    folder = model.folder(tmp_path / "out.jsonl")
    assert model.folder(tmp_path / "out.jsonl") == folder and len(made) == 2
    assert Setup(ARGUMENTS).load(folder, None).tokenizer is not None
    other = BatchModel("byte-llama", "eager", layers=1, rows=4)
    assert other.folder(tmp_path / "out.jsonl") != folder and other.identity() != model.identity()
