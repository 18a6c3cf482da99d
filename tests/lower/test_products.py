"""Products of one vector as one: prompts and steps do what they did, and the model holds each matrix once."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import pytest
import torch
from torch.fx import GraphModule

from lower.test_prompt_parts import given, parts, program_of, prompt_of
from trilithon.lower import cuda_graph
from trilithon.lower.inputs import cached_inputs
from trilithon.lower.native.fused.fuse import fuse_step
from trilithon.lower.native.layers import in_layers
from trilithon.lower.native.lower import is_lowered_site, lower_native
from trilithon.lower.native.one_product import one_product
from trilithon.lower.native.writes import separate_writes
from trilithon.lower.products import LINEAR, attribute
from trilithon.rewrite.insert_cache import cache_shapes, insert_cache
from trilithon.rewrite.unlift import unlift


def linears(gm: GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=LINEAR))


@pytest.mark.parametrize(
    ("name", "layers", "each"),
    [
        ("qwen2", 2, 4),  # with biases: queries, keys and values; what leaves attention; gate and up; down
        ("qwen3", 2, 4),
        ("phi3", 1, 4),  # whose layers have one product already
    ],
)
@torch.no_grad()
def test_prompts_do_what_they_did(name: str, layers: int, each: int) -> None:
    gm, inputs = prompt_of(name, layers)
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    calls = [given(inputs, counts) for counts in ([7], [5, 3], [1])]
    want = [(gm(*own), [x.clone() for x in own[3:]]) for own in calls]
    one_product(gm)
    assert linears(gm) == layers * each + 1
    separate_writes(gm, inputs)
    whole = in_layers(gm, is_lowered_site, lambda part: part)
    assert len(parts(whole)) == layers
    for (logits, caches), counts in zip(want, ([7], [5, 3], [1]), strict=True):
        own = given(inputs, counts)
        torch.testing.assert_close(whole(*own), logits, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(own[3:], caches, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    after = gm.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@torch.no_grad()
def test_steps_of_several_rows_do_what_they_did() -> None:
    """Rows with as many tokens in their caches as they have; the generated kernels of one row read the matrices as they are."""
    program = program_of("qwen3", 2)
    gm = lower_native(insert_cache(program, "step"), split=True)
    inputs = cached_inputs(gm, cache_shapes(program), 24, 3, most_tokens=1)
    generator = torch.Generator().manual_seed(0)
    caches = [torch.randn([x.high for x in own.axes], generator=generator) for own in inputs[3:]]
    own = [torch.tensor([[4], [5], [6]]), torch.tensor([3, 0, 9]), torch.ones(3, dtype=torch.int64)]
    mine, theirs = ([x.clone() for x in caches] for _ in range(2))
    fused = fuse_step(gm, inputs)
    read = {key: value.clone() for key, value in fused.state_dict().items()}
    want = gm(*own, *theirs)
    one_product(gm)
    assert linears(gm) == 2 * 4 + 1
    for a, b in zip([*gm(*own, *mine), *mine], [*want, *theirs], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(fused.state_dict()[key], value) for key, value in read.items())
    merged = {x.untyped_storage().data_ptr() for key, x in gm.named_buffers() if key.startswith("merged")}
    assert sum(x.untyped_storage().data_ptr() in merged for x in fused.state_dict().values()) == 2 * 5  # q, k, v; gate, up


@torch.no_grad()
def test_a_second_program_reads_the_same_memory() -> None:
    first, _ = prompt_of("qwen3", 2)
    one_product(first)
    second = one_product(lower_native(unlift(program_of("qwen3", 2))))
    names = [key for key, _ in first.named_buffers() if key.startswith("merged")]
    assert len(names) == 4
    for name in names:
        assert first.get_buffer(name).data_ptr() == second.get_buffer(name).data_ptr()
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in program_of("qwen3", 2).state_dict.values()}
    assert sum(held.values()) == sum({x.data_ptr(): x.nbytes for x in program_of("qwen3", 2).state_dict.values()}.values())


def test_matrices_that_share_memory_with_others_stay() -> None:
    """A near miss: one of them is the model's own view of something larger, which may be written to."""
    gm, _ = prompt_of("qwen3", 1)
    product = next(n for n in gm.graph.nodes if n.target is LINEAR and "k_proj" in str(n.args[1]))
    weight = attribute(gm, product.args[1])
    weight.data = torch.cat([weight.detach(), weight.detach()])[: len(weight)]
    one_product(gm)
    assert linears(gm) == 6 + 1  # gate and up are one


def test_graphs_captured_before_keep_the_memory_that_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        pass

    graph, kept = Graph(), WeakKeyDictionary[object, list[torch.Tensor]]()
    kept[graph] = []
    monkeypatch.setattr(cuda_graph, "_KEPT", kept)
    gm, _ = prompt_of("qwen2", 1)
    old = {attribute(gm, n).data_ptr() for n in gm.graph.find_nodes(op="get_attr") if "_proj" in str(n.target)}
    one_product(gm)
    read = {x.data_ptr() for x in kept[graph]}
    assert len(read) == 8 and read <= old  # matrices and biases of queries, keys and values; gate and up
    del graph
    assert not kept
