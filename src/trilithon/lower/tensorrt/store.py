"""Engines kept in a folder, and found again by all that they were built from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch._ops import OpOverload
from torch.fx import GraphModule

from trilithon.lower.inputs import Input
from trilithon.lower.products import attribute
from trilithon.lower.tensorrt.engine import Engine, from_data, to_data
from trilithon.lower.tensorrt.library import version
from trilithon.lower.tensorrt.weights import is_bound
from trilithon.options import Options
from trilithon.spec.codec import data_hash, source_digest

BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError)
log = logging.getLogger(__name__)


def engine_key(gm: GraphModule, inputs: Sequence[Input], target: str, options: Options, exact: int = 0) -> str:
    """A hash of the graph, of the weights that are part of the engine, the sizes, the target, and of the code that builds."""
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        digest.update("".join(f"{len(str(part))}:{part}" for part in parts).encode())

    add(version(), source_digest("lower", "spec", "rewrite"), target, options.attention, exact, *inputs)
    for node in gm.graph.nodes:
        own = isinstance(node.target, (str, OpOverload))  # any other function prints its address
        called = node.target if own else f"{node.target.__module__}.{node.target.__name__}"
        add(node.op, node.name, called, node.args, node.kwargs)
        if node.op == "get_attr":
            value = attribute(gm, node)
            add(value.dtype, tuple(value.shape), "" if is_bound(gm, node) else data_hash(value))
    return digest.hexdigest()


def find_or_build(folder: Path, key: str, build: Callable[[Path], Engine]) -> Engine:
    """The engine of this key, built into the folder where it is not there. A broken one is built again, with a warning."""
    plan, about = folder / f"{key}.plan", folder / f"{key}.json"
    if plan.exists() and about.exists():
        try:
            return from_data(json.loads(about.read_text(encoding="utf-8")), plan)
        except BROKEN as error:
            log.warning("an engine in %s cannot be read and is built again: %s: %s", folder, type(error).__name__, error)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".new-{os.getpid()}-{key}.plan"
    engine = build(fresh)
    os.replace(fresh, plan)
    about.write_text(json.dumps(to_data(engine), ensure_ascii=False), encoding="utf-8")
    return from_data(to_data(engine), plan)
