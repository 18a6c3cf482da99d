"""The token loop against transformers' own `generate`, token by token, over a decoder without tricks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, TextStreamer

from runtime.cycle_decoder import CycleDecoder
from runtime.plain_decoder import PlainDecoder
from runtime.tiny_llama import VOCABULARY, tiny_llama
from trilithon.errors import InputError
from trilithon.runtime.generate import generate, stream


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A step of so small a model takes microseconds; waking a second thread that is busy elsewhere takes milliseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def eos_that_stops_rows_apart(decoder: PlainDecoder, batch: dict[str, Tensor]) -> list[int]:
    """A token from the middle of each row, so that the rows finish in different steps."""
    free = generate(decoder, **batch, max_new_tokens=24)[:, 9:]
    return [int(free[0, 3]), int(free[1, 10]), int(free[2, 17])]


REQUESTS: dict[str, dict[str, Any]] = {
    "default_is_20_tokens": {},
    "one_token": {"max_new_tokens": 1},
    "greedy": {"max_new_tokens": 25},
    "max_length": {"max_length": 30},
    "repetition_penalty": {"max_new_tokens": 25, "repetition_penalty": 1.4},
    "sample": {"max_new_tokens": 25, "do_sample": True},
    "sample_all": {
        "max_new_tokens": 25,
        "do_sample": True,
        "temperature": 1.3,
        "top_k": 12,
        "top_p": 0.85,
        "repetition_penalty": 1.1,
    },
}


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("padded", [False, True], ids=["one_row", "padded_batch"])
def test_tokens_are_hugging_faces(
    model: LlamaForCausalLM, decoder: PlainDecoder, request_: dict[str, Any], padded: bool
) -> None:
    batch = padded_batch() if padded else {"input_ids": prompts(1, 7)}
    torch.manual_seed(7)
    theirs = model.generate(**batch, **request_, pad_token_id=0)
    torch.manual_seed(7)
    ours = generate(decoder, **batch, **request_, pad_token_id=0)
    assert ours.dtype == torch.int64
    assert torch.equal(ours, theirs)
    assert decoder.steps == ours.shape[1] - batch["input_ids"].shape[1]


def test_attention_mask_is_read_off_the_pad_token_as_hugging_face_does(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    ids = padded_batch()["input_ids"]
    theirs = model.generate(ids, max_new_tokens=10, pad_token_id=0)
    assert torch.equal(generate(decoder, ids, max_new_tokens=10, pad_token_id=0), theirs)
    assert not torch.equal(generate(decoder, ids, max_new_tokens=10), theirs)


def test_pad_token_that_is_eos_too_is_no_padding_in_a_prompt(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    ids = torch.tensor([[5, 7, 5, 9]])
    theirs = model.generate(ids, max_new_tokens=10, pad_token_id=5, eos_token_id=5)
    assert torch.equal(generate(decoder, ids, max_new_tokens=10, pad_token_id=5, eos_token_id=5), theirs)


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="it penalises padding as if it were text")
def test_padding_is_not_penalised_as_a_repetition(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    batch = padded_batch()
    chosen = generate(decoder, **batch, max_new_tokens=1)[:, -1:]
    batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], chosen)
    theirs = model.generate(**batch, max_new_tokens=10, repetition_penalty=5.0, pad_token_id=0)
    assert torch.equal(generate(decoder, **batch, max_new_tokens=10, repetition_penalty=5.0), theirs)


@pytest.mark.parametrize("pad_token_id", [None, 0])
def test_finished_rows_are_filled_and_the_batch_stops_early(
    model: LlamaForCausalLM, decoder: PlainDecoder, pad_token_id: int | None
) -> None:
    batch = padded_batch()
    eos = eos_that_stops_rows_apart(decoder, batch)
    theirs = model.generate(**batch, max_new_tokens=40, eos_token_id=eos, pad_token_id=pad_token_id)
    ours = generate(decoder, **batch, max_new_tokens=40, eos_token_id=eos, pad_token_id=pad_token_id)
    assert torch.equal(ours, theirs)
    new = ours.shape[1] - 9
    assert 3 < new < 40, "the rows must finish, and not all at once"
    assert bool((ours[:, -1] == (eos[0] if pad_token_id is None else pad_token_id)).any()), "a row must have been filled"


@pytest.mark.parametrize("step", range(1, 20))
def test_checking_eos_seldom_returns_what_checking_each_step_returns(
    model: LlamaForCausalLM, decoder: PlainDecoder, step: int
) -> None:
    ids = prompts(1, 4, seed=3)
    eos = int(generate(decoder, ids, max_new_tokens=20)[0, 3 + step])
    theirs = model.generate(ids, max_new_tokens=20, eos_token_id=eos, pad_token_id=0)
    decoder.calls.clear()
    assert torch.equal(generate(decoder, ids, max_new_tokens=20, eos_token_id=eos, pad_token_id=0), theirs)
    assert decoder.steps < theirs.shape[1] - 4 + 9
    joined = torch.stack(list(stream(decoder, ids, max_new_tokens=20, eos_token_id=eos, pad_token_id=0)), 1)
    assert torch.equal(joined, theirs[:, 4:])


def test_sampling_repeats_with_a_seed_and_returns_several_sequences(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    batch = padded_batch()
    torch.manual_seed(11)
    theirs = model.generate(**batch, max_new_tokens=8, do_sample=True, num_return_sequences=3, pad_token_id=0)
    ours = generate(decoder, **batch, max_new_tokens=8, do_sample=True, num_return_sequences=3, seed=11)
    again = generate(
        decoder,
        **batch,
        max_new_tokens=8,
        do_sample=True,
        num_return_sequences=3,
        generator=torch.Generator().manual_seed(11),
    )
    other = generate(decoder, **batch, max_new_tokens=8, do_sample=True, num_return_sequences=3, seed=12)
    assert torch.equal(ours, theirs) and torch.equal(ours, again) and not torch.equal(ours, other)


def test_integer_ids_of_any_width_are_taken(decoder: PlainDecoder) -> None:
    ids = prompts(1, 5)
    wide = generate(decoder, ids, max_new_tokens=3)
    assert torch.equal(generate(decoder, ids.to(torch.int32), max_new_tokens=3), wide)


class HostReads(TorchDispatchMode):
    """Counts the reads of a tensor's value on the host: on a GPU each waits for everything queued before it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


