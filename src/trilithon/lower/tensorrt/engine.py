"""Build an engine from a network, for a GPU that need not be here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from trilithon.errors import CannotLower
from trilithon.lower.inputs import Axis, Input
from trilithon.lower.tensorrt.capability import SiteLowering
from trilithon.lower.tensorrt.kernels import Layer, check_kernels, layer_table
from trilithon.lower.tensorrt.library import check_builder, errors_since, library, mark, messages_since
from trilithon.lower.tensorrt.network import Network
from trilithon.spec.codec import decode, encode, readable_classes

# Compute capability of a GPU -> the target whose engines it runs. SM90 and SM100 run those of SM80: TensorRT-RTX 1.5 has
# no target of theirs, and its CURRENT gave wrong numbers on an H200 (docs/backends.md).
TARGETS = {(7, 5): "sm75", (8, 0): "sm80", (8, 6): "sm86", (8, 7): "sm86", (8, 9): "sm89", (9, 0): "sm80", (10, 0): "sm80"}
TARGETS |= {(12, 0): "sm120", (12, 1): "sm121"}


@dataclass(frozen=True)
class Engine:
    """A built engine.

    Attributes:
        plan: TensorRT's serialized form, on disk.
        inputs: what it takes, in order.
        outputs: names, in order.
        aliases: name of an input -> the output that must be bound to the same memory.
        weights: names of further inputs, which are always the same tensors.
        target: the GPU it was built for, e.g. "sm80".
        layers: what its kernels are, in order of execution.
        sites: what each attention became.
        build_seconds: time that TensorRT took.
    """

    plan: Path
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    aliases: dict[str, str]
    weights: tuple[str, ...]
    target: str
    layers: tuple[Layer, ...]
    sites: tuple[SiteLowering, ...]
    build_seconds: float

    @property
    def plan_bytes(self) -> int:
        return self.plan.stat().st_size


def to_data(engine: Engine) -> dict[str, Any]:
    """All of an engine but its plan, for JSON."""
    return {f.name: encode(getattr(engine, f.name)) for f in fields(Engine) if f.name != "plan"}


def from_data(data: dict[str, Any], plan: Path) -> Engine:
    """The engine of which `to_data` gave `data`.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it did not.
    """
    classes = readable_classes(Input, Axis, Layer, SiteLowering)
    return Engine(plan=plan, **{name: decode(value, classes) for name, value in data.items()})


def targets() -> list[str]:
    """What this TensorRT builds for, e.g. "sm80"."""
    return [n.lower() for n in library().ComputeCapability.__members__ if n.startswith("SM")]


def resolve_target(gpu: str | None) -> str:
    """The target that serves `gpu` ("sm80"), or the GPU at hand.

    Raises:
        CannotLower: there is no such target, or none is named and there is no GPU.
    """
    names = targets()
    if gpu is None:
        if not torch.cuda.is_available():
            raise CannotLower(
                "cannot build a TensorRT engine for the GPU at hand",
                why="there is no GPU on this machine",
                todo=f"name the one that will run it: gpu='sm80' (one of {', '.join(names)})",
            )
        gpu = TARGETS.get(torch.cuda.get_device_capability(), "")
    target = gpu.lower()
    if target not in names:
        why = f"this TensorRT builds for {', '.join(names)}"
        raise CannotLower(f"cannot build a TensorRT engine for gpu={gpu!r}", why=why, todo="name one of these")
    return target


def build(net: Network, inputs: Sequence[Input], target: str, plan: Path) -> Engine:
    """Build `net` for one GPU and write the engine to the file `plan`.

    Args:
        inputs: as given to `convert`.
        target: from `resolve_target`.

    Raises:
        CannotLower: TensorRT refuses the network, logs an error, built an attention that is another, or is one that breaks.
    """
    check_builder()
    trt, place, started = library(), mark(), time.perf_counter()
    config = net.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers under our names, in the log
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32, as in PyTorch
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.__members__[target.upper()], 0)
    if any(not axis.is_fixed for x in inputs for axis in x.axes):
        config.add_optimization_profile(_profile(net, inputs))
    with plan.open("wb") as file:
        done = net.builder.build_serialized_network_to_stream(net.definition, config, _writer(file))
    errors = errors_since(place)
    if not done or errors:
        plan.unlink(missing_ok=True)
        raise CannotLower(
            f"TensorRT cannot build an engine for {target}",
            why="; ".join(errors) or "it says no more",
            todo="use attention='decomposed', or backend='native'; trilithon doctor shows the versions to report",
        )
    layers = tuple(layer_table(messages_since(place)))
    check_kernels(plan, layers, net.sites)
    return Engine(
        plan=plan,
        inputs=tuple(inputs),
        outputs=tuple(net.definition.get_output(i).name for i in range(net.definition.num_outputs)),
        aliases={name: f"{name}_out" for name in net.aliases},
        weights=tuple(net.weights),
        target=target,
        layers=layers,
        sites=tuple(net.sites),
        build_seconds=time.perf_counter() - started,
    )


def _profile(net: Network, inputs: Sequence[Input]) -> Any:
    profile = net.builder.create_optimization_profile()
    used = {net.definition.get_input(i).name for i in range(net.definition.num_inputs)}
    for x in inputs:
        if x.name in used and any(not axis.is_fixed for axis in x.axes):
            profile.set_shape(x.name, *(tuple(getattr(axis, at) for axis in x.axes) for at in ("low", "best", "high")))
    return profile


def _writer(file: Any) -> Any:
    """A stream of TensorRT's that writes to a file: the engine is never whole in memory."""
    base: Any = library().IStreamWriter

    class Writer(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def write(self, data: bytes) -> int:
            return int(file.write(data))

    return Writer()
