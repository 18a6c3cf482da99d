"""TensorRT engines of a compiled model: what is saved of them, and what they are made of again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from mmap import ACCESS_READ, mmap
from typing import Any

from torch import Tensor

from trilithon.artefact.files import File
from trilithon.artefact.weights import BLOCK, Tensors
from trilithon.errors import CannotLower
from trilithon.lower.tensorrt.engine import from_data, to_data
from trilithon.lower.tensorrt.module import Split, TensorRTModule


def engines_of(lowered: Mapping[str, Any]) -> dict[str, TensorRTModule]:
    """The engines among lowered programs.

    Raises:
        CannotLower: a part of a program stays in PyTorch.
    """
    split = next((module for module in lowered.values() if isinstance(module, Split)), None)
    if split is not None:
        kept = ", ".join(f"{node} ({why})" for node, why in split.kept.items())
        raise CannotLower(
            "cannot save engines that run beside PyTorch",
            why=f"a part of the program stays in PyTorch: {kept}",
            todo="keep it in memory, or compile with backend='native'",
        )
    return {name: module for name, module in lowered.items() if isinstance(module, TensorRTModule)}


def describe(engines: Mapping[str, TensorRTModule], tensors: Tensors) -> tuple[dict[str, Any], dict[str, Any]]:
    """The engines without their plans, and for each the key of each weight that it reads."""
    readers = {
        name: {own: tensors.key(f"{name}.{own}", tensor) for own, tensor in module.weights.items()}
        for name, module in engines.items()
    }
    return {name: to_data(module.engine) for name, module in engines.items()}, readers


def plan_of(module: TensorRTModule) -> Iterator[bytes]:
    """The bytes of its plan."""
    if module.plan is not None:
        yield from (module.plan[start : start + BLOCK] for start in range(0, len(module.plan), BLOCK))
        return
    with module.engine.plan.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def read_engines(data: Mapping[str, Any], files: Mapping[str, File], kept: Mapping[str, Tensor]) -> dict[str, TensorRTModule]:
    """The engines; TensorRT reads a plan when it is first run."""
    made: dict[str, TensorRTModule] = {}
    for name, engine in data["engines"].items():
        weights = {own: kept[key] for own, key in data["weights"][name].items()}
        path = files[f"{name}.plan"].path
        with path.open("rb") as file:
            plan = mmap(file.fileno(), 0, access=ACCESS_READ)  # it stays what it is, should the folder be saved over
        made[name] = TensorRTModule(from_data(engine, path), weights=weights, plan=plan)
    return made