class SaysMore(CycleDecoder):
    """Its best token is another than its logits say."""

    def extend(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        logits = super().extend(tokens, counts)
        self.best = (tokens + 2) % len(self.vocabulary)
        return logits


@pytest.mark.parametrize(
    ("settings", "step"), [({}, 2), ({"prompt_lookup_num_tokens": 3}, 2), ({"repetition_penalty": 1.1}, 1)]
)
def test_greedy_tokens_are_those_that_the_decoder_names(settings: dict[str, Any], step: int) -> None:
    """Logits are looked at only where they are changed."""
    got = generate(SaysMore(VOCABULARY), torch.tensor([[3]]), max_new_tokens=5, **settings)
    assert got.tolist() == [[3 + step * i for i in range(6)]]


@pytest.mark.parametrize("request_", [{}, {"repetition_penalty": 1.1}, {"do_sample": True, "top_p": 0.9}], ids=str)
def test_host_reads_no_value_in_the_loop_without_eos(request_: dict[str, Any]) -> None:
    counts = []
    for new in (1, 30):
        with HostReads() as reads:
            generate(CycleDecoder(VOCABULARY), prompts(2, 5), max_new_tokens=new, **request_)
        counts.append(reads.count)
    assert counts[0] == counts[1], "a read for each token"


def test_host_reads_a_flag_every_eighth_step_with_eos() -> None:
    counts = []
    for new in (7, 8, 31):
        with HostReads() as reads:
            generate(CycleDecoder(VOCABULARY), torch.tensor([[3]]), max_new_tokens=new, eos_token_id=60)
        counts.append(reads.count)
    assert [count - counts[0] for count in counts] == [0, 1, 3]


class Recorder:
    def __init__(self) -> None:
        self.got: list[list[Any]] = []
        self.ended = False

    def put(self, value: Tensor, /) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.ended = True


def test_streamer_gets_what_hugging_face_gives_it(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    ids = prompts(1, 4, seed=3)
    eos = int(generate(decoder, ids, max_new_tokens=20)[0, 3 + 10])
    ours, theirs = Recorder(), Recorder()
    generate(decoder, ids, max_new_tokens=20, eos_token_id=eos, streamer=ours)
    model.generate(ids, max_new_tokens=20, eos_token_id=eos, pad_token_id=eos, streamer=theirs)
    assert ours.got == theirs.got and ours.ended and theirs.ended


def test_text_streamer_of_transformers_works(decoder: PlainDecoder, capsys: pytest.CaptureFixture[str]) -> None:
    class Numbers:
        def decode(self, tokens: list[int]) -> str:
            return " ".join(str(t) for t in tokens)

    ids = prompts(1, 4)
    out = generate(decoder, ids, max_new_tokens=5, streamer=TextStreamer(Numbers()))
    assert capsys.readouterr().out.split() == [str(t) for t in out[0].tolist()]


def test_stream_checks_its_arguments_at_the_call(decoder: PlainDecoder) -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        stream(decoder, prompts(1, 4), max_new_tokens=0)


def test_stream_yields_each_step_of_a_batch(decoder: PlainDecoder) -> None:
    batch = padded_batch()
    steps = list(stream(decoder, **batch, max_new_tokens=6))
    assert torch.equal(torch.stack(steps, 1), generate(decoder, **batch, max_new_tokens=6)[:, 9:])


def test_default_length_is_cut_to_the_cache(model: LlamaForCausalLM) -> None:
    assert generate(PlainDecoder(model, cache_tokens=12), prompts(1, 5)).shape == (1, 12)
