"""The tables of a sweep, one for each batch and context: as JSON, Markdown and for the terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as RichTable

from trilithon.bench.table import FORMAT, Row, Table, markdown_table, show_seconds, show_times
from trilithon.errors import InputError

_CELLS = ("batch x context", "", "1st token", "vs floor", "a step", "vs floor", "tokens/s", "peak")


@dataclass(frozen=True)
class Sweep:
    """One model on one machine, at several batches and contexts.

    Attributes:
        tables: one a batch and context, in the order of these.
        last: the row that was measured last, in words.
    """

    tables: tuple[Table, ...]
    last: str = ""

    def adding(self, table: Table) -> Sweep:
        """With one more table of one row; the first row of the same batch and context is its baseline."""
        (row,), at = table.rows, _place(table)
        last = f"batch {table.batch}, context {show_tokens(context_of(table))}: {row.summary()}"
        same = [known for known in self.tables if _place(known) == at]
        if same:
            (known,) = same
            table = replace(known, rows=(*known.rows, replace(row, ratio_to_baseline=_ratio(known.rows[0], row))))
        others = (known for known in self.tables if _place(known) != at)
        return Sweep(tuple(sorted((*others, table), key=_place)), last)

    def summary(self) -> str:
        """One line on the row that was measured last."""
        return self.last

    def to_json(self) -> str:
        """All tables, each as `Table.to_json` writes it."""
        return json.dumps({"format": FORMAT, "tables": [json.loads(table.to_json()) for table in self.tables]}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Sweep:
        """Read what `to_json` wrote.

        Raises:
            InputError: the text is of another format, or no sweep.
        """
        tables = json.loads(text).get("tables")
        if tables is None:
            raise InputError("this is no sweep", why="it holds no tables", todo="read it with Table.from_json")
        return cls(tuple(Table.from_json(json.dumps(table)) for table in tables))

    def title(self) -> str:
        """One line: model, dtype and new tokens."""
        table = self.tables[0]
        return f"{table.model}, {table.dtype}, static caches, {table.new_tokens} new tokens at each batch and context"

    def footing(self) -> tuple[str, ...]:
        """What the numbers rest on, and the failures, a line each."""
        table = self.tables[0]
        lines = [line for line in table.footing() if not line.startswith(("floor of the job", "size: "))]
        failed = ((t, row) for t in self.tables for row in t.rows if row.error)
        errors = (
            f"{row.name}, batch {t.batch}, context {show_tokens(context_of(t))}: {' '.join(row.error.split())}"
            for t, row in failed
        )
        return (*errors, *lines)

    def to_markdown(self) -> str:
        footing = "  \n".join(self.footing())
        return f"**{self.title()}**\n\n{markdown_table(_CELLS, self._cells())}\n\n{footing}\n"

    def to_rich(self) -> RichTable:
        """The same for a terminal of 80 characters."""
        drawn = RichTable(
            title=escape(self.title()),
            caption=escape("\n".join(self.footing())),
            caption_justify="left",
            caption_style="dim",
            box=SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
        )
        for heading in _CELLS:
            above = heading.replace(" x ", " x\n")
            drawn.add_column(above, justify="right" if heading else "left", no_wrap=bool(heading), vertical="bottom")
        for cells in self._cells():
            drawn.add_row(*map(escape, cells), style="red" if "failed" in cells else "")
        return drawn

    def _cells(self) -> list[list[str]]:
        return [_cells(table, row) for table in self.tables for row in table.rows]


def context_of(table: Table) -> int:
    """Tokens of a prompt when the job has ended."""
    return table.prompt_tokens + table.new_tokens


def show_tokens(number: int) -> str:
    """As it is written on a command line: 2k, 1000."""
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)


def short_name(row: str) -> str:
    """All rows of a sweep have static caches, and its title says so."""
    return row.removesuffix(" static cache")


def step_floor(table: Table) -> float:
    """Least seconds of a decode step, on average over the job."""
    return table.floor.decode_seconds / (table.new_tokens - 1)


def _ratio(baseline: Row, row: Row) -> float | None:
    if baseline.timing is None or row.timing is None:
        return None
    return baseline.timing.median / row.timing.median


def _place(table: Table) -> tuple[int, int]:
    return table.batch, context_of(table)


def _cells(table: Table, row: Row) -> list[str]:
    at = [f"{table.batch} x {show_tokens(context_of(table))}", short_name(row.name)]
    if row.timing is None:
        return [*at, "failed", "", "", "", "", ""]
    first, step = row.first_token_seconds, row.seconds_per_token
    return [
        *at,
        "" if first is None else show_seconds(first),
        show_times(row.first_token_ratio_to_floor),
        "" if step is None else show_seconds(step),
        show_times(row.token_ratio_to_floor),
        "" if step is None else f"{table.batch / step:,.0f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB",
    ]
