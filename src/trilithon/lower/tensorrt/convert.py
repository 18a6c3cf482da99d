"""Emit a graph module as a TensorRT network, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from trilithon.lower.inputs import Input
from trilithon.lower.products import attribute
from trilithon.lower.tensorrt import converters as _  # noqa: F401 (fills the table)
from trilithon.lower.tensorrt.converters.registry import CONVERTERS
from trilithon.lower.tensorrt.network import Network, is_tensor
from trilithon.lower.tensorrt.weights import is_bound
from trilithon.passes import bound_arguments, where_of

SCALARS = ("Tensor", "number", "Scalar", "Optional[Tensor]", "Optional[number]")


def convert(gm: GraphModule, inputs: Sequence[Input], attention: str = "auto", exact: int = 0) -> Network:
    """A network that computes what `gm` does.

    Its outputs are `output_0`, ...; an input that the graph writes to in place, say `cache_k_0`, gives an output
    `cache_k_0_out` which is to be bound to the same memory.

    Large matrices among the weights are inputs too; see `Network.weights`.

    Args:
        gm: of ATen and `trilithon` operations; weights are its attributes.
        inputs: one for each placeholder, in order; those that nothing reads are left out of the network.
        attention: "auto", "fused" or "decomposed"; see `Options.attention`.
        exact: as in `lower_tensorrt`.

    Raises:
        CannotLower: an operation has no converter, or TensorRT refuses a layer.
    """
    net, env = Network(attention, exact), dict[Node, Any]()
    given = iter(inputs)
    for node in gm.graph.nodes:
        net.node = node
        with net.at(where_of(node)):
            if node.op == "placeholder":
                spec = next(given)
                if not node.users:
                    continue
                shape = [axis.high if axis.is_fixed else -1 for axis in spec.axes]
                env[node] = net.input(spec.name, spec.dtype, shape)
                sizes = getattr(node.meta.get("val"), "shape", ())
                net.spans |= {str(s): axis for s, axis in zip(sizes, spec.axes, strict=False) if isinstance(s, torch.SymInt)}
            elif node.op == "get_attr":
                env[node] = (net.bound if is_bound(gm, node) else net.constant)(attribute(gm, node))
            elif node.op == "output":
                _mark_outputs(net, node, env)
            else:
                env[node] = _call(net, node, env)
    net.drop_unread_weights()
    net.values = {node.name: value for node, value in env.items()}
    return net


def _call(net: Network, node: Node, env: dict[Node, Any]) -> Any:
    if node.op != "call_function" or node.target not in CONVERTERS:
        raise net.refuse(f"{node.target} has no converter")
    converter = CONVERTERS[node.target]
    if not isinstance(node.target, OpOverload):
        return converter(net, *map_arg(node.args, env.__getitem__), **map_arg(node.kwargs, env.__getitem__))
    arguments = _arguments(net, node, env)
    result = converter(net, **arguments)
    _require_type(net, node, result)
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node):
            env[value] = net.aliases[value.name] = result
    return result


def _arguments(net: Network, node: Node, env: dict[Node, Any]) -> dict[str, Any]:
    """The arguments by name; a size that stands where a tensor or number is asked for becomes a tensor without axes."""
    bound = bound_arguments(node)
    arguments = {name: map_arg(value, env.__getitem__) for name, value in bound.items()}
    for argument in node.target._schema.arguments:  # type: ignore[union-attr]
        value = bound[argument.name]
        is_size = isinstance(value, Node) and isinstance(value.meta.get("val"), torch.SymInt)
        if is_size and str(argument.type) in SCALARS and is_tensor(arguments[argument.name]):
            arguments[argument.name] = net.reshape(arguments[argument.name], [])
    return arguments


def _require_type(net: Network, node: Node, result: Any) -> None:
    """The tensors of the network have the types and ranks that PyTorch's have, as far as the node records those.

    Raises:
        CannotLower: they differ, as where PyTorch has a type that TensorRT lacks.
    """
    meant = node.meta.get("val")
    pairs = zip(meant, result, strict=False) if isinstance(meant, (tuple, list)) else [(meant, result)]
    for ours, theirs in pairs:
        if not isinstance(ours, torch.Tensor) or not is_tensor(theirs):
            continue
        if net.dtype(theirs) != ours.dtype:
            raise net.refuse(f"its result is {ours.dtype} in PyTorch and {net.dtype(theirs)} in TensorRT")
        if len(theirs.shape) != ours.dim():
            raise net.refuse(f"its result has {ours.dim()} axes in PyTorch and {len(theirs.shape)} in TensorRT")


def _mark_outputs(net: Network, node: Node, env: dict[Node, Any]) -> None:
    values = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
    for i, value in enumerate(values):
        if not isinstance(value, Node) or not is_tensor(env[value]):
            raise net.refuse(f"its output {i} is {value}, not a tensor")
        net.output(env[value], f"output_{i}")
    for name, updated in net.aliases.items():
        net.output(updated, f"{name}_out")
