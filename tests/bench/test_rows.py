"""Running candidates: ratios, comparison with the baseline, failures as rows, memory between rows, and the table."""

from __future__ import annotations

import gc
import io
import json
import re
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from trilithon.bench.plot import save_plot
from trilithon.bench.roofline import DecoderSize, Job, Machine, floor_of
from trilithon.bench.rows import Bench, Candidate, Run, run_rows
from trilithon.bench.save import Saver
from trilithon.bench.table import Table, show_seconds
from trilithon.errors import CannotLower, InputError

SIZE = DecoderSize(layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocabulary=32)
BENCH = Bench(
    model="tiny",
    job=Job(size=SIZE, value_bytes=4, prompt_tokens=3, new_tokens=4),
    machine=Machine(name="a test", bytes_per_second=1e9, flops_per_second=1e9, versions={"torch": "9"}),
    dtype="float32",
    device=torch.device("cpu"),
    command="trilithon bench tiny",
    versions={"transformers": "8"},
    repeats=3,
)


def job(seconds: float = 0.0, ids: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)) -> Callable[[], Run]:
    """Half of its time goes to the prompt, the other to the tokens behind the first."""

    def run(new_tokens: int) -> Tensor:
        time.sleep(seconds / 2 + seconds / 2 * (new_tokens - 1) / 3)
        return torch.tensor([ids[: 3 + new_tokens]])

    return lambda: run


def fails(error: Exception) -> Callable[[], Run]:
    def make() -> Run:
        raise error

    return make


@pytest.fixture(scope="module")
def table() -> Table:
    candidates = [
        Candidate(name="slow", make=job(0.04), note="the baseline"),
        Candidate(name="fast", make=job(0.01)),
        Candidate(name="other | tokens", make=job(ids=(1, 2, 3, 4, 5, 0, 7))),
        Candidate(name="broken", make=fails(RuntimeError("out of [memory]"))),
        Candidate(name="refused", make=fails(CannotLower("no backend", why="it is missing", todo="install it"))),
        Candidate(name="short", make=job(ids=(1, 2, 3, 4))),
    ]
    return run_rows(candidates, BENCH, console=Console(file=io.StringIO()))


def test_ratios_are_to_the_first_row_and_to_the_floor(table: Table) -> None:
    slow, fast = table.rows[:2]
    assert slow.timing is not None and fast.timing is not None
    assert slow.ratio_to_baseline == 1 and slow.tokens_equal_baseline is None
    assert fast.ratio_to_baseline == slow.timing.median / fast.timing.median > 1.5
    assert fast.ratio_to_floor == fast.timing.median / floor_of(BENCH.job, BENCH.machine).seconds
    assert fast.tokens == 4 and fast.tokens_per_second == 4 / fast.timing.median
    assert len(fast.timing.seconds) == 3 and fast.peak_bytes is not None
    assert fast.build_seconds is not None and fast.first_run_seconds is not None and fast.first_run_seconds >= 0.01


def test_the_first_token_and_the_others_are_measured_apart(table: Table) -> None:
    slow = table.rows[0]
    floor = floor_of(BENCH.job, BENCH.machine)
    assert slow.timing is not None and slow.first_token_seconds is not None and slow.seconds_per_token is not None
    assert 0.02 <= slow.first_token_seconds < 0.03
    assert slow.seconds_per_token == (slow.timing.median - slow.first_token_seconds) / 3 > 0.004
    assert slow.first_token_ratio_to_floor == slow.first_token_seconds / floor.prefill_seconds
    assert slow.token_ratio_to_floor == pytest.approx(slow.seconds_per_token / (floor.decode_seconds / 3))


def test_a_job_of_one_token_has_no_time_per_token() -> None:
    bench = replace(BENCH, job=replace(BENCH.job, new_tokens=1))
    (row,) = run_rows([Candidate(name="one", make=job(ids=(1, 2, 3, 4)))], bench, console=Console(file=io.StringIO())).rows
    assert row.timing is not None and row.first_token_seconds == row.timing.median
    assert row.seconds_per_token is None and row.token_ratio_to_floor is None


