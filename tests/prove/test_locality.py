"""A KV cache goes in only where every value outside attention belongs to one token of one row."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from trilithon.capture.collectives import all_gather, all_reduce
from trilithon.capture.export import capture
from trilithon.compiler import analyse
from trilithon.errors import CannotCache
from trilithon.options import Options
from trilithon.rewrite.insert_cache import cache_shapes, insert_cache

WIDTH, HEADS, VOCAB = 16, 2, 11
Twist = Callable[["Decoder", Tensor, Tensor], Tensor]
Mask = Callable[[int], Tensor]


class Decoder(nn.Module):
    """`twist(self, x, position_ids)`, then causal attention, then where a mask is given a second one; `turn` before each K.

    A mask is the text of a canonical one, or makes the mask of an attention that is to be proved.
    """

    def __init__(self, twist: Twist | None = None, mask: str | Mask | None = None, turn: Twist | None = None) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(32, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.twist, self.turn = twist, turn
        self.masks: list[str | Mask] = ["causal"] if mask is None else ["causal", mask]

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(position_ids)
        if self.twist is not None:
            x = self.twist(self, x, position_ids)
        for i in range(len(self.masks)):
            x = x + self.attend(self.norm(x), i, position_ids)
        return self.head(F.silu(x))

    def attend(self, x: Tensor, i: int, position_ids: Tensor) -> Tensor:
        b, s, _ = x.shape
        y = self.qkv[i](x)
        q, k, v = (y[..., n : n + WIDTH].view(b, s, HEADS, -1).transpose(1, 2) for n in (0, WIDTH, 2 * WIDTH))
        if self.turn is not None:
            k = self.turn(self, k, position_ids)
        mask = self.masks[i]
        if isinstance(mask, str):
            y = torch.ops.trilithon.attention(q, k, v, mask, 0.5)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask(s))
        return self.out[i](y.transpose(1, 2).reshape(b, s, WIDTH))


def canonical(model: nn.Module, static: bool = False, shortest: int = 2) -> ExportedProgram:
    example = {"input_ids": torch.ones(2, 7, dtype=torch.long), "position_ids": torch.arange(7).expand(2, 7).contiguous()}
    axes = {0: Dim("b", max=8)} if static else {0: Dim("b", max=8), 1: Dim("s", min=shortest, max=30)}
    shapes = {"input_ids": axes, "position_ids": axes}
    deferred = {"strict": False, "prefer_deferred_runtime_asserts_over_guards": True}
    with torch.no_grad():
        return torch.export.export(model, (), example, dynamic_shapes=shapes, **deferred)


@cache
def plain() -> ExportedProgram:
    return canonical(Decoder().eval())


def test_a_causal_decoder_may_have_a_cache() -> None:
    shapes = cache_shapes(plain())
    assert [(c.g, c.d, c.e, c.dtype, c.window) for c in shapes] == [(2, 8, 8, torch.float32, None)]
    windows = cache_shapes(canonical(Decoder(mask="window(3)").eval()))
    assert [(c.window, c.slots(100), c.slots(10)) for c in windows] == [(None, 100, 10), (3, 18, 10)]


# ------------------------------------------------------------ what mixes tokens or rows


def shift(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def convolve(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), torch.ones(WIDTH, WIDTH, 3)).transpose(1, 2)


def batch_norm(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)


def convolve_around(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return F.conv1d(x.transpose(1, 2), torch.ones(WIDTH, 1, 3), padding=1, groups=WIDTH).transpose(1, 2)


def pooled(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return F.avg_pool1d(F.pad(x.transpose(1, 2), (2, 0)), 3, stride=1).transpose(1, 2)


def gather_rows(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + F.embedding(p * 0, x.mean(0))


def gather_tokens(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + x.gather(1, p.unsqueeze(-1).expand(-1, -1, WIDTH).flip(1))


def vector_product(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    """A product with a vector drops an axis; the softmax after it runs over tokens."""
    return x * torch.softmax(torch.matmul(x, m.norm.weight), 1).unsqueeze(-1)


def capacity(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    """An expert takes the first tokens that chose it: how many came before counts."""
    chosen = (x[..., 0] > 0).long()
    place = chosen.cumsum(1) * chosen
    return x * (place <= 3).unsqueeze(-1)


def attend_unmasked(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + torch.softmax(x @ x.transpose(1, 2), -1) @ x


def attend_rows(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    rows = x.transpose(0, 1).unsqueeze(1)
    return x + torch.ops.trilithon.attention(rows, rows, rows, "causal", 0.5).squeeze(1).transpose(0, 1)


def mix_view(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    b, s, c = x.shape
    return x + x.reshape(s, b, c).transpose(0, 1)


def pair_tokens(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    b, s, c = x.shape
    return x + x.transpose(1, 2).contiguous().view(b, s, c)


def sort_experts_away(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    """Tokens sorted by a value are mixed with their neighbours, then put back."""
    order = x[..., :4].topk(1, dim=-1)[1].view(-1).sort()[1]
    y = x.view(-1, WIDTH)[order]
    return x + (y * 0.5).cumsum(0)[order].view_as(x)


def reversed_positions(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + m.positions(torch.arange(x.shape[1] - 1, -1, -1))


def far_positions(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + m.positions(torch.arange(x.shape[1]) - x.shape[1] + 30)


def last_learned(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + m.positions.weight[x.shape[1] - 1 : x.shape[1]]


def end_of_table(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + m.positions.weight[32 - x.shape[1] :]


def last_everywhere(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + x[:, -1:]


def last_expanded(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x[:, -1].unsqueeze(1).expand(-1, x.shape[1], -1)


def first_everywhere(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + x[:, :1]


def dot_row_sum(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    """A matrix over batch rows."""
    b = x.shape[0]
    flat = x.transpose(0, 1)
    return x + (torch.ones(b, b) @ flat).transpose(0, 1)


def row_numbers(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
    return x + torch.arange(x.shape[0])[:, None, None]


def shifted_key(m: Decoder, k: Tensor, p: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(k[:, :, :1]), k[:, :, :-1]], 2)


def rolled_key(m: Decoder, k: Tensor, p: Tensor) -> Tensor:
    return k.roll(-1, 2)


def normed_key(m: Decoder, k: Tensor, p: Tensor) -> Tensor:
    return k / k.norm(dim=2, keepdim=True)


LENGTH = "from the number of tokens|depends on the number"
FORBIDDEN: dict[str, tuple[Twist, str, str]] = {  # the operation that must be named, and why
    "token_shift": (shift, "slice", "selects tokens"),
    "cumsum": (lambda m, x, p: x.cumsum(1), "cumsum", "over tokens"),
    "mean": (lambda m, x, p: x + x.mean(1, keepdim=True), "mean", "over tokens"),
    "mean_of_all": (lambda m, x, p: x + x.mean(dim=(), keepdim=True), "mean", "over rows|over tokens"),
    "max": (lambda m, x, p: x + x.amax(1, keepdim=True), "amax", "over tokens"),
    "norm_over_tokens": (lambda m, x, p: x / x.norm(dim=1, keepdim=True), "norm", "over tokens"),
    "softmax": (lambda m, x, p: x.softmax(1), "softmax", "over tokens"),
    "convolution": (convolve, "pad", "pads over tokens"),
    "convolution_around": (convolve_around, "conv1d", "not known to keep tokens apart"),
    "pooling": (pooled, "pad", "pads over tokens"),
    "flip": (lambda m, x, p: x.flip(1), "flip", "not known to keep tokens apart"),
    "roll": (lambda m, x, p: x.roll(1, 1), "roll", "not known to keep tokens apart"),
    "sort": (lambda m, x, p: x.sort(1)[0], "sort", "over tokens"),
    "topk": (lambda m, x, p: x + x.topk(1, dim=1)[0], "topk", "over tokens"),
    "batch_norm": (batch_norm, "batch_norm", "not known to keep tokens apart"),
    "instance_norm": (lambda m, x, p: F.instance_norm(x.transpose(1, 2)).transpose(1, 2), "instance_norm", "not known"),
    "group_norm": (lambda m, x, p: F.group_norm(x.transpose(1, 2), 4).transpose(1, 2), "group_norm", "over tokens"),
    "vector_product": (vector_product, "softmax", "over tokens"),
    "product_of_tokens": (lambda m, x, p: x + (x @ x.transpose(1, 2)) @ x, "matmul", "different tokens|along tokens"),
    "einsum_of_tokens": (lambda m, x, p: x + torch.einsum("bsc,btc->bst", x, x) @ x, "einsum", "different tokens"),
    "einsum_of_rows": (lambda m, x, p: x + torch.einsum("bsc,dsc->bsc", x, x), "einsum", "along rows"),
    "running_mean": (lambda m, x, p: x + torch.ones(x.shape[1], x.shape[1]).tril() @ x, "ones", "different tokens"),
    "next_of_two_copies": (lambda m, x, p: x.repeat(1, 2, 1)[:, 1 : x.shape[1] + 1], "slice", "selects tokens"),
    "unmasked_attention": (attend_unmasked, "matmul", "different tokens|not proved causal"),
    "expert_capacity": (capacity, "cumsum", "over tokens"),
    "sorted_tokens": (sort_experts_away, "cumsum", "over tokens|sorted"),
    "gather_tokens": (gather_tokens, "flip", "not known"),
    "tokens_as_width": (pair_tokens, "view", "cuts across tokens"),
    "rows_as_tokens": (mix_view, "view|reshape", "cuts across tokens or rows"),
    "last_everywhere": (last_everywhere, "add", "last token's value"),
    "last_expanded": (last_expanded, "expand", "last token's value"),
    "first_everywhere": (first_everywhere, "slice", "selects tokens"),
    "other_tokens_by_number": (lambda m, x, p: x + x[:, [0]], "index", "looks tokens up"),
    "scaled_by_length": (lambda m, x, p: x / x.shape[1], "div", LENGTH),
    "scaled_by_power_of_length": (lambda m, x, p: x * 0.9 ** x.shape[1], "mul|pow", LENGTH),
    "scaled_by_inverse_length": (lambda m, x, p: x * (1.0 / x.shape[1]), "mul", LENGTH),
    "filled_with_length": (lambda m, x, p: x + torch.full((1,), x.shape[1]), "full", "at run time"),
    "reversed_positions": (reversed_positions, "arange", "one by one from the first"),
    "positions_from_the_end": (far_positions, "sub", LENGTH),
    "last_learned": (last_learned, "slice", LENGTH),
    "end_of_table": (end_of_table, "slice", LENGTH),
    "every_other_position": (lambda m, x, p: x + m.positions(torch.arange(0, 2 * x.shape[1], 2)), "arange", "one by one"),
    "sum_of_positions": (lambda m, x, p: x + p.sum(1)[:, None, None], "sum", "over tokens"),
    "running_sum_of_positions": (lambda m, x, p: x + p.cumsum(1)[..., None], "cumsum", "over tokens"),
    "mean_of_rows": (lambda m, x, p: x + x.mean(0, keepdim=True), "mean", "over rows"),
    "cumsum_of_rows": (lambda m, x, p: x.cumsum(0), "cumsum", "over rows"),
    "matrix_of_rows": (dot_row_sum, "ones", "different rows"),
    "attention_across_rows": (attend_rows, "attention", "do not run over rows"),
    "first_row_everywhere": (lambda m, x, p: x + x[:1], "slice", "selects tokens or rows"),
    "row_numbers": (row_numbers, "arange", "one by one"),
    "scaled_by_rows": (lambda m, x, p: x / x.shape[0], "div", "number of rows"),
    "gather_rows": (gather_rows, "mean", "over rows"),
    "joined_rows_of_ranks": (lambda m, x, p: x + all_gather(x, 2, "0")[: x.shape[0]], "gather", "along rows"),
    "joined_tokens_of_ranks": (
        lambda m, x, p: x + all_gather(x.permute(1, 0, 2), 2, "0").mean(0)[:, None],
        "gather",
        "along tokens",
    ),
    "largest_of_ranks": (lambda m, x, p: all_reduce(x, "0", "max"), "all_reduce", "takes the max, where sums alone"),
    "ranks_of_another_group": (lambda m, x, p: all_reduce(x, "0") + all_reduce(x, "1"), "all_reduce", "may have other tokens"),
    "dropout": (lambda m, x, p: F.dropout(x, 0.1, training=True), "dropout", "dropout is on"),
    "noise": (lambda m, x, p: x + torch.randn(WIDTH), "randn", "not known"),
}
KEYS: dict[str, tuple[Twist, str, str]] = {
    "shifted_key": (shifted_key, "slice", "selects tokens"),
    "next_key": (rolled_key, "roll", "not known to keep tokens apart"),
    "normed_key": (normed_key, "norm", "over tokens"),
}


def refusal(program: ExportedProgram) -> CannotCache:
    with pytest.raises(CannotCache) as caught:
        cache_shapes(program)
    assert "cannot insert a KV cache" in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", [*FORBIDDEN, *KEYS])
def test_mixed_tokens_or_rows_are_refused(name: str) -> None:
    twist, operation, why = (FORBIDDEN | KEYS)[name]
    model = Decoder(twist) if name in FORBIDDEN else Decoder(turn=twist)
    found = refusal(canonical(model.eval()))
    assert found.where is not None and "test_locality.py" in str(found)
    assert any(part in found.where.node for part in operation.split("|")), found.where
    assert any(part in found.why for part in why.split("|")), found.why


def test_sums_over_ranks_keep_tokens_apart() -> None:
    def meet(m: Decoder, x: Tensor, p: Tensor) -> Tensor:
        return all_reduce(x, "0") + all_gather(x.permute(2, 0, 1), 2, "0")[:WIDTH].permute(1, 2, 0)

    (shape,) = cache_shapes(canonical(Decoder(meet).eval()))
    assert shape.g == HEADS


# ------------------------------------------------------------ experts


class Experts(nn.Module):
    """Tokens sorted by their expert, as transformers does; `spoil` is what goes wrong."""

    def __init__(self, spoil: str = "") -> None:
        super().__init__()
        self.tokens, self.head, self.router = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB), nn.Linear(WIDTH, 4)
        self.weights = nn.Parameter(torch.randn(4, WIDTH, WIDTH))
        self.spoil = spoil

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        b, s, c = x.shape
        q = x.view(b, s, 2, -1).transpose(1, 2)
        x = torch.ops.trilithon.attention(q, q, q, "causal", 0.5).transpose(1, 2).reshape(-1, c)
        gates, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        groups, order = (chosen + 1 if self.spoil == "groups" else chosen).view(-1).sort()
        sorted_ = x[order // (1 if self.spoil == "copies" else 2)]
        ends = torch.histc(groups.float(), 4, 0, 4 if self.spoil == "bins" else 3).cumsum(0, dtype=torch.int32)
        y = torch._grouped_mm(sorted_.bfloat16(), self.weights.bfloat16(), offs=ends)
        if self.spoil == "neighbours":
            y = y.view(-1, 2, c).sum(1).repeat_interleave(2, 0)
        back = torch.empty_like(order).index_put([order], torch.arange(2 * b * s))
        y = y[order if self.spoil == "order" else back].view(b * s, 2, c) * gates[..., None]
        return self.head(y.sum(1).view(b, s, c).to(self.head.weight.dtype))


def test_experts_that_sort_tokens_may_have_a_cache() -> None:
    assert len(cache_shapes(canonical(Experts().eval()))) == 1


@pytest.mark.parametrize("spoil", ["groups", "copies", "bins", "neighbours", "order"])
def test_experts_that_mix_tokens_are_refused(spoil: str) -> None:
    found = refusal(canonical(Experts(spoil).eval()))
    assert found.where is not None and "test_locality.py" in str(found)


# ------------------------------------------------------------ masks


def full(s: int) -> Tensor:
    return torch.ones(s, s, dtype=torch.bool)


def unproved(s: int) -> Tensor:
    i = torch.arange(s)
    return (i[None] <= i[:, None]) & ((i[:, None] - i[None]) % 3 == 0)


def peeking(s: int) -> Tensor:
    """The second head sees one token ahead."""
    i = torch.arange(s)
    return i[None, None] <= i[None, :, None] + torch.arange(2)[:, None, None]


def prefix(s: int) -> Tensor:
    i = torch.arange(s)
    return (i[None] <= i[:, None]) | (i[None] < 2)


@pytest.mark.parametrize("mask", [full, unproved, peeking, prefix])
def test_attention_that_is_not_proved_causal_is_refused(mask: Mask) -> None:
    """The second of two layers."""
    program = canonical(Decoder(mask=mask).eval())
    found = refusal(analyse(program, None, None, (), Options()).rewritten)
    assert "not causal" in found.why or "not proved causal" in found.why
    assert found.where is not None and "attention" in found.where.node and "test_locality.py" in str(found)


@pytest.mark.parametrize("mask", ["full", "local(1, 1)", "chunked(4)", "causal(lower_right)", "causal & padding(keys)"])
def test_canonical_masks_that_are_not_causal_are_refused(mask: str) -> None:
    found = refusal(canonical(Decoder(mask=mask).eval()))
    assert f"its mask is {mask}" in found.why and found.where is not None and "attention" in found.where.node


# ------------------------------------------------------------ inputs


def test_a_fixed_number_of_tokens_is_refused() -> None:
    assert "number of tokens is fixed" in refusal(canonical(Decoder().eval(), static=True)).why


def test_a_program_for_long_prompts_only_is_refused() -> None:
    assert "for 5 tokens or more" in refusal(canonical(Decoder().eval(), shortest=5)).why


class WithMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(input_ids, attention_mask.cumsum(1) - 1)


def test_an_attention_mask_is_refused() -> None:
    ones = torch.ones(2, 7, dtype=torch.long)
    axes = {0: Dim("b", max=8), 1: Dim("s", min=2, max=30)}
    example = {"input_ids": ones, "attention_mask": ones}
    refused = refusal(capture(WithMask().eval(), example, dict.fromkeys(example, axes)).program)
    assert "takes input_ids, attention_mask" in refused.why and "export it without attention_mask" in str(refused.todo)


def test_all_logits_of_a_selection_that_is_viewed_are_refused() -> None:
    class Last(Decoder):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            x = self.tokens(input_ids) + self.attend(self.tokens(input_ids), 0, position_ids)
            return self.head(x[:, -1].view(-1, 2, WIDTH // 2).flatten(1))

    program = canonical(Last().eval())
    insert_cache(program, "extend")
    with pytest.raises(CannotCache, match="logits of the last token only"):
        insert_cache(program, "extend", all_logits=True)
