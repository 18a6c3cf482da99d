"""Saved models, and what may be done to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trilithon.artefact.manifest import MANIFEST, render


def manifest_of(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return data


def file_of(folder: Path, name: str) -> Path:
    """Where the file lies that the manifest calls so."""
    return folder / manifest_of(folder)["files"][name]["file"]


def names_of(folder: Path) -> set[str]:
    """What the manifest calls the files of a folder, each of which it must list."""
    listed = manifest_of(folder)["files"]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {MANIFEST, *(about["file"] for about in listed.values())}
    return set(listed)


def change(folder: Path, act: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest, and give it the digest that belongs to it, as one would who means it."""
    data = manifest_of(folder)
    del data["digest"]
    act(data)
    (folder / MANIFEST).write_text(render(data))
