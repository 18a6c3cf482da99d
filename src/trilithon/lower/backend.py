"""Choose a backend by name, and lower a canonical module with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.errors import CannotLower, InputError
from trilithon.lower.graph_data import GraphData, from_data, to_data
from trilithon.lower.inputs import Input
from trilithon.lower.native.lower import compiled, lower_native
from trilithon.lower.native.one_product import one_product
from trilithon.lower.native.prompt import Prompt, make_prompt
from trilithon.lower.native.split_kv import has_triton
from trilithon.lower.native.step import compiled_step, make_step
from trilithon.lower.native.writes import separate_writes
from trilithon.lower.tensorrt.engine import resolve_target
from trilithon.lower.tensorrt.library import check_builder, version
from trilithon.options import BACKENDS, Options
from trilithon.rewrite.unlift import device_of

Role = Literal["sequence", "prompt", "step"]


@dataclass(frozen=True)
class Blueprint:
    """What a program was lowered from: with its weights, enough to lower it again.

    Attributes:
        role, name, inputs: as `lower_module` takes them.
        graph: the canonical module, or why no file can hold it.
    """

    role: Role
    name: str
    inputs: tuple[Input, ...]
    graph: GraphData | CannotLower

    def lower(self, backend: str, options: Options, tensors: Mapping[str, Tensor], device: torch.device) -> Callable[..., Any]:
        """The program; `tensors` are its weights, on the device."""
        assert isinstance(self.graph, GraphData)
        gm = from_data(self.graph.nodes, tensors, device)
        return lower_module(gm, backend, options, role=self.role, name=self.name, inputs=self.inputs)


def blueprint_of(gm: GraphModule, role: Role, name: str, inputs: tuple[Input, ...]) -> Blueprint:
    """What a canonical module is made of; before it is lowered, which changes it."""
    try:
        return Blueprint(role, name, inputs, to_data(gm))
    except CannotLower as refusal:
        return Blueprint(role, name, inputs, refusal)


def resolve_backend(name: str, cache_dtype: str | None = None) -> str:
    """The backend that serves `name`; "auto" is "native".

    Args:
        cache_dtype: as in `Options`.

    Raises:
        InputError: there is no such backend.
        CannotLower: a backend named by the user cannot be had, or not with such a cache.
    """
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}", todo=f"choose one of {', '.join(BACKENDS)}")
    if name == "tensorrt" and cache_dtype is not None:
        raise CannotLower(
            f"cannot keep K and V in {cache_dtype} with TensorRT",
            why="its layer that writes a cache (IKVCacheUpdate) takes float32, float16 and bfloat16 only",
            todo="leave cache_dtype out, or compile with backend='native'",
        )
    if name == "tensorrt":
        check_builder()
    return "native" if name == "auto" else name


def backend_note(backend: str, options: Options, device: torch.device) -> str:
    """What the report says of a backend."""
    if backend != "tensorrt":
        return f"backend: {backend}"
    text = f"backend: tensorrt ({resolve_target(options.gpu)}, {version()})"
    return text if device.type == "cuda" else f"{text}; its inputs are on the CPU, where calls are interpreted, slowly"


def lower_module(
    gm: GraphModule, backend: str, options: Options, *, role: Role, name: str, inputs: tuple[Input, ...], exact: int = 0
) -> Callable[..., Any]:
    """A canonical module as something fast to call.

    Args:
        gm: made by `unlift` or `insert_cache`; it is changed.
        backend: "native", "eager" or "tensorrt".
        options: whether to use Inductor; what TensorRT builds for.
        name: of the program, e.g. "decode".
        inputs: what it takes.
        role: "step": one token, run many times: on a GPU made of generated kernels for one row, else compiled by Inductor,
            once for each number of rows; the only other sizes that are not fixed are those of caches. "prompt": any
            number of tokens, into an empty cache: on a GPU made with generated kernels for one row, else compiled by
            Inductor, once for all lengths, where it can be. "sequence": any number of tokens: compiled only if asked for.
        exact: 0 to 2: in how short parts TensorRT adds up products of halves, which is slower.
    """
    if backend == "eager":
        return gm
    if backend == "tensorrt":
        from trilithon.lower.tensorrt.lower import lower_tensorrt  # half a second, which only its users wait for

        return lower_tensorrt(gm, inputs, name, options, exact)
    device = device_of(gm).type
    wanted = device == "cuda" and role != "sequence" if options.inductor is None else options.inductor
    lowered = lower_native(gm, trim=device == "cpu" and not wanted, split=device == "cuda" and has_triton())
    if device == "cuda" and role != "step":  # see `make_step`
        one_product(lowered)
    if not wanted:
        return lowered
    if role == "prompt":
        separate_writes(lowered, inputs)
        return make_prompt(lowered, inputs) if device == "cuda" and has_triton() else Prompt(lowered)
    if role == "sequence":
        return compiled(lowered, dynamic=True)
    return make_step(lowered, inputs) if device == "cuda" and has_triton() else compiled_step(lowered, inputs)
