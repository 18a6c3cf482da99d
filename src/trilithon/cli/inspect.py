"""`trilithon inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trilithon.cli.common import app


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="What trilithon compile, or Compiled.save, wrote.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is in a compiled model, and whether its files are as they were written. Runs none of it.

    The exit code is 1 if one is not.
    """
    from json import dumps

    from trilithon.artefact.inspection import as_text, is_whole, saved_report
    from trilithon.artefact.inspection import inspect as inspect_folder

    found = inspect_folder(folder)
    if json:
        print(dumps(found, indent=2))
    else:
        print(as_text(found), saved_report(folder), sep="\n\n")
    if not is_whole(found):
        raise typer.Exit(1)
