"""Choose a backend by name, and lower a canonical module with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from trilithon.errors import CannotLower, InputError
from trilithon.lower.native.lower import lower_native
from trilithon.options import BACKENDS, Options


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


def lower_module(gm: GraphModule, backend: str, options: Options, *, decode: bool) -> Callable[..., Any]:
    """A canonical module as something fast to call.

    Args:
        gm: made by `unlift` or `insert_cache`; it is changed.
        backend: "native" or "eager".
        options: whether to use Inductor.
        decode: a one-token program: static shapes, matrix-vector products tuned.
    """
    if backend == "eager":
        return gm
    lowered = lower_native(gm)
    device = next((b.device for b in gm.buffers()), torch.device("cpu"))
    use_inductor = device.type == "cuda" if options.inductor is None else options.inductor
    if not use_inductor:
        return lowered
    tuned: dict[str, Any] = {"coordinate_descent_tuning": True} if decode and device.type == "cuda" else {}
    return torch.compile(lowered, dynamic=False if decode else None, fullgraph=True, options=tuned)
