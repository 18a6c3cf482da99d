"""The table of a benchmark: its rows, as JSON, Markdown and for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as RichTable

from trilithon.bench.roofline import Floor, Machine
from trilithon.bench.timing import Timing
from trilithon.errors import InputError

FORMAT = 1  # of the JSON; raise it when a field changes its meaning


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one way of doing the job took.

    Attributes:
        tokens: new tokens of all prompts together, a run.
        timing: None when it failed; then `error` says why.
        build_seconds: loading and compiling, before the first run.
        first_run_seconds: the first run, which is not in `timing`; programs that compile themselves do so here.
        total_seconds: everything that was done for this row, also where it failed.
        ratio_to_baseline: the first row's median over this one's: 2 is twice as fast.
        ratio_to_floor: this row's median over the floor: 1 is as fast as the machine allows.
        tokens_per_second: `tokens` over the median, prefill included.
        first_token_seconds: median of the same call with one new token: what the prompt takes.
        seconds_per_token: what each further token takes, one of every prompt at a time: the rest of the median, over the
            number of these tokens; None where there is one new token only.
        first_token_ratio_to_floor, token_ratio_to_floor: these two over the floor of prefill and of a decode step.
        peak_ratio_to_size: `peak_bytes` over weights and cache; None on a CPU, where the peak is the whole process's.
        tokens_equal_baseline: None for the baseline itself, or when one of the two failed.
    """

    name: str
    tokens: int
    timing: Timing | None = None
    build_seconds: float | None = None
    first_run_seconds: float | None = None
    total_seconds: float | None = None
    ratio_to_baseline: float | None = None
    ratio_to_floor: float | None = None
    tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    seconds_per_token: float | None = None
    first_token_ratio_to_floor: float | None = None
    token_ratio_to_floor: float | None = None
    peak_ratio_to_size: float | None = None
    tokens_equal_baseline: bool | None = None
    note: str = ""
    error: str = ""

    def summary(self) -> str:
        """One line: what it took to build, to run first and in all, or why it failed."""
        total = f"{show_seconds(self.total_seconds or 0)} in all"
        if self.timing is None or self.build_seconds is None or self.first_run_seconds is None:
            return f"{self.name}: failed, {total}: {' '.join(self.error.split())}"
        first = f"build {show_seconds(self.build_seconds)}, first run {show_seconds(self.first_run_seconds)}"
        return f"{self.name}: {first}, {total}; median {show_seconds(self.timing.median)}"

    @property
    def peak_bytes(self) -> int | None:
        """See `Timing.peak_bytes`."""
        return None if self.timing is None else self.timing.peak_bytes


