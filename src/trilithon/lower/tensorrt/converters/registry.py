"""Which operations have a TensorRT form: a closed table from the target of a node to a function that emits layers.

A converter takes the network, then the operation's arguments under the names of its ATen schema: tensors as `ITensor`,
sizes as `int` or int64 `ITensor` of shape [1], all else as in the graph. It returns what the node stands for, or raises
`net.refuse(why)` for what it does not model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload

Converter = Callable[..., Any]
CONVERTERS: dict[Any, Converter] = {}


def converts(*targets: Any) -> Callable[[Converter], Converter]:
    """Register a converter. Each target has one, with a parameter for each argument of the schema."""

    def register(converter: Converter) -> Converter:
        names = list(inspect.signature(converter).parameters)[1:]
        for target in targets:
            if target in CONVERTERS:
                raise ValueError(f"two converters for {target}")
            if isinstance(target, OpOverload) and names != [a.name for a in target._schema.arguments]:
                raise ValueError(f"{converter.__name__} takes {names}, {target} has {target._schema}")
            CONVERTERS[target] = converter
        return converter

    return register
