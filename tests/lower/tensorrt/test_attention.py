"""Attention calls as TensorRT layers: what the network means, site by site, and which form each site takes.

The sites of a table are the outputs of one program, which is exported and converted once for each type of numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._pytree import tree_map_only

from trilithon.errors import CannotLower
from trilithon.lower.inputs import Axis, Input, fixed
from trilithon.lower.tensorrt.attention import Attention, attend
from trilithon.lower.tensorrt.capability import AttentionSpec, choose, keeps_a_key, prefers_primitives, refuses
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.interpret import interpret
from trilithon.lower.tensorrt.network import Network
from trilithon.rewrite.cache_ops import write_cache
from trilithon.rewrite.op import ATTENTION
from trilithon.spec import float_term
from trilithon.spec import term as terms
from trilithon.spec.bias_text import write_bias
from trilithon.spec.masks import Causal, Full, H, K, Mask, Padding, Q, parse, parts
from trilithon.spec.reference import allowed_keys, reference_attention
from trilithon.spec.term import Term

aten = torch.ops.aten
B, S, T = Dim("b", min=1, max=8), Dim("s", min=1, max=32), Dim("t", min=1, max=32)
RANGES = {B: Axis(1, 2, 8), S: Axis(1, 9, 32), T: Axis(1, 12, 32)}
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES = {"float32": torch.float32, **HALF}
D, SCALE = 16, 0.3
SIZES = ((2, 9, 9), (3, 12, 5), (2, 1, 11), (1, 1, 1))
Call = Callable[..., Tensor]


# ------------------------------------------------------------ the tables


class Site(nn.Module):
    """One call, so that the site has a module's path for a name."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Tensor]) -> Tensor:
        return self.call(q, k, v, extra)


