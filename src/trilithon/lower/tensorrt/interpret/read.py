"""Reading a network back through TensorRT's Python API; all of its traps are dealt with here.

* `get_layer` returns a bare `ILayer`. Its class must be assigned, which is not checked: a wrong one reads foreign memory.
  Hence the closed table `EVALUATORS` holds the class beside each kind of layer.
* `IActivationLayer.type` (and that of a pooling layer) hides `ILayer.type`: the kind is read before the class is assigned.
* Layers come in the order in which they were added; `layers_of` sorts them.
* Dims that are unset, or given by a tensor, raise ValueError when their length is asked for (TensorRT-RTX 1.5), or are None
  (1.7); to a loop over them they look empty, as those of a tensor without axes are.
  Where a slice's axes come as a tensor, `axes` holds garbage without any error. Hence `Layer.sizes`, which looks at the
  inputs first.
* Permutations have eight slots, whatever the rank; only the first ones count. See `Layer.order`.
* Slots of inputs that are left out are None; slots behind the last one that is set do not exist. See `Layer.maybe`.
* Weights come back as numpy arrays, except those of a type that numpy lacks (bfloat16), which cannot be read at all.
  Hence `Network.data`, which is asked first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import Tensor

from trilithon.errors import CannotLower, Where
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.network import ITensor, Network

Evaluator = Callable[["Layer"], "Tensor | tuple[Tensor, ...]"]
EVALUATORS: dict[str, tuple[str, Evaluator]] = {}  # kind of layer -> (its class, the function that evaluates it)
HALF = (torch.float16, torch.bfloat16)


def evaluates(kind: str, named: str) -> Callable[[Evaluator], Evaluator]:
    """Register what evaluates layers of `trt.LayerType.<kind>`, which are of the class `trt.<named>`."""

    def register(evaluator: Evaluator) -> Evaluator:
        if kind in EVALUATORS:
            raise ValueError(f"two evaluators for {kind}")
        EVALUATORS[kind] = (named, evaluator)
        return evaluator

    return register


@dataclass(frozen=True)
class Mode:
    """How to calculate.

    Attributes:
        dtype: what all floating tensors are held in; None: in their own type.
        empty_row: what an attention gives for a query that may see no key.
    """

    dtype: torch.dtype | None
    empty_row: float

    def held(self, dtype: torch.dtype) -> torch.dtype:
        """The type that a tensor of this declared type has."""
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype


@dataclass(frozen=True)
class Layer:
    """A layer, and the values of the tensors that it reads.

    Attributes:
        kind: name of its `trt.LayerType`.
        own: the layer, as its own class.
        module: path of the module that it was made for.
        sources: name of the tensor in each slot.
        results: the tensors that it makes.
        data: its weights, where `Network.data` has them.
        env: name of a tensor -> its value.
    """

    kind: str
    name: str
    own: Any
    module: str
    sources: tuple[str | None, ...]
    results: tuple[ITensor, ...]
    data: Tensor | None
    env: Mapping[str, Tensor]
    mode: Mode

    def refuse(
        self, why: str, todo: str = "compare this network on a GPU, or lower the model without this layer"
    ) -> CannotLower:
        """The error that this layer cannot be interpreted."""
        where = Where(node=self.name, module=self.module)
        return CannotLower(f"cannot interpret a {self.kind} layer", where=where, why=why, todo=todo)

    def maybe(self, slot: int) -> Tensor | None:
        """The value in this slot; None where there is none."""
        name = self.sources[slot] if slot < len(self.sources) else None
        return None if name is None else self.env[name]

    def x(self, slot: int = 0) -> Tensor:
        """The value in this slot."""
        value = self.maybe(slot)
        if value is None:
            raise self.refuse(f"it has nothing in slot {slot}")
        return value

    def wide(self, slot: int = 0) -> Tensor:
        """The value in this slot, in float32 where its type is shorter: a result is rounded once, at the end."""
        return wide(self.x(slot))

    def wides(self) -> list[Tensor]:
        return [self.wide(slot) for slot in range(len(self.sources))]

    def sizes(self, attribute: str, slot: int) -> list[int] | None:
        """Numbers that a layer has as the tensor in a slot, else as an attribute; None where it has neither."""
        value = self.maybe(slot)
        if value is not None:
            return [int(v) for v in value.reshape(-1)]
        dims = getattr(self.own, attribute)
        try:
            return None if dims is None else [int(dims[i]) for i in range(len(dims))]
        except ValueError:
            return None

    def order(self, attribute: str, rank: int) -> list[int]:
        """A permutation of this many axes."""
        permutation = getattr(self.own, attribute)
        return [int(permutation[i]) for i in range(rank)]

    def axes(self) -> list[int]:
        """The axes whose bits are set in the attribute `axes`."""
        return [axis for axis in range(8) if int(self.own.axes) >> axis & 1]

    def weights(self, attribute: str) -> Tensor:
        """Weights that the layer holds itself."""
        if self.data is not None:
            return self.data
        held = getattr(self.own, attribute)
        if type(held) is library().Weights:
            if held.size == 0:
                return torch.zeros(0)
            raise self.refuse(
                f"its {attribute} are {held.dtype}, which Python cannot read back", todo="put them into Network.data"
            )
        return torch.from_numpy(held.copy())


def wide(x: Tensor) -> Tensor:
    """In float32 where its type is shorter."""
    return x.float() if x.dtype in HALF else x


def layers_of(net: Network, env: Mapping[str, Tensor], mode: Mode) -> list[Layer]:
    """The layers, each behind those whose tensors it reads.

    Raises:
        CannotLower: a layer of a kind that is not modelled, or a cycle.
    """
    layers = [_read(net, i, env, mode) for i in range(net.definition.num_layers)]
    maker = {tensor.name: layer for layer in layers for tensor in layer.results}
    if len(maker) != sum(len(layer.results) for layer in layers):
        raise CannotLower("cannot interpret this network", why="two of its tensors have one name")
    place = {layer.name: i for i, layer in enumerate(layers)}
    if len(place) != len(layers):
        raise CannotLower("cannot interpret this network", why="two of its layers have one name")
    before = {layer.name: [maker[s].name for s in layer.sources if s in maker] for layer in layers}
    try:
        order = TopologicalSorter(before).static_order()
        return [layers[place[name]] for name in order]
    except CycleError as error:
        raise CannotLower("cannot interpret this network", why=f"layers wait for each other: {error.args[1]}") from error


def _read(net: Network, i: int, env: Mapping[str, Tensor], mode: Mode) -> Layer:
    own = net.definition.get_layer(i)
    kind = own.type.name  # before the class is assigned
    inputs = [own.get_input(slot) for slot in range(own.num_inputs)]
    layer = Layer(
        kind=kind,
        name=own.name,
        own=own,
        module=own.metadata,
        sources=tuple(None if tensor is None else tensor.name for tensor in inputs),
        results=tuple(own.get_output(slot) for slot in range(own.num_outputs)),
        data=net.data.get(own.name),
        env=env,
        mode=mode,
    )
    if kind not in EVALUATORS:
        raise layer.refuse("layers of this kind are not modelled")
    own.__class__ = getattr(library(), EVALUATORS[kind][0])
    return layer
