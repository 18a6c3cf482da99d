"""What the builder makes of attention, read without a GPU: one kernel a site, with the bounds of the mask that was proved."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule

from trilithon.lower.inputs import Axis, Input, fixed
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.engine import Engine, build
from trilithon.lower.tensorrt.kernels import AttentionKernel, attention_kernels, contradiction, layer_table
from trilithon.lower.tensorrt.network import Network
from trilithon.rewrite.cache_ops import write_cache
from trilithon.rewrite.op import ATTENTION
from trilithon.spec.masks import Padding, parse, parts

aten = torch.ops.aten
H, G, D, SLOTS = 8, 2, 64, 2176
TOKENS = Axis(1, 256, 1024)
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Sites(nn.Module):
    """A block of one mask each, projections around them, one behind the other."""

    def __init__(self, masks: tuple[str, ...], g: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(mask, g) for mask in masks)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, keys)
        return x


class Block(nn.Module):
    def __init__(self, mask: str, g: int) -> None:
        super().__init__()
        self.mask, self.heads = mask, (H, g, g)
        self.weights = nn.ParameterList(torch.randn(H * D, heads * D) * 0.02 for heads in self.heads)
        self.out = nn.Parameter(torch.randn(H * D, H * D) * 0.02)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = ((x @ w).view(b, s, n, D).transpose(1, 2) for w, n in zip(self.weights, self.heads, strict=True))
        padded = any(isinstance(part, Padding) for part in parts(parse(self.mask)))
        o = ATTENTION(q, k, v, self.mask, D**-0.5, None, keys if padded else None)
        return x + o.transpose(1, 2).reshape(b, s, H * D) @ self.out


@cache
def prompt(dtype: torch.dtype, g: int, attention: str, masks: tuple[str, ...]) -> tuple[Network, list[Input]]:
    torch.manual_seed(0)
    module = Sites(masks, g).to(dtype)
    example = (torch.randn(1, 9, H * D).to(dtype), torch.ones(1, 9, dtype=torch.bool))
    s = Dim("s", min=1, max=4096)
    program = torch.export.export(module, example, dynamic_shapes=({1: s}, {1: s}))
    inputs = [Input("x", dtype, (fixed(1), TOKENS, fixed(H * D))), Input("keys", torch.bool, (fixed(1), TOKENS))]
    return convert(program.module(check_guards=False), inputs, attention), inputs


def built(net: Network, inputs: list[Input], folder: Path) -> tuple[Engine, list[AttentionKernel]]:
    engine = build(net, inputs, "sm80", folder / "engine.plan")
    return engine, attention_kernels(engine.plan.read_bytes())


BF16, F16 = torch.bfloat16, torch.float16
PROMPTS = {
    "bfloat16, grouped": (BF16, G, "auto", ("causal", "window(64)", "full", "padding(keys)")),
    "bfloat16, decomposed": (BF16, H, "decomposed", ("window(64)", "full", "padding(keys)", "window(64)")),
    "bfloat16, equal heads": (BF16, H, "auto", ("causal", "window(64)", "window(64)")),
    "bfloat16, masks that share indices": (BF16, G, "auto", ("chunked(128)", "causal & padding(keys)")),
    "float16, grouped": (F16, G, "auto", ("causal", "window(64)", "full", "padding(keys)")),
    "float16, fused": (F16, G, "fused", ("causal", "window(64)", "padding(keys)")),
}
BOUNDS = {"causal": ("0", "row"), "window(64)": ("max(0,row-63)", "row")}


@pytest.mark.parametrize("case", PROMPTS.values(), ids=PROMPTS)
def test_a_kernel_a_site_with_its_bounds(case: tuple[torch.dtype, int, str, tuple[str, ...]], tmp_path: Path) -> None:
    dtype, g, attention, masks = case
    net, inputs = prompt(*case)
    engine, kernels = built(net, inputs, tmp_path)
    by_name = {kernel.name: kernel for kernel in kernels}
    launched = [layer for layer in engine.layers if layer.is_attention]
    assert len(launched) == len(net.sites) == len(masks), [layer.name for layer in engine.layers]
    for site, layer, text in zip(net.sites, launched, masks, strict=True):
        kernel = by_name[layer.tactic]
        assert site.name in layer.modules
        assert contradiction(kernel, parse(text)) is None, f"{text}: {kernel}"
        assert (kernel.left, kernel.right) == BOUNDS.get(text, ("0", "shape1")), text
        in_half, inlined = dtype == F16 and text != "causal", g == H and text not in ("causal", "full")
        avoided = attention == "auto" and (in_half or inlined)
        assert site.form == ("decomposed" if attention == "decomposed" or avoided else "fused")
        assert kernel.accumulator == ("float16" if in_half and site.form == "fused" else "float32")


WRONG = {"causal": ("full", "window(64)", "local(0, 1)"), "window(64)": ("causal", "window(63)", "window(65)", "full")}
WRONG |= {"full": ("causal", "padding(keys)", "chunked(128)")}


def test_a_dropped_mask_shows(tmp_path: Path) -> None:
    """A kernel contradicts every other mask, and one that was built without its mask contradicts that."""
    net, inputs = prompt(torch.bfloat16, G, "auto", tuple(WRONG))
    _, kernels = built(net, inputs, tmp_path)
    for kernel, (text, others) in zip(kernels, WRONG.items(), strict=True):
        assert contradiction(kernel, parse(text)) is None
        assert contradiction(kernel, parse(f"{text} & padding(keys)")) is not None
        for other in others:
            assert contradiction(kernel, parse(other)) is not None, f"{text} is not {other}"
    assert contradiction(kernels[0], parse("causal"), from_start=True) is not None


def step(layers: int, weights: dict[str, Tensor]) -> GraphModule:
    """Layers of one decode step, as `insert_cache` writes them: projections, cache writes, attention."""
    graph = Graph()
    x, start, counts = (graph.placeholder(name) for name in ("x", "start", "counts"))
    caches = [graph.placeholder(f"cache_{kind}_{i}") for i in range(layers) for kind in "kv"]
    for i in range(layers):
        q, k, v = (project(graph, x, f"{name}{i}") for name in "qkv")
        pairs = zip(caches[2 * i : 2 * i + 2], (k, v), strict=True)
        keys, values = (graph.call_function(write_cache, (cache_, new, start, counts)) for cache_, new in pairs)
        o = graph.call_function(ATTENTION, (q, keys, values, "causal", D**-0.5, start, None))
        flat = graph.call_function(aten.view.default, (graph.call_function(aten.transpose.int, (o, 1, 2)), [1, 1, H * D]))
        x = graph.call_function(aten.matmul.default, (flat, graph.get_attr(f"o{i}")))
    graph.output((x,))
    return GraphModule(weights, graph)


def project(graph: Graph, x: Any, name: str) -> Any:
    flat = graph.call_function(aten.matmul.default, (x, graph.get_attr(name)))
    heads = graph.call_function(aten.view.default, (flat, [1, 1, -1, D]))
    return graph.call_function(aten.transpose.int, (heads, 1, 2))


@pytest.mark.parametrize("g", [H, G])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_few_kernels_a_layer_in_decode(dtype: torch.dtype, g: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    widths = {f"{name}{i}": heads * D for i in range(2) for name, heads in (("q", H), ("k", g), ("v", g), ("o", H))}
    gm = step(2, {name: (torch.randn(H * D, width) * 0.02).to(dtype) for name, width in widths.items()})
    caches = [Input(f"cache_{kind}_{i}", dtype, tuple(map(fixed, (1, g, SLOTS, D)))) for i in range(2) for kind in "kv"]
    rest = [Input("x", dtype, (fixed(1), fixed(1), fixed(H * D))), Input("start", torch.int64, (fixed(1),))]
    inputs = [*rest, Input("counts", torch.int64, (fixed(1),)), *caches]
    net = convert(gm, inputs)
    engine, kernels = built(net, inputs, tmp_path)
    first, second = [False, False, True, False], [False, False, False, True, False]  # projections, writes, attention, output
    assert [layer.is_attention for layer in engine.layers] == first + second, [layer.name for layer in engine.layers]
    assert all("_gemv_mha" in kernel.name for kernel in kernels)
    assert all(contradiction(kernel, parse("causal"), from_start=True) is None for kernel in kernels)
    assert engine.aliases == {f"cache_{kind}_{i}": f"cache_{kind}_{i}_out" for i in range(2) for kind in "kv"}


ENDS = {"window(64)": (("max(0,row-63)", "row"), ("max(row-63,0)", "min(row,shape2)"), ("row-63", "min(shape2,row)"))}
ENDS |= {"local(20, 30)": (("max(row-20,0)", "min(shape2,row+30)"), ("max(0,row-20)", "min(256,row+30)"))}
OTHER_ENDS = {"window(64)": (("max(row-62,0)", "row"), ("max(0,row-64)", "row"), ("max(0,row-63)", "min(row+1,shape2)"))}
OTHER_ENDS |= {"local(20, 30)": (("max(row-20,0)", "min(row+29,shape2)"), ("max(row,20)", "row+30"), ("0", "min(row,col)"))}


def test_bounds_are_read_in_any_spelling() -> None:
    for text, ends in ENDS.items():
        for left, right in ends:
            assert contradiction(AttentionKernel("k", left, right), parse(text)) is None, (text, left, right)
        for left, right in OTHER_ENDS[text]:
            assert contradiction(AttentionKernel("k", left, right), parse(text)) is not None, (text, left, right)


def test_layer_table_reads_the_log() -> None:
    lines = (
        "Name: a, LayerType: shape_call, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata: ",
        "Name: b, LayerType: kgen, Inputs: [ { Name: c } ], TacticName: _gemm_mha_v2_0xa, StreamId: 0, Metadata: m.0\x1fm.1",
    )
    found = layer_table(["something else", "Layers:\n" + "\n".join(lines) + "\n\nI/O Tensors:\n Name: x, IOMode: Input"])
    assert [(x.name, x.kind, x.tactic, x.modules, x.is_attention) for x in found] == [
        ("a", "shape_call", "", (), False),
        ("b", "kgen", "_gemm_mha_v2_0xa", ("m.0", "m.1"), True),
    ]
