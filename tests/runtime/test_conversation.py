"""Conversations: the tokens of a from-scratch `generate`, with nothing computed twice."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from runtime.plain_decoder import PlainDecoder
from runtime.tiny_llama import VOCABULARY, tiny_parrot
from trilithon import CannotCache, Compiled
from trilithon.errors import CapacityExceeded, InputError, TrilithonError
from trilithon.report.report import Report
from trilithon.runtime.generate import generate


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_parrot()


def compiled(decoder: Any, **defaults: Any) -> Compiled:
    report = Report(model="tiny", inputs=(), route="", sites=[])
    return Compiled(programs={}, report=report, build=None, decoder=decoder, max_tokens=64, defaults=defaults)


@pytest.fixture
def decoder(model: LlamaForCausalLM) -> PlainDecoder:
    return PlainDecoder(model, ring=True)


@pytest.fixture
def llm(decoder: PlainDecoder) -> Compiled:
    return compiled(decoder)


def turn(seed: int, tokens: int = 5) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drafts": {"prompt_lookup_num_tokens": 5},
    "eos": {"eos_token_id": [7, 11, 13, 17, 23, 32]},
    "eos_and_drafts": {"eos_token_id": [7, 11, 13, 17, 23, 32], "prompt_lookup_num_tokens": 5},
    "penalty": {"repetition_penalty": 1.3},
    "sampled": {"do_sample": True, "seed": 3},
    "pad_token_in_the_text": {"eos_token_id": [7, 11], "pad_token_id": 32},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_each_turn_gives_what_the_whole_text_gives(
    model: LlamaForCausalLM, llm: Compiled, decoder: PlainDecoder, request_: dict[str, Any]
) -> None:
    conversation = llm.conversation()
    text = turn(0)[:, :0]
    for n in range(3):
        text = torch.cat([text, turn(n)], 1)
        plain = {k: v for k, v in request_.items() if k != "prompt_lookup_num_tokens"}
        whole = {"attention_mask": torch.ones_like(text), **plain}
        text = generate(PlainDecoder(model), text, max_new_tokens=10, **whole)
        ours = conversation.generate(turn(n), max_new_tokens=10, **request_)
        assert torch.equal(ours, text)
        assert torch.equal(conversation.tokens, text) and len(conversation) == text.shape[1]
    assert [name for name, _ in decoder.calls].count("prefill") == 1
    if not request_:
        assert decoder.tokens_taken == text.shape[1] - 1, "a token was computed twice"


def test_it_goes_on_without_new_tokens(model: LlamaForCausalLM, llm: Compiled) -> None:
    conversation = llm.conversation()
    with pytest.raises(InputError, match=r"no token to go on from(.|\n)*pass input_ids"):
        conversation.generate()
    conversation.generate(turn(0), max_new_tokens=7)
    assert torch.equal(conversation.generate(max_new_tokens=6), generate(PlainDecoder(model), turn(0), max_new_tokens=13))


def test_a_fork_goes_its_own_way(model: LlamaForCausalLM, llm: Compiled, decoder: PlainDecoder) -> None:
    first = llm.conversation()
    stem = first.generate(turn(0, 20), max_new_tokens=4)
    forks = [first.fork(), first.fork()]
    decoder.calls.clear()
    for n, conversation in enumerate([*forks, first, forks[0].fork()]):
        want = generate(PlainDecoder(model), torch.cat([conversation.tokens, turn(n + 5)], 1), max_new_tokens=5)
        assert torch.equal(conversation.generate(turn(n + 5), max_new_tokens=5), want)
    assert torch.equal(first.tokens[:, : stem.shape[1]], stem)
    assert not torch.equal(forks[0].tokens, forks[1].tokens)
    assert "prefill" not in [name for name, _ in decoder.calls], "the stem was computed again"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_a_fork(model: LlamaForCausalLM, llm: Compiled, copied: Any) -> None:
    first = llm.conversation()
    first.generate(turn(0), max_new_tokens=4)
    other = copied(first)
    for n, conversation in enumerate((other, first, other)):
        want = generate(PlainDecoder(model), torch.cat([conversation.tokens, turn(n + 1)], 1), max_new_tokens=4)
        assert torch.equal(conversation.generate(turn(n + 1), max_new_tokens=4), want)


def test_many_conversations_share_one_cache(model: LlamaForCausalLM, llm: Compiled, decoder: PlainDecoder) -> None:
    open_ones = [llm.conversation() for _ in range(3)]
    for n in range(2):
        for i, conversation in enumerate(open_ones):
            want = generate(PlainDecoder(model), torch.cat([conversation.tokens, turn(7 * i + n)], 1), max_new_tokens=4)
            assert torch.equal(conversation.generate(turn(7 * i + n), max_new_tokens=4), want)
        llm.generate(turn(n), max_new_tokens=3)
    assert [name for name, _ in decoder.calls].count("prefill") == 3 + 2
    decoder.calls.clear()
    del open_ones, conversation
    gc.collect()
    llm.generate(turn(1), max_new_tokens=3)
    assert "save" not in [name for name, _ in decoder.calls], "nobody's tokens were saved"


def test_streams_and_conversations_take_turns(model: LlamaForCausalLM, llm: Compiled) -> None:
    alone = list(llm.stream(turn(0), max_new_tokens=8))
    conversation, mixed = llm.conversation(), []
    for tokens in llm.stream(turn(0), max_new_tokens=8):
        mixed.append(tokens)
        conversation.generate(turn(len(mixed), 2), max_new_tokens=1)
    assert torch.equal(torch.stack(mixed), torch.stack(alone))
    last = conversation.tokens[:, :-1]
    assert torch.equal(conversation.tokens, generate(PlainDecoder(model), last, max_new_tokens=1))


@pytest.mark.parametrize("given", [{"max_new_tokens": 60}, {"max_new_tokens": 0}, {"temperatur": 1.0}], ids=str)
def test_a_refused_turn_changes_nothing(model: LlamaForCausalLM, llm: Compiled, given: dict[str, Any]) -> None:
    conversation = llm.conversation()
    before = conversation.generate(turn(0), max_new_tokens=6)
    with pytest.raises(TrilithonError):
        conversation.generate(turn(1), **given)
    assert torch.equal(conversation.tokens, before) and conversation.room == 64 - 11
    want = generate(PlainDecoder(model), torch.cat([before, turn(2)], 1), max_new_tokens=6)
    assert torch.equal(conversation.generate(turn(2), max_new_tokens=6), want)


def test_capacity_is_that_of_the_whole_conversation(llm: Compiled) -> None:
    conversation = llm.conversation()
    conversation.generate(turn(0, 30), max_new_tokens=20)
    with pytest.raises(CapacityExceeded, match=r"55 prompt tokens and 10 new ones do not fit: 1 tokens too many"):
        conversation.generate(turn(1), max_new_tokens=10)
    assert conversation.generate(turn(1), max_new_tokens=9).shape == (1, 64)
    assert conversation.room == 0


def test_an_error_under_way_leaves_it_as_it_was(model: LlamaForCausalLM, llm: Compiled) -> None:
    conversation = llm.conversation()
    before = conversation.generate(turn(0), max_new_tokens=6)

    def fails_later(input_ids: Tensor, scores: Any) -> Tensor:
        if input_ids.shape[1] > 20:
            raise KeyError("the user's own")
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(KeyError, match="the user's own"):
        conversation.generate(turn(1), max_new_tokens=20, stopping_criteria=[fails_later])
    assert torch.equal(conversation.tokens, before)
    want = generate(PlainDecoder(model), torch.cat([before, turn(2)], 1), max_new_tokens=6)
    assert torch.equal(conversation.generate(turn(2), max_new_tokens=6), want)


def test_generate_within_generate_is_refused(llm: Compiled) -> None:
    def nested(input_ids: Tensor, scores: Tensor) -> Tensor:
        llm.generate(input_ids, max_new_tokens=1)
        return scores

    with pytest.raises(InputError, match=r"generating already(.|\n)*not from a streamer"):
        llm.generate(turn(0), logits_processor=[nested], max_new_tokens=4)
    assert llm.generate(turn(0), max_new_tokens=4).shape == (1, 9)


def test_nothing_is_saved_for_a_call_that_failed(llm: Compiled, decoder: PlainDecoder) -> None:
    with pytest.raises(InputError) as caught:
        llm.generate(turn(0).float())
    llm.generate(turn(0), max_new_tokens=2)
    assert caught.value.todo and "save" not in [name for name, _ in decoder.calls]


def test_what_a_conversation_does_not_take(llm: Compiled) -> None:
    conversation = llm.conversation()
    with pytest.raises(InputError, match=r"takes no attention_mask(.|\n)*one row without padding"):
        conversation.generate(turn(0), attention_mask=torch.ones(1, 5))
    with pytest.raises(InputError, match="takes no num_return_sequences"):
        conversation.generate(turn(0), do_sample=True, num_return_sequences=2)
    with pytest.raises(InputError, match="takes one row, got 2"):
        conversation.generate(turn(0).repeat(2, 1))
    with pytest.raises(InputError, match="must hold integers"):
        conversation.generate(turn(0).float())
    with pytest.raises(CannotCache, match="no cache here"):
        compiled(CannotCache("no cache here")).conversation()


def test_streamer_and_scores_of_a_turn(llm: Compiled) -> None:
    got: list[list[Any]] = []

    class Streamer:
        def put(self, value: Tensor, /) -> None:
            got.append(value.tolist())

        def end(self) -> None:
            got.append([])

    conversation = llm.conversation()
    conversation.generate(turn(0), max_new_tokens=2)
    ours = conversation.generate(
        turn(1), max_new_tokens=3, streamer=Streamer(), return_dict_in_generate=True, output_scores=True
    )
    assert got == [turn(1).tolist(), *([t] for t in ours.sequences[0, -3:].tolist()), []]
    assert ours.scores is not None and len(ours.scores) == 3


def test_defaults_of_the_model_hold(model: LlamaForCausalLM) -> None:
    free = generate(PlainDecoder(model), turn(0), max_new_tokens=10)
    llm = compiled(PlainDecoder(model), eos_token_id=int(free[0, 7]))
    assert llm.conversation().generate(turn(0), max_new_tokens=10).shape[1] <= 8
    assert llm.conversation().generate(turn(0), max_new_tokens=10, eos_token_id=None).shape[1] == 15
