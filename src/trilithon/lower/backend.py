"""Choose a backend by name, and lower a canonical module with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.fx import GraphModule

from trilithon.errors import CannotLower, InputError
from trilithon.lower.native.lower import lower_native
from trilithon.options import BACKENDS, Options

Role = Literal["sequence", "step"]


def resolve_backend(name: str) -> str:
    """The backend that serves `name`; "auto" is "native".

    Raises:
        InputError: there is no such backend.
        CannotLower: a backend named by the user cannot be had.
    """
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}", todo=f"choose one of {', '.join(BACKENDS)}")
    if name == "tensorrt":
        raise CannotLower(
            "cannot lower with backend 'tensorrt'",
            why="this version builds no TensorRT engines yet",
            todo="use backend='native', or 'auto'",
        )
    return "native" if name == "auto" else name


def lower_module(gm: GraphModule, backend: str, options: Options, *, role: Role) -> Callable[..., Any]:
    """A canonical module as something fast to call.

    Args:
        gm: made by `unlift` or `insert_cache`; it is changed.
        backend: "native" or "eager".
        options: whether to use Inductor.
        role: "step": one token, static shapes, run many times: compiled by Inductor on a GPU. "sequence": any number
            of tokens: compiled only if the options ask for it, once for all lengths.
    """
    if backend == "eager":
        return gm
    lowered = lower_native(gm)
    device = next((b.device for b in gm.buffers()), torch.device("cpu"))
    wanted = device.type == "cuda" and role == "step" if options.inductor is None else options.inductor
    if not wanted:
        return lowered
    return torch.compile(lowered, dynamic=role == "sequence", fullgraph=True)
