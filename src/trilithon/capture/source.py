"""Where a model came from: what an artefact says of it."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

_LOADED: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def loaded(model: nn.Module, kind: str, name: str, revision: str | None = None) -> nn.Module:
    """Remember the name under which a model was loaded; the model."""
    _LOADED[model] = {"kind": kind, "id": name, "revision": revision}
    return model


def source_of(model: nn.Module | ExportedProgram) -> dict[str, Any]:
    """Plain data: `kind` ("preset", "hub", "folder", "module" or "exported program"), `id` and `revision` where it came by
    name, `class`, and the `config` of a Hugging Face model.

    A folder is called by its last name: where it lies on this machine says nothing to others.
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, ExportedProgram):
        return {"kind": "exported program", "id": None, "revision": None, "class": kind, "config": None}
    config = getattr(model, "config", None)
    named = _LOADED.get(model) or _from_config(config)
    return {**named, "class": kind, "config": _plain(config)}


def _from_config(config: Any) -> dict[str, Any]:
    """Of a model that the user loaded with transformers, its config knows the name and the commit."""
    name, revision = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if not isinstance(name, str) or not name:
        return {"kind": "module", "id": None, "revision": None}
    if isinstance(revision, str):
        return {"kind": "hub", "id": name, "revision": revision}
    return {"kind": "folder", "id": Path(name).name, "revision": None}


def _plain(config: Any) -> dict[str, Any] | None:
    """A transformers config as JSON would hold it; None for others."""
    if not hasattr(config, "to_json_string"):
        return None
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in found.items() if name != "_name_or_path"}
