"""Each refusal of `generate`: what, why and what to do are in the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trilithon.errors import CapacityExceeded, InputError, TrilithonError
from trilithon.runtime.generate import generate
from trilithon.runtime.request import make_request

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(x) for x in row] for row in rows])


# name: (arguments, kind of error, parts of its text in order)
REFUSALS: dict[str, tuple[dict[str, Any], type[TrilithonError], list[str]]] = {
    "no_tensor": ({"input_ids": [[1, 2]]}, InputError, ["must be a tensor [b s]", "got list", "return_tensors='pt'"]),
    "float_ids": (
        {"input_ids": IDS.float()},
        InputError,
        ["must hold integers, got torch.float32 [2, 3]", "embedding table", "input_ids.long()"],
    ),
    "bool_ids": ({"input_ids": IDS > 5}, InputError, ["must hold integers, got torch.bool"]),
    "one_axis": ({"input_ids": IDS[0]}, InputError, ["must be [b s]", "got [3]", "input_ids[None]"]),
    "three_axes": ({"input_ids": IDS[None]}, InputError, ["must be [b s]", "got [1, 2, 3]", "one row of ids a prompt"]),
    "empty_prompt": ({"input_ids": IDS[:, :0]}, InputError, ["input_ids is empty: [2, 0]", "last prompt token", "bos"]),
    "no_rows": ({"input_ids": IDS[:0]}, InputError, ["input_ids is empty: [0, 3]"]),
    "other_device": (
        {"input_ids": IDS.to("meta")},
        InputError,
        ["is on meta, but the model was compiled for cpu", "input_ids.to('cpu')"],
    ),
    "negative_id": ({"input_ids": IDS - 100}, InputError, ["input_ids holds -95", "attention_mask"]),
    "mask_shape": (
        {"attention_mask": mask("11", "11")},
        InputError,
        ["attention_mask must be [b s] = [2, 3]", "got [2, 2]", "tokenizer returned"],
    ),
    "mask_of_four_axes": ({"attention_mask": torch.ones(2, 1, 3, 3)}, InputError, ["got [2, 1, 3, 3]"]),
    "additive_mask": ({"attention_mask": mask("111", "111") * -1e4}, InputError, ["only 0 (padding) and 1", "additive"]),
    "segment_mask": ({"attention_mask": mask("112", "111")}, InputError, ["values up to 2", "segment numbers"]),
    "hole": (
        {"attention_mask": mask("101", "111")},
        InputError,
        ["row 0 of attention_mask has padding between tokens: it reads 1 0 1", "without gaps"],
    ),
    "row_of_padding": (
        {"attention_mask": mask("111", "000")},
        InputError,
        ["row 1 of attention_mask is all padding", "no token at all", "leave the row out"],
    ),
    "inferred_hole": (
        {"pad_token_id": 9},
        InputError,
        ["row 1 of the mask read off input_ids where pad_token_id=9", "reads 1 0 1", "or pass attention_mask yourself"],
    ),
    "no_new_tokens": ({"max_new_tokens": 0}, InputError, ["max_new_tokens must be", "got 0", "pass at least 1"]),
    "part_of_a_token": ({"max_new_tokens": 1.5}, InputError, ["whole number of tokens", "got 1.5"]),
    "max_length_within_prompt": (
        {"max_length": 3},
        InputError,
        ["max_length=3 leaves no room", "prompt too, which has 3 tokens", "max_length=4 or more", "max_new_tokens=1"],
    ),
    "too_many_tokens": (
        {"max_new_tokens": 14},
        CapacityExceeded,
        ["3 prompt tokens and 14 new ones", "1 tokens too many", "16 tokens a row", "max_new_tokens=13", "max_tokens=17"],
    ),
    "too_long_in_all": ({"max_length": 17}, CapacityExceeded, ["14 new ones", "max_new_tokens=13 or fewer"]),
    "prompt_fills_the_cache": (
        {"input_ids": IDS.repeat(1, 6)},
        CapacityExceeded,
        ["18 prompt tokens and 1 new ones", "3 tokens too many", "shorten the prompt to 15", "max_tokens=19"],
    ),
    "cold": ({"do_sample": True, "temperature": 0.0}, InputError, ["temperature=0.0", "do_sample=False"]),
    "greedy_copies": (
        {"num_return_sequences": 2},
        InputError,
        ["num_return_sequences=2", "all of them would be equal", "do_sample=True"],
    ),
    "no_copies": ({"num_return_sequences": 0}, InputError, ["num_return_sequences=0", "nothing to return"]),
    "seed_and_generator": (
        {"seed": 0, "generator": torch.Generator()},
        InputError,
        ["both seed=0 and generator", "pass one of them"],
    ),
    "misspelt": (
        {"max_new_token": 4},
        InputError,
        ["generate has no argument max_new_token (got max_new_token=4)", "none is ignored", "did you mean max_new_tokens?"],
    ),
    "foreign": ({"num_beams": 4}, InputError, ["generate has no argument num_beams", "attention_mask, max_new_tokens"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str) -> None:
    arguments, kind, parts = REFUSALS[name]
    with pytest.raises(TrilithonError) as caught:
        make_request(16, CPU, **{"input_ids": IDS, **arguments})
    assert type(caught.value) is kind
    text = str(caught.value)
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), text
    assert caught.value.todo, "every refusal says what to do"


def test_left_padding_is_counted_and_repeated() -> None:
    request = make_request(16, CPU, IDS, attention_mask=mask("011", "001"), do_sample=True, num_return_sequences=2)
    assert request.pad.tolist() == [1, 1, 2, 2]
    assert request.input_ids.tolist() == [[5, 6, 7], [5, 6, 7], [8, 9, 10], [8, 9, 10]]


def test_bool_and_float_masks_of_zeros_and_ones_are_taken() -> None:
    for dtype in (torch.bool, torch.float32):
        assert make_request(16, CPU, IDS, attention_mask=mask("011", "111").to(dtype)).pad.tolist() == [1, 0]


def test_none_switches_a_setting_off() -> None:
    sampling = make_request(
        16, CPU, IDS, do_sample=True, temperature=None, top_k=None, top_p=None, repetition_penalty=None
    ).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty) == (1.0, 0, 1.0, 1.0)


def test_max_new_tokens_wins_over_max_length() -> None:
    assert make_request(16, CPU, IDS, max_new_tokens=2, max_length=12).new_tokens == 2


class NeverCalled:
    cache_tokens = 16
    device = CPU

    def prefill(self, input_ids: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a refused call must not reach the model")

    decode = prefill


def test_streamer_of_several_rows_is_refused() -> None:
    class Silent:
        def put(self, value: torch.Tensor, /) -> None: ...

        def end(self) -> None: ...

    with pytest.raises(InputError, match=r"a streamer takes one row, got 2(.|\n)*stream\(\.\.\.\)"):
        generate(NeverCalled(), IDS, streamer=Silent())
