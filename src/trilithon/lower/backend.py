"""Choose a backend by name, and lower a canonical module with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.fx import GraphModule

from trilithon.errors import CannotLower, InputError
from trilithon.lower.native.lower import lower_native
from trilithon.options import BACKENDS, Options

Role = Literal["sequence", "step", "rare"]


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
        role: "sequence": any number of tokens, one compilation for all lengths. "step": one token, static shapes,
            its matrix-vector products tuned. "rare": not worth the seconds of a compilation.
    """
    if backend == "eager":
        return gm
    lowered = lower_native(gm)
    device = next((b.device for b in gm.buffers()), torch.device("cpu"))
    use_inductor = device.type == "cuda" if options.inductor is None else options.inductor
    if not use_inductor or role == "rare":
        return lowered
    if role == "sequence":
        return torch.compile(lowered, dynamic=True, fullgraph=True)
    tuned = {"coordinate_descent_tuning": True} if device.type == "cuda" else {}
    return torch.compile(lowered, dynamic=False, fullgraph=True, options=tuned)  # type: ignore[arg-type]
