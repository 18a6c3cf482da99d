#!/usr/bin/env python3
"""Check on a GPU what docs/backends.md says of TensorRT, where that was only read off kernels: run each form and compare.

scripts/check_tensorrt.py [--gpu sm80] [--json FILE] [--build-only]
"""

from __future__ import annotations

import json as json_module
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from trilithon.lower.inputs import Input, fixed
from trilithon.lower.tensorrt.engine import build, resolve_target
from trilithon.lower.tensorrt.library import library, version
from trilithon.lower.tensorrt.module import TensorRTModule
from trilithon.lower.tensorrt.network import Network
from trilithon.runtime.verify import relative_error

B, H, S, D = 2, 8, 256, 64
HALF = torch.float16


class Attention:
    """A network of one IAttention over inputs `q k v`, and whatever a check adds."""

    def __init__(self, s: int = S, t: int = S, kind: str = "NONE", norm: str = "SOFTMAX") -> None:
        trt = library()
        self.net, self.s, self.t = Network(), s, t
        self.inputs = [Input("q", HALF, tuple(map(fixed, (B, H, s, D))))]
        self.inputs += [Input(name, HALF, tuple(map(fixed, (B, H, t, D)))) for name in "kv"]
        self.q, self.k, self.v = (self.net.input(x.name, x.dtype, [a.high for a in x.axes]) for x in self.inputs)
        operations = getattr(trt.AttentionNormalizationOp, norm), getattr(trt.CausalMaskKind, kind)
        self.layer = self.net.add("attention_v2", self.q, self.k, self.v, *operations)

    def given(self, name: str, dtype: torch.dtype, *shape: int) -> Any:
        """One more input."""
        self.inputs.append(Input(name, dtype, tuple(map(fixed, shape))))
        return self.net.input(name, dtype, shape)

    def build(self, target: str) -> TensorRTModule:
        self.net.output(self.layer.get_output(0), "o")
        return TensorRTModule(build(self.net, self.inputs, target, Path(mkdtemp()) / "check.plan"), self.net)

    def random(self, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((B, H, self.s, D), (B, H, self.t, D), (B, H, self.t, D))
        q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
        return (q * D**-0.5 * scale).half().cuda(), k.half().cuda(), v.half().cuda()


def reference(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill(~allowed.to(scores.device), -math.inf)
    return torch.softmax(scores, -1) @ v.double()


def nearest(got: Tensor, claims: dict[str, Tensor]) -> str:
    """Which claim the result is nearest to, with its relative error."""
    errors = {name: relative_error(got, want) for name, want in claims.items()}
    best = min(errors, key=lambda name: errors[name])
    return f"{best} (relative error {errors[best]:.1e})"


def lengths(target: str) -> tuple[Callable[[], str], str]:
    case = Attention()
    case.layer.key_value_lengths = case.given("n", torch.int32, B)
    module = case.build(target)

    def run() -> str:
        q, k, v = case.random()
        got = module(q, k, v, torch.full((B,), 100, dtype=torch.int32, device="cuda"))
        keys = torch.arange(S)
        return nearest(
            got,
            {
                "keys < n": reference(q, k, v, keys < 100),
                "keys >= n": reference(q, k, v, keys >= 100),
                "all keys": reference(q, k, v),
            },
        )  # type: ignore[arg-type]

    return run, "key_value_lengths, no mask"


def causal_lengths(target: str) -> tuple[Callable[[], str], str]:
    case = Attention(kind="UPPER_LEFT")
    case.layer.key_value_lengths = case.given("n", torch.int32, B)
    module = case.build(target)

    def run() -> str:
        q, k, v = case.random()
        got = module(q, k, v, torch.full((B,), 100, dtype=torch.int32, device="cuda"))
        keys, below = torch.arange(S), torch.ones(S, S).tril().bool()
        return nearest(
            got,
            {
                "causal & keys < n": reference(q, k, v, below & (keys < 100)),
                "keys < n": reference(q, k, v, keys < 100),
                "keys >= n": reference(q, k, v, keys >= 100),
            },
        )  # type: ignore[arg-type]

    return run, "key_value_lengths, UPPER_LEFT"


def no_norm(target: str) -> tuple[Callable[[], str], str]:
    case = Attention(norm="NONE")
    module = case.build(target)

    def run() -> str:
        q, k, v = case.random()
        plain = q.double() @ k.double().transpose(-1, -2) @ v.double()
        return nearest(module(q, k, v), {"softmax": reference(q, k, v), "no softmax": plain})  # type: ignore[arg-type]

    return run, "AttentionNormalizationOp.NONE"


def one_query(target: str) -> tuple[Callable[[], str], str]:
    case = Attention(s=1, t=1024, kind="UPPER_LEFT")
    module = case.build(target)

    def run() -> str:
        q, k, v = case.random()
        first = reference(q, k, v, torch.arange(1024) == 0)
        return nearest(module(q, k, v), {"key 0 only": first, "all keys": reference(q, k, v)})  # type: ignore[arg-type]

    return run, "UPPER_LEFT, one query, 1024 keys"


def empty_rows(target: str) -> tuple[Callable[[], str], str]:
    case = Attention()
    case.layer.mask = case.given("m", torch.bool, 1, 1, S, S)
    module = case.build(target)

    def run() -> str:
        q, k, v = case.random()
        mask = torch.ones(1, 1, S, S, dtype=torch.bool, device="cuda")
        mask[:, :, 3] = False
        row = module(q, k, v, mask)[:, :, 3]  # type: ignore[index]
        if bool(row.isnan().any()):
            return "NaN"
        return nearest(row, {"mean of v": v.double().mean(2), "0": torch.zeros_like(row)}) if bool(row.any()) else "0"

    return run, "a row without keys"


def large_scores(target: str) -> tuple[Callable[[], str], str]:
    plain, causal = Attention().build(target), Attention(kind="UPPER_LEFT").build(target)
    case = Attention()

    def run() -> str:
        found = []
        for scale in (100.0, 1000.0, 10000.0):
            q, k, v = case.random(scale)
            below = torch.ones(S, S).tril().bool()
            errors = (
                relative_error(plain(q, k, v), reference(q, k, v)),
                relative_error(causal(q, k, v), reference(q, k, v, below)),
            )  # type: ignore[arg-type]
            largest = float((q.double() @ k.double().transpose(-1, -2)).abs().max())
            found.append(f"|scores| up to {largest:.0f}: full {errors[0]:.1e}, causal {errors[1]:.1e}")
        return "; ".join(found)

    return run, "float16, large scores"


def windows(target: str) -> tuple[Callable[[], str], str]:
    """A window of 256 at 2048 tokens, in four spellings."""
    s, modules = 2048, {}
    for spelling in ("iota", "constant", "input", "causal"):
        case = Attention(s=s, t=s, kind="UPPER_LEFT" if spelling == "causal" else "NONE")
        net = case.net
        if spelling == "iota":
            row, column = net.iota(s, 2, 4), net.iota(s, 3, 4)
            late = net.unary("NOT", net.elementwise("GREATER", column, row))
            near = net.elementwise("GREATER", column, net.elementwise("SUB", row, net.number(256, torch.int64, 4)))
            case.layer.mask = net.elementwise("AND", late, near)
        elif spelling == "constant":
            case.layer.mask = net.constant(window(s)[None, None])
        elif spelling == "input":
            case.layer.mask = case.given("m", torch.bool, 1, 1, s, s)
        modules[spelling] = case, case.build(target)

    def run() -> str:
        found = []
        for spelling, (case, module) in modules.items():
            given = [*case.random(), *([window(s)[None, None].cuda()] if spelling == "input" else [])]
            allowed = torch.ones(s, s).tril().bool() if spelling == "causal" else window(s)
            error = relative_error(module(*given), reference(*given[:3], allowed))  # type: ignore[arg-type]
            found.append(f"{spelling} {milliseconds(lambda m=module, g=given: m(*g)):.3f} ms ({error:.1e})")  # type: ignore[misc]
        return ", ".join(found)

    return run, "window of 256 at 2048, IAttention"


def window(s: int) -> Tensor:
    i = torch.arange(s)
    return (i <= i[:, None]) & (i > i[:, None] - 256)


def cache_edges(target: str) -> tuple[Callable[[], str], str]:
    net, slots = Network(), 16
    inputs = [Input("cache", HALF, tuple(map(fixed, (1, 1, slots, 8)))), Input("new", HALF, tuple(map(fixed, (1, 1, 1, 8))))]
    inputs.append(Input("at", torch.int32, (fixed(1),)))
    cache, new, at = (net.input(x.name, x.dtype, [a.high for a in x.axes]) for x in inputs)
    net.aliases["cache"] = net.out("kv_cache_update", cache, new, at, library().KVCacheMode.LINEAR)
    net.output(net.unary("NEG", new), "o")
    net.output(net.aliases["cache"], "cache_out")
    module = TensorRTModule(build(net, inputs, target, Path(mkdtemp()) / "cache.plan"), net)

    def run() -> str:
        found = []
        for place in (slots, -1):
            held = torch.zeros(1, 1, slots, 8, dtype=HALF, device="cuda")
            module(
                held, torch.ones(1, 1, 1, 8, dtype=HALF, device="cuda"), torch.tensor([place], dtype=torch.int32, device="cuda")
            )
            written = held[0, 0, :, 0].nonzero().flatten().tolist()
            found.append(f"slot {place} of {slots}: writes {written or 'nothing'}")
        return "; ".join(found)

    return run, "cache writes outside"


def milliseconds(call: Callable[[], object], runs: int = 30) -> float:
    """Median time on the GPU."""
    times = []
    for i in range(runs + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times += [start.elapsed_time(end)] if i >= 5 else []
    return statistics.median(times)


CHECKS = (lengths, causal_lengths, no_norm, one_query, empty_rows, large_scores, windows, cache_edges)


def main(
    gpu: Annotated[str | None, typer.Option(help="What to build for. Default: the GPU at hand.")] = None,
    json: Annotated[Path | None, typer.Option(help="Save the findings.")] = None,
    build_only: Annotated[bool, typer.Option(help="Build each engine and run none.")] = False,
) -> None:
    target, found = resolve_target(gpu), {}
    for check in CHECKS:
        run, name = check(target)
        found[name] = "built" if build_only else run()
        print(f"{name:40} {found[name]}", flush=True)
    if json is not None:
        about = {"tensorrt": version(), "target": target, "torch": torch.__version__}
        about |= {} if build_only else {"gpu": torch.cuda.get_device_name()}
        json.write_text(json_module.dumps(about | {"found": found}, indent=1))


if __name__ == "__main__":
    typer.run(main)
