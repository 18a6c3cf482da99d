"""Compile the kernel of causal attention for a Hopper GPU that need not be here: each width, kind and type into a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from trilithon.lower.native.causal import KINDS, STAGES, WIDTHS
from trilithon.lower.native.causal_kernels import BLOCK, HALF, causal

TYPES = {"fp16": gl.float16, "bf16": gl.bfloat16}


def cubin(width: int, number: str, kind: str) -> bytes:
    constants = {"KIND": kind, "BLOCK_D": width, "STAGES": STAGES}
    signature = {}
    for name, rows in (("q", HALF.value), ("k", BLOCK.value), ("v", BLOCK.value), ("result", HALF.value)):
        layout = gl.NVMMASharedLayout.get_default_for([rows, width], TYPES[number])
        signature[name] = f"tensordesc<{number}{[rows, width]},{layout!r}>"
    signature |= (
        dict.fromkeys(("tokens", "heads", "group", "reach"), "i32") | {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    )
    kernel = triton.compile(
        GluonASTSource(causal, signature, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
    )
    assert kernel.metadata.shared <= 227 * 1024
    return kernel.asm["cubin"]


for width in WIDTHS:
    for number, kind in (*(("fp16", kind) for kind in KINDS), ("bf16", "causal")):
        Path(sys.argv[1], f"{width}-{number}-{kind}.cubin").write_bytes(cubin(width, number, kind))
