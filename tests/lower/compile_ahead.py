"""Compile the kernels of a step and a prompt for a Hopper GPU that need not be here; print what each dry run has compiled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from torch.fx import GraphModule
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lower.test_fused import given, step_of
from lower.test_fused_prompt import lowered
from trilithon.lower.inputs import Input
from trilithon.lower.native.fused import launch
from trilithon.lower.native.fused.ahead import dry_run, on_all_cores
from trilithon.lower.native.fused.fuse import fuse_step
from trilithon.lower.native.fused.fuse_prompt import fuse_prompt
from trilithon.lower.native.step import _in_parts


class Hopper:
    """What Triton asks a driver when it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


compiled: list[str] = []


def seen(kernel: launch.Kernel, args: tuple[Any, ...]) -> None:
    kernel.prepare(*args)


@contextmanager
def recorded(found: dict[str, list[str]], name: str) -> Iterator[None]:
    compiled.clear()
    yield
    found[name] = list(compiled)


def caches(inputs: tuple[Input, ...], slots: int) -> list[Tensor]:
    return [torch.zeros(1, x.axes[1].high, slots, x.axes[3].high, dtype=x.dtype) for x in inputs[3:]]


def of_step(found: dict[str, list[str]]) -> None:
    gm, inputs, _ = step_of("qwen3")
    fused = fuse_step(gm, inputs)
    tokens = given(inputs, 5)[:3]
    with recorded(found, "step"), on_all_cores():
        dry_run(fused, [*tokens, *caches(inputs, 2176)], seen)
    with recorded(found, "step, 302 slots"):
        dry_run(fused, [*tokens, *caches(inputs, 302)], seen)
    with recorded(found, "step, 2 parts"), _in_parts(fused, 2):
        dry_run(fused, [*tokens, *caches(inputs, 302)], seen)


def of_prompt(found: dict[str, list[str]]) -> None:
    gm, inputs = lowered("qwen3")
    fused: GraphModule = fuse_prompt(gm, inputs)
    # slots of which caches' strides are multiples of 16, as those of wider heads always are
    for name, tokens, slots in (("prompt", 545, 546), ("prompt, 576 tokens", 576, 2176), ("prompt, 1 token", 1, 1000)):
        given_ = [torch.ones(1, tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.full((1,), tokens)]
        with recorded(found, name):
            dry_run(fused, [*given_, *caches(inputs, slots)], seen)


if __name__ == "__main__":
    driver.set_active(Hopper())
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name.rpartition(".")[2])
    launch.dependent_launch = lambda device: {"PDL": True, "launch_pdl": True}
    made: dict[str, list[str]] = {}
    with torch.no_grad():
        of_step(made)
        of_prompt(made)
    print(json.dumps(made))
