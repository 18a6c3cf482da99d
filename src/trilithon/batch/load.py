"""A worker from a compiled model, or from the folder of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trilithon.artefact import load, tokenizer_folder
from trilithon.batch.worker import Worker
from trilithon.capture.hf import load_tokenizer
from trilithon.compiled import Compiled
from trilithon.errors import InputError


@dataclass(frozen=True)
class Setup:
    """How a worker answers.

    Attributes:
        arguments: of `generate`, for all lines; before them come those that the model gives.
        stop: strings that end a text.
        seed: see `Worker`.
        rows: how many lines at once; None = as many as the cache has rows. No answer depends on it.
    """

    arguments: Mapping[str, Any]
    stop: tuple[str, ...] = ()
    seed: int = 0
    rows: int | None = None

    def decides(self) -> dict[str, Any]:
        """Plain data: all that an answer depends on."""
        return {"arguments": dict(self.arguments), "stop": list(self.stop), "seed": self.seed}

    def worker(self, compiled: Compiled, tokenizer: Any | None) -> Worker:
        """
        Raises:
            CannotCache: the model has no KV cache.
            CapacityExceeded: it has too few rows.
            InputError: it is an encoder-decoder, or a setting needs a tokenizer and there is none.
        """
        if compiled.seq2seq is not None:
            raise InputError(
                "a batch run takes no encoder-decoder",
                why="what its encoder read stands beside the cache for all rows together",
                todo="use generate with several rows",
            )
        if self.stop and tokenizer is None:
            raise InputError("stop strings were given without a tokenizer", why="ids are matched by their text")
        stops = {"stop_strings": list(self.stop), "tokenizer": tokenizer} if self.stop else {}
        arguments = {**compiled.defaults, **self.arguments, **stops}
        return Worker(compiled.decoder, tokenizer, arguments, self.seed, self.rows)

    def load(self, folder: str, device: str | None) -> Worker:
        """As `worker`, from what `Compiled.save` wrote.

        Raises:
            InputError: see `trilithon.load`.
        """
        compiled, where = load(folder, device), tokenizer_folder(folder)
        return self.worker(compiled, None if where is None else load_tokenizer(str(where)))
