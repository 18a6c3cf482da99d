"""A worker gives each line the tokens that `generate` gives for it alone, whatever its other rows do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import trilithon
from batch_runs.lines import ARGUMENTS, ROWS, TOKENS, some_lines
from trilithon import InputError
from trilithon.batch.jobs import Answer, Job, Refusal, Result
from trilithon.batch.load import Setup
from trilithon.batch.local import LocalEngine
from trilithon.batch.worker import Row, seed_of
from trilithon.errors import CapacityExceeded
from trilithon.runtime.slots import Slots

TOKENIZER = trilithon.load_tokenizer("byte-llama")
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "min_new_tokens": 2}


def jobs_of(lines: list[dict[str, Any]]) -> list[Job]:
    return [
        Job(n, x["id"], x.get("prompt") or tuple(x["input_ids"]), x.get("max_new_tokens")) for n, x in enumerate(lines, start=1)
    ]


def answers(llm: Any, setup: Setup, jobs: list[Job]) -> dict[Any, Result]:
    engine = LocalEngine(lambda: setup.worker(llm, TOKENIZER))
    results = [result for ended in engine.answers(iter(jobs)) for result in ended]
    assert sorted(result.line for result in results) == [job.line for job in jobs]
    return {result.id: result for result in results}


def alone(llm: Any, setup: Setup, job: Job) -> tuple[int, ...]:
    """The new tokens of a line that `generate` gives."""
    ids = list(TOKENIZER(job.prompt).input_ids) if isinstance(job.prompt, str) else list(job.prompt)
    arguments: dict[str, Any] = {**setup.arguments, "seed": seed_of(setup.seed, job.id)}
    if job.max_new_tokens is not None:
        arguments["max_new_tokens"] = job.max_new_tokens
    if setup.stop:
        arguments |= {"stop_strings": list(setup.stop), "tokenizer": TOKENIZER}
    ones = torch.ones(1, len(ids), dtype=torch.int64)
    return tuple(llm.generate(torch.tensor([ids]), attention_mask=ones, **arguments)[0, len(ids) :].tolist())


@pytest.mark.parametrize(
    "setup",
    [
        Setup(ARGUMENTS),
        Setup(ARGUMENTS | {"eos_token_id": [5, 200, 131]}, stop=("e", "zz")),
        Setup(ARGUMENTS | SAMPLED, seed=7),
    ],
    ids=["greedy", "stops", "sampled"],
)
def test_each_line_has_the_tokens_it_has_alone(llm, setup):
    jobs = jobs_of(some_lines(24))
    wanted = {job.id: alone(llm, setup, job) for job in jobs}
    for rows in (1, 3, None):
        check_answers(answers(llm, replace(setup, rows=rows), jobs), jobs, setup, wanted)


def check_answers(found: dict[Any, Result], jobs: list[Job], setup: Setup, wanted: dict[Any, tuple[int, ...]]) -> None:
    for job in jobs:
        got = found[job.id]
        assert isinstance(got, Answer) and got.tokens == wanted[job.id]
        assert got.text == TOKENIZER.decode(list(got.tokens), skip_special_tokens=True)
        asked = job.max_new_tokens or setup.arguments["max_new_tokens"]
        assert len(got.tokens) <= asked and (got.finish == "stop" or len(got.tokens) == asked)
    if setup.stop:
        assert {x.finish for x in found.values()} == {"stop", "length"}


def test_a_line_that_ends_makes_room_at_once(llm):
    """While one line makes 60 tokens, a single other row answers 20 of 3."""
    long, short = Job(1, "long", (97, 98), 60), [Job(n, n, (97 + n,), 3) for n in range(2, 22)]
    setup = Setup({**ARGUMENTS, "eos_token_id": None}, rows=2)
    ended = [result for step in LocalEngine(lambda: setup.worker(llm, None)).answers(iter([long, *short])) for result in step]
    assert [result.line for result in ended] == [*range(2, 22), 1]
    worker = setup.worker(llm, None)
    worker.add(long)
    worker.add(short[0])
    steps = 0
    waiting = short[1:]
    while worker.is_busy:
        worker.step()
        steps += 1
        if worker.free and waiting:
            worker.add(waiting.pop(0))
    assert steps == 59 and not waiting, "no step was made for the short lines alone"


def test_what_a_line_draws_depends_on_its_id_and_the_seed(llm):
    lines = [Job(1, "a", (97,)), Job(2, "b", (97,)), Job(3, "c", (98,))]
    setup = Setup({**ARGUMENTS, "do_sample": True, "eos_token_id": None})
    first = answers(llm, setup, lines)
    assert first["a"].tokens != first["b"].tokens
    assert answers(llm, setup, [Job(1, "b", (97,))])["b"].tokens == first["b"].tokens
    assert answers(llm, Setup(setup.arguments, seed=1), lines)["a"].tokens != first["a"].tokens


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (Job(1, 1, tuple([97] * TOKENS)), "96 prompt tokens and 12 new ones do not fit: 12 tokens too many"),
        (Job(1, 1, (97,), 10**30), "do not fit"),
        (Job(1, 1, ""), "input_ids is empty"),
        (Job(1, 1, (97, 259)), "its input_ids holds 259: the model has 259 tokens"),
    ],
)
def test_what_a_model_cannot_answer_is_refused(llm, job, reason):
    """The lines beside it are answered."""
    others = [Job(n, n, (97 + n,), n % 2 + 1) for n in range(2, 2 + 2 * ROWS)]
    found = answers(llm, Setup(ARGUMENTS), [job, *others])
    refused = found.pop(1)
    assert isinstance(refused, Refusal) and reason in refused.reason
    assert all(isinstance(x, Answer) for x in found.values())


class Broken:
    """A tokenizer that cannot read one text, and cannot write one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, text: str) -> Any:
        if text == "bad":
            raise KeyError("no such piece")
        return TOKENIZER(text)

    def decode(self, tokens: list[int], **more: Any) -> str:
        if self.token in tokens:
            raise IndexError("piece id is out of range")
        return str(TOKENIZER.decode(tokens, **more))


