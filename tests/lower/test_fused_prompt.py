"""Prompts of generated kernels, in Triton's interpreter: they give what the program gives; what mixes tokens is refused."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from lower.test_fused import few_programs, interpreted
from lower.test_prompt_parts import given, prompt_of
from trilithon.lower.inputs import Input
from trilithon.lower.native import causal, gated
from trilithon.lower.native.attention import attend
from trilithon.lower.native.emit import blocked
from trilithon.lower.native.fused.by_token import ByToken
from trilithon.lower.native.fused.fuse_prompt import fuse_prompt
from trilithon.lower.native.fused.operations import CannotFuse
from trilithon.lower.native.gated import GATED, gate_products
from trilithon.lower.native.one_product import one_product
from trilithon.lower.native.prompt import make_prompt
from trilithon.lower.native.writes import separate_writes

aten = torch.ops.aten
prompt_module = importlib.import_module("trilithon.lower.native.prompt")
fuse_prompt_module = importlib.import_module("trilithon.lower.native.fused.fuse_prompt")


def lowered(name: str, layers: int = 2) -> tuple[GraphModule, tuple[Input, ...]]:
    gm, inputs = prompt_of(name, layers)
    one_product(gm)
    separate_writes(gm, inputs)
    return gate_products(gm), inputs


def by_token(gm: GraphModule) -> list[ByToken]:
    return [m for m in gm.children() if isinstance(m, ByToken)]


def behind(gm: GraphModule, target: object, make: Callable[[Node], Node], which: int = 0) -> None:
    """Put what `make` makes of a node in its place."""
    node = gm.graph.find_nodes(op="call_function", target=target)[which]
    users = set(node.users)
    with gm.graph.inserting_before(node.next):
        new = make(node)
    node.replace_all_uses_with(new, delete_user_cb=users.__contains__)


@interpreted
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("qwen3", 5),  # one before all products; in each layer one for heads; behind both products of the first, one each
        ("qwen2", 5),  # values with a bias are written to the cache as they stand in the product
        ("olmo2", 5),  # norms behind products
        ("phi3", 5),
        ("gpt-neox", 5),  # layer norms, no gate, values that lie between queries and keys
        ("phi", 5),  # attention and MLP read one vector
    ],
)
@torch.no_grad()
def test_generated_kernels_give_what_the_prompt_gives(name: str, kernels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few tokens, with padding behind them, and of one."""
    few_programs(monkeypatch)
    gm, inputs = lowered(name)
    fused = fuse_prompt(gm, inputs)
    assert len(by_token(fused)) == kernels
    for length, count in ((6, 4), (1, 1)):
        whole, own = (given(inputs, [length]) for _ in range(2))
        whole[2], own[2] = torch.tensor([count]), torch.tensor([count])
        torch.testing.assert_close(fused(*own), gm(*whole), rtol=1e-5, atol=1e-5)
        for expected, written in zip(whole[3:], own[3:], strict=True):
            torch.testing.assert_close(written, expected, rtol=1e-5, atol=1e-5)
            assert not written[:, :, count:].any()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda g: lambda n: g.call_function(aten.flip.default, (n, [1])), "flip"),
        (lambda g: lambda n: g.call_function(aten.cumsum.default, (n, 1)), "cumsum"),
        (lambda g: lambda n: g.call_function(aten.roll.default, (n, [1], [1])), "roll"),
        (lambda g: lambda n: g.call_function(aten.mean.dim, (n, [1], True)), "not made token by token|another axis"),
        (lambda g: lambda n: g.call_function(aten.slice.Tensor, (n, 1, 0, 1)), "not made token by token"),
        (lambda g: lambda n: g.call_function(aten.add.Tensor, (n, _first(g, n))), "not made token by token"),
        (lambda g: lambda n: _turned(g, n), "mixes tokens|not made token by token"),
    ],
    ids=["flip", "cumsum", "shift", "mean", "first", "beside the first", "turned"],
)
def test_what_mixes_tokens_is_refused(change: Callable[..., Callable[[Node], Node]], why: str) -> None:
    """Near misses: for one token each does what it does to that token."""
    gm, inputs = prompt_of("llama", 2)
    separate_writes(gm, inputs)
    fuse_prompt(gm, inputs)
    behind(gm, aten.silu.default, change(gm.graph))
    with pytest.raises(CannotFuse, match=why):
        fuse_prompt(gm, inputs)


def _first(graph: torch.fx.Graph, node: Node) -> Node:
    return graph.call_function(aten.select.int, (node, 1, 0))


def _turned(graph: torch.fx.Graph, node: Node) -> Node:
    """As many numbers, in the same shape: those of the first column of all tokens, then of the next."""
    shape = graph.call_function(aten.sym_size.int, (node, 1))
    turned = graph.call_function(aten.transpose.int, (node, 1, 2))
    return graph.call_function(aten.reshape.default, (turned, [-1, shape, 64]))


