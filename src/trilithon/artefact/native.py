"""Native programs of a compiled model: their graphs are saved, and lowered again where they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.artefact.weights import Tensors
from trilithon.compiled import Compiled
from trilithon.errors import CannotCache
from trilithon.lower.backend import Blueprint, blueprint_of
from trilithon.lower.graph_data import GraphData, from_data
from trilithon.lower.inputs import Axis, Input
from trilithon.options import Options
from trilithon.runtime.program import Program
from trilithon.spec.codec import decode, encode, readable_classes

CLASSES = (Input, Axis)
Lowered = Callable[..., Any]


def call_name(program: Program) -> str:
    return "call-" + "-".join(program.inputs)


def general_name(program: Program) -> str:
    return "general-" + "-".join(program.inputs)


def needs_general(program: Program) -> bool:
    """May it run the captured program?"""
    return bool(program.guards) and program.when_guard_fails == "general" and program.general is not None


def blueprints_of(compiled: Compiled) -> dict[str, Blueprint]:
    """What each program was lowered from, by the name of its file; empty where that was not kept.

    Raises:
        CannotLower: one of them is a program that no file can hold.
    """
    found = {} if isinstance(compiled.cached, CannotCache) else dict(compiled.cached.blueprints)
    for program in compiled.programs:
        if program.blueprint is None:
            continue
        found[call_name(program)] = program.blueprint
        if needs_general(program):
            assert isinstance(program.general, GraphModule)
            found[general_name(program)] = blueprint_of(program.general, "sequence", "general", ())
    for blueprint in found.values():
        if not isinstance(blueprint.graph, GraphData):
            raise blueprint.graph
    return found


def program_text(name: str, blueprint: Blueprint, tensors: Tensors) -> bytes:
    """A program as a file; its weights are added to `tensors`, and named in it by their keys."""
    assert isinstance(blueprint.graph, GraphData)
    weights = {own: tensors.key(f"{name}.{own}", tensor) for own, tensor in blueprint.graph.tensors.items()}
    data = {
        "role": blueprint.role,
        "name": blueprint.name,
        "inputs": encode(blueprint.inputs),
        "weights": weights,
        "nodes": blueprint.graph.nodes,
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


def read_blueprint(path: Path, kept: Mapping[str, Tensor]) -> Blueprint:
    """What `program_text` wrote.

    Args:
        kept: the weights, by key.
    """
    data = json.loads(path.read_bytes())
    if data["role"] not in ("sequence", "prompt", "step"):
        raise ValueError(f"{data['role']!r} is no role of a program")
    inputs = decode(data["inputs"], readable_classes(*CLASSES))
    tensors = {own: kept[key] for own, key in data["weights"].items()}
    return Blueprint(data["role"], data["name"], inputs, GraphData(data["nodes"], tensors))


def lower_again(blueprint: Blueprint, backend: str, options: Options, device: torch.device) -> Lowered:
    assert isinstance(blueprint.graph, GraphData)
    return blueprint.lower(backend, options, blueprint.graph.tensors, device)


def as_captured(blueprint: Blueprint, device: torch.device) -> GraphModule:
    """A general program, which runs as it is."""
    assert isinstance(blueprint.graph, GraphData)
    return from_data(blueprint.graph.nodes, blueprint.graph.tensors, device)
