"""The manifest: the one file of an artefact with a fixed name. It lists the others, and is written last."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trilithon.errors import InputError

MANIFEST = "trilithon.json"
FORMAT = 7  # raise it when a field is added, removed or changes its meaning
HOW = "write one with trilithon compile MODEL --out FOLDER, or Compiled.save(FOLDER)"
AGAIN = "nothing of it was used. Copy it again from where it came, or compile and save it again"
NAME = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9_][A-Za-z0-9._-]*")  # of a file; one folder deep at most
SHA256 = re.compile(r"[0-9a-f]{64}")
FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "model": dict,
    "versions": dict,
    "target": dict,
    "options": dict,
    "verified": dict,
    "proofs": list,
    "report": dict,
    "max_tokens": int,
    "defaults": dict,
    "engines": dict,
    "weights": dict,
    "native": dict,
    "programs": list,
    "cache": dict,
    "tuned": dict,
    "files": dict,
    "digest": str,
}


def render(data: Mapping[str, Any]) -> str:
    """The text of a manifest: one text for each content, so that any other is a changed one.

    Args:
        data: without its digest.
    """
    plain = json.loads(json.dumps(data, allow_nan=False))
    return _text(plain | {"digest": _digest(plain)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artefact, checked: its digest, and the type of each of its fields.

    Raises:
        InputError: there is none, it is of another format, or it was changed.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder} holds no compiled model", why="there is no such folder", todo=HOW)
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{folder} holds no compiled model", why=f"there is no {MANIFEST} in it", todo=HOW)
    try:
        text = path.read_bytes().decode()
        data = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # of the JSON, or of its bytes
        raise damaged(path, f"it cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(data, dict) or type(data.get("format")) is not int:
        raise damaged(path, "it has no format number")
    if data["format"] != FORMAT:
        raise InputError(
            f"cannot read {path}",
            why=f"its format is {data['format']}, this version reads {FORMAT}",
            todo="compile the model again with this version, or load it with the version that wrote it",
        )
    given = data.pop("digest", None)
    if given != _digest(data) or text != _text(data | {"digest": given}):
        raise damaged(path, "it is not as it was written: its text and its digest do not agree")
    _check_fields(path, data | {"digest": given})
    return data


def damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged or was changed", why=why, todo=AGAIN)


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _check_fields(path: Path, data: Mapping[str, Any]) -> None:
    for name, kind in FIELDS.items():
        if type(data.get(name)) is not kind:
            raise damaged(path, f"its field {name} is missing or no {kind}")
    if set(data) - set(FIELDS):
        raise damaged(path, f"it has the unknown field {min(set(data) - set(FIELDS))}")
    for name, about in data["files"].items():
        if not isinstance(about, dict) or about.keys() != {"file", "bytes", "sha256"}:
            raise damaged(path, f"it does not say what {name} is")
        file, size, digest = about["file"], about["bytes"], about["sha256"]
        if not isinstance(file, str) or not NAME.fullmatch(file) or ".." in file:
            raise damaged(path, f"{name} is said to be {file!r}, which is no name of a file of this folder")
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not SHA256.fullmatch(digest):
            raise damaged(path, f"size or hash of {name} is none")
