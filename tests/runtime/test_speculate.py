"""Prompt lookup gives the tokens of plain greedy decoding, in fewer steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from runtime.cycle_decoder import CycleDecoder
from runtime.plain_decoder import PlainDecoder
from runtime.tiny_llama import VOCABULARY, tiny_llama, tiny_parrot
from trilithon.errors import InputError
from trilithon.runtime.generate import generate, stream
from trilithon.runtime.lookup import Lookup, find_drafts


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_parrot()


def repeating(model: LlamaForCausalLM, rows: int, tokens: int = 8) -> dict[str, Tensor]:
    """Prompts that hold what the model says next, so that drafts are right for a while; unequal lengths."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(5))
    ids = torch.cat([generate(PlainDecoder(model), ids, max_new_tokens=12), ids], 1)
    mask = (torch.arange(ids.shape[1]) >= 3 * torch.arange(rows)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def random_rows(seed: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 4, (6, 20), generator=source)
    return rows, torch.randint(1, 21, (6,), generator=source)


@pytest.mark.parametrize("ngram", [1, 2, 3, 30])
@pytest.mark.parametrize("drafts", [1, 4, 15])
def test_drafts_are_hugging_faces(ngram: int, drafts: int) -> None:
    theirs_of = PromptLookupCandidateGenerator(None, drafts, ngram, max_length=1000)
    for seed in range(4):
        rows, lengths = random_rows(seed)
        found, counts = find_drafts(rows, lengths, Lookup(drafts, ngram))
        for row, length, ours, count in zip(rows, lengths.tolist(), found, counts.tolist(), strict=True):
            theirs = theirs_of.get_candidates(row[None, :length])[0][0, length:]
            assert ours[:count].tolist() == theirs.tolist()


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one_draft": {"prompt_lookup_num_tokens": 1},
    "most_drafts": {"prompt_lookup_num_tokens": 15, "max_matching_ngram_size": 1},
    "penalty": {"repetition_penalty": 1.2, "max_matching_ngram_size": 1},
    "eos": {"eos_token_id": [7, 11, 13, 17]},
    "min_new_tokens": {"eos_token_id": [7, 11, 13, 17], "min_new_tokens": 6},
    "one_token": {"max_new_tokens": 1},
    "to_the_brim": {"max_new_tokens": 36},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seed", range(2))
def test_tokens_are_those_of_plain_decoding(rows: int, request_: dict[str, Any], seed: int) -> None:
    model = tiny_parrot(seed)
    batch, arguments = repeating(model, rows), {"max_new_tokens": 21, "prompt_lookup_num_tokens": 6} | request_
    names = ("prompt_lookup_num_tokens", "max_matching_ngram_size")
    plain = generate(PlainDecoder(model), **batch, **{k: v for k, v in arguments.items() if k not in names})
    decoder = PlainDecoder(model, ring=True)
    ours = generate(decoder, **batch, **arguments, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, plain)
    assert 0 <= ours.accepted <= ours.drafted
    assert all(width <= arguments["prompt_lookup_num_tokens"] + 1 for name, width in decoder.calls if name == "extend")


def test_rows_that_finish_at_their_own_time(model: LlamaForCausalLM) -> None:
    batch = repeating(model, 3)
    free = generate(PlainDecoder(model), **batch, max_new_tokens=24)[:, -24:]
    eos = [int(free[0, 2]), int(free[1, 9]), int(free[2, 16])]
    plain = generate(PlainDecoder(model), **batch, max_new_tokens=24, eos_token_id=eos, pad_token_id=0)
    ours = generate(
        PlainDecoder(model), **batch, max_new_tokens=24, eos_token_id=eos, pad_token_id=0, prompt_lookup_num_tokens=5
    )
    assert torch.equal(ours, plain)
    assert bool((ours[:, -1] == 0).any())


def test_repetition_takes_fewer_steps_and_counts_them(model: LlamaForCausalLM) -> None:
    batch = repeating(model, 1)
    plain, drafted = PlainDecoder(model), PlainDecoder(model)
    generate(plain, **batch, max_new_tokens=20)
    ours = generate(drafted, **batch, max_new_tokens=20, prompt_lookup_num_tokens=8, return_dict_in_generate=True)
    assert plain.steps == 20
    assert drafted.steps == 20 - ours.accepted
    assert 5 <= ours.accepted <= ours.drafted


def test_drafts_that_are_never_right_cost_nothing_but_room() -> None:
    """A row that repeats itself before a model that does not."""
    model, ids = tiny_llama(1), torch.tensor([[5, 9, 52, 5, 9, 52, 7, 52, 5]])
    plain = generate(PlainDecoder(model), ids, max_new_tokens=9)
    ours = generate(PlainDecoder(model), ids, max_new_tokens=9, prompt_lookup_num_tokens=7, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, plain)
    assert ours.accepted < ours.drafted


def test_scores_are_those_of_plain_decoding(model: LlamaForCausalLM) -> None:
    asked = {"max_new_tokens": 12, "output_scores": True, "output_logits": True, "repetition_penalty": 1.1}
    for rows in (1, 3):
        batch = repeating(model, rows)
        plain = generate(PlainDecoder(model), **batch, **asked, return_dict_in_generate=True)
        ours = generate(PlainDecoder(model), **batch, **asked, prompt_lookup_num_tokens=5, return_dict_in_generate=True)
        assert ours.scores and plain.scores and ours.logits and plain.logits
        torch.testing.assert_close(ours.scores, plain.scores, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(ours.logits, plain.logits, atol=2e-4, rtol=1e-4)


def no_token_twice_running(input_ids: Tensor, scores: Tensor) -> Tensor:
    return scores.scatter(1, input_ids[:, -3:], -torch.inf)


def odd_length(input_ids: Tensor, scores: Any) -> Tensor:
    return torch.tensor([input_ids.shape[1] % 11 == 0])


@pytest.mark.parametrize(
    "extra",
    [{"logits_processor": [no_token_twice_running]}, {"stopping_criteria": [odd_length]}],
    ids=["processors", "criteria"],
)
def test_processors_and_criteria_of_one_row(model: LlamaForCausalLM, extra: dict[str, Any]) -> None:
    batch = repeating(model, 1)
    plain = generate(PlainDecoder(model), **batch, max_new_tokens=20, **extra)
    ours = generate(PlainDecoder(model), **batch, max_new_tokens=20, prompt_lookup_num_tokens=6, **extra)
    assert torch.equal(ours, plain)
    with pytest.raises(InputError, match=r"does not go with prompt_lookup_num_tokens and 2 rows(.|\n)*unlike lengths"):
        generate(PlainDecoder(model), **repeating(model, 2), prompt_lookup_num_tokens=6, **extra)


def test_sampled_tokens_follow_the_model(model: LlamaForCausalLM) -> None:
    """Each token is drawn from what the model says behind the tokens before it: near zero temperature that is greedy."""
    batch = repeating(model, 2)
    plain = generate(PlainDecoder(model), **batch, max_new_tokens=15)
    cold = {"do_sample": True, "temperature": 1e-4, "seed": 0}
    assert torch.equal(generate(PlainDecoder(model), **batch, max_new_tokens=15, prompt_lookup_num_tokens=5, **cold), plain)


@pytest.mark.parametrize("rows", [1, 3])
def test_stream_and_streamer_get_every_token(model: LlamaForCausalLM, rows: int) -> None:
    batch = repeating(model, rows)
    whole = generate(PlainDecoder(model), **batch, max_new_tokens=15)
    steps = list(stream(PlainDecoder(model), **batch, max_new_tokens=15, prompt_lookup_num_tokens=5))
    assert torch.equal(torch.stack(steps, 1), whole[:, -15:])
    if rows == 1:
        got: list[Tensor] = []

        class Streamer:
            def put(self, value: Tensor, /) -> None:
                got.append(value)

            def end(self) -> None:
                got.append(torch.zeros(1, 0, dtype=torch.int64))

        generate(PlainDecoder(model), **batch, max_new_tokens=15, prompt_lookup_num_tokens=5, streamer=Streamer())
        assert torch.equal(torch.cat(got, 1), whole)
        assert max(value.shape[1] for value in got[1:]) > 1


class HostReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_host_reads_the_device_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    tolist = Tensor.tolist

    def counted(self: Tensor) -> Any:
        nonlocal reads
        reads += 1
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", counted)
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1], [3, 4, 0, 1, 2, 3, 4]])
    counts = []
    for new in (1, 31):
        reads = 0
        with HostReads() as scalars:
            generate(CycleDecoder(5), ids, max_new_tokens=new, prompt_lookup_num_tokens=5, eos_token_id=70)
        counts.append((reads, scalars.count))
    assert counts[1][0] - counts[0][0] == 5, "30 more tokens in steps of 6"
    assert counts[1][1] == counts[0][1], "no other reads"


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "too_many": ({"prompt_lookup_num_tokens": 16}, r"between 1 and 15(.|\n)*16 tokens at most"),
    "none": ({"prompt_lookup_num_tokens": 0}, "between 1 and 15"),
    "ngram": ({"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 0}, "max_matching_ngram_size=0 must be"),
    "ngram_alone": ({"max_matching_ngram_size": 2}, "without prompt_lookup_num_tokens"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(model: LlamaForCausalLM, name: str) -> None:
    arguments, text = REFUSALS[name]
    with pytest.raises(InputError, match=text):
        generate(PlainDecoder(model), torch.tensor([[1, 2, 3]]), **arguments)
