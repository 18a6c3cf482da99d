"""The command line: `trilithon explain | compile | export | inspect | generate | batch | bench | demo | doctor`.

Nothing heavy is imported before a command runs, so that `trilithon --help` answers at once.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Annotated

import typer

from trilithon.cli.batch import batch
from trilithon.cli.bench import PRESETS, bench, demo
from trilithon.cli.common import app
from trilithon.cli.compile import compile
from trilithon.cli.explain import explain
from trilithon.cli.export import export
from trilithon.cli.generate import generate
from trilithon.cli.inspect import inspect
from trilithon.cli.ranks import joined, text_of
from trilithon.errors import TrilithonError

__all__ = ["PRESETS", "app", "batch", "bench", "compile", "demo", "doctor", "explain", "export", "generate", "inspect", "main"]


def main() -> None:
    """Run the command line; an error of Trilithon's is its text on stderr and exit code 1."""
    with joined():
        try:
            app()
        except TrilithonError as error:
            print(text_of(error), file=sys.stderr)
            sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        print(f"trilithon {metadata.version('trilithon')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices, and what each backend and integration can do here, or why it cannot."""
    from json import dumps

    from trilithon.bench.doctor import as_text, diagnose

    found = diagnose()
    print(dumps(found, indent=2) if json else as_text(found))