def test_a_failure_with_one_token_keeps_the_whole_job() -> None:
    def run(new_tokens: int) -> Tensor:
        if new_tokens == 1:
            raise ValueError("needs two tokens")
        return torch.arange(7)[None]

    (row,) = run_rows([Candidate(name="one", make=lambda: run, note="a note")], BENCH, console=Console(file=io.StringIO())).rows
    assert row.timing is not None and not row.error
    assert row.first_token_seconds is None and row.seconds_per_token is None
    assert row.note == "a note; the first token alone was not measured: ValueError: needs two tokens"


def test_tokens_are_compared_with_the_baselines(table: Table) -> None:
    assert table.rows[1].tokens_equal_baseline is True
    assert table.rows[2].tokens_equal_baseline is False
    assert table.rows[2].note == "tokens differ from the baseline's from new token 3 of 4 on"


def test_failure_is_a_row_with_its_text(table: Table) -> None:
    broken, refused, short = table.rows[3:]
    assert broken.timing is None and broken.error == "RuntimeError: out of [memory]"
    assert refused.error == "no backend\n  because it is missing\n  install it"
    assert "the run returned ids [1, 4], not [1, 7]" in short.error


def test_failed_baseline_leaves_the_others_without_ratio() -> None:
    both = [Candidate(name="broken", make=fails(ValueError("no"))), Candidate(name="good", make=job())]
    good = run_rows(both, BENCH, console=Console(file=io.StringIO())).rows[1]
    assert good.ratio_to_baseline is None and good.tokens_equal_baseline is None and good.ratio_to_floor is not None


def test_a_candidate_is_freed_before_the_next_is_built() -> None:
    alive: list[weakref.ref[torch.nn.Module]] = []
    found: list[bool] = []

    def make(fail: bool) -> Callable[[], Run]:
        def build() -> Run:
            found.extend(model() is not None for model in alive)
            model = torch.nn.Linear(2, 2)
            alive[:] = [weakref.ref(model)]
            cycle: list[object] = [model]
            cycle.append(cycle)  # as models and compiled programs have; only the collector frees it

            def run(new_tokens: int) -> Tensor:
                if fail:
                    raise RuntimeError(f"{model} broke")
                return torch.arange(3 + new_tokens)[None]

            return run

        return build

    gc.disable()
    try:
        run_rows([Candidate(name=str(i), make=make(fail=i == 1)) for i in range(3)], BENCH, console=Console(file=io.StringIO()))
    finally:
        gc.enable()
    assert found == [False, False]


def test_no_candidate_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to measure"):
        run_rows([], BENCH)


