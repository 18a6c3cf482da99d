"""One query over a cache that keeps values turned: what the network means, which kernels are built, and whole decoders."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import trilithon
from lower.tensorrt.test_attention import CHANGED, DTYPES, SCALE, D, allowed_by, within, written_out
from models.configs import tiny
from one_layer import trt  # noqa: F401 (skips without TensorRT)
from rewrite.cached_run import CachedRun
from rewrite.test_insert_cache import worst
from runtime.test_decoder import ROWS, Rows, back, choose, fork, model, one, prompt, several
from trilithon import Options
from trilithon.capture import hf
from trilithon.compiler import analyse
from trilithon.errors import CannotLower, CapacityExceeded
from trilithon.lower.inputs import Axis, Input, fixed
from trilithon.lower.tensorrt import attention
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.engine import Engine, build
from trilithon.lower.tensorrt.interpret import interpret
from trilithon.lower.tensorrt.network import Network
from trilithon.rewrite.cache_ops import turn, turn_back, write_cache
from trilithon.rewrite.cache_shape import CacheShape
from trilithon.rewrite.op import ATTENTION
from trilithon.runtime.decoder import CachedDecoder
from trilithon.spec.bias_text import write_bias
from trilithon.spec.masks import parse
from trilithon.spec.reference import reference_attention

aten = torch.ops.aten
H, SLOTS, TOKENS = 4, 20, 121
KERNELS = ("Mul(Add)?Resh(Cast)?MulSum_", "SeleMaxrSubExpSum_", "MulSumReshDiv")
ORDER = ("q", "k", "v", "start", "counts", "cache_k", "cache_v", "x", "keys")


def test_turned_and_back() -> None:
    x = torch.randn(2, 3, 5, 4)
    cache = turn(x)
    assert cache.shape == (2, 12, 5, 1) and torch.equal(cache[:, 5, :, 0], x[:, 1, :, 1])
    assert torch.equal(turn_back(cache, 3), x)
    assert turn_back(cache, 3).data_ptr() == cache.data_ptr()


# ------------------------------------------------------------ one attention


def step(g: int, mask: str, **changes: Any) -> GraphModule:
    """Writes into both caches, and an attention over them."""
    graph = Graph()
    given = {name: graph.placeholder(name) for name in ORDER}
    fresh = given["k"], graph.call_function(turn, (given["v"],))
    pairs = zip((given["cache_k"], given["cache_v"]), fresh, strict=True)
    keys, kept = (graph.call_function(write_cache, (cache, x, given["start"], given["counts"])) for cache, x in pairs)
    rest = {"key_mask": given["keys"] if "padding" in mask else None, **changes}
    if changes.get("bias"):
        rest["tables"] = [given["x"]]
    values = graph.call_function(turn_back, (kept, g))
    graph.output((graph.call_function(ATTENTION, (given["q"], keys, values, mask, SCALE, given["start"]), rest),))
    return GraphModule(nn.Module(), graph)


def step_inputs(dtype: torch.dtype, g: int, s: Axis) -> list[Input]:
    b = Axis(1, 2, 4)
    new = [Input(n, dtype, (b, fixed(heads), s, fixed(D))) for n, heads in (("q", H), ("k", g), ("v", g))]
    whole = [Input(n, torch.int64, (b,)) for n in ("start", "counts")]
    caches = [Input("cache_k", dtype, (b, fixed(g), fixed(SLOTS), fixed(D)))]
    caches += [Input("cache_v", dtype, (b, fixed(g * D), fixed(SLOTS), fixed(1)))]
    return [*new, *whole, *caches, Input("x", dtype, (fixed(H),)), Input("keys", torch.bool, (b, fixed(SLOTS)))]


def operands(dtype: torch.dtype, g: int, s: int = 1) -> dict[str, Tensor]:
    """Two rows, and caches full of numbers: what stands behind a row's end must not matter."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, s, D).to(dtype) for heads in (H, g, g))
    caches = torch.randn(2, g, SLOTS, D).to(dtype), torch.randn(2, g * D, SLOTS, 1).to(dtype)
    start, counts = torch.tensor([11, 4]), torch.full((2,), s)
    rest = torch.randn(H).to(dtype), torch.ones(2, SLOTS, dtype=torch.bool)
    return dict(zip(ORDER, (q, k, v, start, counts, *caches, *rest), strict=True))


