"""Scores, processors, criteria, stop strings and padding at the right, against transformers' own `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList, StopStringCriteria

from runtime.plain_decoder import PlainDecoder
from runtime.tiny_llama import VOCABULARY, tiny_llama
from trilithon.capture.hf import load_tokenizer
from trilithon.errors import InputError
from trilithon.runtime.generate import Generated, generate
from trilithon.runtime.stops import StopStrings


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def decoder(model: LlamaForCausalLM) -> PlainDecoder:
    return PlainDecoder(model)


def prompts(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded_batch() -> dict[str, Tensor]:
    """Three prompts of 9, 5 and 2 tokens, left padded with 0."""
    mask = (torch.arange(9) >= torch.tensor([0, 4, 7])[:, None]).long()
    return {"input_ids": prompts(3, 9, seed=1) * mask, "attention_mask": mask}


def moved_right(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompts, right padded."""
    pads = (1 - batch["attention_mask"]).sum(1).tolist()
    return {name: torch.stack([row.roll(-p) for row, p in zip(x, pads, strict=True)]) for name, x in batch.items()}


def no_odd_tokens(input_ids: Tensor, scores: Tensor) -> Tensor:
    scores = scores.clone()
    scores[:, (int(input_ids.shape[1]) % 2) :: 3] = -torch.inf
    return scores


