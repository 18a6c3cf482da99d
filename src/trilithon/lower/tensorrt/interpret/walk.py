"""Evaluation of a network, layer by layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from trilithon.errors import InputError
from trilithon.lower.tensorrt.interpret.columns import together
from trilithon.lower.tensorrt.interpret.read import EVALUATORS, Layer, Mode, layers_of, wide
from trilithon.lower.tensorrt.library import torch_dtypes
from trilithon.lower.tensorrt.network import ITensor, Network


def interpret(
    net: Network, feeds: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, empty_row: float = math.nan
) -> dict[str, Tensor]:
    """The outputs of a network by their names, calculated on the CPU.

    float16 and bfloat16 are widened to float32 inside a layer, and its result rounded once.

    Args:
        feeds: a tensor for each input but those that are weights.
        dtype: float32 or float64: all floating tensors, weights too, are held in this type, and casts between floating
            types do nothing. What the network means, without its rounding.
        empty_row: what an attention layer gives for a query that may see no key. TensorRT states no value.

    Raises:
        InputError: a feed is missing, unknown, or of another shape or type than the input.
        CannotLower: a layer is not modelled, fails, or makes a tensor of another shape or type than is declared.
    """
    outputs = [net.definition.get_output(i).name for i in range(net.definition.num_outputs)]
    values = _walk(net, feeds, _mode(dtype, empty_row), kept=set(outputs))
    return {name: values[name] for name in outputs}


def tensors(
    net: Network, feeds: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, empty_row: float = math.nan
) -> dict[str, Tensor]:
    """All tensors of a network by their names. See `interpret`."""
    return _walk(net, feeds, _mode(dtype, empty_row), kept=None)


def _mode(dtype: torch.dtype | None, empty_row: float) -> Mode:
    if dtype not in (None, torch.float32, torch.float64):
        raise InputError(
            f"cannot interpret a network in {dtype}", why="it has less digits than the network's own types may have"
        )
    return Mode(dtype, empty_row)


def _walk(net: Network, feeds: Mapping[str, Tensor], mode: Mode, kept: set[str] | None) -> dict[str, Tensor]:
    """The tensors of a network; but for those to be kept (None: all) each is dropped once no layer will read it."""
    env: dict[str, Tensor] = {}
    layers = layers_of(net, env, mode) if kept is None else together(layers_of(net, env, mode))
    env.update(_feeds(net, feeds, mode))
    readers = Counter(name for layer in layers for name in layer.sources)
    for layer in layers:
        made = _evaluate(layer)
        if len(made) != len(layer.results):
            raise layer.refuse(f"it has {len(layer.results)} outputs, {len(made)} were calculated")
        for tensor, value in zip(layer.results, made, strict=True):
            env[tensor.name] = _checked(layer, tensor, value)
        readers.subtract(layer.sources)
        dead = {name for name in layer.sources if name is not None and readers[name] == 0}
        for name in dead - kept if kept is not None else ():
            del env[name]
    return env


def _evaluate(layer: Layer) -> tuple[Tensor, ...]:
    try:
        made = EVALUATORS[layer.kind][1](layer)
    except (IndexError, RuntimeError, ValueError) as error:
        raise layer.refuse(f"it fails on these inputs: {error}", todo="check the inputs and the layer's attributes") from error
    return made if isinstance(made, tuple) else (made,)


def _feeds(net: Network, feeds: Mapping[str, Tensor], mode: Mode) -> dict[str, Tensor]:
    inputs = {t.name: t for t in (net.definition.get_input(i) for i in range(net.definition.num_inputs))}
    feeds = {**net.weights, **feeds}
    if set(inputs) != set(feeds):
        wrong = ", ".join(sorted(set(inputs) ^ set(feeds)))
        raise InputError("the feeds do not fit the network", why=f"its inputs are {', '.join(inputs)}; not in both: {wrong}")
    result = {}
    for name, tensor in inputs.items():
        value, declared = feeds[name].detach().cpu(), torch_dtypes()[tensor.dtype]
        if value.dtype not in (declared, mode.held(declared)) or not fits(tensor, value):
            why = f"it is {declared} {list(tensor.shape)}, got {value.dtype} {list(value.shape)}"
            raise InputError(f"the feed of input {name} does not fit", why=why)
        result[name] = value.to(mode.held(declared))
    return result


def _checked(layer: Layer, tensor: ITensor, value: Tensor) -> Tensor:
    """The value, rounded from the type that it was calculated in to the declared one.

    Raises:
        CannotLower: TensorRT declares another shape or type: the network, or this interpreter, is wrong.
    """
    declared = layer.mode.held(torch_dtypes()[tensor.dtype])
    if value.dtype not in (declared, wide(torch.zeros(0, dtype=declared)).dtype):
        raise layer.refuse(
            f"it makes {value.dtype}, declared is {declared}", todo="this is a bug of Trilithon: please report it"
        )
    if not fits(tensor, value):
        why = f"it makes {list(value.shape)}, declared is {list(tensor.shape)}"
        raise layer.refuse(why, todo="this is a bug of Trilithon: please report it")
    return value.to(declared)


def fits(tensor: ITensor, value: Tensor) -> bool:
    """Has the value a shape that the tensor may have? Declared sizes of -1 are any."""
    sizes = list(tensor.shape)
    return len(sizes) == value.dim() and all(size in (-1, own) for size, own in zip(sizes, value.shape, strict=True))