def test_progress_names_the_candidate_and_its_stage() -> None:
    drawn = io.StringIO()
    run_rows([Candidate(name="one", make=job())], BENCH, console=Console(file=drawn, force_terminal=True, width=100))
    for stage in ("one: building", "one: first run", "one: timing", "one: first token", "6/6"):
        assert stage in drawn.getvalue()


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> Run:
        raise KeyboardInterrupt

    saver = Saver(json=tmp_path / "new" / "t.json", markdown=tmp_path / "t.md", png=tmp_path / "t.png")
    rows = [
        Candidate(name="one", make=job(0.01)),
        Candidate(name="broken", make=fails(ValueError("no"))),
        Candidate(name="two", make=interrupted),
    ]
    with pytest.raises(KeyboardInterrupt):
        run_rows(rows, BENCH, console=Console(file=io.StringIO()), after_row=saver.after_row)
    one, broken = json.loads((tmp_path / "new" / "t.json").read_text())["rows"]
    assert one["build_seconds"] >= 0 and one["first_run_seconds"] >= 0.01 and one["total_seconds"] >= 4 * 0.01
    assert broken["error"] == "ValueError: no" and broken["total_seconds"] > 0
    assert (tmp_path / "t.md").read_text().startswith("**tiny, float32")
    assert (tmp_path / "t.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.rglob("*.part"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert re.fullmatch(r"one: build .+ m?s, first run .+ m?s, .+ m?s in all; median .+ m?s", said[0])
    assert re.fullmatch(r"broken: failed, .+ m?s in all: ValueError: no", said[1])


def test_a_folder_of_tables() -> None:
    saver = Saver.inside(Path("results"), "cpu-tiny-1.5b")
    assert [str(path) for path in saver.files] == [f"results/cpu-tiny-1.5b.{suffix}" for suffix in ("json", "md", "png")]


def test_json_reads_back(table: Table) -> None:
    text = table.to_json()
    assert Table.from_json(text) == table
    written = json.loads(text)
    assert written["rows"][0]["timing"]["median"] == table.rows[0].timing.median
    assert written["versions"] == {"torch": "9", "transformers": "8"} and written["date"]
    for row in written["rows"]:
        for field in ("first_token_seconds", "seconds_per_token", "first_token_ratio_to_floor", "token_ratio_to_floor"):
            row.pop(field)
    earlier = Table.from_json(json.dumps(written)).rows[0]  # as written before there were these fields
    assert earlier.timing == table.rows[0].timing and earlier.seconds_per_token is None
    with pytest.raises(InputError, match="format 99"):
        Table.from_json(text.replace('"format": 1', '"format": 99'))


PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["cpu-byte-llama", "h100-llama-3.2-1b-tensorrt", "h200-llama-3.2-1b-step", "h200-qwen3-0.6b"])
def test_published_tables_can_be_read_and_shown(name: str) -> None:
    table = Table.from_json((PUBLISHED / f"{name}.json").read_text())
    console = Console(file=io.StringIO(), width=80)
    console.print(table.to_rich())
    assert table.title() in table.to_markdown() and "TB/s" in console.file.getvalue()


def test_markdown(table: Table) -> None:
    lines = table.to_markdown().splitlines()
    assert lines[0] == "**tiny, float32, 3 tokens in, 4 out**"
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 6 and len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert rows[2].startswith("| slow | ") and "| 1.00x |" in rows[2]
    assert rows[4].startswith("| other \\| tokens | ") and "| no |" in rows[4]
    assert rows[5].startswith("| broken | failed | ")
    assert "- refused: no backend because it is missing install it" in lines
    assert "a test: copy 0.001 TB/s, matmul 0.001 TFLOP/s, both measured  " in lines
    assert lines[-1] == "`trilithon bench tiny`"
    assert "| first token | vs floor | per token | vs floor |" in rows[0]
    slow = table.rows[0]
    assert slow.first_token_seconds is not None and slow.seconds_per_token is not None
    assert f"| {show_seconds(slow.first_token_seconds)} | {slow.first_token_ratio_to_floor:.2f}x |" in rows[2]
    assert f"| {show_seconds(slow.seconds_per_token)} | {slow.token_ratio_to_floor:.2f}x |" in rows[2]


def test_seconds_are_shown_with_three_digits() -> None:
    shown = {
        0.000012: "0.0120 ms",
        0.0999: "99.9 ms",
        0.367: "367 ms",
        0.9999: "1.00 s",
        1.5: "1.50 s",
        12.34: "12.3 s",
        250.0: "250 s",
    }
    assert {seconds: show_seconds(seconds) for seconds in shown} == shown


def test_terminal_table_shows_every_row_and_takes_brackets_literally(table: Table) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(table.to_rich())
    drawn = console.file.getvalue()
    for row in table.rows:
        assert row.name in drawn
    assert "out of [memory]" in drawn and "floor of the job" in drawn
    assert max(map(len, drawn.splitlines())) <= 80
    first, per_token = table.rows[0].first_token_seconds, table.rows[0].seconds_per_token
    assert first is not None and per_token is not None
    (line,) = (line for line in drawn.splitlines() if show_seconds(first) in line)
    assert show_seconds(per_token) in line and "slow" not in line


def test_plot_is_a_png(table: Table, tmp_path: object) -> None:
    path = save_plot(table, f"{tmp_path}/new/chart.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
