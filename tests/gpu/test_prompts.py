"""Prompts on a GPU: compiled once, replayed as CUDA graphs, with the tokens of a decoder without graphs."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import trilithon
from trilithon import Options
from trilithon.lower.cuda_graph import captured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = (1, 63, 64, 65, 200)


def ids_of(length: int, rows: int, seed: int) -> Tensor:
    return torch.randint(3, 1000, (rows, length), device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("inductor", [None, False], ids=["inductor", "aten"])
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_equal_those_without_graphs(rows: int, inductor: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    """Each length twice, so that the second is captured, and once more, replayed; rows are of unlike lengths."""
    model = trilithon.load_model("qwen3-0.6b", device="cuda", layers=2)
    options = [Options(max_batch=rows, inductor=inductor, cuda_graphs=graphs, verify=False) for graphs in (False, None)]
    plain, graphs = (trilithon.compile(model, max_tokens=320, options=option) for option in options)
    for turn in range(3):
        for length in LENGTHS:
            ids = ids_of(length, rows, seed=turn)
            mask = torch.ones_like(ids)
            mask[1:, : length // 3] = 0
            want, got = (llm.generate(ids, attention_mask=mask, max_new_tokens=16, pad_token_id=0) for llm in (plain, graphs))
            assert torch.equal(got, want)
    assert set(graphs.decoder.prompts._graphs) == {(rows, 64), (rows, 128), (rows, 256)}
    assert plain.decoder.prompts is None
    assert not [r for r in caplog.records if r.name.startswith("trilithon") and r.levelno >= logging.WARNING]


@pytest.mark.timeout(600)
def test_the_report_says_what_prompts_are_made_of() -> None:
    model = trilithon.load_model("qwen3-0.6b", device="cuda", layers=2, dtype=torch.bfloat16)
    llm = trilithon.compile(model, max_tokens=128)
    (note,) = (x for x in llm.report.notes if x.startswith("prefill: "))
    assert "generated kernels beside products and attention for one row" in note


def test_a_wait_is_found_before_the_capture() -> None:
    """After it both graphs and random numbers are as good as before."""
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        captured(lambda: x + x.sum().item())
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.rand(3, device="cuda").shape == (3,)
    graph, made = captured(lambda: x * 2)
    _, other = captured(lambda: x * 3, pool=graph.pool())
    x.fill_(5)
    graph.replay()
    assert made.tolist() == [10.0] * 4 and other.shape == (4,)


def test_what_a_capture_undoes() -> None:
    """The runs before a capture leave no trace; a replay does."""
    count = torch.zeros(1, device="cuda")
    graph, _ = captured(lambda: count.add_(1), undo=lambda: count.zero_())
    assert count.item() == 0
    graph.replay()
    assert count.item() == 1