@pytest.mark.parametrize(
    ("name", "why"), [("mistral", "index_axis has no kernel"), ("falcon", "no kernel"), ("gpt2", "addmm.* has no kernel")]
)
def test_what_has_no_kernel_is_named(name: str, why: str) -> None:
    gm, inputs = lowered(name, 2)
    with pytest.raises(CannotFuse, match=why) as refusal:
        fuse_prompt(gm, inputs)
    assert refusal.value.where is not None and refusal.value.where.node
    prompt = make_prompt(gm, inputs)
    assert prompt.one_row is None and "no generated kernels: " in prompt.note


@interpreted
@torch.no_grad()
def test_windows_are_known_to_the_kernel_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the window of 5, where the cache is a ring; no mask is made but where the kernel is not for the prompt."""
    few_programs(monkeypatch)
    monkeypatch.setattr(fuse_prompt_module, "has_kernel", lambda mask, *rest: causal.kind_of(mask) == "window")
    gm, inputs = lowered("mistral", 2)
    fused = fuse_prompt(gm, inputs)
    sites = fused.graph.find_nodes(op="call_function", target=causal.attend_causal)
    assert [n.args[3] for n in sites] == ["window(5)", "window(5)"]
    for length, count in ((15, 13), (4, 4), (1, 1)):
        whole, own = (given(inputs, [length]) for _ in range(2))
        whole[2], own[2] = torch.tensor([count]), torch.tensor([count])
        torch.testing.assert_close(fused(*own), gm(*whole), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own[3:], whole[3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["bias", "another mask"])
def test_a_mask_that_is_not_what_its_name_says_stays(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor with a bias is added beside a mask of the same name; and kinds that the kernel lacks keep their tensor."""
    monkeypatch.setattr(fuse_prompt_module, "has_kernel", lambda mask, *rest: bool(causal.kind_of(mask)))
    gm, inputs = lowered("mistral", 1)
    (site,) = gm.graph.find_nodes(op="call_function", target=attend)
    if change == "bias":
        with gm.graph.inserting_before(site):
            bias = gm.graph.call_function(torch.full, ((1, 1, 1, 1), 0.5))
            site.args = (*site.args[:5], gm.graph.call_function(blocked, (bias, site.args[5], torch.float32)))
    else:
        site.args = (*site.args[:3], "causal & padding(attention_mask)", *site.args[4:])
    with pytest.raises(CannotFuse, match=r"no kernel|its mask is a tensor"):
        fuse_prompt(gm, inputs)


def test_a_second_write_of_a_value_is_refused() -> None:
    gm, inputs = lowered("llama", 1)
    first, second = gm.graph.find_nodes(op="call_function", target=prompt_module.write_tokens)
    second.args = (second.args[0], *first.args[1:])
    with pytest.raises(CannotFuse, match="not the one write of a value"):
        fuse_prompt(gm, inputs)


def test_a_write_of_what_no_attention_reads_is_refused() -> None:
    gm, inputs = lowered("llama", 2)
    site = gm.graph.find_nodes(op="call_function", target=prompt_module.write_tokens)[0]
    site.args = (site.args[0], site.args[1].args[0], *site.args[2:])  # type: ignore[union-attr]
    with pytest.raises(CannotFuse, match=r"no attention reads what it writes|no value of each token|not made"):
        fuse_prompt(gm, inputs)


def of_few_tokens(patch: pytest.MonkeyPatch) -> None:
    few_programs(patch)
    for name, value in (("TRIED_TOKENS", 4), ("TRIED_PADDING", 1)):
        patch.setattr(prompt_module, name, value)


@interpreted
@torch.no_grad()
def test_one_row_takes_generated_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    of_few_tokens(monkeypatch)
    gm, inputs = lowered("qwen3", 1)
    prompt = make_prompt(gm, inputs)
    assert prompt.one_row is not None
    kernels = len(prompt.one_row.graph.find_nodes(op="call_module"))
    assert prompt.note.startswith(f"prefill: {kernels} generated kernels beside products and attention for one row; for more")
    seen = list[int]()
    prompt.compiled = lambda tokens, *rest: seen.append(len(tokens)) or gm(tokens, *rest)
    for counts in ([3], [2, 1]):
        torch.testing.assert_close(prompt(*given(inputs, counts)), gm(*given(inputs, counts)))
    assert seen == [2]


