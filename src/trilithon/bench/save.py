"""Keep the table of a benchmark, or the tables of a sweep, on disk while they grow."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from trilithon.bench.plot import save_plot
from trilithon.bench.sweep_plot import save_sweep_plot
from trilithon.bench.sweep_table import Sweep
from trilithon.bench.table import Table


@dataclass(frozen=True)
class Saver:
    """Where a table is saved; None = not there.

    Attributes:
        json, markdown, png: written after each row, so that an interrupted run keeps what it measured.
    """

    json: Path | None = None
    markdown: Path | None = None
    png: Path | None = None

    def after_row(self, table: Table | Sweep) -> None:
        """Save the table so far, and where stdout is no terminal say on stderr what its last row took."""
        if self.json is not None:
            write_whole(self.json, table.to_json())
        if self.markdown is not None:
            write_whole(self.markdown, table.to_markdown())
        if self.png is not None:
            save_plot(table, self.png) if isinstance(table, Table) else save_sweep_plot(table, self.png)
        if not sys.stdout.isatty():
            print(table.summary(), file=sys.stderr, flush=True)

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.json, self.markdown, self.png) if path is not None]

    @classmethod
    def inside(cls, folder: Path, stem: str) -> Saver:
        """All kinds of file: `<folder>/<stem>.json` and so on."""
        return cls(*(folder / f"{stem}.{suffix}" for suffix in ("json", "md", "png")))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever looks finds the old one or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def device_stem(device: torch.device) -> str:
    """A file name for a device: "cpu", or the GPU's name such as "nvidia-h200"."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
