#!/usr/bin/env python3
"""Errors of single operations as TensorRT engines on a GPU, in units of PyTorch's own in the same type, both against float64.

scripts/check_precision.py [--gpu sm80] [--json FILE]
"""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from trilithon.lower.inputs import Input, fixed
from trilithon.lower.tensorrt.lower import lower_tensorrt
from trilithon.options import Options
from trilithon.rewrite.unlift import unlift
from trilithon.runtime.verify import relative_error


class Call(nn.Module):
    """One operation; a weight is a buffer, as in a model."""

    def __init__(self, call: Callable[..., Tensor], weight: Tensor | None) -> None:
        super().__init__()
        self.call = call
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x) if self.weight is None else self.call(x, self.weight)


def rms_norm(x: Tensor) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def attention(x: Tensor) -> Tensor:
    q = x.view(1, x.shape[1], 8, -1).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q.flip(2), q * 0.5, is_causal=True)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, int] | None]] = {
    **{
        f"linear {m} x {k} x {n}": (linear, (1, m, k), (n, k))
        for m, k, n in ((1, 2048, 2048), (6, 2048, 8192), (512, 896, 896))
    },
    "linear 6 x 8192 x 2048": (linear, (1, 6, 8192), (2048, 8192)),
    "matmul of activations": (lambda x: x @ x.transpose(1, 2) * 0.02, (4, 257, 64), None),
    "rms norm": (rms_norm, (1, 6, 2048), None),
    "silu": (F.silu, (1, 6, 2048), None),
    "softmax": (lambda x: torch.softmax(x * 3, -1), (1, 6, 2048), None),
    "layer norm": (lambda x: F.layer_norm(x, (2048,)), (1, 6, 2048), None),
    "causal attention": (attention, (1, 257, 512), None),
}


def errors(name: str, dtype: torch.dtype, gpu: str | None) -> dict[str, Any]:
    call, shape, weights = CALLS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").to(dtype)
    weight = None if weights is None else (torch.randn(weights, device="cuda") / math.sqrt(weights[1])).to(dtype)
    module = Call(call, weight)
    program = torch.export.export(module, (x,))
    inputs = (Input("x", dtype, tuple(map(fixed, shape))),)
    engine: Any = lower_tensorrt(unlift(program), inputs, "check", Options(gpu=gpu))
    truth = Call(call, None if weight is None else weight.double())(x.double())
    got = engine(x)
    got = got[0] if isinstance(got, (tuple, list)) else got
    mine, eager = relative_error(got, truth), relative_error(module(x), truth)
    layers = [layer.name for layer in engine.engine.layers]
    return {"engine": mine, "pytorch": eager, "ratio": mine / max(eager, torch.finfo(dtype).eps / 16), "layers": layers}


def main(
    gpu: Annotated[str | None, typer.Option(help="What to build for. Default: the GPU at hand.")] = None,
    json: Annotated[Path | None, typer.Option(help="Save the findings.")] = None,
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, dict[str, Any]] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for name in CALLS:
            key = f"{str(dtype).removeprefix('torch.')} {name}"
            try:
                found[key] = errors(name, dtype, gpu)
                print(
                    "{:36} engine {engine:.1e}, pytorch {pytorch:.1e}, ratio {ratio:.1f}".format(key, **found[key]), flush=True
                )
            except Exception as error:  # one operation that fails says nothing of the others
                found[key] = {"error": f"{type(error).__name__}: {error}"}
                print(f"{key:36} {found[key]['error'][:200]}", flush=True)
    if json is not None:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        json.write_text(json_module.dumps(about | {"found": found}, indent=1))


if __name__ == "__main__":
    typer.run(main)
