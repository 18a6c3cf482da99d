"""Logits from the cached programs equal those of the program without a cache, at every position of every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rewrite.cached_run import CachedRun, Found
from rewrite.token_models import LONGEST, MODELS, VOCAB
from trilithon.capture import hf
from trilithon.compiler import analyse
from trilithon.errors import CannotCache
from trilithon.options import Options
from trilithon.rewrite.cache_ops import last_tokens, slot_positions, write_cache
from trilithon.rewrite.op import ATTENTION
from zoo.families import FAMILIES

CANONICAL = len(ATTENTION._schema.arguments) > 7  # the op takes positions of keys, biases and sinks
PLAIN = ("gpt2", "opt", "gpt-neox", "falcon", "mixtral", "gemma3", "llama4")
SCORED = ("gemma2", "bloom", "falcon-alibi", "gpt-oss")


def worst(found: Found, want: Tensor) -> float:
    """The largest error of logits; `want` is `[b n v]`."""
    assert len({position for _, position, _ in found}) > want.shape[1] // 2
    return max(float((logits - want[row, position]).abs().max()) for row, position, logits in found)


def exported(model: nn.Module, rows: int, axes: dict[int, Any]) -> ExportedProgram:
    example = {"idx": torch.ones(rows, 7, dtype=torch.long)}
    return torch.export.export(model, (), example, dynamic_shapes={"idx": axes}, strict=False)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_hand_written_models(name: str) -> None:
    torch.manual_seed(0)
    model, ids = MODELS[name]().double().eval(), torch.randint(0, VOCAB, (3, 56))
    shapes = {0: Dim("b", max=8), 1: Dim("s", min=2, max=LONGEST - 2)}
    program = exported(model, 2, shapes)
    if "triangle" in name:
        program = analyse(program, None, None, (), Options()).rewritten
    want = torch.stack([model(ids[:, : n + 1]).view(3, -1, VOCAB)[:, -1] for n in range(56)], 1)
    for seed in range(2):
        run = CachedRun(program, ids, 60, rings=CANONICAL)
        assert worst(run.schedule(seed), want) < 1e-9


@pytest.mark.parametrize("name", [*PLAIN, *(SCORED if CANONICAL else ())])
@torch.no_grad()
def test_families(name: str) -> None:
    family = FAMILIES[name]
    model = family.make("eager" if family.eager_only else "sdpa")
    ids = torch.randint(3, 60, (3, 48), generator=torch.Generator().manual_seed(1))
    program = analyse(model, *hf.example_for(model, ("input_ids",)), (), Options()).rewritten
    want = model(input_ids=ids, use_cache=False).logits
    for seed in range(2):
        run = CachedRun(program, ids, 50, rings=CANONICAL)
        assert worst(run.schedule(seed), want) < 1e-4


class OneRow(nn.Module):
    """Exported for one row: positions need no axis of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MODELS["slice of a table"]()

    def forward(self, idx: Tensor) -> Tensor:
        return self.inner(idx)


@torch.no_grad()
def test_a_program_for_one_row() -> None:
    torch.manual_seed(0)
    model, ids = OneRow().double().eval(), torch.randint(0, VOCAB, (1, 30))
    program = exported(model, 1, {1: Dim("s", min=2, max=40)})
    want = torch.stack([model(ids[:, : n + 1])[:, -1] for n in range(30)], 1)
    assert worst(CachedRun(program, ids, 40, rings=False).schedule(0), want) < 1e-9


def test_two_fixed_rows_are_refused() -> None:
    program = exported(MODELS["no positions"]().eval(), 2, {1: Dim("s", min=2, max=40)})
    with pytest.raises(CannotCache, match="number of rows is fixed at 2"):
        CachedRun(program, torch.zeros(2, 3), 8, rings=False)


# ------------------------------------------------------------ what cached programs call


@pytest.mark.parametrize("tokens", [1, 4, 9, 20])
def test_writes_keep_the_last_tokens_of_each_row(tokens: int) -> None:
    slots, start = 8, torch.tensor([0, 3, 13])
    counts = torch.tensor([1, max(1, tokens - 2), tokens])
    cache, x = torch.zeros(3, 2, slots, 4), torch.randn(3, 2, tokens, 4)
    want = cache.clone()
    for row in range(3):
        for i in range(int(counts[row])):
            want[row, :, (int(start[row]) + i) % slots] = x[row, :, i]
    assert write_cache(cache, x, start, counts) is cache
    assert torch.equal(cache, want)


def test_positions_of_slots() -> None:
    held = slot_positions(torch.tensor([0, 2, 4, 7]), 4)
    assert (held[0] < 0).all()
    assert held[1].tolist()[:2] == [0, 1] and (held[1][2:] < 0).all()
    assert held[2:].tolist() == [[0, 1, 2, 3], [4, 5, 6, 3]]


def test_last_tokens() -> None:
    x = torch.arange(12).view(2, 3, 2)
    assert last_tokens(x, torch.tensor([1, 3])).tolist() == [[[0, 1]], [[10, 11]]]
