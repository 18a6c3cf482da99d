"""The plug-in for Torch-TensorRT: the pass on graphs of ATen operations, and its registration with a stand-in of the package.

Source of the stand-in: torch_tensorrt 2.11.0, 2.13.0 and 2.14.0, dynamo/lowering/passes and dynamo/conversion.
"""

from __future__ import annotations

import enum
import math
import operator
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention as sdpa

from trilithon.errors import InputError
from trilithon.integrations import torch_tensorrt as plugin
from trilithon.integrations.own_converters import use_default_scales, write_out_constant_masks
from trilithon.passes import bound_arguments
from trilithon.report.report import SiteReport

aten = torch.ops.aten
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
INF = float("inf")
H, D, S = 2, 16, 6


class Attend(nn.Module):
    def __init__(self, make: Callable[..., Tensor], **settings: Any) -> None:
        super().__init__()
        self.make, self.settings = make, settings
        self.register_buffer("triangle", torch.ones(80, 80).tril().log())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=self.make(self, q, k, *given), **self.settings)


def places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]


def added(allowed: Tensor) -> Tensor:
    return torch.where(allowed, 0.0, -INF)


def causal(_: Any, q: Tensor, k: Tensor) -> Tensor:
    i, j = places(q, k)
    return added(j <= i)


def padded_causal(_: Any, q: Tensor, k: Tensor) -> Tensor:
    """As PyTorch aligns a bias for its memory-efficient kernel: padded to a multiple of 8, and cut."""
    mask = causal(_, q, k)
    return nn.functional.pad(mask, (0, 8))[..., : k.shape[2]]


def buffer(self: Any, q: Tensor, k: Tensor) -> Tensor:
    return self.triangle[: q.shape[2], : k.shape[2]]


def one_open(_: Any, q: Tensor, k: Tensor) -> Tensor:
    i, j = places(q, k)
    return added((j <= i) | ((i == 1) & (j == 4)))


def window(_: Any, q: Tensor, k: Tensor) -> Tensor:
    i, j = places(q, k)
    return added((j <= i) & (j > i - 3))


def padding(_: Any, q: Tensor, k: Tensor, given: Tensor) -> Tensor:
    return added((given != 0)[:, None, None, :].expand(-1, 1, q.shape[2], -1))


def random_bias(_: Any, q: Tensor, k: Tensor) -> Tensor:
    return torch.sin(places(q, k)[0] * 1.7 + places(q, k)[1] * 2.3)


def operands(s: int = S, t: int = S, g: int = H) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(s)
    return torch.randn(2, H, s, D), torch.randn(2, g, t, D), torch.randn(2, g, t, D)


Operands = tuple[Tensor, Tensor, Tensor]


def graph_of(
    make: Callable[..., Any], *given: Tensor, own: Operands | None = None, dynamic: bool = False, efficient: bool = True
) -> GraphModule:
    """What Torch-TensorRT's passes are given: attributes for weights; by a GPU, the memory-efficient operation."""
    inputs, tokens = (*(own or operands()), *given), Dim("s", min=2, max=64)
    shapes: Any = {key: {2: tokens} for key in "qkv"} | ({"given": ({1: tokens},)} if given else {})
    shapes = shapes if dynamic else None
    program = torch.export.export(Attend(make).eval(), inputs, dynamic_shapes=shapes, strict=False)
    gm = program.run_decompositions({}).module()
    for node in gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        if efficient:
            _make_efficient(gm, node)
    gm.recompile()
    return gm


def _make_efficient(gm: GraphModule, node: Node) -> None:
    q, k, v, mask = node.args[:4]
    with gm.graph.inserting_before(node):
        call = gm.graph.call_function(EFFICIENT, (q, k, v, mask, False))
        call.meta = {**node.meta, "val": (node.meta["val"], None, None, None)}
        first = gm.graph.call_function(operator.getitem, (call, 0))
        first.meta = dict(node.meta)
    node.replace_all_uses_with(first)
    gm.graph.erase_node(node)


def attention_of(gm: GraphModule) -> dict[str, Any]:
    (call,) = (n for n in gm.graph.nodes if "scaled_dot_product" in str(n.target))
    args = bound_arguments(call)
    return {"target": call.target, "mask": args.get("attn_mask", args.get("attn_bias")), "is_causal": args["is_causal"]}


