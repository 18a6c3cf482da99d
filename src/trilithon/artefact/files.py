"""The files of an artefact: opened only where they are as the manifest says."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trilithon.artefact.digest import digest_of
from trilithon.artefact.manifest import damaged, read_manifest
from trilithon.errors import InputError

THREADS = 4  # files at a time
State = Literal["ok", "missing", "truncated", "damaged", "no regular file", "cannot be read"]


@dataclass(frozen=True)
class File:
    """One file of an artefact.

    Attributes:
        name: what the programs call it, e.g. "prefill.plan".
        folder: of the artefact.
        path: where it is; its name holds a part of its hash.
        size: bytes that it must have.
        sha256: hash that it must have, as in `artefact.digest`.
    """

    name: str
    folder: Path
    path: Path
    size: int
    sha256: str


def files_of(folder: Path, manifest: Mapping[str, Any]) -> dict[str, File]:
    """What the manifest lists, by name."""
    listed = manifest["files"].items()
    return {name: File(name, folder, folder / about["file"], about["bytes"], about["sha256"]) for name, about in listed}


def bytes_of(folder: Path) -> int:
    """Of all files of an artefact, and of no other that lies there."""
    return sum(file.size for file in files_of(folder, read_manifest(folder)).values())


def check_files(files: Mapping[str, File], hashes: bool) -> None:
    """Check each file's kind and size, and its hash where that is asked for; several are read at a time.

    Raises:
        InputError: one is not as the manifest says.
    """
    for file, state in states(files, hashes):
        if state == "missing":
            raise InputError(f"{file.path} is missing", why="the manifest lists it", todo="copy the folder again, whole")
        if state != "ok":
            raise damaged(file.path, _why(file, state))


def states(files: Mapping[str, File], hashes: bool) -> Iterator[tuple[File, State]]:
    """Each file and how it is found."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = [(file, pool.submit(state_of, file, hashes)) for file in files.values()]
        yield from ((file, future.result()) for file, future in found)


def state_of(file: File, hashes: bool) -> State:
    """Links are not followed: all that belongs to an artefact lies in its folder."""
    if file.path.parent != file.folder and file.path.parent.is_symlink():
        return "no regular file"
    try:
        handle = os.open(file.path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "no regular file" if file.path.is_symlink() else "cannot be read"
    with os.fdopen(handle, "rb", buffering=0) as opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode):
            return "no regular file"
        if status.st_size != file.size:
            return "truncated" if status.st_size < file.size else "damaged"
        try:
            return "damaged" if hashes and digest_of(opened, file.size) != file.sha256 else "ok"
        except OSError:
            return "cannot be read"


def _why(file: File, state: State) -> str:
    texts: dict[State, str] = {
        "truncated": f"it has fewer than {file.size} bytes",
        "damaged": f"its size or its hash is not the saved one, {file.size} bytes and {file.sha256[:16]}...",
        "no regular file": "it is a link or no regular file, and an artefact is read from its own folder alone",
        "cannot be read": "the system cannot read it",
    }
    return texts[state]
