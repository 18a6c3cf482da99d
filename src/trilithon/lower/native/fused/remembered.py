"""What was found of a program is kept on this machine, beside the kernels, and found anew where anything it depends on differs.

The key holds all of that: the graph, the sizes of its weights, its kernels with their settings, the GPU, the versions of
compilers, and the source of this package. So a stale entry is never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cache
from operator import attrgetter
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.folders import replace_file
from trilithon.lower.native.fused.launch import kernel_folder
from trilithon.lower.native.fused.tune import triton_version
from trilithon.lower.native.layers import words
from trilithon.spec.codec import source_digest

log = logging.getLogger(__name__)


class Remembered:
    """One fact.

    Args:
        what: kind of fact, the end of its file's name.
        device: None = it is the same for all devices.
        known: what it depends on beside versions; of modules the text, sizes and settings, not the numbers.
    """

    def __init__(self, what: str, device: torch.device | None, *known: Any) -> None:
        gpu = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else str(device)
        self._source = source()
        by = gpu, torch.__version__, torch.version.cuda, triton_version(), self._source
        parts = [text_of(x) if isinstance(x, GraphModule) else x for x in known]
        self._path: Path = kernel_folder() / f"{_digest(repr((by, parts)))[:32]}.{what}"

    def read(self) -> Any:
        """None where nothing is kept, or what is kept is not what was written."""
        try:
            digest, _, text = self._path.read_text().partition("\n")
            return json.loads(text) if digest == _digest(text) else None
        except (OSError, ValueError):
            return None

    def keep(self, fact: Any) -> None:
        if self._source is None:  # which may change
            return
        try:
            text = json.dumps(fact, separators=(",", ":"))
            replace_file(self._path, f"{_digest(text)}\n{text}")
        except (OSError, TypeError) as error:
            log.warning("what was found of a program is not kept: %s", error)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def source() -> str | None:
    """A hash of what such facts are found by; None where there is no source."""
    return source_digest("spec", "rewrite", "lower/native")


def text_of(gm: GraphModule) -> Any:
    """What a program does, with tensors of which sizes; no names, which hang on what else was made before."""
    nodes = [n for n in gm.graph.nodes if n.op in ("get_attr", "call_module")]
    places = {name: i for i, name in enumerate(dict.fromkeys(str(n.target) for n in nodes))}
    held = [(places[str(n.target)], _state(attrgetter(str(n.target))(gm))) for n in nodes]
    return [(_called(target), given) for target, given in words(gm.graph.nodes)], held


def _called(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}" if isinstance(target, FunctionType) else str(target)


def _state(held: Any) -> Any:
    if isinstance(held, Tensor):
        return tuple(held.shape), held.stride(), str(held.dtype)
    if isinstance(held, GraphModule):
        return text_of(held)
    return type(held).__name__, sorted((k, repr(v)) for k, v in vars(held).items() if not k.startswith("_"))
