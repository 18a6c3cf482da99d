"""The model of `trilithon batch`: what was compiled and saved, or what is compiled for this run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trilithon.artefact import is_artefact
from trilithon.artefact.manifest import MANIFEST
from trilithon.batch.load import Setup
from trilithon.batch.worker import Worker
from trilithon.capture.hf import load_tokenizer
from trilithon.cli.common import load
from trilithon.compiled import Compiled
from trilithon.compiler import compile as compile_model
from trilithon.errors import InputError
from trilithon.options import Options


@dataclass(frozen=True)
class BatchModel:
    """The options of the command line that are about the model.

    Raises:
        InputError: it was compiled and saved, and an option would have it compiled otherwise.
    """

    name: str
    backend: str = "auto"
    dtype: str | None = None
    device: str | None = None
    layers: int | None = None
    seed: int = 0
    max_tokens: int | None = None
    cache_dtype: str | None = None
    rows: int = 8
    proof_cache: bool = True

    def __post_init__(self) -> None:
        of_models = {"backend": "--backend", "dtype": "--dtype", "layers": "--layers"}
        of_models |= {"max_tokens": "--max-tokens", "cache_dtype": "--cache-dtype"}
        defaults = {field.name: field.default for field in fields(self)}
        given = [option for name, option in of_models.items() if getattr(self, name) != defaults[name]]
        if given and is_artefact(self.name):
            raise InputError(
                f"{given[0]} was given with a compiled model", why="it runs as it was compiled", todo="leave it out"
            )

    def identity(self) -> dict[str, Any]:
        """Plain data by which a run that goes on knows its model."""
        if is_artefact(self.name):
            return {"sha256": hashlib.sha256((Path(self.name) / MANIFEST).read_bytes()).hexdigest()}
        names = ("name", "backend", "dtype", "layers", "seed", "max_tokens", "cache_dtype")
        return {name: getattr(self, name) for name in names}

    def worker(self, setup: Setup) -> Worker:
        """One in this process."""
        if is_artefact(self.name):
            return setup.load(self.name, self.device)
        return setup.worker(self._compiled(), load_tokenizer(self.name))

    def folder(self, output: Path) -> str:
        """What workers load: the model as it was saved, or one that is compiled and saved now, beside the output."""
        if is_artefact(self.name):
            return str(Path(self.name).resolve())
        digest = hashlib.sha256(json.dumps([self.identity(), self.rows]).encode()).hexdigest()
        made = output.with_name(f"{output.name}.{digest[:12]}.artefact")
        if not is_artefact(made):
            self._compiled().save(made, load_tokenizer(self.name))
        return str(made.resolve())

    def _compiled(self) -> Compiled:
        module = load(self.name, self.dtype, self.device, self.layers, self.seed)
        options = Options(
            proof_cache=self.proof_cache,
            cache_dtype=self.cache_dtype,  # type: ignore[arg-type]
            max_batch=self.rows,
        )
        return compile_model(module, max_tokens=self.max_tokens, backend=self.backend, options=options)