@interpreted
@pytest.mark.parametrize("wrong", [" + token + 1\n", " + token * 0\n"], ids=["a position too far", "the position of the first"])
def test_a_wrong_kernel_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    of_few_tokens(monkeypatch)
    gm, inputs = lowered("llama", 1)
    fused = fuse_prompt(gm, inputs)
    kernel = next(k for k in by_token(fused) if " + token\n" in k.source)
    kernel.source = kernel.source.replace(" + token\n", wrong)
    monkeypatch.setattr(prompt_module, "fuse_prompt", lambda gm, inputs: fused)
    prompt = make_prompt(gm, inputs)
    assert prompt.one_row is None and "disagree" in prompt.note
    told = [r.getMessage() for r in caplog.records if r.name.startswith("trilithon") and r.levelno >= logging.WARNING]
    assert len(told) == 1 and told[0].startswith("generated kernels of prompts cannot be used here: VerificationFailed")


# -------------------------------------------------------------- gate and up


class Noted(Interpreter):
    """Notes each value in its node."""

    def run_node(self, n: Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def meeting(change: str = "") -> GraphModule:
    """`silu(%all[.., :4]) * %all[.., 4:]` of a product with 8 rows, or something near it."""
    graph, root = Graph(), torch.nn.Module()
    root.weight, root.bias = torch.nn.Parameter(torch.randn(8, 6)), torch.nn.Parameter(torch.randn(8))
    x = graph.placeholder("x")
    given = [graph.get_attr(name) for name in ("weight", "bias")[: 1 + (change == "bias")]]
    product = graph.call_function(aten.linear.default, (x, *given))
    begin = 3 if change == "overlap" else 4
    first, second = (graph.call_function(aten.slice.Tensor, (product, 2, a, a + 4)) for a in (0, begin))
    gate, up = (second, first) if change == "turned" else (first, second)
    act = {"tanh": aten.tanh.default, "gelu": aten.gelu.default}.get(change, aten.silu.default)
    made = graph.call_function(act, (gate,))
    found = graph.call_function(aten.mul.Tensor, (up, made) if change == "swapped" else (made, up))
    if change in ("read", "gate read"):
        found = graph.call_function(aten.add.Tensor, (found, first if change == "read" else made))
    graph.output(found)
    gm = GraphModule(root, graph)
    Noted(gm).run(torch.randn(2, 1 if change == "one token" else 5, 6))
    return gm


@pytest.mark.parametrize("change", ["", "swapped", "gelu"])
def test_gate_and_up_become_one_product(change: str) -> None:
    gm, x = meeting(change), torch.randn(2, 5, 6)
    want = gm(x)
    gate_products(gm)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [GATED]
    torch.testing.assert_close(gm(x), want)


@pytest.mark.parametrize("change", ["bias", "overlap", "turned", "tanh", "read", "gate read", "one token"])
def test_what_only_looks_like_gate_and_up_stays(change: str) -> None:
    gm, x = meeting(change), torch.randn(2, 5, 6)
    want = gm(x)
    gate_products(gm)
    assert not gm.graph.find_nodes(op="call_function", target=GATED)
    assert torch.equal(gm(x), want)


@interpreted
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_the_kernel_of_gated_products(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several tiles, of which those at the ends are not full. The interpreter cannot load bfloat16 so: see `tests/gpu`."""
    for name, value in (("BLOCK_M", 16), ("BLOCK_N", 16), ("BLOCK_K", 16), ("GROUP", 2)):
        monkeypatch.setattr(gated, name, value)
    generator = torch.Generator().manual_seed(0)
    for rows, k, n in ((40, 40, 24), (3, 16, 16), (97, 24, 72)):
        x = torch.randn(1, rows, k, generator=generator).half()
        weight = (torch.randn(2 * n, k, generator=generator) / k**0.5).half()
        exact = gated._plain(x.double(), weight.double(), act)
        plain, found = gated._plain(x, weight, act), gated.gated_by_kernel(x, weight, act)
        errors = [float((y.double() - exact).norm() / exact.norm()) for y in (plain, found)]
        assert errors[1] <= 2 * errors[0], (rows, k, n, errors)


@interpreted
def test_a_kernel_that_goes_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(gated, "TRIED", (20, 16, 16))
    gated._works.cache_clear()
    assert gated._works(device, torch.float16, "silu") and not caplog.records
    right = gated.gated_by_kernel
    monkeypatch.setattr(gated, "gated_by_kernel", lambda x, weight, act: right(x, weight.roll(1, 0), act))
    assert not gated._works(device, torch.float16, "gelu")
    monkeypatch.setattr(gated, "gated_by_kernel", lambda x, weight, act: 1 / 0)
    assert not gated._works(device, torch.float16, "gelu_tanh")
    told = [r.getMessage().rpartition(": ")[2] for r in caplog.records]
    assert told[0].startswith("it is off by") and told[1] == "division by zero"
    gated._works.cache_clear()