def settings() -> SimpleNamespace:
    return SimpleNamespace(attn_bias_is_causal=True)


def site() -> SiteReport:
    (found,) = plugin.reports()[-1].sites
    return found


# ------------------------------------------------------------ the pass


@pytest.mark.parametrize("efficient", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("make", [causal, padded_causal, buffer])
def test_a_causal_mask_becomes_a_flag(make, dynamic, efficient):
    gm = graph_of(make, dynamic=dynamic, efficient=efficient)
    before = attention_of(gm)
    given = settings()
    assert plugin.prove_masks(gm, given) is gm
    after = attention_of(gm)
    assert after == {"target": before["target"], "mask": None, "is_causal": True}
    assert given.attn_bias_is_causal is False
    assert not gm.graph.find_nodes(op="call_function", target=aten.where.self)  # what made the mask is gone
    if not efficient:
        q, k, v = operands()
        torch.testing.assert_close(gm(q, k, v), sdpa(q, k, v, is_causal=True))


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    ("make", "form"), [(one_open, "formula"), (window, "window(3)"), (padding, "padding(given_0)"), (random_bias, None)]
)
def test_another_mask_stays(make, form, dynamic):
    given = (torch.tensor([[1] * S, [1] * 4 + [0] * 2]),) if make is padding else ()
    gm, chosen = graph_of(make, *given, dynamic=dynamic), settings()
    plugin.prove_masks(gm, chosen)
    after = attention_of(gm)
    assert after["mask"] is not None and after["is_causal"] is False and chosen.attn_bias_is_causal is False
    if form is not None:
        assert str(site().mask).partition("(k")[0] == form


def test_one_cell_of_a_constant():
    class Flipped(Attend):
        def __init__(self) -> None:
            super().__init__(buffer)
            self.triangle[5, 2] = -INF

    gm = torch.export.export(Flipped(), operands(), strict=False).run_decompositions({}).module()
    plugin.prove_masks(gm, settings())
    assert attention_of(gm)["mask"] is not None


def test_other_lengths_keep_their_mask():
    """Versions of Torch-TensorRT align causal differently there."""
    gm = graph_of(causal, own=operands(4, 9))
    plugin.prove_masks(gm, settings())
    assert attention_of(gm)["mask"] is not None and "other lengths" in site().runs_on


def test_a_graph_that_writes_is_left_alone():
    gm = graph_of(causal)
    with gm.graph.inserting_before(gm.graph.output_node()):
        q = gm.graph.find_nodes(op="placeholder")[0]
        gm.graph.call_function(aten.copy_.default, (q, q))
    chosen = settings()
    plugin.prove_masks(gm, chosen)
    assert attention_of(gm)["mask"] is not None and chosen.attn_bias_is_causal is False


