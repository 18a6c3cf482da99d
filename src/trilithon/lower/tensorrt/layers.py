"""Layers of a TensorRT network under construction: names, places, errors, weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Node

from trilithon.errors import CannotLower, Where
from trilithon.lower.inputs import Axis
from trilithon.lower.tensorrt.capability import SiteLowering
from trilithon.lower.tensorrt.library import dtypes, errors_since, library, logger, mark, torch_dtypes

ITensor = Any
NOWHERE = Where()


class Layers:
    """An `INetworkDefinition` and what its layers need: names, the weights that must stay alive, errors with a place.

    Attributes:
        definition: TensorRT's own object.
        data: name of a constant layer -> the tensor that it reads; TensorRT keeps pointers into these.
        weights: name of an input -> the weight that it always is.
        aliases: name of an input -> the tensor that takes its place in memory.
        node: the graph node that is being converted.
        values: name of a graph node -> what it was converted to.
        attention: "auto", "fused" or "decomposed"; see `Options.attention`.
        sites: what each attention became, in order.
        shared: what is emitted once for all that need it, e.g. masks, by what it is.
        spans: name of a size that export left dynamic -> what it may be here.
    """

    def __init__(self, attention: str = "auto", exact: int = 0, definition: Any = None) -> None:
        """`definition`: a network of others, strongly typed, that layers are added to; by default a new one."""
        trt = library()
        self.attention, self.exact = attention, exact
        self.sites: list[SiteLowering] = []
        self.shared: dict[tuple[Any, ...], Any] = {}
        self.spans: dict[str, Axis] = {}
        self.builder: Any = None
        if definition is None:
            self.builder = trt.Builder(logger())
            definition = self.builder.create_network(0)  # strongly typed
        self.definition = definition
        self.data: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.aliases: dict[str, ITensor] = {}
        self.node: Node | None = None
        self.values: dict[str, Any] = {}
        self._where, self._prefix = NOWHERE, "head"
        self._made: dict[str, int] = {}
        self._numbers: dict[tuple[Any, ...], ITensor] = {}
        self._number_of: dict[str, tuple[float, torch.dtype]] = {}
        self._sizes: dict[tuple[str, int], ITensor] = {}

    # ------------------------------------------------------------ places and errors

    @contextmanager
    def at(self, where: Where) -> Iterator[None]:
        """Layers made inside are named after this node, and errors are raised at this place."""
        before = self._where, self._prefix
        self._where, self._prefix = where, where.node or "head"
        try:
            yield
        finally:
            self._where, self._prefix = before

    def refuse(self, why: str, todo: str = "the node stays in PyTorch") -> CannotLower:
        """The error that what stands here cannot be a TensorRT layer."""
        return CannotLower(f"cannot lower {self._prefix} to TensorRT", where=self._where, why=why, todo=todo)

    def add(self, kind: str, *arguments: Any, inputs: Mapping[int, ITensor] | None = None, **settings: Any) -> Any:
        """The layer that `INetworkDefinition.add_<kind>` makes, with these attributes set and read back.

        Args:
            inputs: tensors for further slots of the layer.

        Raises:
            CannotLower: TensorRT logs an error, or does not keep an attribute.
        """
        place = mark()
        try:
            layer = getattr(self.definition, f"add_{kind}")(*arguments)
            for slot, x in (inputs or {}).items():
                layer.set_input(slot, x)
            for name, value in settings.items():
                setattr(layer, name, value)
            named = self.name(kind)
            layer.name, layer.metadata = named, self._where.module
            for i in range(layer.num_outputs):
                layer.get_output(i).name = named if i == 0 else f"{named}:{i}"
                len(layer.get_output(i).shape)  # of an invalid layer this is an error
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise self.refuse("; ".join(errors_since(place)) or f"add_{kind}: {error}") from error
        if errors_since(place):
            raise self.refuse("; ".join(errors_since(place)))
        return layer

    def name(self, kind: str) -> str:
        """A name that no layer has: the node's, the first time, then the node's with a number."""
        count = self._made[self._prefix] = self._made.get(self._prefix, 0) + 1
        return f"{self._prefix}.{kind}.{count}"

    def checked(self, layer: Any) -> ITensor:
        """The output of a layer to which inputs were added; refused where that made it invalid."""
        place = mark()
        try:
            len(layer.get_output(0).shape)
        except ValueError as error:
            raise self.refuse("; ".join(errors_since(place)) or str(error)) from error
        if errors_since(place):
            raise self.refuse("; ".join(errors_since(place)))
        return layer.get_output(0)

    # ------------------------------------------------------------ leaves

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> ITensor:
        """An input; -1 is a size known at run time.

        Raises:
            CannotLower: TensorRT lacks the data type.
        """
        if dtype not in dtypes():
            raise self.refuse(f"input {name} is {dtype}, which TensorRT lacks", todo="convert the model to float32 or less")
        return self.definition.add_input(name, dtypes()[dtype], tuple(shape))

    def output(self, x: ITensor, name: str) -> None:
        """Make `x` an output of this name. An input, or what is an output already, is copied."""
        if x.is_network_input or x.is_network_output:
            x = self.out("identity", x)
        x.name = name
        self.definition.mark_output(x)

    def constant(self, value: torch.Tensor) -> ITensor:
        """A tensor that is part of the engine; shared with the caller's memory where it lies on the CPU, contiguous."""
        if value.dtype not in dtypes():
            raise self.refuse(f"TensorRT has no {value.dtype}")
        held = value.detach().cpu().contiguous()
        trt = library()
        weights = trt.Weights(dtypes()[held.dtype], held.data_ptr(), held.numel())
        layer = self.add("constant", tuple(held.shape), weights)
        self.data[layer.name] = held
        return layer.get_output(0)

    def bound(self, value: torch.Tensor) -> ITensor:
        """A weight that the engine reads where it is; made once."""
        held = value.detach().contiguous()
        key = ("bound", held.data_ptr(), held.shape, held.dtype)
        if key not in self.shared:
            name = f"weights.{len(self.weights)}"  # no name of a graph has a dot
            self.shared[key], self.weights[name] = self.input(name, held.dtype, held.shape), held
        return self.shared[key]

    def drop_unread_weights(self) -> None:
        """Take out of `weights`, and of the inputs, what no layer reads: an engine asks for the address of each input."""
        layers = (self.definition.get_layer(i) for i in range(self.definition.num_layers))
        read = {x.name for layer in layers for x in map(layer.get_input, range(layer.num_inputs)) if x is not None}
        inputs = {x.name: x for x in map(self.definition.get_input, range(self.definition.num_inputs))}
        for name in set(self.weights) - read:
            self.definition.remove_tensor(inputs[name])
            del self.weights[name]

    def number(self, value: float, dtype: torch.dtype, rank: int = 0) -> ITensor:
        """A constant of one element and `rank` axes, made once."""
        key = (value, dtype, rank, str(value))
        if key not in self._numbers:
            made = self._numbers[key] = self.constant(torch.full((1,) * rank, value, dtype=dtype))
            self._number_of[made.name] = value, dtype
        return self._numbers[key]

    def out(self, kind: str, *arguments: Any, **settings: Any) -> ITensor:
        """The output of a layer that has one."""
        return self.add(kind, *arguments, **settings).get_output(0)

    def dtype(self, x: ITensor) -> torch.dtype:
        return torch_dtypes()[x.dtype]

    def cast(self, x: ITensor, dtype: torch.dtype) -> ITensor:
        """`x` as `dtype`; itself where it is that already."""
        if self.dtype(x) == dtype:
            return x
        if dtype not in dtypes():
            raise self.refuse(f"TensorRT has no {dtype}")
        return self.out("cast", x, dtypes()[dtype])