def seven_more(input_ids: Tensor, scores: Any, **unused: Any) -> Tensor:
    """Rows stop apart: row i after 3 + 2 i tokens."""
    return torch.tensor([input_ids.shape[1] - 9 >= 3 + 2 * i for i in range(len(input_ids))])


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.5},
    "min_p": {"do_sample": True, "min_p": 0.2, "temperature": 0.8},
    "all_of_sampling": {"do_sample": True, "min_p": 0.05, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    "processor": {"logits_processor": [no_odd_tokens]},
    "processor_and_sampling": {"logits_processor": [no_odd_tokens], "do_sample": True, "top_k": 5},
    "eos": {"eos_token_id": [7, 11, 13, 17, 19, 23]},
    "min_new_tokens": {"eos_token_id": [7, 11, 13, 17, 19, 23], "min_new_tokens": 9},
    "criteria": {"stopping_criteria": [seven_more]},
    "criteria_and_eos": {"stopping_criteria": [seven_more], "eos_token_id": 7},
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_scores_and_logits_are_hugging_faces(model: LlamaForCausalLM, decoder: PlainDecoder, request_: dict[str, Any]) -> None:
    # transformers 5.17 penalises padding as if it were text
    batch = {"input_ids": prompts(3, 9)} if "repetition_penalty" in request_ else padded_batch()
    asked = {"max_new_tokens": 14, "output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    lists = {"logits_processor": LogitsProcessorList, "stopping_criteria": StoppingCriteriaList}
    as_hf = {name: lists[name](value) if name in lists else value for name, value in request_.items()}
    torch.manual_seed(3)
    theirs = model.generate(**batch, **asked, **as_hf, pad_token_id=0)
    torch.manual_seed(3)
    ours = generate(decoder, **batch, **asked, **request_, pad_token_id=0)
    assert isinstance(ours, Generated)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.scores is not None and ours.logits is not None
    assert len(ours.scores) == len(theirs.scores) and len(ours.logits) == len(theirs.logits)
    for got, want in ((ours.scores, theirs.scores), (ours.logits, theirs.logits)):
        for mine, their in zip(got, want, strict=True):
            assert mine.dtype == their.dtype and mine.shape == their.shape
            torch.testing.assert_close(mine, their, atol=2e-4, rtol=1e-4)


def test_without_asking_there_are_no_outputs(decoder: PlainDecoder) -> None:
    ours = generate(decoder, prompts(1, 4), max_new_tokens=3, return_dict_in_generate=True)
    assert ours.scores is None and ours.logits is None and ours.drafted == 0
    with pytest.warns(UserWarning, match="output_scores has no effect without return_dict_in_generate"):
        plain = generate(decoder, prompts(1, 4), max_new_tokens=3, output_scores=True)
    assert torch.equal(plain, ours.sequences)


def test_min_new_tokens_does_something(decoder: PlainDecoder) -> None:
    batch, eos = padded_batch(), REQUESTS["eos"]
    short = generate(decoder, **batch, **eos, max_new_tokens=14)
    long = generate(decoder, **batch, **eos, max_new_tokens=14, min_new_tokens=9)
    assert not torch.equal(short[:, : long.shape[1]], long[:, : short.shape[1]])
    assert not bool(torch.isin(long[:, 9:17], torch.tensor(eos["eos_token_id"])).any())
    assert bool(torch.isin(short[:, 9:17], torch.tensor(eos["eos_token_id"])).any())
    with pytest.raises(InputError, match=r"min_new_tokens=15 must be a whole number between 0 and 14(.|\n)*max_new_tokens"):
        generate(decoder, **batch, **eos, max_new_tokens=14, min_new_tokens=15)


def test_what_cannot_be_called_is_refused(decoder: PlainDecoder) -> None:
    with pytest.raises(InputError, match=r"logits_processor holds a int(.|\n)*\(input_ids, scores\) -> scores"):
        generate(decoder, prompts(1, 4), logits_processor=[3])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"stopping_criteria holds a str(.|\n)*\[b\] bool"):
        generate(decoder, prompts(1, 4), stopping_criteria=["stop"])  # type: ignore[list-item]


def test_criteria_of_transformers_work(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    ids = prompts(2, 6)
    stop = StoppingCriteriaList([MaxLengthCriteria(11)])
    theirs = model.generate(ids, max_new_tokens=20, stopping_criteria=stop, pad_token_id=0)
    assert torch.equal(generate(decoder, ids, max_new_tokens=20, stopping_criteria=stop), theirs)
    assert theirs.shape[1] == 11


# ---------------------------------------------------------------- padding at the right


@pytest.mark.parametrize("drafts", [None, 4])
def test_right_padded_prompts_give_what_left_padded_ones_give(decoder: PlainDecoder, drafts: int | None) -> None:
    batch = padded_batch()
    left = generate(decoder, **batch, max_new_tokens=12, prompt_lookup_num_tokens=drafts)
    right = generate(decoder, **moved_right(batch), max_new_tokens=12, prompt_lookup_num_tokens=drafts)
    assert torch.equal(left, right)
    both = {name: torch.stack([x[0], x[1].roll(-2), x[2].roll(-7)]) for name, x in batch.items()}
    assert torch.equal(generate(decoder, **both, max_new_tokens=12), left), "padding to both sides"
    wrong = moved_right(batch) | {"attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    assert not torch.equal(generate(decoder, **wrong, max_new_tokens=12)[:, 9:], left[:, 9:])


def test_right_padding_is_read_off_the_pad_token(decoder: PlainDecoder) -> None:
    batch = padded_batch()
    left = generate(decoder, **batch, max_new_tokens=6)
    assert torch.equal(generate(decoder, moved_right(batch)["input_ids"], max_new_tokens=6, pad_token_id=0), left)


# ---------------------------------------------------------------- stop strings

WORDS = [
    "<pad>",
    "st",
    "op",
    "stop",
    "to",
    "s",
    "pped",
    "opera",
    "las",
    "topper",
    "xstopx",
    "a",
    "b",
    "\n",
    "aa",
    " the",
    "c",
    "d",
    "e",
    "f",
]


class WordTokenizer:
    """Token i is WORDS[i]; enough of a tokenizer for `StopStringCriteria` too."""

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(WORDS)}

    def __len__(self) -> int:
        return len(WORDS)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def _convert_id_to_token(self, token: int) -> str:
        return WORDS[token]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [WORDS[i] for i in ids]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [WORDS.index(c) for c in text if c in WORDS]}

    def decode(self, token_ids: Any, **unused: bool) -> str:
        return "".join(WORDS[i] for i in token_ids)


STOPS = [["stop"], ["aa"], ["sto", "ab"], ["the", "\n"], ["a"], ["stops"]]


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_stop_strings_match_where_hugging_face_matches(stops: list[str]) -> None:
    tokenizer = WordTokenizer()
    rows = torch.randint(1, len(WORDS), (400, 9), generator=torch.Generator().manual_seed(0))
    theirs = StopStringCriteria(tokenizer, stops)(rows, None)
    ours = [StopStrings(tuple(stops), tokenizer).completed_by_last(row) for row in rows.tolist()]
    assert ours == theirs.tolist()
    assert 0 < sum(ours) < 400


def test_stop_strings_match_where_hugging_face_matches_with_a_tokenizer_of_its_own() -> None:
    tokenizer, stops = load_tokenizer("byte-llama"), ["the", "ab", "\n"]
    assert tokenizer is not None
    ids = torch.tensor(tokenizer("and then a line\nof the abbot").input_ids)
    rows = [ids[:n] for n in range(3, len(ids) + 1)]
    theirs = [bool(StopStringCriteria(tokenizer, stops)(row[None], None)) for row in rows]
    assert [StopStrings(tuple(stops), tokenizer).completed_by_last(row.tolist()) for row in rows] == theirs
    assert sum(theirs) == 4


class ByteTokenizer:
    def decode(self, token_ids: Any, **unused: bool) -> str:
        return bytes(token_ids).decode(errors="replace")


def test_stop_strings_of_several_bytes_a_character() -> None:
    stops = StopStrings(("né",), ByteTokenizer())
    text = list("un né ".encode())
    assert [stops.completed_by_last(text[:n]) for n in range(1, 8)] == [False] * 5 + [True, False]


@pytest.mark.parametrize("eos", [None, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_stop_at_strings_as_in_hugging_face(rows: int, eos: int | None) -> None:
    model, tokenizer = tiny_llama(seed=4, vocab_size=len(WORDS)), WordTokenizer()
    ids = torch.randint(1, len(WORDS), (rows, 4), generator=torch.Generator().manual_seed(2))
    free = generate(PlainDecoder(model), ids, max_new_tokens=20)
    text = [tokenizer.decode(row[4 + 3 * i : 6 + 3 * i].tolist())[1:] or "a" for i, row in enumerate(free)]
    asked = {"max_new_tokens": 20, "stop_strings": text, "eos_token_id": eos, "pad_token_id": 0}
    theirs = model.generate(ids, **asked, tokenizer=tokenizer)
    assert torch.equal(generate(PlainDecoder(model), ids, **asked, tokenizer=tokenizer), theirs)
    assert theirs.shape[1] < 24
    if eos is not None or rows == 1:
        drafted = generate(PlainDecoder(model), ids, **asked, tokenizer=tokenizer, prompt_lookup_num_tokens=5)
        assert torch.equal(drafted, theirs)


def test_stop_strings_are_checked(decoder: PlainDecoder) -> None:
    with pytest.raises(InputError, match=r"stop_strings was given without tokenizer(.|\n)*tokenizer="):
        generate(decoder, prompts(1, 4), stop_strings="stop")
    with pytest.raises(InputError, match=r"stop_strings holds ''(.|\n)*at once"):
        generate(decoder, prompts(1, 4), stop_strings=["a", ""], tokenizer=WordTokenizer())