@dataclass(frozen=True, kw_only=True)
class Table:
    """One job on one machine, done in several ways; the first row is the baseline.

    Attributes:
        dtype: of weights and cache, as text.
        batch: prompts at a time.
        prompt_tokens, new_tokens: of each prompt.
        weight_bytes, cache_bytes: of the model, and of the keys and values seen when the job ends.
        command: the line that repeats the table.
        date: when it was measured, ISO 8601.
    """

    model: str
    machine: Machine
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    floor: Floor
    rows: tuple[Row, ...]
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    weight_bytes: int | None = None
    cache_bytes: int | None = None

    def to_json(self) -> str:
        """All fields, and for each row median, minimum and maximum, as indented JSON."""
        data: dict[str, Any] = {"format": FORMAT} | asdict(self)
        data["floor"]["seconds"] = self.floor.seconds
        for row, written in zip(self.rows, data["rows"], strict=True):
            if row.timing is not None:
                written["timing"] |= {name: getattr(row.timing, name) for name in ("median", "minimum", "maximum")}
        return json.dumps(data, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Table:
        """Read what `to_json` wrote.

        Raises:
            InputError: the text is of another format.
        """
        data: dict[str, Any] = json.loads(text)
        found = data.pop("format", None)
        if found != FORMAT:
            raise InputError(
                f"cannot read a benchmark table of format {found}",
                why=f"this version reads format {FORMAT}",
                todo="measure again, or read it with the version that wrote it",
            )
        data["machine"] = Machine(**data["machine"])
        data["floor"].pop("seconds")
        data["floor"] = Floor(**data["floor"])
        data["rows"] = tuple(Row(**row | {"timing": _timing(row["timing"])}) for row in data["rows"])
        return cls(**data)

    def summary(self) -> str:
        """One line on the row that was measured last."""
        return self.rows[-1].summary()

    def title(self) -> str:
        """One line: model, dtype and job."""
        prompts = f"{self.batch} x " if self.batch > 1 else ""
        return f"{self.model}, {self.dtype}, {prompts}{self.prompt_tokens} tokens in, {self.new_tokens} out"

    def footing(self) -> tuple[str, ...]:
        """What the numbers rest on, a line each: machine and rates, floor, versions, command."""
        made_with = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = (
            f"{self.machine.name}: copy {self.machine.bytes_per_second / 1e12:.3g} TB/s, "
            f"matmul {self.machine.flops_per_second / 1e12:.3g} TFLOP/s, both measured",
            f"floor of the job {show_seconds(self.floor.seconds)}: prefill {show_seconds(self.floor.prefill_seconds)}, "
            f"decode {show_seconds(self.floor.decode_seconds)}",
            ""
            if self.weight_bytes is None or self.cache_bytes is None
            else f"size: weights {show_bytes(self.weight_bytes)}, cache {show_bytes(self.cache_bytes)}",
            made_with,
            self.command,
        )
        return tuple(line for line in lines if line)

    def remarks(self) -> tuple[str, ...]:
        """A line for each row that has an error or a note."""
        return tuple(f"{row.name}: {_one_line(row.error or row.note)}" for row in self.rows if row.error or row.note)

    def to_markdown(self) -> str:
        """A Markdown table with its title and footing."""
        table = markdown_table(_CELLS, [_cells(row) for row in self.rows])
        remarks = [f"- {remark}" for remark in self.remarks()]
        footing = [*self.footing()[:-1], f"`{self.command}`"] if self.command else list(self.footing())
        blocks = [f"**{self.title()}**", table, "\n".join(remarks), "  \n".join(footing)]
        return "\n\n".join(block for block in blocks if block) + "\n"

    def to_rich(self) -> RichTable:
        """The same for a terminal of 80 characters: `rich.print(table.to_rich())`."""
        caption = escape("\n".join((*self.remarks(), *self.footing())))
        table = RichTable(
            title=escape(self.title()),
            caption=caption,
            caption_justify="left",
            caption_style="dim",
            box=SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
        )
        table.add_column("")
        for heading, below in zip(_CELLS[1:_NARROW], _SECOND_LINE[1:], strict=True):
            table.add_column(f"{heading}\n[dim]{below}[/]", justify="right", no_wrap=True, vertical="bottom")
        for row in self.rows:
            cells = zip(_cells(row)[:_NARROW], _second_line(row), strict=True)
            lines = (f"{escape(cell)}\n[dim]{below}[/]" for cell, below in cells)
            table.add_row(*lines, style="red" if row.error else "")
        return table


_CELLS = ["", "median", "min", "max", "vs first", "tokens/s", "vs floor"]
_NARROW = len(_CELLS)  # columns of a terminal table: it must fit 80 characters
_SECOND_LINE = ["", "1st token", "vs floor", "a token", "vs floor", "peak", "vs size"]  # what stands below these in a terminal
_CELLS += ["first token", "vs floor", "per token", "vs floor", "peak", "vs size", "same tokens", "first result"]


def _cells(row: Row) -> list[str]:
    if row.timing is None:
        return [row.name, "failed"] + [""] * (len(_CELLS) - 2)
    same = {None: "", True: "yes", False: "no"}[row.tokens_equal_baseline]
    return [
        row.name,
        show_seconds(row.timing.median),
        show_seconds(row.timing.minimum),
        show_seconds(row.timing.maximum),
        show_times(row.ratio_to_baseline),
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.1f}",
        show_times(row.ratio_to_floor),
        *_token_cells(row),
        *_peak_cells(row),
        same,
        show_seconds((row.build_seconds or 0) + (row.first_run_seconds or 0)),
    ]


def _second_line(row: Row) -> list[str]:
    same = {None: "", True: "same tokens", False: "tokens differ"}[row.tokens_equal_baseline]
    return [same, *_token_cells(row), *_peak_cells(row)]


def _token_cells(row: Row) -> list[str]:
    """The first token, over its floor, a further token, over its floor."""
    first, further = (
        "" if seconds is None else show_seconds(seconds) for seconds in (row.first_token_seconds, row.seconds_per_token)
    )
    return [first, show_times(row.first_token_ratio_to_floor), further, show_times(row.token_ratio_to_floor)]


def _peak_cells(row: Row) -> list[str]:
    return ["" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB", show_times(row.peak_ratio_to_size)]


def show_bytes(number: int) -> str:
    """Two decimals with a unit that suits: 2.47 GB, 6.29 MB."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def show_seconds(seconds: float) -> str:
    """Three digits with a unit that suits: 367 ms, 1.53 s."""
    number, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1e3, "ms")
    return f"{number:.0f} {unit}" if number >= 99.95 else f"{number:#.3g} {unit}"


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, numbers aligned to the right; the column without a heading holds names."""
    body = [headings, ["---:" if heading else "---" for heading in headings], *lines]
    return "\n".join("| " + " | ".join(_one_line(cell) for cell in line) + " |" for line in body)


def show_times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _timing(data: dict[str, Any] | None) -> Timing | None:
    return None if data is None else Timing(tuple(data["seconds"]), data["peak_bytes"], data.get("outside_bytes"))
