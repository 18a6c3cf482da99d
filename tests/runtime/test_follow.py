"""Greedy tokens that a decoder makes several at once are those that it makes one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from models.configs import tiny
from runtime.plain_decoder import PlainDecoder
from runtime.tiny_llama import VOCABULARY, tiny_llama
from trilithon import Options
from trilithon import compile as compile_model
from trilithon.rewrite.cache_shape import SPARE
from trilithon.runtime.conversation import Conversation
from trilithon.runtime.generate import generate, stream
from trilithon.runtime.memory import Memory
from trilithon.runtime.step import AT_ONCE, Step

STOPS = [7, 11, 13, 17, 23, 32]


class Follower(PlainDecoder):
    """A plain decoder that takes in eight at once."""

    at_once = 8

    def follow(self, tokens: Tensor) -> Tensor:
        made = []
        for _ in range(self.at_once):
            self.decode(tokens)
            tokens = self.best.clone()
            made.append(tokens)
        self.calls.append(("follow", self.at_once))
        self.best = torch.stack(made, 1)[:, -1]
        return torch.stack(made, 1)


class Streamer:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value)

    def end(self) -> None: ...


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def prompts() -> Tensor:
    return torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(4))


def twice_before(chain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(step: Step, *args: Any) -> Tensor:
        start = step.start.clone()
        for _ in range(2):
            chain(step, *args)
            step.start.copy_(start)
        return chain(step, *args)

    return run


def blocks(decoder: PlainDecoder) -> int:
    return sum(name == "follow" for name, _ in decoder.calls)


@pytest.mark.parametrize("new", [1, 2, 8, 9, 10, 17, 30])
@pytest.mark.parametrize("eos", [None, STOPS, [7]], ids=str)
def test_tokens_are_the_same(model: LlamaForCausalLM, new: int, eos: list[int] | None) -> None:
    """Rows end at unlike places in a block, or never."""
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, :2] = 0
    plain, decoder = PlainDecoder(model), Follower(model)
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": new, "eos_token_id": eos}
    assert torch.equal(generate(decoder, prompts(), **settings), generate(plain, prompts(), **settings))
    assert blocks(decoder) == (new - 1) // 8 if eos is None else blocks(decoder) <= (new - 1) // 8
    if eos is None:
        assert decoder.lengths.tolist() == plain.lengths.tolist()  # nothing is made beyond what was asked for


ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "sampled": {"do_sample": True, "seed": 3},
    "penalty": {"repetition_penalty": 1.3},
    "least tokens": {"min_new_tokens": 3, "eos_token_id": 7},
    "processor": {"logits_processor": [lambda ids, scores: scores]},
    "criterion": {"stopping_criteria": [lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool)]},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
    "logits": {"output_logits": True, "return_dict_in_generate": True},
    "drafts": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("settings", ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_what_is_asked_between_tokens_is_asked(model: LlamaForCausalLM, settings: dict[str, Any]) -> None:
    plain, decoder = PlainDecoder(model), Follower(model)
    found, wanted = (generate(x, prompts(), max_new_tokens=20, **settings) for x in (decoder, plain))
    if not isinstance(found, Tensor):
        found, wanted = found.sequences, wanted.sequences
    assert torch.equal(found, wanted) and not blocks(decoder)


def test_who_streams_gets_each_token_when_it_is_made(model: LlamaForCausalLM) -> None:
    decoder = Follower(model)
    streamer = Streamer()
    whole = generate(decoder, prompts()[:1], max_new_tokens=20, streamer=streamer)
    assert [len(x) for x in streamer.seen[1:]] == [1] * 20
    assert torch.equal(torch.stack(list(stream(decoder, prompts()[:1], max_new_tokens=20)), 1), whole[:, 6:])
    assert not blocks(decoder)


@pytest.mark.parametrize("eos", [None, STOPS], ids=str)
def test_turns_go_on_from_what_is_held(model: LlamaForCausalLM, eos: list[int] | None) -> None:
    """Tokens behind an end are taken back, of a ring too."""
    made = []
    for decoder in (PlainDecoder(model, ring=True), Follower(model, ring=True)):
        talk = Conversation(Memory(decoder), {"eos_token_id": eos})
        for seed in range(3):
            fresh = torch.randint(3, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(seed))
            talk.generate(fresh, max_new_tokens=12)
        made.append(talk.tokens)
    assert torch.equal(*made) and blocks(decoder)


def test_a_ring_has_room_for_what_is_written_ahead() -> None:
    """What the last of several steps has written is not seen by the first, when they are made again."""
    assert AT_ONCE - 1 <= SPARE


@pytest.mark.parametrize("written_ahead", [False, True])
@pytest.mark.parametrize("family", ["llama-3.2", "mistral"])
def test_a_compiled_decoder_follows(family: str, written_ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a ring, and where the cache grows; then it goes on as if it had taken one by one.

    Also where steps are made twice first and taken back, as they are before a graph is captured of them.
    """
    if written_ahead:
        monkeypatch.setattr(Step, "_chain", twice_before(Step._chain))
    llm = compile_model(tiny(family), max_tokens=96, options=Options(max_batch=3, verify=False))
    ids, found = prompts()[:2] % 50, []
    for at_once in (1, AT_ONCE):
        llm.decoder.at_once = at_once
        seen = [llm.generate(ids, max_new_tokens=n, eos_token_id=None) for n in (9, 40)]
        logits = llm.decoder.decode(seen[-1][:, -1])
        found.append((*seen, logits, llm.decoder.lengths, llm.decoder.best))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
