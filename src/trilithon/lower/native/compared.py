"""Generated kernels are compared with what they are made of once on a machine, not whenever a program is lowered again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.folders import replace_file
from trilithon.lower.inputs import Input
from trilithon.lower.native.fused.launch import kernel_folder
from trilithon.lower.native.fused.tune import triton_version
from trilithon.rewrite.unlift import device_of
from trilithon.spec.codec import source_digest

log = logging.getLogger(__name__)
Compare = Callable[[GraphModule, GraphModule, tuple[Input, ...]], None]


def compare_once(compare: Compare, plain: GraphModule, fused: GraphModule, inputs: tuple[Input, ...]) -> None:
    """Run `compare(plain, fused, inputs)`, which raises where they disagree, unless it has passed on this machine.

    What it depends on is kept beside the kernels: both programs without the numbers of their weights, each kernel with its
    settings, the GPU, the versions of compilers, and the source of this package.
    """
    path = kernel_folder() / f"{_key(plain, fused, inputs)}.same"
    if path.exists():
        return
    compare(plain, fused, inputs)
    if _source() is None:  # which may change
        return
    try:
        replace_file(path, "")
    except OSError as error:
        log.warning("that kernels were compared is not kept: %s", error)


def _key(plain: GraphModule, fused: GraphModule, inputs: tuple[Input, ...]) -> str:
    device = device_of(plain)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    by = gpu, torch.__version__, torch.version.cuda, triton_version(), _source()
    return hashlib.sha256(repr((by, inputs, _text(plain), _text(fused))).encode()).hexdigest()[:32]


@cache
def _source() -> str | None:
    return source_digest("lower/native", "rewrite")


def _text(gm: GraphModule) -> tuple[Any, ...]:
    """What it does, with tensors of which sizes."""
    held = [attrgetter(str(n.target))(gm) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")]
    return str(gm.graph), [_state(x) for x in held]


def _state(held: Any) -> Any:
    if isinstance(held, Tensor):
        return tuple(held.shape), held.stride(), str(held.dtype)
    return type(held).__name__, sorted((k, repr(v)) for k, v in vars(held).items() if not k.startswith("_"))
