"""Where a network, or an engine that was built from it, departs from the graph that it was converted from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Interpreter, Node

from trilithon.errors import InputError, Where
from trilithon.lower.tensorrt.interpret.walk import tensors
from trilithon.lower.tensorrt.network import Network, is_tensor
from trilithon.passes import where_of

FLOATING_LIMIT = 1e-2  # bfloat16 has two digits; where roundings add up over many layers, ask for more


@dataclass(frozen=True)
class Difference:
    """A node of the graph whose value in the network is another one.

    Attributes:
        node: its name.
        where: its place in the user's program.
        tensor: name of the network's tensor; empty where that is a number.
        error: largest absolute difference, divided by the largest absolute value in the graph; infinite where shapes, NaN
            or infinities differ.
        network: the network's value, or what was observed.
        graph: the graph's value.
    """

    node: str
    where: Where
    tensor: str
    error: float
    network: Tensor
    graph: Tensor

    def __str__(self) -> str:
        shapes = f"network {list(self.network.shape)}, graph {list(self.graph.shape)}"
        return f"{self.node} differs by {self.error:.3g} (relative; {shapes})  at {self.where}"


def first_difference(
    net: Network,
    gm: GraphModule,
    feeds: Mapping[str, Tensor],
    *,
    observed: Mapping[str, Tensor] | None = None,
    limit: float = FLOATING_LIMIT,
    dtype: torch.dtype | None = None,
) -> Difference | None:
    """The first node, in the order of the graph, whose value differs by more than `limit`; None if none does.

    Args:
        net: what `convert` made of `gm`.
        feeds: a tensor for each input of the network but those that are weights.
        observed: tensors of an engine by name, say its outputs; they take the place of calculated ones, and nodes whose
            tensors are not among them are passed over.
        limit: of floating tensors; others must be equal.
        dtype: see `interpret`.

    Raises:
        InputError: see `interpret`; or the network was made of another graph; or a name in `observed` is of no tensor
            that a node stands for.
    """
    values = tensors(net, feeds, dtype=dtype) if observed is None else observed
    named = {value.name for node in gm.graph.nodes for value in _flat(_converted(net, node)) if is_tensor(value)}
    if observed is not None and not set(observed) <= named:
        raise InputError("cannot place what was observed", why=f"no node stands for {', '.join(sorted(set(observed) - named))}")
    for node, graph_value in _run(net, gm, feeds).items():
        for ours, theirs in zip(_flat(_converted(net, node)), _flat(graph_value), strict=False):
            found = _compare(node, ours, theirs, values)
            if found is not None and found.error > (limit if found.graph.is_floating_point() else 0):
                return found
    return None


def _converted(net: Network, node: Node) -> Any:
    """What the node became. Outputs of the graph are the first outputs of the network; those behind are caches."""
    if node.op == "output":
        return [net.definition.get_output(i) for i in range(net.definition.num_outputs)]
    if node.op == "placeholder":
        return net.values.get(node.name)  # None where nobody reads it
    if node.name not in net.values:
        raise InputError("cannot compare the network with this graph", why=f"it was not made of it: {node.name} is not known")
    return net.values[node.name]


class _Recorder(Interpreter):
    """Runs a graph and keeps a copy of each value: an operation may write to one later."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        for node in _written(n):
            self.seen.pop(node, None)  # in the network it stands for the new value, as this node does
        if n.op != "placeholder":
            parts = [part.detach().clone() if isinstance(part, Tensor) else part for part in _flat(value)]
            self.seen[n] = tuple(parts) if isinstance(value, (tuple, list)) else parts[0]
        return value


def _written(node: Node) -> list[Node]:
    """The nodes whose memory this one writes to."""
    if not isinstance(node.target, OpOverload):
        return []
    pairs = zip(node.target._schema.arguments, node.args, strict=False)
    return [x for a, x in pairs if a.alias_info is not None and a.alias_info.is_write and isinstance(x, Node)]


def _run(net: Network, gm: GraphModule, feeds: Mapping[str, Tensor]) -> dict[Node, Any]:
    own = (net.definition.get_input(i).name for i in range(net.definition.num_inputs))
    names = (name for name in own if name not in net.weights)
    inputs: list[Any] = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        value = feeds[next(names)].detach().clone() if node.users else None  # an unread one is no input of the network
        inputs.append(int(value) if value is not None and isinstance(node.meta.get("val"), torch.SymInt) else value)
    recorder = _Recorder(gm)
    with torch.no_grad():
        recorder.run(*inputs)
    return recorder.seen


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _compare(node: Node, ours: Any, theirs: Any, values: Mapping[str, Tensor]) -> Difference | None:
    """How the two differ, be it not at all; None where there is nothing to compare."""
    if not isinstance(theirs, (Tensor, int, float)):
        return None
    name = ours.name if is_tensor(ours) else ""
    ours = values.get(name) if name else ours
    if not isinstance(ours, (Tensor, int, float)):
        return None
    graph, network = (torch.as_tensor(x).detach().cpu() for x in (theirs, ours))
    if not isinstance(theirs, Tensor) and network.numel() == 1:  # a size has an axis in a network
        network = network.reshape([])
    return Difference(node.name, where_of(node), name, relative_error(network, graph), network, graph)


def relative_error(network: Tensor, graph: Tensor) -> float:
    """Largest absolute difference over the largest finite absolute value of the graph."""
    if network.shape != graph.shape:
        return torch.inf
    a, b = network.double(), graph.double()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return torch.inf
    if not bool(finite.any()):
        return 0.0
    error = (a - b)[finite].abs().max()
    return float(error / b[finite].abs().max()) if error > 0 else 0.0