def run(net: Network, given: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    held = {net.definition.get_input(i).name for i in range(net.definition.num_inputs)}
    return interpret(net, {name: x for name, x in given.items() if name in held}, **settings)


def eager(gm: GraphModule, given: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    result: Tensor = gm(*(x.to(dtype, copy=True) if x.is_floating_point() else x for x in given.values()))[0]
    return result


@pytest.mark.parametrize("mask", ["causal", "window(3)", "causal & chunked(4)"])
@pytest.mark.parametrize("g", [4, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sums_are_attention(dtype: torch.dtype, g: int, mask: str) -> None:
    gm, given = step(g, mask), operands(dtype, g)
    net = convert(gm, step_inputs(dtype, g, fixed(1)))
    assert net.sites[0].form == "summed"
    got, meant = run(net, given), run(net, given, dtype=torch.float64)["output_0"]
    exact = eager(gm, given, torch.float64)
    assert within(meant, exact, eager(gm, given, torch.float32))
    caches = given["cache_k"].clone(), given["cache_v"].clone()
    gm(*({**given, "cache_k": caches[0], "cache_v": caches[1]}.values()))
    assert torch.equal(got["cache_k_out"], caches[0]) and torch.equal(got["cache_v_out"], caches[1])
    keys = torch.ones(2, SLOTS, dtype=torch.bool)
    site = given["q"], caches[0], turn_back(caches[1], g)
    usual = written_out(*site, allowed_by(parse(mask), 2, 1, SLOTS, keys, given["start"]), SCALE)
    assert got["output_0"].dtype == dtype and within(got["output_0"], exact, usual)
    for other in parse(mask).near_misses() if "&" not in mask else ():
        allowed = allowed_by(other, 2, 1, SLOTS, keys, given["start"])
        wrong = reference_attention(*site, allowed, SCALE, torch.float64)
        assert not within(wrong, exact, usual), str(other)


def test_only_what_is_seen_matters() -> None:
    """Slots behind a row's end have no weight at all, and those before it have some."""
    gm, given = step(2, "causal"), operands(torch.float16, 2)
    net = convert(gm, step_inputs(torch.float16, 2, fixed(1)))
    got = run(net, given)["output_0"]
    for slot, row in ((5, 1), (12, 0), (19, 0)):
        for cache in ("cache_k", "cache_v"):
            other = {**given, cache: given[cache].clone()}
            other[cache][row, :, slot] = 6e4
            assert torch.equal(run(net, other)["output_0"], got)
            other[cache][row, :, 2] += 1
            assert not within(run(net, other)["output_0"][row], got[row].double(), got[row])
    given |= {name: torch.zeros_like(given[name]) for name in ("cache_k", "cache_v")}
    first = {**given, "start": torch.tensor([0, 0])}
    assert torch.equal(run(net, first)["output_0"], given["v"].repeat_interleave(2, 1))


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_changed_scores(dtype: torch.dtype, name: str) -> None:
    bias, softcap = CHANGED[name]
    gm = step(2, "causal", bias="" if bias is None else write_bias(bias, ["x"]), softcap=softcap)
    net, given = convert(gm, step_inputs(dtype, 2, fixed(1))), operands(dtype, 2)
    assert net.sites[0].form == "summed"
    meant = run(net, given, dtype=torch.float64)["output_0"]
    torch.testing.assert_close(meant.double(), eager(gm, given, torch.float64), rtol=1e-5, atol=1e-5)


def test_a_query_without_a_key_gives_0() -> None:
    gm, given = step(2, "causal & padding(keys)"), operands(torch.float32, 2)
    given["keys"][0] = False
    given["keys"][1, 1:3] = False
    got = run(convert(gm, step_inputs(torch.float32, 2, fixed(1))), given)["output_0"]
    assert not got[0].any() and got[1].all()
    torch.testing.assert_close(got.double(), eager(gm, given, torch.float64), rtol=1e-5, atol=1e-5)


def test_other_forms_read_turned_values_too() -> None:
    """Several queries, or products that were asked for; the fused layer does not take one query and a float32."""
    for tokens, asked in ((fixed(3), "auto"), (fixed(1), "decomposed")):
        gm, given = step(2, "causal"), operands(torch.float32, 2, tokens.best)
        net = convert(gm, step_inputs(torch.float32, 2, tokens), asked)
        assert net.sites[0].form == "decomposed"
        torch.testing.assert_close(run(net, given)["output_0"], eager(gm, given, torch.float32), rtol=1e-5, atol=1e-5)
    with pytest.raises(CannotLower, match="was asked to be fused: float32"):
        convert(step(2, "causal"), step_inputs(torch.float32, 2, fixed(1)), "fused")


# ------------------------------------------------------------ kernels


def rotary_step(layers: int, g: int, d: int, weights: dict[str, Tensor], turned: bool) -> GraphModule:
    """Layers of a decode step whose queries and keys are multiplied by something that is computed."""
    graph = Graph()
    x, start, counts = (graph.placeholder(name) for name in ("x", "start", "counts"))
    caches = [graph.placeholder(f"cache_{kind}_{i}") for i in range(layers) for kind in "kv"]
    angle = graph.call_function(aten.view.default, (graph.call_function(aten._to_copy.default, (start,)), [1, 1, 1, 1]))
    turns = graph.call_function(aten.mul.Tensor, (angle, graph.get_attr("inverse")))
    cos = graph.call_function(aten.cos.default, (turns,))
    for i in range(layers):
        flat = [graph.call_function(aten.matmul.default, (x, graph.get_attr(f"{name}{i}"))) for name in "qkv"]
        heads = [graph.call_function(aten.view.default, (y, [1, 1, -1, d])) for y in flat]
        q, k, v = (graph.call_function(aten.transpose.int, (y, 1, 2)) for y in heads)
        q, k = (graph.call_function(aten.mul.Tensor, (y, cos)) for y in (q, k))
        v = graph.call_function(turn, (v,)) if turned else v
        pairs = zip(caches[2 * i : 2 * i + 2], (k, v), strict=True)
        keys, values = (graph.call_function(write_cache, (cache, new, start, counts)) for cache, new in pairs)
        values = graph.call_function(turn_back, (values, g)) if turned else values
        o = graph.call_function(ATTENTION, (q, keys, values, "causal", d**-0.5, start, None))
        o = graph.call_function(aten.view.default, (graph.call_function(aten.transpose.int, (o, 1, 2)), [1, 1, -1]))
        x = graph.call_function(aten.matmul.default, (o, graph.get_attr(f"o{i}")))
    graph.output((x,))
    return GraphModule(weights, graph)


def engine_of(dtype: torch.dtype, h: int, g: int, turned: bool, folder: Path) -> Engine:
    torch.manual_seed(0)
    d, slots, layers = 64, 2176, 2
    shape = CacheShape(g, d, d, dtype, turned=turned)
    widths = {f"{name}{i}": heads * d for i in range(layers) for name, heads in (("q", h), ("k", g), ("v", g), ("o", h))}
    weights = {name: (torch.randn(h * d, width) * 0.02).to(dtype) for name, width in widths.items()}
    weights["inverse"] = torch.rand(1, 1, 1, d).to(dtype)
    gm = rotary_step(layers, g, d, weights, turned)
    kept = [(f"{x.kind}_{i}", (1, x.heads, slots, x.width)) for i in range(layers) for x in shape.tensors]
    caches = [Input(name, dtype, tuple(map(fixed, sizes))) for name, sizes in kept]
    rest = [Input("x", dtype, (fixed(1), fixed(1), fixed(h * d)))]
    inputs = [*rest, *(Input(name, torch.int64, (fixed(1),)) for name in ("start", "counts")), *caches]
    for node, spec in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["val"] = torch.empty([axis.high for axis in spec.axes], dtype=spec.dtype, device="meta")
    engine = build(convert(gm, inputs), inputs, "sm80", folder / f"{turned}.plan")
    assert engine.aliases == {x.name: f"{x.name}_out" for x in caches}
    return engine


def copies(engine: Engine) -> list[str]:
    """Kernels that move or repeat something and compute nothing."""
    return [layer.name for layer in engine.layers if re.match(r"__myl_(Resh|Tran|Repl|Move)+_", layer.name)]


@pytest.mark.parametrize("g", [8, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_three_kernels_and_no_copies(dtype: torch.dtype, g: int, tmp_path: Path) -> None:
    """Scores; their largest, weights and total; values. A product of matrices has keys and values copied first."""
    summed, before = (engine_of(dtype, 8, g, turned, tmp_path) for turned in (True, False))
    names = [layer.name for layer in summed.layers if layer.tactic]
    assert not copies(summed) and not any(layer.is_attention for layer in summed.layers), names
    assert len(copies(before)) == 4 and sum(layer.is_attention for layer in before.layers) == 2
    scores, weights, values = ([name for name in names if re.search(part, name)] for part in KERNELS)
    assert (len(scores), len(weights), len(values)) == (2, 2, 2), names
    others = [name for name in names if name not in {*scores, *weights, *values} and "matrix_multiply" not in name]
    assert len(others) == 3 and all(re.search("Scat|Etc", name) for name in others), names  # writes, and cosines once


# ------------------------------------------------------------ cached programs and decoders


@pytest.mark.parametrize("name", ["mixtral", "falcon", "gemma3"])
@pytest.mark.parametrize("rings", [False, True])
@torch.no_grad()
def test_cached_programs(name: str, rings: bool) -> None:
    ids = torch.randint(3, 60, (3, 48), generator=torch.Generator().manual_seed(1))
    program = analyse(model(name), *hf.example_for(model(name), ("input_ids",)), (), Options()).rewritten
    run = CachedRun(program, ids, 50, rings=rings, turned=True)
    assert all(x.turned and x.slots(50) % 8 == 0 for x in run.shapes)
    assert worst(run.schedule(0), model(name)(input_ids=ids, use_cache=False).logits) < 1e-4


def decoder_of(family: str, **options: Any) -> CachedDecoder:
    own = Options(gpu="sm80", max_batch=ROWS, **{"verify": False, **options})
    return trilithon.compile(model(family), max_tokens=TOKENS, backend="tensorrt", options=own).decoder


@pytest.mark.parametrize("family", ["mistral", "falcon", "gemma2"])
def test_schedules(family: str) -> None:
    """Prompts, steps, rewinds, forks and selections, with grouped and single heads, a window and a softcap."""
    decoder, generator = decoder_of(family), random.Random(family)
    module: Any = decoder.modules.decode
    assert {site.form for site in module.engine.sites} == {"summed"}
    assert {cache.shape[2] for cache in decoder.caches} == {128}
    rows = Rows(family)
    prompt(decoder, rows, generator)
    for action in (one, back, fork, several, choose, one):
        action(decoder, rows, generator)
    prompt(decoder, rows, generator)
    for action in (several, choose, back, one, fork, one):
        action(decoder, rows, generator)


def test_a_stale_slot_shows() -> None:
    decoder, rows, generator = decoder_of("llama-3.2"), Rows("llama-3.2"), random.Random(0)
    prompt(decoder, rows, generator)
    one(decoder, rows, generator)
    decoder.caches[1][0, :, len(rows.rows[0]) - 1] = 0  # the values of the newest token
    with pytest.raises(AssertionError):
        one(decoder, rows, generator)


def test_the_capacity_is_the_users() -> None:
    decoder = decoder_of("llama-3.2")
    assert decoder.cache_tokens == TOKENS
    prompt_ids = torch.arange(TOKENS - 1)[None] % 50 + 3
    decoder.prefill(prompt_ids, torch.tensor([0]))
    decoder.decode(torch.tensor([5]))
    with pytest.raises(CapacityExceeded, match=f"a cache of {TOKENS}"):
        decoder.decode(torch.tensor([5]))


def test_forms_that_are_asked_for_keep_values_as_they_are() -> None:
    for options in ({"attention": "decomposed"}, {}):
        decoder = decoder_of("gpt2", **options)
        assert {shape.turned for shape in decoder.shapes} == {not options}
    with pytest.raises(CannotLower, match="asked to be fused"):
        decoder_of("gpt2", attention="fused")


def test_wrong_sums_are_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canary sees keys that a mask forbids, and the decoder is built again without the sums."""
    right = attention._summed
    monkeypatch.setattr(attention, "_summed", lambda net, site: right(net, replace(site, allowed=lambda use: None)))
    llm = trilithon.compile(tiny("llama-3.2", layers=1), max_tokens=32, backend="tensorrt", options=Options(gpu="sm80"))
    assert not any(shape.turned for shape in llm.decoder.shapes)
    assert any("attention='decomposed', since engines in a faster form were refused" in note for note in llm.report.notes)
