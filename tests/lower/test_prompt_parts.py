"""Prompts in parts: equal layers are one part, the parts do what the whole does, and writes stand beside them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM

from lower.test_fused import interpreted
from trilithon.capture import hf
from trilithon.compiler import analyse
from trilithon.lower.graph_data import from_data, to_data
from trilithon.lower.inputs import Input, cached_inputs
from trilithon.lower.native.fused.remembered import text_of
from trilithon.lower.native.gated import gate_products
from trilithon.lower.native.layers import in_layers
from trilithon.lower.native.lower import is_lowered_site, lower_native
from trilithon.lower.native.one_product import one_product
from trilithon.lower.native.writes import separate_writes, write_by_kernel, write_tokens
from trilithon.options import Options
from trilithon.rewrite.cache_ops import quantise, write_cache, write_cache_8bit
from trilithon.rewrite.insert_cache import cache_shapes, insert_cache
from zoo.families import FAMILIES

SLOTS = 24


@cache
def program_of(name: str, layers: int) -> ExportedProgram:
    torch.manual_seed(0)
    family = FAMILIES[name]
    attention = "eager" if family.eager_only else "sdpa"
    config: Any = family.make(attention).config
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    return analyse(model, *hf.example_for(model, ("input_ids",)), (), Options()).rewritten


def prompt_of(name: str, layers: int, stored: torch.dtype | None = None) -> tuple[GraphModule, tuple[Input, ...]]:
    program = program_of(name, layers)
    gm = lower_native(insert_cache(program, "prompt", stored=stored))
    return gm, cached_inputs(gm, cache_shapes(program, stored=stored), SLOTS, 2)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma3", "glm", "gpt-neox", "falcon-alibi"])
def test_one_that_was_read_from_a_file_is_lowered_alike(name: str) -> None:
    """Products are merged and gated, and layers are the same parts: lowering asks of values what the file says of them."""
    program = program_of(name, 2)
    kept = to_data(insert_cache(program, "prompt"))
    weights = {own: x.detach().clone() for own, x in kept.tensors.items()}
    found = []
    for gm in (insert_cache(program, "prompt"), from_data(json.loads(json.dumps(kept.nodes)), weights, torch.device("cpu"))):
        inputs = cached_inputs(gm, cache_shapes(program), SLOTS, 2)
        one_product(lower_native(gm))
        separate_writes(gm, inputs)
        gate_products(gm)
        found.append(
            (text_of(gm), text_of(in_layers(gm, is_lowered_site, lambda part: part, lambda n: n.target is write_tokens)))
        )
    assert found[0] == found[1]
    merged = any("merged" in own for own, _ in gm.named_buffers())
    assert merged == (name not in ("phi3", "gpt-neox", "falcon-alibi")), "it is merged in the model"


def given(inputs: tuple[Input, ...], counts: list[int]) -> list[torch.Tensor]:
    rows = len(counts)
    ids = torch.randint(3, 40, (rows, max(counts)), generator=torch.Generator().manual_seed(1))
    caches = [torch.zeros(rows, *(axis.high for axis in x.axes[1:]), dtype=x.dtype) for x in inputs[3:]]
    return [ids, torch.zeros(rows, dtype=torch.int64), torch.tensor(counts), *caches]


def parts(gm: GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize(
    ("name", "layers", "kinds"),
    [
        ("qwen3", 4, 3),  # the first, those between, the last
        ("gemma2", 5, 4),  # windows in turn: two kinds between
        ("phi3", 1, 1),
    ],
)
@torch.no_grad()
def test_equal_layers_are_one_part(name: str, layers: int, kinds: int) -> None:
    gm, inputs = prompt_of(name, layers)
    separate_writes(gm, inputs)
    compiled: list[GraphModule] = []

    def keep(part: GraphModule) -> GraphModule:
        compiled.append(part)
        return part

    made = in_layers(gm, is_lowered_site, keep, lambda n: n.target is write_tokens)
    assert len(parts(made)) == layers and len(set(parts(made))) == len(compiled) == kinds
    for part in compiled:
        assert sum(is_lowered_site(n) for n in part.graph.nodes) == 1
        assert not part.graph.find_nodes(op="call_function", target=write_tokens)
        assert not list(part.parameters())
    assert len(made.graph.find_nodes(op="call_function", target=write_tokens)) == 2 * layers
    for counts in ([7], [5, 3], [1]):
        whole, own = given(inputs, counts), given(inputs, counts)
        assert torch.equal(gm(*whole), made(*own))
        assert all(torch.equal(x, y) for x, y in zip(whole[3:], own[3:], strict=True))
        assert bool(own[3].any())


@torch.no_grad()
def test_layers_that_differ_in_one_number_are_two_parts() -> None:
    """A near miss: one norm of one of the two layers between has another epsilon."""
    gm, _ = prompt_of("qwen3", 4)
    sites = [n for n in gm.graph.nodes if is_lowered_site(n)]
    nodes = list(gm.graph.nodes)
    between = nodes[nodes.index(sites[1]) : nodes.index(sites[2])]
    plain = in_layers(gm, is_lowered_site, lambda part: part)
    assert len(set(parts(plain))) == 3
    own = next(n for n in between if n.target is torch.ops.aten.add.Tensor and n.args[1] == 1e-6)
    own.args = (own.args[0], 2e-6)
    changed = in_layers(gm, is_lowered_site, lambda part: part)
    assert len(set(parts(changed))) == 4


def test_layers_of_other_widths_are_two_parts() -> None:
    """Dynamo compiles a part anew for other sizes of its weights, and gives up after a few."""
    gm, _ = prompt_of("qwen3", 4)
    name = next(str(n.target) for n in gm.graph.find_nodes(op="get_attr") if "layers_1_mlp_gate" in str(n.target))
    setattr(gm, name, torch.nn.Parameter(torch.zeros(7, 5)))
    assert len(set(parts(in_layers(gm, is_lowered_site, lambda part: part)))) == 4


def test_a_write_of_8_bits_becomes_two() -> None:
    gm, inputs = prompt_of("qwen3", 4, torch.int8)
    before, after = given(inputs, [6, 4]), given(inputs, [6, 4])
    want = gm(*before)
    separate_writes(gm, inputs)
    targets = [n.target for n in gm.graph.nodes]
    assert targets.count(write_tokens) == 16 and targets.count(quantise) == 8
    assert write_cache_8bit not in targets and write_cache not in targets
    assert torch.equal(gm(*after), want)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_kernel_writes_what_write_cache_writes(dtype: torch.dtype) -> None:
    """Padding, rings that go round, odd widths, strides of a transposed view; slots of padding keep what they held."""
    generator = torch.Generator().manual_seed(0)
    for s, t, d, counts, start in (
        (5, 16, 8, [5, 2], [0, 3]),
        (9, 4, 6, [9, 6], [0, 0]),
        (33, 40, 16, [33, 1], [7, 39]),
        (3, 8, 1, [2, 3], [6, 0]),
    ):
        x = torch.randn(2, s, 3, d, generator=generator).mul(9).to(dtype).transpose(1, 2)
        cache = torch.randn(2, 3, t, d, generator=generator).mul(9).to(dtype)
        own, places = cache.clone(), (torch.tensor(start), torch.tensor(counts))
        as_bits = torch.int8 if dtype.itemsize == 1 else dtype
        write_cache(cache.view(as_bits), x.contiguous().view(as_bits), *places)
        write_by_kernel(own, x, *places)
        assert torch.equal(own.view(as_bits), cache.view(as_bits))
