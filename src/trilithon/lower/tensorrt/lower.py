"""Lower a canonical module to one TensorRT engine; where TensorRT cannot follow, to several with PyTorch in between."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from trilithon.capture.collectives import group_of
from trilithon.errors import CannotLower
from trilithon.lower.inputs import Axis, Input
from trilithon.lower.native.lower import replace_attention
from trilithon.lower.products import merge_products
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.converters.registry import CONVERTERS
from trilithon.lower.tensorrt.engine import build, resolve_target
from trilithon.lower.tensorrt.module import Part, Split, TensorRTModule
from trilithon.lower.tensorrt.partition import engines, part_inputs, split
from trilithon.lower.tensorrt.store import engine_key, find_or_build
from trilithon.lower.tensorrt.weights import is_bound
from trilithon.options import Options

Inputs = Sequence[Input]
MOST_REFUSALS = 100  # nodes that may turn out to stay in PyTorch, one after the other


def lower_tensorrt(gm: GraphModule, inputs: Inputs, name: str, options: Options, exact: int = 0) -> TensorRTModule | Split:
    """Convert and build.

    Args:
        gm: of ATen and `trilithon` operations; weights are its attributes. It is changed.
        inputs: one for each placeholder.
        name: of the engine, e.g. "decode".
        exact: 0 to 2: products of halves are added up in float32, in parts that are the shorter, the higher it is.

    Raises:
        CannotLower: there is no such GPU; nothing of the program can be an engine; an attention that was asked to be
            fused cannot be; or TensorRT refuses the network.
    """
    if group_of(gm.graph) is not None:
        raise CannotLower(
            f"cannot lower {name} to TensorRT",
            why="ranks share the model, and meet in collectives of torch.distributed within each layer",
            todo="compile with backend='native'",
        )
    target = resolve_target(options.gpu)
    merge_products(gm, is_bound)

    def made(part: GraphModule, takes: Inputs, called: str) -> TensorRTModule:
        net = convert(part, takes, attention=options.attention, exact=exact)
        if options.engine_cache is None:
            return TensorRTModule(build(net, takes, target, _folder() / f"{called}.plan"), net)
        key = engine_key(part, takes, target, options, exact)
        engine = find_or_build(Path(options.engine_cache), key, lambda plan: build(net, takes, target, plan))
        return TensorRTModule(engine, net)

    refused = {
        n.name: f"{n.target} has no converter" for n in gm.graph.nodes if n.op == "call_function" and n.target not in CONVERTERS
    }
    if not refused:
        try:
            return made(gm, inputs, name)
        except CannotLower as error:
            _note(error, refused, gm, options)
    _infer(gm, inputs)
    for _ in range(MOST_REFUSALS):
        try:
            return _lower_parts(gm, inputs, name, refused, made)
        except CannotLower as error:
            _note(error, refused, gm, options)
    raise CannotLower(f"cannot lower {name} to TensorRT", why=f"more than {MOST_REFUSALS} of its nodes are refused")


def _note(error: CannotLower, refused: dict[str, str], gm: GraphModule, options: Options) -> None:
    """Leave the node that an error names in PyTorch; raise the error where that is no way out."""
    node = next((n for n in gm.graph.nodes if error.where is not None and n.name == error.where.node), None)
    forced = options.attention == "fused" and node is not None and "attention" in str(node.target)
    if node is None or node.op != "call_function" or node.name in refused or forced:
        raise error
    refused[node.name] = error.why


def _lower_parts(
    gm: GraphModule,
    inputs: Inputs,
    name: str,
    refused: Mapping[str, str],
    made: Callable[[GraphModule, Inputs, str], TensorRTModule],
) -> Split:
    whole = split(GraphModule(gm, _copy(gm.graph)), refused)
    spans = _spans(gm, inputs)
    parts = engines(whole)
    if not parts:
        why = "; ".join(f"{node}: {reason}" for node, reason in refused.items())
        raise CannotLower(f"cannot lower {name} to TensorRT", why=why, todo="use backend='native'")
    for called, part in parts:
        takes = part_inputs(part, spans)
        if isinstance(takes, str):
            raise CannotLower(f"cannot lower {name} to TensorRT in parts", why=takes, todo="use backend='native'")
        setattr(whole, called, Part(made(part, takes, f"{name}-{called}")))
    return Split(replace_attention(whole), refused)


def _copy(graph: Graph) -> Graph:
    copy = Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def _spans(gm: GraphModule, inputs: Inputs) -> dict[str, Axis]:
    """Name of a size that export left dynamic -> what it may be here."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return {
        str(size): axis
        for node, spec in zip(placeholders, inputs, strict=True)
        for size, axis in zip(node.meta["val"].shape, spec.axes, strict=True)
        if isinstance(size, torch.SymInt)
    }


def _infer(gm: GraphModule, inputs: Inputs) -> None:
    """Give every node its fake tensor; those that the cache brought have none yet."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    known = [n.meta["val"] for n in placeholders if "val" in n.meta]
    mode = detect_fake_mode(known)
    if all("val" in n.meta for n in gm.graph.nodes if n.op != "output") or mode is None:
        return
    ids = known[0]
    with mode:
        values = [_fake(node, spec, ids) for node, spec in zip(placeholders, inputs, strict=True)]
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*values)


def _fake(node: Node, spec: Input, ids: torch.Tensor) -> torch.Tensor:
    """What an input is: what it was in the export, or what the cache made of it, with the rows and tokens of `ids`."""
    if "val" in node.meta:
        value: torch.Tensor = node.meta["val"]
        return value
    rows, length = ids.shape[:2]
    sizes = [axis.high if axis.is_fixed else length for axis in spec.axes]
    return torch.empty([rows, *sizes[1:]] if sizes else [], dtype=spec.dtype, device=ids.device)


def split_notes(module: Any) -> tuple[str, ...]:
    """What a report says of a lowered program that is in parts."""
    if not isinstance(module, Split):
        return ()
    reasons = ", ".join(f"{node} ({why})" for node, why in module.kept.items())
    return (f"{len(module.engines)} engines, and these nodes in PyTorch: {reasons}",)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="trilithon-engines-")


def _folder() -> Path:
    """A new folder for one engine; removed when the process ends."""
    return Path(tempfile.mkdtemp(dir=_scratch().name))
