"""Ranks that share a model give the tokens of one process: presets of small depth and width, gloo on a CPU."""

from __future__ import annotations

import gc
import weakref
from copy import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

import trilithon
from parallel.shares import CAPACITY, NEW, alone, compiled, prompts, small
from parallel.together import Together
from trilithon.errors import CannotCache, CannotLower, InputError
from trilithon.parallel import share as share_module

PROMPTS = """ranks were given different prompts, or different arguments
  because they share one model, and compute each token together
  call it with the same arguments on every rank"""
INPUTS = """ranks were given different inputs
  because they share one model, and compute each result together
  call it with the same inputs on every rank"""
SAVED = f"""cannot save <trilithon.Compiled {{}}: 1 attention sites, cache of {CAPACITY} tokens>
  because this process holds one rank's share of it, and meets the others in collectives of their process group
  keep the model's weights, and compile them where they run"""


def refused(made: trilithon.Compiled) -> list[str]:
    """What they cannot do together."""
    texts, rank = [], dist.get_rank()
    positions = torch.arange(7).expand(2, 7) + rank  # the second rank's guards fail
    without = copy(made)  # as one is that has no cache
    without.cached = CannotCache("no cache")
    for call in (
        lambda: made.generate(prompts() + rank),
        lambda: made.generate(prompts(), max_new_tokens=4 + rank),
        lambda: made.generate(prompts(), do_sample=True, temperature=1.0 + rank),
        lambda: made(input_ids=prompts(), position_ids=positions),
        lambda: made.save("nowhere"),
        lambda: without.save("nowhere"),
    ):
        with pytest.raises((InputError, CannotLower)) as error:
            call()
        texts.append(str(error.value))
    return texts


def tokens_of(preset: str, by_hand: bool = False) -> dict[str, Any]:
    made, _ = compiled(preset, by_hand)
    (site,) = made.report.sites
    return {
        "greedy": made.generate(prompts(), max_new_tokens=NEW).tolist(),
        "drafts": made.generate(prompts()[:1], max_new_tokens=NEW, prompt_lookup_num_tokens=3).tolist(),
        "drawn": made.generate(prompts(), max_new_tokens=NEW, do_sample=True, temperature=2.0).tolist(),
        "mask": str(site.mask),
        "heads": [shape.g for shape in made.decoder.shapes],
        "notes": made.report.notes,
        "model": made.report.model,
        "refused": refused(made),
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "by_hand", "kv"),
    [
        ("llama-3.2-1b", True, (4, 4)),
        ("qwen2.5-0.5b:9:3", False, (1, 2)),  # heads that do not divide
    ],
)
def test_tokens_are_those_of_one_process(name: str, by_hand: bool, kv: tuple[int, int], pair: Together) -> None:
    alone(name)  # now, so that the ranks need not import the model
    found = pair(tokens_of, name, by_hand)
    for each, heads in zip(found, kv, strict=True):
        assert each["greedy"] == alone(name)
        assert each["drafts"] == alone(name)[:1]
        assert each["drawn"] == found[0]["drawn"] != each["greedy"]
        assert (each["mask"], each["heads"]) == ("causal", [heads])
        assert any(note.startswith("tensor parallel: ") and "over 2 ranks" in note for note in each["notes"])
        saved = SAVED.format(each["model"])
        assert each["refused"] == [
            PROMPTS,
            PROMPTS,
            PROMPTS,
            INPUTS,
            saved,
            saved.replace(f"cache of {CAPACITY} tokens", "no cache"),
        ]


def memory_of(preset: str) -> dict[str, Any]:
    """What a share holds, and what of the model is left when it is dropped."""
    model: Any = small(preset)
    whole = sum(x.nbytes for x in model.parameters())
    share: Any = trilithon.tensor_parallel(model)
    before = [(id(x), x.data_ptr()) for x in model.parameters()]
    share.to(torch.float64)
    cut = [x for name, x in share.named_parameters() if name.endswith("_proj.weight")]
    same = before == [(id(x), x.data_ptr()) for x in model.parameters()]
    gone = [weakref.ref(x) for x in (model, *model.parameters())]
    del model
    gc.collect()
    return {
        "left": sum(x() is not None for x in gone),
        "model stays": same,
        "own memory": all(x.untyped_storage().nbytes() == x.nbytes for x in cut),
        "part": sum(x.nbytes for x in cut) / 2 / whole,
    }


@pytest.mark.parametrize("preset", ["llama-3.2-1b", "qwen3-0.6b"])
def test_a_share_holds_no_more_than_its_part(preset: str, pair: Together) -> None:
    for found in pair(memory_of, preset):
        assert (found["left"], found["model stays"], found["own memory"]) == (0, True, True)
        assert 0 < found["part"] < 0.5


def on_meta(preset: str) -> list[str]:
    """Where the tensors of a share are that is kept on another device than the model."""
    share = trilithon.tensor_parallel(small(preset), device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(share_module, "_require_same", lambda *_: None)
        moved = trilithon.tensor_parallel(small(preset), device="meta")
    kinds = {str(x.device) for x in (*moved.parameters(), *moved.buffers())}
    shapes = [(name, x.shape) for name, x in moved.state_dict().items()]
    assert shapes == [(name, x.shape) for name, x in share.state_dict().items()]
    return sorted(kinds)


def test_all_of_a_share_is_on_its_device(pair: Together) -> None:
    assert pair(on_meta, "llama-3.2-1b") == [["meta"]] * 2


def eager_tokens(preset: str) -> dict[str, Any]:
    share: Any = trilithon.tensor_parallel(small(preset))
    attention = share.model.layers[0].self_attn
    tokens = share.generate(prompts(), max_new_tokens=NEW, do_sample=False).tolist()
    return {"tokens": tokens, "queries": attention.q_proj.out_features // 16, "kv": attention.k_proj.out_features // 16}


def test_heads_that_are_fewer_than_ranks(three: Together) -> None:
    """One rank holds 7 query heads; two hold 3 and 4, and the same head of keys and values."""
    expected = alone("qwen2.5-0.5b")
    found = three(eager_tokens, "qwen2.5-0.5b")
    assert [x["tokens"] for x in found] == [expected] * 3
    assert [(x["queries"], x["kv"]) for x in found] == [(7, 1), (3, 1), (4, 1)]