def test_a_mistake_of_ours_leaves_the_graph_alone(monkeypatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(plugin, "drop_proved_masks", fail)
    gm, chosen = graph_of(causal), settings()
    plugin.prove_masks(gm, chosen)
    assert attention_of(gm)["mask"] is not None and chosen.attn_bias_is_causal is False
    assert "no such thing" in plugin.reports()[-1].notes[0]


# ------------------------------------------------------------ forms that its own converters get right


def test_flags_are_given_by_position():
    """Its converters look for them nowhere else: a flag given by name is dropped in silence."""
    gm = graph_of(causal)
    plugin.prove_masks(gm, settings())
    (call,) = (n for n in gm.graph.nodes if n.target in plugin.FUSED)
    flag = [a.name for a in call.target._schema.arguments].index("is_causal")
    assert call.args[flag] is True and not {"is_causal", "attn_bias", "dropout_p"} & set(call.kwargs)


@pytest.mark.parametrize("scale", [None, 1 / math.sqrt(D), 0.3])
def test_attention_is_given_the_default_scale(scale):
    class Scaled(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q, k, v, is_causal=True, scale=scale)

    own = operands()
    gm = torch.export.export(Scaled(), own, strict=False).module()
    before = len(gm.graph.nodes)
    use_default_scales(gm)
    (call,) = (n for n in gm.graph.nodes if n.target in plugin.FUSED)
    assert "scale" not in call.kwargs and len(gm.graph.nodes) == before + (scale == 0.3)
    torch.testing.assert_close(gm(*own), sdpa(*own, is_causal=True, scale=scale))


@pytest.mark.parametrize(("g", "efficient"), [(H, True), (H, False), (1, False)])
def test_attention_with_a_constant_mask_is_written_out(g, efficient):
    """The memory-efficient operation has no grouped heads."""
    own = operands(g=g)
    gm = graph_of(window, own=own, efficient=efficient) if g == H else grouped(own)
    want = reference(own, window)
    write_out_constant_masks(gm)
    assert not [n for n in gm.graph.nodes if n.target in plugin.FUSED]
    assert all("val" in n.meta for n in gm.graph.nodes if n.op == "call_function")
    torch.testing.assert_close(gm(*own), want)


def test_a_row_without_a_key_gives_zero():
    def none_for_the_third(_: Any, q: Tensor, k: Tensor) -> Tensor:
        i, j = places(q, k)
        return added((j <= i) & (i != 2))

    own = operands()
    gm = write_out_constant_masks(graph_of(none_for_the_third, own=own, efficient=False))
    found = gm(*own)
    torch.testing.assert_close(found, reference(own, none_for_the_third))
    assert not found[:, :, 2].any() and found.isfinite().all()


def grouped(own: Operands) -> GraphModule:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q, k, v, attn_mask=window(self, q, k), enable_gqa=True)

    return torch.export.export(Grouped().eval(), own, strict=False).run_decompositions({}).module()


def reference(own: Operands, make: Callable[..., Tensor]) -> Tensor:
    q, k, v = own
    return sdpa(q, k, v, attn_mask=make(None, q, k), enable_gqa=q.shape[1] != k.shape[1])


@pytest.mark.parametrize(("make", "given", "dynamic"), [(padding, True, False), (window, False, True)])
def test_attention_with_a_mask_of_inputs_or_of_sizes_stays(make, given, dynamic):
    """Near misses: these are tensors of the network."""
    gm = graph_of(make, *([torch.ones(2, S)] if given else []), dynamic=dynamic)
    before = str(gm.graph)
    assert str(write_out_constant_masks(gm).graph) == before


# ------------------------------------------------------------ registration


class Priority(enum.Enum):
    STANDARD = 1
    HIGH = 2


@dataclass
class Support:
    converter_implementation: Any
    capability_validator: Any
    supports_dynamic_shapes: bool


