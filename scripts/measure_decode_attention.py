#!/usr/bin/env python3
"""What attention costs in a step over a long static cache, as TensorRT-RTX engines for SM80: three ways to write it.

scripts/measure_decode_attention.py [--only NAME,...] [--layers 4] [--slots 2176] [--used 2100] [--kernels] [--check]

Without a GPU it builds, and with --check runs the networks by the interpreter. With one it compares with float64, captures a
CUDA graph of a step, and prints microseconds a layer; those of the layer without attention ("nothing") are taken off.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trilithon.lower.inputs import Input, fixed
from trilithon.lower.tensorrt import attention
from trilithon.lower.tensorrt.capability import AttentionSpec
from trilithon.lower.tensorrt.engine import build
from trilithon.lower.tensorrt.library import library
from trilithon.lower.tensorrt.module import TensorRTModule
from trilithon.lower.tensorrt.network import ITensor, Network

WIDE, LOWEST = torch.float32, torch.finfo(torch.float32).min
B, H, G, D, HIDDEN = 1, 32, 8, 64, 2048
N = H // G
DTYPE = torch.float16


# ------------------------------------------------------------ pieces


def f32(net: Network, value: float, rank: int) -> ITensor:
    return net.number(value, WIDE, rank)


def seen(net: Network, start: ITensor, sizes: list[int], strides: list[int]) -> ITensor:
    """Bool: position of a slot <= start. `sizes` of the axes, `strides` of the position along each (0: broadcast, size 1)."""
    key = ("seen", tuple(sizes), tuple(strides))
    if key not in net.shared:
        rank, at = len(sizes), None
        for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
            if stride:
                place = net.iota(size, axis, rank)
                if stride > 1:
                    place = net.elementwise("PROD", place, net.number(stride, torch.int64, rank))
                at = place if at is None else net.elementwise("SUM", at, place)
        last = net.reshape(start, [1] * rank)
        beyond = net.elementwise("GREATER", at, last)
        net.shared[key] = net.unary("NOT", beyond)
    return net.shared[key]


# ------------------------------------------------------------ spellings: q [1 H 1 D], k, v [1 G T D], start [1] -> [1 H 1 D]


def products(net, q, k, v, start, T, P):
    """matmul, softmax, matmul, as attention without turned values is emitted."""
    spec = AttentionSpec(DTYPE, H, G, D, D, fixed(1), fixed(T), from_start=True)
    site = attention.Attention(
        "site", (q, k, v), 1 / math.sqrt(D), spec, lambda use: seen(net, start, [1, 1, 1, T], [0, 0, 0, 1]), keeps_a_key=True
    )
    return attention._primitives(net, site)


def nothing(net, q, k, v, start, T, P):
    """No attention: what the rest of a layer costs; caches are written."""
    return q


def split(net, q, k, v, start, T, P):
    """Keys and values in P parts; products added up in float32, and these over the parts."""
    C = T // P
    wide_q, wide_k = net.reshape(net.cast(q, WIDE), [1, G, 1, N, 1, D]), net.reshape(net.cast(k, WIDE), [1, G, P, 1, C, D])
    s = net.reduce("SUM", net.elementwise("PROD", wide_q, wide_k), [5], keep=False)
    s = net.elementwise("PROD", s, f32(net, 1 / math.sqrt(D), 5))
    s = net.select(seen(net, start, [1, 1, P, 1, C], [0, 0, C, 0, 1]), s, f32(net, LOWEST, 5))
    e = net.unary("EXP", net.elementwise("SUB", s, net.reduce("MAX", s, [2, 4], keep=True)))
    total = net.reduce("SUM", e, [2, 4], keep=True)
    product = net.elementwise("PROD", net.reshape(e, [1, G, P, N, C, 1]), net.reshape(net.cast(v, WIDE), [1, G, P, 1, C, D]))
    o = net.reduce("SUM", net.reduce("SUM", product, [4], keep=False), [2], keep=True)
    return net.reshape(net.cast(net.elementwise("DIV", o, total), DTYPE), [1, H, 1, D])


def turned_values(net, q, k, v, start, T, P):
    """V is kept as [1 G D T], so that both sums run along contiguous numbers."""
    product = net.elementwise(
        "PROD", net.reshape(net.cast(q, WIDE), [1, G, N, 1, D]), net.reshape(net.cast(k, WIDE), [1, G, 1, T, D])
    )
    s = net.elementwise("PROD", net.reduce("SUM", product, [4], keep=False), f32(net, 1 / math.sqrt(D), 4))
    s = net.select(seen(net, start, [1, 1, 1, T], [0, 0, 0, 1]), s, f32(net, LOWEST, 4))
    w = net.unary("EXP", net.elementwise("SUB", s, net.reduce("MAX", s, [3], keep=True)))
    total = net.reshape(net.reduce("SUM", w, [3], keep=False), [1, G, N, 1])
    wide_v = net.reshape(net.cast(v, WIDE), [1, G, 1, D, T])
    o = net.reduce("SUM", net.elementwise("PROD", net.reshape(w, [1, G, N, 1, T]), wide_v), [4], keep=False)
    return net.reshape(net.cast(net.elementwise("DIV", o, total), DTYPE), [1, H, 1, D])


VARIANTS: dict[str, tuple[Callable, int]] = {
    "nothing": (nothing, 1),
    "products of matrices": (products, 1),
    "17 parts": (split, 17),
    "turned values": (turned_values, 1),
}


# ------------------------------------------------------------ a stack of layers


def weights(layers: int) -> list[dict[str, Tensor]]:
    make = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=make) / math.sqrt(shape[-1])).to(DTYPE)

    sizes = {"q": (H * D, HIDDEN), "k": (G * D, HIDDEN), "v": (G * D, HIDDEN), "o": (HIDDEN, H * D)}
    return [{name: weight(*shape) * (3.0 if name in "qk" else 1.0) for name, shape in sizes.items()} for _ in range(layers)]


def network(emit: Callable, P: int, T: int, held: list[dict[str, Tensor]]) -> Network:
    trt, net = library(), Network("decomposed")
    x = net.input("x", DTYPE, [1, 1, HIDDEN])
    start = net.input("start", torch.int64, [1])
    turn = emit is turned_values
    shapes = {"k": [1, G, T, D], "v": [1, G * D, T, 1] if turn else [1, G, T, D]}
    caches = [[net.input(f"cache_{kind}_{i}", DTYPE, shapes[kind]) for kind in "kv"] for i in range(len(held))]
    inverse = net.constant((500000.0 ** (-torch.arange(0, D, 2) / D)).view(1, 1, 1, D // 2))
    angle = net.elementwise("PROD", net.reshape(net.cast(start, WIDE), [1, 1, 1, 1]), inverse)
    angle = net.concat([angle, angle], 3)
    cos, sin = (net.cast(net.unary(op, angle), DTYPE) for op in ("COS", "SIN"))
    slot = net.cast(start, torch.int32)

    def turned(y: ITensor, heads: int) -> ITensor:
        low, high = (net.slice(y, [0, 0, 0, at], [1, heads, 1, D // 2], [1] * 4) for at in (0, D // 2))
        half = net.concat([net.unary("NEG", high), low], 3)
        return net.elementwise("SUM", net.elementwise("PROD", y, cos), net.elementwise("PROD", half, sin))

    for i, w in enumerate(held):
        wide = net.cast(x, WIDE)
        square = net.reduce("AVG", net.elementwise("PROD", wide, wide), [2], keep=True)
        norm = net.unary("RECIP", net.unary("SQRT", net.elementwise("SUM", square, f32(net, 1e-5, 3))))
        y = net.cast(net.elementwise("PROD", wide, norm), DTYPE)
        q, k, v = (
            net.permute(net.reshape(net.matmul(y, net.constant(w[name][None]), transpose_b=True), [1, 1, n, D]), [0, 2, 1, 3])
            for name, n in (("q", H), ("k", G), ("v", G))
        )
        fresh = (turned(k, G), net.reshape(v, [1, G * D, 1, 1]) if turn else v)
        q = turned(q, H)
        kept = []
        for cache, new in zip(caches[i], fresh, strict=True):
            made = net.out("kv_cache_update", cache, new, slot, trt.KVCacheMode.LINEAR)
            net.aliases[cache.name] = made
            kept.append(made)
        if turn:
            kept[1] = net.reshape(kept[1], [1, G, D, T])
        o = emit(net, q, *kept, start, T, P)
        o = net.reshape(net.permute(o, [0, 2, 1, 3]), [1, 1, H * D])
        x = net.elementwise("SUM", x, net.matmul(o, net.constant(w["o"][None]), transpose_b=True))
    net.output(x, "output_0")
    for name, made in net.aliases.items():
        net.output(made, f"{name}_out")
    return net


def inputs(T: int, layers: int, turn: bool) -> tuple[Input, ...]:
    shapes = {"k": (1, G, T, D), "v": (1, G * D, T, 1) if turn else (1, G, T, D)}
    caches = [Input(f"cache_{kind}_{i}", DTYPE, tuple(map(fixed, shapes[kind]))) for i in range(layers) for kind in "kv"]
    x = Input("x", DTYPE, tuple(map(fixed, (1, 1, HIDDEN))))
    return (x, Input("start", torch.int64, (fixed(1),)), *caches)


def reference(x: Tensor, start: int, caches: list[Tensor], held: list[dict[str, Tensor]], dtype: torch.dtype) -> Tensor:
    """The same by torch, in `dtype`; caches are not written."""
    x = x.to(dtype)
    angle = (500000.0 ** (-torch.arange(0, D, 2) / D)).to(x.device) * float(start)
    angle = torch.cat([angle, angle]).double()
    cos, sin = (f(angle.float()).to(dtype) for f in (torch.cos, torch.sin))

    def turned(y: Tensor) -> Tensor:
        return y * cos + torch.cat([-y[..., D // 2 :], y[..., : D // 2]], -1) * sin

    for i, w in enumerate(held):
        wide = x.double() if dtype == torch.float64 else x.float()
        y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
        q, k, v = (
            (y @ w[name].to(x.device, dtype).T).view(1, 1, n, D).transpose(1, 2) for name, n in (("q", H), ("k", G), ("v", G))
        )
        keys, values = (
            torch.cat([c[:, :, :start].to(dtype), new], 2)
            for c, new in zip(caches[2 * i : 2 * i + 2], (turned(k), v), strict=True)
        )
        keys, values = (z.repeat_interleave(N, 1) for z in (keys, values))
        s = (turned(q) @ keys.transpose(-1, -2)) / math.sqrt(D)
        p = torch.softmax(s.double() if dtype == torch.float64 else s.float(), -1).to(dtype)
        o = (p @ values).transpose(1, 2).reshape(1, 1, H * D)
        x = x + o @ w["o"].to(x.device, dtype).T
    return x


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def microseconds(call: Callable[[], object], steps: int = 30) -> float:
    """Median time of one replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    times = []
    for _ in range(steps):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) * 100)
    return sorted(times)[len(times) // 2]


def profile(call: Callable[[], object], layers: int, calls: int = 20) -> None:
    """Prints microseconds a layer of each kernel."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    for name, times in sorted(found.items(), key=lambda pair: -sum(pair[1])):
        each = f"{len(times) / calls / layers:.2f} x {sum(times) / len(times):6.2f} us"
        print(f"       {sum(times) / calls / layers:7.2f} us a layer, {each}  {name[:100]}")


def main() -> None:
    parse = argparse.ArgumentParser()
    parse.add_argument("--only", default="")
    parse.add_argument("--layers", type=int, default=4)
    parse.add_argument("--slots", type=int, default=2176)
    parse.add_argument("--used", type=int, default=2100)
    parse.add_argument("--kernels", action="store_true", help="on a GPU: time of each kernel, by torch.profiler")
    parse.add_argument("--check", action="store_true", help="interpret the network on a CPU")
    options = parse.parse_args()
    T, held = options.slots, weights(options.layers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, HIDDEN, generator=make).to(DTYPE).to(device)
    # what unused slots hold must not matter
    caches = [torch.randn(1, G, T, D, generator=make).to(DTYPE).to(device) for _ in range(2 * options.layers)]
    start = torch.tensor([options.used], device=device)
    truth = None
    wanted = [name for name in VARIANTS if not options.only or name in options.only.split(",")]
    base = None
    if device.type == "cuda":
        print(torch.cuda.get_device_name(), "| layers", options.layers, "| slots", T, "| used", options.used, flush=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name in wanted:
            emit, P = VARIANTS[name]
            if T % P:
                print(f"{name:28} {T} slots are no multiple of {P}")
                continue
            began = time.perf_counter()
            try:
                net = network(emit, P, T, held)
                engine = build(net, inputs(T, options.layers, emit is turned_values), "sm80", Path(folder) / f"{name}.plan")
            except Exception as problem:
                print(f"{name:28} {type(problem).__name__}: {str(problem)[:300]}", flush=True)
                continue
            launched = [layer for layer in engine.layers if layer.tactic]
            text = f"{name:28} {len(launched) / options.layers:5.2f} kernels a layer"
            module = TensorRTModule(engine, net)
            if device.type == "cuda" or options.check:
                if truth is None:
                    truth = reference(x, options.used, caches, held, torch.float64)
                    text += f" (torch float16: {error(reference(x, options.used, caches, held, DTYPE), truth):.1e})"
                mine = [c.clone() for c in caches]
                if emit is turned_values:
                    mine[1::2] = [c.transpose(2, 3).reshape(1, G * D, T, 1).contiguous() for c in mine[1::2]]
                step = partial(module, x, start, *mine)
                got = step()
                got = got[-1] if isinstance(got, tuple) else got
                text += f"  error {error(got, truth):.1e}"
            if device.type == "cuda":
                once = microseconds(step) / options.layers
                base = once if name == "nothing" else base
                text += f"  {once:7.2f} us a layer" + ("" if base is None else f", {once - base:7.2f} of them attention")
            print(text + f"   [{time.perf_counter() - began:.0f} s]", flush=True)
            if options.kernels and device.type == "cuda":
                profile(step, options.layers)


if __name__ == "__main__":
    main()