class Sites(nn.Module):
    """The calls of a table, by name. They take turns with 4, 2 and 1 heads of keys for 4 of queries."""

    def __init__(self, calls: dict[str, Call]) -> None:
        super().__init__()
        self.rows = nn.ModuleDict({name: Site(call) for name, call in calls.items()})

    def forward(self, q: Tensor, ks: list[Tensor], vs: list[Tensor], extra: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(row(q, ks[i % 3], vs[i % 3], extra) for i, row in enumerate(self.rows.values()))


MASKS = ("causal", "full", "window(3)", "window(1)", "chunked(4)", "local(1, 2)", "padding(keys)", "causal & padding(keys)")
MASKS += ("padding(keys) & window(3)", "causal(lower_right)", "window(3, lower_right)")
STARTED = ("causal", "window(3)", "padding(keys)", "causal & padding(keys)", "padding(keys) & window(3)")


def canonical(mask: str, *, started: bool) -> Call:
    padded = any(isinstance(part, Padding) for part in parts(parse(mask)))
    return lambda q, k, v, x: ATTENTION(q, k, v, mask, SCALE, x["start"] if started else None, x["keys"] if padded else None)


CANONICAL = {
    f"{text} started={started}": canonical(text, started=started)
    for started, texts in ((False, MASKS), (True, STARTED))
    for text in texts
}
LEADING = {"none": (1, 1), "rows": (2, 1), "heads": (1, 4), "both": (2, 4)}
FORMS = {"matrix": (2, 3), "cube": (1, 2, 3), "row": (0, -1, -1, 3), "column": (0, -1, 2, -1)}  # axes of [b h s t]; -1: one
FORMS |= {name: (0 if rows > 1 else -1, 1 if heads > 1 else -1, 2, 3) for name, (rows, heads) in LEADING.items()}
KINDS = {**{f"bool {form}": torch.bool for form in FORMS}, **{f"own {form}": None for form in FORMS}}
KINDS |= {f"float32 {form}": torch.float32 for form in LEADING}


def masked(name: str, **settings: Any) -> Call:
    return lambda q, k, v, x: sdpa(q, k, v, x[name], enable_gqa=True, **settings)


CALLS: dict[str, Call] = {
    "plain": lambda q, k, v, x: sdpa(q, k, v, enable_gqa=True),
    "scaled": lambda q, k, v, x: sdpa(q, k, v, scale=0.7, enable_gqa=True),
    "unscaled": lambda q, k, v, x: sdpa(q, k, v, scale=1.0, enable_gqa=True),
    "causal": lambda q, k, v, x: sdpa(q, k, v, is_causal=True, enable_gqa=True),
    "one query": lambda q, k, v, x: sdpa(q[:, :, -1:], k, v, enable_gqa=True),
    "one causal query": lambda q, k, v, x: sdpa(q[:, :, -1:], k, v, is_causal=True, enable_gqa=True),
    "one masked query": lambda q, k, v, x: sdpa(q[:, :, -1:], k, v, x["bool row"], enable_gqa=True),
    "three axes": lambda q, k, v, x: sdpa(q[0], pair(k, v)[0][0], pair(k, v)[1][0], x["bool cube"]),
    **{name: masked(name) for name in KINDS},
}


def both(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What a mask and `is_causal` together mean."""
    below = torch.ones(q.shape[2], k.shape[2]).tril().bool()
    return sdpa(q, k, v, mask & below if mask.dtype == torch.bool else mask.masked_fill(~below, -torch.inf))


PRIVATE: dict[str, tuple[Call, Call]] = {  # the operation, and what it means
    "for the CPU": (
        lambda q, k, v, x: aten._scaled_dot_product_flash_attention_for_cpu(q, *pair(k, v), 0.0, True)[0],
        lambda q, k, v, x: sdpa(q, *pair(k, v), is_causal=True),
    ),
    "for the CPU, masked": (
        lambda q, k, v, x: aten._scaled_dot_product_flash_attention_for_cpu(q, *pair(k, v), attn_mask=x["own both"])[0],
        lambda q, k, v, x: sdpa(q, *pair(k, v), x["own both"]),
    ),
    "efficient": (
        lambda q, k, v, x: aten._scaled_dot_product_efficient_attention(q, *pair(k, v), x["own both"], False, 0.0, True)[0],
        lambda q, k, v, x: both(q, *pair(k, v), x["own both"]),
    ),
    "flash": (
        lambda q, k, v, x: aten._scaled_dot_product_flash_attention(q, *pair(k, v), 0.0, True, scale=0.5)[0],
        lambda q, k, v, x: sdpa(q, *pair(k, v), is_causal=True, scale=0.5),
    ),
    "cudnn": (
        lambda q, k, v, x: aten._scaled_dot_product_cudnn_attention(q, *pair(k, v), x["bool both"], False, 0.0, True)[0],
        lambda q, k, v, x: both(q, *pair(k, v), x["bool both"]),
    ),
}


def pair(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for each of four query heads."""
    return k.repeat_interleave(4 // k.shape[1], 1), v.repeat_interleave(4 // v.shape[1], 1)


# ------------------------------------------------------------ programs and their networks


def operands(b: int, s: int, t: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    ks, vs = ([torch.randn(b, g, t, D).to(dtype) for g in (4, 2, 1)] for _ in range(2))
    return torch.randn(b, 4, s, D).to(dtype), ks, vs


def masks_for(b: int, s: int, t: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A mask of each kind. Some queries may see nothing."""
    made = {}
    for name, kind in KINDS.items():
        allowed = torch.rand([1 if axis < 0 else (b, 4, s, t)[axis] for axis in FORMS[name.split()[1]]]) < 0.7
        allowed[..., :1, :] &= s < 2
        numbers = torch.randn(allowed.shape).masked_fill(~allowed, -torch.inf)
        made[name] = allowed if kind == torch.bool else numbers.to(kind or dtype)
    return made


def keys_and_start(b: int, t: int) -> dict[str, Tensor]:
    keys = torch.rand(b, t) < 0.7
    keys[0] = False  # a row of padding alone
    return {"keys": keys, "start": torch.tensor(3)}


@dataclass(frozen=True)
class Program:
    """An exported table.

    Attributes:
        graph: of the export.
        axes: what may vary of each input, in order.
        floats: whether an input has the operands' type.
        values: what the export recorded for each node, with float64 for the operands' type.
    """

    graph: GraphModule
    axes: list[dict[int, Any]]
    floats: list[bool]
    values: dict[Node, Any]

    def network(self, dtype: torch.dtype, attention: str = "auto") -> Network:
        """The network for operands of this type."""
        for node, value in self.values.items():
            node.meta["val"] = tree_map_only(Tensor, lambda x: x.to(dtype) if x.dtype == torch.float64 else x, value)
        nodes = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        inputs = [
            Input(
                node.name,
                dtype if own else node.meta["val"].dtype,
                tuple(RANGES[axes[i]] if i in axes else fixed(int(n)) for i, n in enumerate(node.meta["val"].shape)),
            )
            for node, axes, own in zip(nodes, self.axes, self.floats, strict=True)
        ]
        return convert(self.graph, inputs, attention)


def exported(calls: dict[str, Call], extra: dict[str, Tensor], extra_axes: dict[str, dict[int, Any]]) -> Program:
    q, ks, vs = operands(2, 9, 12, torch.float64)
    over = {0: B, 2: T}
    shapes = ({0: B, 2: S}, [over] * 3, [over] * 3, {name: axes or None for name, axes in extra_axes.items()})
    program = torch.export.export(Sites(calls), (q, ks, vs, extra), dynamic_shapes=shapes)
    floats = [True] * 7 + [x.dtype == torch.float64 for x in extra.values()]
    values = {node: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    return Program(program.graph_module, [{0: B, 2: S}, *[over] * 6, *extra_axes.values()], floats, values)


@cache
def canonical_program() -> Program:
    return exported(CANONICAL, keys_and_start(2, 12), {"keys": {0: B, 1: T}, "start": {}})


@cache
def sdpa_program() -> Program:
    names = {0: B, 2: S, 3: T}
    axes = {name: {i: names[axis] for i, axis in enumerate(FORMS[name.split()[1]]) if axis in names} for name in KINDS}
    private = {name: call for name, (call, _) in PRIVATE.items()}
    return exported({**CALLS, **private}, masks_for(2, 9, 12, torch.float64), axes)


def feeds(net: Network, q: Tensor, ks: list[Tensor], vs: list[Tensor], extra: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [net.definition.get_input(i).name for i in range(net.definition.num_inputs)]
    return dict(zip(names, (q, *ks, *vs, *extra.values()), strict=True))


def within(got: Tensor, exact: Tensor, eager: Tensor) -> bool:
    """Is the error at most twice that of the same precision in eager PyTorch?"""
    limit = 2 * float((eager.double() - exact).abs().max()) + 1e-7
    return float((got.double() - exact).abs().max()) <= limit


def written_out(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Attention as eager models write it: products in the operands' type, softmax in float32."""
    k, v = pair(k, v)
    scores = ((q @ k.transpose(-1, -2)).float() * scale).masked_fill(~allowed, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num().to(q.dtype) @ v


def allowed_by(mask: Mask, b: int, s: int, t: int, keys: Tensor, start: Tensor | None = None) -> Tensor:
    if start is not None:
        return allowed_keys(mask, s, t, q_start=start, key_mask=keys, device=keys.device)
    return mask.materialize(b, 4, s, t, {"keys": keys})


# ------------------------------------------------------------ meaning


@pytest.mark.parametrize("attention", ["auto", "fused", "decomposed"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_canonical(dtype: torch.dtype, attention: str) -> None:
    if dtype == torch.float32 and attention == "fused":
        return  # see test_fused_is_refused
    net = canonical_program().network(dtype, attention)
    torch.manual_seed(0)
    for b, s, t in SIZES if attention == "auto" else SIZES[:2]:
        q, ks, vs = operands(b, s, t, dtype)
        extra = keys_and_start(b, t)
        ideal = interpret(net, feeds(net, q, ks, vs, extra), dtype=torch.float64)
        own = interpret(net, feeds(net, q, ks, vs, extra)) if (b, s, t) == SIZES[0] else ideal
        for i, (name, meant, mine) in enumerate(zip(CANONICAL, ideal.values(), own.values(), strict=True)):
            text, started = name.split(" started=")
            start = extra["start"] if started == "True" else None
            allowed = allowed_by(parse(text), b, s, t, extra["keys"], start)
            site = q, ks[i % 3], vs[i % 3]
            exact = reference_attention(*(x.double() for x in site), allowed, SCALE, torch.float64)
            single = reference_attention(*(x.float() for x in site), allowed, SCALE)
            assert within(meant, exact, single), f"{name} at {b, s, t}"
            assert within(mine, exact, written_out(*site, allowed, SCALE)), f"{name} at {b, s, t}, rounded"


@pytest.mark.parametrize("text", MASKS)
def test_a_neighbour_differs(text: str) -> None:
    """The limits of `test_canonical` tell a mask from its near misses, and the order of grouped heads."""
    torch.manual_seed(0)
    q, ks, vs = operands(2, 9, 12, torch.float64)
    site, mask, keys = (q, ks[1], vs[1]), parse(text), torch.rand(2, 12) < 0.7
    allowed = allowed_by(mask, 2, 9, 12, keys)
    exact = reference_attention(*site, allowed, SCALE, torch.float64)
    for other in mask.near_misses():
        wrong = reference_attention(*site, allowed_by(other, 2, 9, 12, keys), SCALE, torch.float64)
        assert not within(wrong, exact, exact.bfloat16()), str(other)
    swapped = (q, *(x.repeat(1, 2, 1, 1) for x in site[1:]))
    assert not within(reference_attention(*swapped, allowed, SCALE, torch.float64), exact, exact.bfloat16())


@pytest.mark.parametrize("attention", ["auto", "decomposed"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sdpa(dtype: torch.dtype, attention: str) -> None:
    if dtype == torch.float32 and attention == "decomposed":
        return  # what "auto" is
    net = sdpa_program().network(dtype, attention)
    torch.manual_seed(0)
    means = {**CALLS, **{name: meaning for name, (_, meaning) in PRIVATE.items()}}
    for b, s, t in SIZES if attention == "auto" else SIZES[:1]:
        q, ks, vs = operands(b, s, t, dtype)
        masks = masks_for(b, s, t, dtype)
        got = interpret(net, feeds(net, q, ks, vs, masks), dtype=torch.float64)
        for i, ((name, means_), meant) in enumerate(zip(means.items(), got.values(), strict=True)):
            exact, single = (
                means_(
                    *(x.to(to) for x in (q, ks[i % 3], vs[i % 3])),
                    {n: m if m.dtype == torch.bool else m.to(to) for n, m in masks.items()},
                )
                for to in (torch.float64, torch.float32)
            )
            assert within(meant, exact, single), f"{name} at {b, s, t}"


# ------------------------------------------------------------ the static cache


def cached_step(mask: str) -> GraphModule:
    """One attention over a cache, as `insert_cache` writes it."""
    graph = Graph()
    q, k, v, start, counts, cache_k, cache_v = (
        graph.placeholder(name) for name in ("q", "k", "v", "start", "counts", "cache_k", "cache_v")
    )
    keys = graph.call_function(write_cache, (cache_k, k, start, counts))
    values = graph.call_function(write_cache, (cache_v, v, start, counts))
    graph.output((graph.call_function(ATTENTION, (q, keys, values, mask, SCALE, start, None)),))
    return GraphModule(nn.Module(), graph)


def step_inputs(dtype: torch.dtype, b: Axis, s: Axis, h: int, g: int, slots: int) -> list[Input]:
    new = [Input(n, dtype, (b, fixed(heads), s, fixed(D))) for n, heads in (("q", h), ("k", g), ("v", g))]
    caches = [Input(f"cache_{n}", dtype, (b, fixed(g), fixed(slots), fixed(D))) for n in "kv"]
    return [*new, Input("start", torch.int64, (b,)), Input("counts", torch.int64, (b,)), *caches]


@pytest.mark.parametrize("mask", ["causal", "window(3)"])
@pytest.mark.parametrize("g", [4, 2])
@pytest.mark.parametrize("tokens", [fixed(1), Axis(1, 4, 8)], ids=["one token", "several"])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_step_over_a_cache(dtype: torch.dtype, tokens: Axis, g: int, mask: str) -> None:
    gm = cached_step(mask)
    net = convert(gm, step_inputs(dtype, Axis(1, 2, 4), tokens, 4, g, 20))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, tokens.best, D).to(dtype) for heads in (4, g, g))
    caches = [torch.randn(2, g, 20, D).to(dtype) for _ in range(2)]
    start, counts = torch.tensor([11, 4]), torch.full((2,), tokens.best)
    named = dict(zip(("q", "k", "v", "start", "counts", "cache_k", "cache_v"), (q, k, v, start, counts, *caches), strict=True))
    got, meant = interpret(net, named), interpret(net, named, dtype=torch.float64)
    exact, single = (
        gm(*(x.to(to) for x in (q, k, v)), start, counts, *(c.to(to) for c in caches))[0]
        for to in (torch.float64, torch.float32)
    )
    gm(q, k, v, start, counts, *caches)  # writes to the caches
    assert torch.equal(got["cache_k_out"], caches[0]) and torch.equal(got["cache_v_out"], caches[1])
    assert within(meant["output_0"], exact, single)
    allowed = allowed_by(parse(mask), 2, tokens.best, 20, torch.ones(2, 20, dtype=torch.bool), start)
    assert within(got["output_0"], exact, written_out(q, *caches, allowed, SCALE))
    assert net.sites[0].form == "decomposed" and "cache" in net.sites[0].reason


# ------------------------------------------------------------ bias, softcap, sinks


SLOPE = float_term.apply("mul", "float32", terms.read("x", (H,), "float"), float_term.to_float(K - Q, "float32"))
BUCKET = terms.maximum(terms.minimum(K - Q, terms.ZERO), terms.integer(-3)) + 3
CHANGED: dict[str, tuple[Term | None, float]] = {
    "slope": (SLOPE, 0.0),
    "buckets": (terms.read("x", (BUCKET,), "float"), 0.0),
    "softcap": (None, 0.7),
    "both": (SLOPE, 0.7),
}


def changed(mask: str, bias: Term | None, softcap: float, **more: str) -> GraphModule:
    """One canonical node over inputs `q k v start x`; `more` names inputs for other arguments."""
    graph = Graph()
    nodes = {name: graph.placeholder(name) for name in ("q", "k", "v", "start", "x", *more.values())}
    q, k, v, start, x = (nodes[name] for name in ("q", "k", "v", "start", "x"))
    text, tables = ("", None) if bias is None else (write_bias(bias, ["x"]), [x])
    rest = {"bias": text, "tables": tables, "softcap": softcap, **{name: nodes[other] for name, other in more.items()}}
    graph.output((graph.call_function(ATTENTION, (q, k, v, mask, SCALE, start), rest),))
    return GraphModule(nn.Module(), graph)


def changed_inputs(dtype: torch.dtype, started: int) -> list[Input]:
    q, k, v = (Input(n, dtype, (fixed(2), fixed(heads), fixed(size), fixed(D))) for n, heads, size in
               (("q", 4, 3), ("k", 2, 7), ("v", 2, 7)))  # fmt: skip
    return [q, k, v, Input("start", torch.int64, (fixed(2),) * started), Input("x", dtype, (fixed(4),))]


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("started", [0, 1], ids=["one start", "a start a row"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_changed_scores(dtype: torch.dtype, started: int, name: str) -> None:
    torch.manual_seed(0)
    bias, softcap = CHANGED[name]
    gm, takes = changed("causal", bias, softcap), changed_inputs(dtype, started)
    net = convert(gm, takes)
    q, k, v, x = torch.randn(2, 4, 3, D), torch.randn(2, 2, 7, D), torch.randn(2, 2, 7, D), torch.randn(4)
    start = torch.tensor([4, 2]) if started else torch.tensor(4)
    given = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "start": start, "x": x.to(dtype)}
    held = {net.definition.get_input(i).name for i in range(net.definition.num_inputs)}
    meant = interpret(net, {n: y for n, y in given.items() if n in held}, dtype=torch.float64)["output_0"]
    exact = gm(*(y.double() if y.is_floating_point() else y for y in given.values()))[0]
    torch.testing.assert_close(meant.double(), exact, rtol=1e-5, atol=1e-5)
    assert net.sites[0].form == "decomposed"


def test_what_has_no_form_says_why() -> None:
    takes = changed_inputs(torch.float32, 1)
    with pytest.raises(CannotLower, match="sinks"):
        convert(changed("causal", None, 0.0, sinks="s"), [*takes, Input("s", torch.float32, (fixed(4),))])
    with pytest.raises(CannotLower, match="order of their positions"):
        convert(changed("causal", None, 0.0, k_positions="p"), [*takes, Input("p", torch.int64, (fixed(2), fixed(7)))])
    wide = float_term.to_float(K, "float64")
    with pytest.raises(CannotLower, match="float64"):
        convert(changed("causal", wide, 0.0), takes)


def test_writes_to_anything_but_an_input_are_refused() -> None:
    gm = cached_step("causal")
    write = next(node for node in gm.graph.nodes if node.target is write_cache)
    with gm.graph.inserting_before(write):
        copied = gm.graph.call_function(aten.neg.default, (write.args[0],))
    write.args = (copied, *write.args[1:])
    with pytest.raises(CannotLower, match="an input"):
        convert(gm, step_inputs(torch.float16, fixed(1), fixed(1), 4, 4, 20))


# ------------------------------------------------------------ forms


def spec(**given: Any) -> AttentionSpec:
    usual = {"dtype": torch.bfloat16, "h": 8, "g": 2, "d": 64, "e": 64, "s": Axis(1, 256, 1024), "t": Axis(1, 256, 1024)}
    return AttentionSpec(**{**usual, "same_length": True, **given})


ONE, MANY = fixed(1), Axis(1, 512, 4096)
REFUSED = {  # what IAttention cannot do, or does wrong
    "softcap": (spec(softcap=30.0), "softcap=30"),
    "float32": (spec(dtype=torch.float32), "float32"),
    "value heads of another size": (spec(e=128), "64 in k and 128 in v"),
    "small heads": (spec(d=8, e=8), "heads of 8"),
    "large heads": (spec(d=264, e=264), "heads of 264"),
    "heads that are no multiple": (spec(g=3), "8 query heads over 3"),
    "unknown heads": (spec(h=None), "at run time"),
    "one masked query, many keys": (spec(s=ONE, t=MANY, same_length=False, mask=torch.bool), "crashes"),
    "one causal query, many keys": (spec(s=ONE, t=MANY, same_length=False, upper_left=True), "crashes"),
    "one query of 33 numbers": (spec(d=33, e=33, s=ONE, t=Axis(1, 9, 99), same_length=False), "no kernel"),
    "a mask of another type": (spec(mask=torch.float32), "float32 for queries of bfloat16"),
}
AVOIDED = {
    "a cache": (spec(s=fixed(4), t=fixed(99), same_length=False, mask=torch.bool, from_start=True), "cache"),
    "one query": (spec(s=ONE, t=fixed(99), same_length=False), "one query"),
    "equal heads, masked": (spec(g=8, mask=torch.bool), "no grouped heads"),
    "float16": (spec(dtype=torch.float16), "adds up in float16"),
    "float16, masked": (spec(dtype=torch.float16, mask=torch.bool), "adds up in float16"),
}
TAKEN = {
    "causal": (spec(upper_left=True), "causal by its kind"),
    "causal, float16": (spec(upper_left=True, dtype=torch.float16), "causal by its kind, its kernel adds up in float16"),
    "causal, fewer queries": (spec(upper_left=True, same_length=False, s=Axis(2, 9, 99)), "causal by its kind"),
    "causal, one query perhaps": (spec(upper_left=True, same_length=False), "a mask"),
    "window": (spec(mask=torch.bool), "a mask"),
    "added mask": (spec(mask=torch.bfloat16), "a mask"),
    "full": (spec(), "no mask"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused(case: tuple[AttentionSpec, str]) -> None:
    asked, why = case
    assert why in str(refuses(asked))
    assert choose(asked, "auto") == choose(asked, "fused") == ("decomposed", refuses(asked))


@pytest.mark.parametrize("case", AVOIDED.values(), ids=AVOIDED)
def test_avoided(case: tuple[AttentionSpec, str]) -> None:
    asked, why = case
    assert refuses(asked) is None and why in str(prefers_primitives(asked))
    assert choose(asked, "auto")[0] == "decomposed" and choose(asked, "fused") == ("fused", "asked for")


@pytest.mark.parametrize("case", TAKEN.values(), ids=TAKEN)
def test_taken(case: tuple[AttentionSpec, str]) -> None:
    asked, why = case
    form, reason = choose(asked, "auto")
    assert form == "fused" and reason.startswith(why)
    assert choose(asked, "decomposed") == ("decomposed", "asked for")


def test_rows_that_keep_a_key() -> None:
    square, wide, tall = (
        spec(),
        spec(s=fixed(4), t=fixed(9), same_length=False),
        spec(s=fixed(9), t=fixed(4), same_length=False),
    )
    own = ("window(3)", "local(1, 2)", "chunked(4)", "causal & window(3)")
    assert all(keeps_a_key(parse(text), x) for text in own for x in (square, wide))
    assert not any(keeps_a_key(parse(text), tall) for text in own)
    assert keeps_a_key(Causal(), tall) and keeps_a_key(Full(), tall)
    for text in ("padding(x)", "causal & padding(x)", "causal(lower_right)", "window(3, lower_right)"):
        assert not keeps_a_key(parse(text), square)
    assert not keeps_a_key(parse("window(3)"), spec(from_start=True))


def test_sites_are_reported() -> None:
    net = sdpa_program().network(torch.bfloat16)
    sites = {site.name.removeprefix("rows."): site for site in net.sites}
    assert list(sites) == [*CALLS, *PRIVATE]
    assert sites["causal"].form == sites["plain"].form == sites["own rows"].form == "fused"
    for i, name in enumerate(CALLS):
        if name.startswith("bool"):
            assert sites[name].form == ("decomposed" if i % 3 == 0 else "fused"), name  # every third has no grouped heads
    assert sites["float32 both"].form == sites["one query"].form == "decomposed"
    assert "one query" in sites["one query"].reason and "float32" in sites["float32 both"].reason


def test_fused_is_refused() -> None:
    with pytest.raises(CannotLower, match=r"rows\.causal started=False was asked to be fused: float32"):
        canonical_program().network(torch.float32, "fused")


def test_softcap() -> None:
    capped = AttentionSpec(torch.float16, h=2, g=2, d=D, e=D, s=fixed(5), t=fixed(5), same_length=True, softcap=2.0)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, D).half() * 3 for _ in range(3))
    for attention in ("auto", "fused"):
        net = Network(attention)
        q_, k_, v_ = (net.input(name, torch.float16, (1, 2, 5, D)) for name in "qkv")
        site = Attention("layers.0.attn", (q_, k_, v_), scale=SCALE, spec=capped, allowed=lambda use: None)
        if attention == "fused":
            with pytest.raises(CannotLower, match=r"layers\.0\.attn was asked to be fused: softcap=2"):
                attend(net, site)
            continue
        net.output(attend(net, site), "o")
        scores, single = (2.0 * torch.tanh(q.to(to) @ k.to(to).mT * SCALE / 2.0) for to in (torch.float64, torch.float32))
        exact, eager = scores.softmax(-1) @ v.double(), single.softmax(-1) @ v.float()
        got = interpret(net, {"q": q, "k": k, "v": v}, dtype=torch.float64)["o"]
        assert within(got, exact, eager)
        assert not within((q.double() @ k.double().mT * SCALE).softmax(-1) @ v.double(), exact, eager.half())


def test_a_mask_is_emitted_once() -> None:
    program = exported(
        {str(i): canonical("causal & padding(keys)", started=False) for i in range(4)},
        keys_and_start(2, 12),
        {"keys": {0: B, 1: T}, "start": {}},
    )
    net = program.network(torch.bfloat16)
    assert len([key for key in net.shared if key[0] == "mask" and key[1] == "scores"]) == 1
    assert [site.form for site in net.sites] == ["decomposed", "fused", "fused", "decomposed"]


# ------------------------------------------------------------ what the graph knows and TensorRT does not


@pytest.mark.parametrize("lost", ["heads of queries", "heads of keys"])
def test_lost_head_axis(lost: str) -> None:
    class Calls(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q, k, v, is_causal=True, enable_gqa=True)

    q, k, v = torch.randn(2, 4, 9, D), torch.randn(2, 2, 9, D), torch.randn(2, 2, 9, D)
    axes = ({2: S}, {2: S}, {2: S})
    program = torch.export.export(Calls(), (q, k, v), dynamic_shapes=axes)
    unknown = Axis(1, 2, 8)
    heads = (unknown, fixed(2), fixed(2)) if lost == "heads of queries" else (fixed(4), unknown, unknown)
    inputs = [Input(n, torch.bfloat16, (fixed(2), h, RANGES[S], fixed(D))) for n, h in zip("qkv", heads, strict=True)]
    for node in program.graph.nodes:
        node.meta["val"] = tree_map_only(Tensor, lambda x: x.bfloat16(), node.meta.get("val"))
    net = convert(program.graph_module, inputs)
    assert net.sites[0].form == "fused"
    got = interpret(net, {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()}, dtype=torch.float64)["output_0"]
    q, k, v = (x.bfloat16() for x in (q, k, v))
    assert within(
        got, *(sdpa(*(x.to(to) for x in (q, k, v)), is_causal=True, enable_gqa=True) for to in (torch.float64, torch.float32))
    )


def refusals() -> dict[str, tuple[Call, str]]:
    private = aten._scaled_dot_product_flash_attention_for_cpu
    return {
        "dropout": (lambda q, k, v, x: sdpa(q, *pair(k, v), dropout_p=0.1), "dropout_p=0.1"),
        "log-sum-exp": (lambda q, k, v, x: private(q, *pair(k, v))[1], "output 1 is used"),
        "broadcast batch": (lambda q, k, v, x: sdpa(q, *(y[:1] for y in pair(k, v))), "only by broadcasting"),
    }


@pytest.mark.parametrize("case", refusals().values(), ids=refusals())
def test_calls_that_are_refused(case: tuple[Call, str]) -> None:
    call, why = case
    program = exported({"a": call}, {"keys": torch.ones(2, 12, dtype=torch.bool)}, {"keys": {0: B, 1: T}})
    with pytest.raises(CannotLower, match=why):
        program.network(torch.bfloat16)