@dataclass
class Package:
    """What the plug-in uses of torch_tensorrt."""

    version: str
    passes: list[Any] = field(default_factory=lambda: [len, abs])
    converters: dict[Any, list[Support]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = Support(len, None, True)
        self.converters = {target: [own] for target in plugin.FUSED if "for_cpu" not in str(target)}

    def modules(self) -> dict[str, Any]:
        names = ("torch_tensorrt", plugin.PASSES, plugin.REGISTRY)
        package, passes, registry = (types.ModuleType(name) for name in names)
        package.__version__ = self.version
        passes.ATEN_POST_LOWERING_PASSES = SimpleNamespace(passes=self.passes)
        passes._aten_lowering_pass = lambda given, *, index: self.passes.insert(index, given)
        passes._remove_lowering_pass = self._remove
        registry.DYNAMO_ATEN_CONVERTERS, registry.ConverterPriority = self.converters, Priority
        registry.dynamo_tensorrt_converter = self._converter
        return dict(zip(names, (package, passes, registry), strict=True))

    def _remove(self, *, index: int) -> None:
        del self.passes[index]

    def _converter(self, key: Any, *, capability_validator: Any, priority: Priority, supports_dynamic_shapes: bool) -> Any:
        def register(converter: Any) -> Any:
            known = self.converters.setdefault(key, [])
            known.insert(0 if priority is Priority.HIGH else len(known), Support(converter, capability_validator, True))
            return converter

        return register


def installed(monkeypatch: pytest.MonkeyPatch, version: str) -> Package:
    package = Package(version)
    for name, module in package.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return package


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cu130", "2.14.0a0"])
def test_install_and_uninstall(monkeypatch, version):
    package = installed(monkeypatch, version)
    before = {target: list(known) for target, known in package.converters.items()}
    for _ in range(2):
        plugin.install()
        own = [plugin.prove_masks, *([use_default_scales, write_out_constant_masks] if version == "2.11.0" else [])]
        assert package.passes == [*own, len, abs]
    ours = [
        target for target, known in package.converters.items() if known[0].converter_implementation is plugin.convert_attention
    ]
    assert set(ours) == (set() if version == "2.11.0" else set(plugin.FUSED))
    assert all(len(known) <= 2 for known in package.converters.values())
    plugin.uninstall()
    plugin.uninstall()
    assert package.passes == [len, abs] and package.converters == before


def test_converters_may_be_left_out(monkeypatch):
    package = installed(monkeypatch, "2.13.0")
    plugin.install(converters=False)
    assert package.passes[0] is plugin.prove_masks and all(len(known) == 1 for known in package.converters.values())


def test_an_unknown_version_is_refused(monkeypatch):
    installed(monkeypatch, "2.19.0")
    with pytest.raises(InputError, match=r"cannot plug into Torch-TensorRT 2\.19\.0"):
        plugin.install()


def test_a_missing_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(InputError, match="pip install torch-tensorrt-rtx"):
        plugin.install()


# ------------------------------------------------------------ the converters


def converted(gm: GraphModule, inputs: tuple[Tensor, ...]) -> Tensor:
    """The attention of a graph, converted into a network of others, and interpreted."""
    from trilithon.lower.tensorrt.interpret import interpret
    from trilithon.lower.tensorrt.network import Network

    theirs = Network()
    (call,) = (n for n in gm.graph.nodes if n.target in plugin.FUSED)
    assert plugin.serves(call)
    names = [n.name for n in call.all_input_nodes]
    given = {n: theirs.input(n.name, x.dtype, x.shape) for n, x in zip(call.all_input_nodes, inputs, strict=True)}
    ctx = SimpleNamespace(net=theirs.definition, current_node=call)
    args = torch.fx.node.map_arg(call.args, given.__getitem__)
    kwargs = torch.fx.node.map_arg(call.kwargs, given.__getitem__)
    result = plugin.convert_attention(ctx, call.target, args, kwargs, f"[{call.name}]")
    net = getattr(ctx, plugin.NETWORK)
    net.output(result[0] if isinstance(result, tuple) else result, "y")
    return interpret(net, dict(zip(names, inputs, strict=True)))["y"]


@pytest.mark.parametrize("efficient", [True, False])
def test_converted_attention(efficient):
    pytest.importorskip("tensorrt_rtx")
    for make in (causal, window, random_bias):
        gm, (q, k, v) = graph_of(make, efficient=efficient), operands()
        mask = make(None, q, k)
        torch.testing.assert_close(converted(gm, (q, k, v, mask)), sdpa(q, k, v, attn_mask=mask))
        plugin.prove_masks(gm, settings())
        if make is causal:
            torch.testing.assert_close(converted(gm, (q, k, v)), sdpa(q, k, v, is_causal=True))


def test_causal_is_from_the_first_key_on():
    pytest.importorskip("tensorrt_rtx")
    q, k, v = operands(4, 9)
    gm = graph_of(lambda *_: None, own=(q, k, v), efficient=False)
    (call,) = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    call.kwargs = {"is_causal": True}
    torch.testing.assert_close(converted(gm, (q, k, v)), sdpa(q, k, v, is_causal=True))


@pytest.mark.parametrize(
    "settings", [{"dropout_p": 0.5}, {"dims": 3}, {"g": 3}, {"e": torch.float64}], ids=["dropout", "rank", "heads", "type"]
)
def test_calls_that_are_left_to_their_own_converter(settings):
    graph = torch.fx.Graph()
    value = torch.empty((2, H, S, D)[4 - settings.get("dims", 4) :], dtype=settings.get("e", torch.float32))
    nodes = [graph.placeholder(name) for name in "qkv"]
    for i, node in enumerate(nodes):
        node.meta["val"] = torch.empty(2, 3, S, D) if i and "g" in settings else value
    dropout = (None, settings["dropout_p"]) if "dropout_p" in settings else ()
    call = graph.call_function(aten.scaled_dot_product_attention.default, (*nodes, *dropout))
    call.meta["val"] = value
    assert plugin.serves(call) is False
