"""The last token is taken as early as can be: what is behind the last attention is made for one token of each row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.nn import functional as F

from trilithon.capture import hf
from trilithon.compiler import analyse
from trilithon.options import Options
from trilithon.rewrite.cache_ops import last_tokens
from trilithon.rewrite.cache_shape import CacheShape
from trilithon.rewrite.insert_cache import cache_shapes, insert_cache
from zoo.families import FAMILIES

aten = torch.ops.aten
LINEAR = aten.linear.default


def behind_last(gm: GraphModule) -> list[str]:
    """The weights of products that are made of last tokens alone."""
    late, found = set(gm.graph.find_nodes(op="call_function", target=last_tokens)), []
    for node in gm.graph.nodes:
        if any(n in late for n in node.all_input_nodes):
            late.add(node)
            found += [str(node.args[1])] if node.target is LINEAR else []
    return found


def of_all_and_last(gm: GraphModule, every: GraphModule, shapes: list[CacheShape], counts: list[int], most: int) -> None:
    rows, tokens = len(counts), max(counts)
    ids = torch.randint(3, most, (rows, tokens), generator=torch.Generator().manual_seed(2))
    start, held = torch.zeros(rows, dtype=torch.int64), torch.tensor(counts)
    made = [[torch.zeros(rows, s.g, 16, w) for s in shapes for w in (s.d, s.e)] for _ in range(2)]
    last = gm(ids, start, held, *made[0])
    want = every(ids, start, held, *made[1])[torch.arange(rows), held - 1]
    torch.testing.assert_close(last[:, 0], want, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(*made, strict=True))


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("qwen3", ["o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]),
        ("gemma2", ["o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]),
        ("phi3", ["o_proj", "gate_up_proj", "down_proj", "lm_head"]),  # halves of one product
        ("glm", ["o_proj", "gate_up_proj", "down_proj", "lm_head"]),
        ("gpt-neox", ["dense_h_to_4h", "dense_4h_to_h", "attention_dense", "lm_head"]),
    ],
)
@torch.no_grad()
def test_the_last_layer_is_for_one_token(name: str, products: list[str]) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.make("eager" if family.eager_only else "sdpa").eval()
    program = analyse(model, *hf.example_for(model, ("input_ids",)), (), Options()).rewritten
    gm, every = (insert_cache(program, "prompt", all_logits=x) for x in (False, True))
    found = behind_last(gm)
    assert len(found) == len(products) and all(any(part in name for name in found) for part in products)
    assert not behind_last(every)
    for counts in ([7], [5, 3], [1]):
        of_all_and_last(gm, every, cache_shapes(program), counts, 40)


class Layer(nn.Module):
    """One attention, and `behind` it with what it takes: hidden values, and the result of attention."""

    def __init__(self, behind: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed, self.behind = nn.Embedding(20, 8), behind
        self.out, self.up, self.head = (nn.Linear(8, 8) for _ in range(3))
        self.wide = nn.Linear(8, 16)
        self.table = nn.Parameter(torch.randn(32, 8))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.embed(idx)
        q = x.view(x.shape[0], -1, 2, 4).transpose(1, 2)
        made = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(x.shape)
        return self.head(self.behind(self, x, made))


def halves(m: Layer, x: Tensor, made: Tensor) -> Tensor:
    gate, up = m.wide(made).chunk(2, -1)
    return F.silu(gate) * up + x


def halves_of_heads(m: Layer, x: Tensor, made: Tensor) -> Tensor:
    """Near miss: the third axis of four is no axis of columns."""
    first, second = m.wide(made).view(x.shape[0], -1, 2, 8).split(1, 2)
    return (first * second).flatten(2)


def of_all_tokens(m: Layer, x: Tensor, made: Tensor) -> Tensor:
    """The sum is needed for all tokens: by an attention that is not the last thing."""
    h = x + m.out(made)
    q = h.view(h.shape[0], -1, 2, 4).transpose(1, 2)
    return h + F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("behind", "products"),
    [
        (lambda m, x, made: torch.relu(m.out(made)) * m.up(x), 3),
        (lambda m, x, made: F.layer_norm(m.out(made), (8,)) + m.table[: x.shape[1]], 1),  # another number for each token
        (lambda m, x, made: m.out(made).mean(-1, keepdim=True) + x, 2),
        (lambda m, x, made: m.out(made).view(x.shape[0], -1, 2, 4).flatten(2), 1),  # a view
        (lambda m, x, made: m.out(made) + m.up(m.table[None, : x.shape[1]]), 1),  # of all rows
        (halves, 2),
        (halves_of_heads, 1),
        (of_all_tokens, 1),
    ],
)
@torch.no_grad()
def test_as_far_as_each_token_is_made_by_itself(behind: Callable[..., Tensor], products: int) -> None:
    torch.manual_seed(0)
    model = Layer(behind).eval()
    shapes = {"idx": {0: Dim("b", max=4), 1: Dim("s", min=2, max=24)}}
    exported = torch.export.export(model, (), {"idx": torch.ones(2, 7, dtype=torch.long)}, dynamic_shapes=shapes, strict=False)
    program = analyse(exported, None, None, (), Options()).rewritten
    gm, every = (insert_cache(program, "prompt", all_logits=x) for x in (False, True))
    assert len(behind_last(gm)) == products
    for counts in ([7], [5, 3]):
        of_all_and_last(gm, every, cache_shapes(program), counts, 20)
