"""Each way of choosing a token, against transformers' own logits processors."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trilithon.errors import InputError
from trilithon.runtime.sampling import Sampling, SeenTokens, next_tokens, process_logits

ROWS, VOCABULARY = 3, 97
PAD = torch.tensor([0, 2, 5])

CASES = {
    "greedy": Sampling(),
    "penalty": Sampling(repetition_penalty=1.3),
    "reward": Sampling(repetition_penalty=0.7),
    "defaults": Sampling(do_sample=True),
    "temperature": Sampling(do_sample=True, temperature=0.6, top_k=0),
    "top_k": Sampling(do_sample=True, top_k=7),
    "top_k_above_vocabulary": Sampling(do_sample=True, top_k=1000),
    "top_p": Sampling(do_sample=True, top_k=0, top_p=0.8),
    "top_p_zero": Sampling(do_sample=True, top_k=0, top_p=0.0),
    "all": Sampling(do_sample=True, temperature=1.7, top_k=20, top_p=0.7, repetition_penalty=1.2),
}


def hugging_face(ids: torch.Tensor, logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty, prompt_ignore_length=PAD))
    if sampling.do_sample:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            chain.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            chain.append(TopPLogitsWarper(sampling.top_p))
    return chain(ids, logits.float())


def random_logits_and_ids(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, VOCABULARY, generator=source).mul(3).to(dtype)
    return logits, torch.randint(0, VOCABULARY, (ROWS, 12), generator=source)


def seen_of(ids: torch.Tensor) -> SeenTokens:
    seen = SeenTokens(ROWS, VOCABULARY, torch.device("cpu"))
    seen.add(ids, valid=torch.arange(ids.shape[1]) >= PAD[:, None])
    return seen


@pytest.mark.parametrize("sampling", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_distribution_is_hugging_faces(sampling: Sampling, dtype: torch.dtype) -> None:
    for seed in range(5):
        logits, ids = random_logits_and_ids(seed, dtype)
        before = logits.clone()
        ours = process_logits(logits, sampling, seen_of(ids).mask)
        theirs = hugging_face(ids, logits, sampling)
        assert torch.equal(logits, before)
        assert torch.equal(ours.isinf(), theirs.isinf())
        torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=1e-6, rtol=0)


def test_ties_at_the_border_are_kept_as_hugging_face_keeps_them() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    ids = torch.zeros(1, 1, dtype=torch.int64)
    ours = process_logits(logits, Sampling(do_sample=True, top_k=2))
    assert torch.equal(ours, TopKLogitsWarper(2)(ids, logits))
    assert int(ours.isfinite().sum()) == 3


@pytest.mark.parametrize("seed", range(4))
def test_draw_is_multinomials(seed: int) -> None:
    logits, _ = random_logits_and_ids(seed)
    sampling = Sampling(do_sample=True)
    probabilities = process_logits(logits, sampling).softmax(-1)
    expected = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    drawn = next_tokens(logits, sampling, generator=torch.Generator().manual_seed(seed))
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, expected)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    drawn = next_tokens(logits, Sampling(do_sample=True), generator=torch.Generator().manual_seed(0))
    frequency = drawn.bincount(minlength=4) / len(drawn)
    # Four standard deviations of a frequency of one half over 20 000 draws.
    torch.testing.assert_close(frequency, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=4 * 0.5 / 20_000**0.5, rtol=0)


def test_ids_beyond_the_logits_and_padding_do_not_count_as_seen() -> None:
    seen = SeenTokens(2, 4, torch.device("cpu"))
    seen.add(torch.tensor([[0, 9, 0], [0, 1, 3]]), valid=torch.tensor([[True, True, False], [False, True, True]]))
    assert seen.mask.tolist() == [[True, False, False, False], [False, True, False, True]]


REFUSALS = {
    "temperature": (0.0, "temperature=0.0", "do_sample=False takes the most likely token"),
    "top_k": (-1, "top_k=-1", "0 keeps all of them"),
    "top_p": (1.5, "top_p=1.5", "between 0 and 1"),
    "repetition_penalty": (-2.0, "repetition_penalty=-2.0", "a number above 0"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_value_out_of_range_is_refused(name: str) -> None:
    value, what, todo = REFUSALS[name]
    with pytest.raises(InputError) as caught:
        Sampling(do_sample=True, **{name: value})
    assert what in caught.value.what and todo in caught.value.todo and "outside its range" in caught.value.why


def test_settings_without_effect_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"temperature=0.5, top_k=3 has no effect with do_sample=False"):
        Sampling(temperature=0.5, top_k=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampling(repetition_penalty=1.2)