def test_a_line_that_fails_is_refused_and_the_others_go_on(llm, monkeypatch):
    """Where its prompt is read, where it is taken in, where a token is chosen, and where its text is made."""
    setup = Setup({**ARGUMENTS, "do_sample": True, "eos_token_id": None}, rows=3)
    jobs = [Job(1, 1, "bad"), *(Job(n, n, (97 + n,), 4 + n) for n in range(2, 14))]
    sound = answers(llm, setup, jobs[1:])
    token = sound[5].tokens[-1]
    choose, fill = Row.choose, Slots.fill

    def chosen(row: Row, logits: Any) -> Any:
        if row.job.line == 6 and row.made == 3:
            raise RuntimeError("probability tensor contains inf")
        return choose(row, logits)

    def filled(slots: Slots, row: int, ids: Any) -> Any:
        if ids[0, 0] == 97 + 7:
            raise torch.OutOfMemoryError("too long")
        return fill(slots, row, ids)

    monkeypatch.setattr(Row, "choose", chosen)
    monkeypatch.setattr(Slots, "fill", filled)
    engine = LocalEngine(lambda: setup.worker(llm, Broken(token)))
    found = {result.id: result for ended in engine.answers(iter(jobs)) for result in ended}
    failed = {1: "KeyError: 'no such piece'", 6: "RuntimeError: probability tensor", 7: "OutOfMemoryError: too long"}
    failed |= {n: "IndexError: piece id is out of range" for n in sound.keys() - {6, 7} if token in sound[n].tokens}
    assert 5 in failed and found.keys() == set(range(1, 14)) and len(failed) < 13
    for line, result in found.items():
        if line in failed:
            assert isinstance(result, Refusal) and f"it failed with {failed[line]}" in result.reason
        else:
            assert result.tokens == sound[line].tokens


def test_a_gpu_that_fails_is_no_fault_of_a_line(llm, monkeypatch):
    worker = Setup(ARGUMENTS).worker(llm, None)

    def filled(*given: Any) -> Any:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(Slots, "fill", filled)
    with pytest.raises(torch.AcceleratorError):
        worker.add(Job(1, 1, (97,)))


def test_what_no_line_could_be_answered_with_is_refused_at_once(llm):
    with pytest.raises(InputError, match="stop strings were given without a tokenizer"):
        Setup(ARGUMENTS, stop=("x",)).worker(llm, None)
    with pytest.raises(CapacityExceeded, match="5 rows do not fit a cache of 4"):
        Setup(ARGUMENTS, rows=ROWS + 1).worker(llm, None)
    (refused,) = [
        x for step in LocalEngine(lambda: Setup(ARGUMENTS).worker(llm, None)).answers(iter([Job(1, 1, "a")])) for x in step
    ]
    assert isinstance(refused, Refusal) and "the model has no tokenizer" in refused.reason
