"""`model.generate` of an accelerated model against the same call of a model left alone."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

from runtime.plain_decoder import PlainDecoder
from runtime.tiny_llama import VOCABULARY, tiny_llama, tiny_parrot
from trilithon.errors import CapacityExceeded, InputError
from trilithon.integrations.compiled_cache import CompiledCache
from trilithon.integrations.transformers import Accelerated, accelerate
from trilithon.runtime.memory import Memory

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")

THEIRS = tiny_parrot()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_parrot()


def attach(model: nn.Module, **settings: Any) -> PlainDecoder:
    """Accelerate with a decoder without tricks."""
    decoder = PlainDecoder(model, **settings)
    Accelerated(model, Memory(decoder))
    return decoder


@pytest.fixture
def decoder(model: LlamaForCausalLM) -> PlainDecoder:
    return attach(model, ring=True)


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without the compiled programs")
        yield


def prompts(rows: int, tokens: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded_batch() -> dict[str, Tensor]:
    mask = (torch.arange(9) >= torch.tensor([0, 4, 7])[:, None]).long()
    return {"input_ids": prompts(3, 9, seed=1) * mask, "attention_mask": mask}


def both(model: nn.Module, **arguments: Any) -> tuple[Any, Any]:
    """What the accelerated model gives, and what one that was left alone gives, from the same randomness."""
    torch.manual_seed(5)
    ours = model.generate(**arguments, pad_token_id=0)  # type: ignore[operator]
    torch.manual_seed(5)
    return ours, THEIRS.generate(**arguments, pad_token_id=0)


class After:
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.tokens)


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.2, "top_k": 9, "top_p": 0.9, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True, "eos_token_id": [7, 11]},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "eos": {"eos_token_id": [7, 11, 13, 17]},
    "penalty": {"repetition_penalty": 1.3},
    "processor": {"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])},
    "criteria": {"stopping_criteria": StoppingCriteriaList([After(13)])},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("padded", [False, True], ids=["one_row", "padded_batch"])
def test_tokens_are_those_of_the_model_left_alone(
    model: LlamaForCausalLM, decoder: PlainDecoder, call: dict[str, Any], padded: bool
) -> None:
    batch = padded_batch() if padded else {"input_ids": prompts(1)}
    ours, theirs = both(model, **batch, **call, max_new_tokens=12)
    assert torch.equal(ours, theirs)
    assert decoder.calls[0][0] == "prefill", "the compiled programs ran"


def test_a_prompt_in_chunks(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    ours, theirs = both(model, input_ids=prompts(2), prefill_chunk_size=4, max_new_tokens=5)
    assert torch.equal(ours, theirs) and decoder.calls[:2] == [("prefill", 4), ("extend", 3)]


def test_scores_logits_and_dict(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ours, theirs = both(model, **padded_batch(), **asked, max_new_tokens=6)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-4, rtol=1e-4)
    assert isinstance(ours.past_key_values, CompiledCache)
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()


@pytest.mark.parametrize("drafts", [3, 10, 25])
def test_prompt_lookup(model: LlamaForCausalLM, decoder: PlainDecoder, drafts: int) -> None:
    ids = THEIRS.generate(prompts(1), max_new_tokens=24, pad_token_id=0)
    ours, theirs = both(model, input_ids=ids, prompt_lookup_num_tokens=drafts, max_new_tokens=20)
    assert torch.equal(ours, theirs)
    names = [name for name, _ in decoder.calls]
    assert "extend" in names and "rewind" in names
    assert decoder.steps < 20 or drafts == 25  # a ring cannot take back 25 tokens: then they are taken in again


def test_an_assistant(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    ours, theirs = both(model, input_ids=prompts(1), assistant_model=copy.deepcopy(THEIRS), max_new_tokens=12)
    assert torch.equal(ours, theirs)
    assert decoder.steps < 12


def test_streamer(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    got: list[list[int]] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            got.append(value.flatten().tolist())

        def end(self) -> None: ...

    out = model.generate(prompts(1), max_new_tokens=4, streamer=Streamer(), pad_token_id=0)
    assert [token for tokens in got for token in tokens] == out[0].tolist() and len(got) == 5


def test_a_window_model_with_rings() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "initializer_range": 0.6}
    theirs = MistralForCausalLM(MistralConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None)).eval()
    ours = copy.deepcopy(theirs)
    attach(ours, ring=True)
    for call in ({}, {"num_beams": 3}):
        arguments = {**padded_batch(), **call, "max_new_tokens": 14, "pad_token_id": 0}
        assert torch.equal(ours.generate(**arguments), theirs.generate(**arguments))


# ---------------------------------------------------------------- what stays as it was


def test_plain_calls_are_unchanged(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    ids = prompts(2)
    theirs, ours = THEIRS(ids, output_hidden_states=True), model(ids, output_hidden_states=True)
    assert torch.equal(ours.logits, theirs.logits) and len(ours.hidden_states) == 3
    assert isinstance(ours.past_key_values, DynamicCache)
    more = model(ids[:, :1], past_key_values=ours.past_key_values)
    assert torch.equal(more.logits, THEIRS(ids[:, :1], past_key_values=theirs.past_key_values).logits)
    ours, theirs = both(model, input_ids=ids, use_cache=False, max_new_tokens=5)
    assert torch.equal(ours, theirs)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert model.lm_head.weight.grad is not None
    assert inspect.signature(model.forward) == inspect.signature(THEIRS.forward)
    assert not decoder.calls


def test_restore_undoes_it(model: LlamaForCausalLM) -> None:
    before = set(model.__dict__)
    decoder = PlainDecoder(model)
    with Accelerated(model, Memory(decoder)) as accelerated:
        assert "8 rows" not in repr(accelerated) and "16 rows of 64 tokens" in repr(accelerated)
        model.generate(prompts(1), max_new_tokens=3, pad_token_id=0)
    assert set(model.__dict__) == before
    calls = len(decoder.calls)
    ours, theirs = both(model, input_ids=prompts(1), max_new_tokens=3)
    assert torch.equal(ours, theirs) and calls and len(decoder.calls) == calls
    accelerated.restore()  # again: nothing to do


def test_an_own_forward_is_given_back(model: LlamaForCausalLM) -> None:
    own = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    model.forward = counting
    Accelerated(model, Memory(PlainDecoder(model))).restore()
    assert model.__dict__["forward"] is counting


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_plain_model(model: LlamaForCausalLM, decoder: PlainDecoder, copied: Callable[[Any], Any]) -> None:
    other = copied(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    assert torch.equal(other(prompts(1)).logits, -THEIRS(prompts(1)).logits)
    other.generate(prompts(1), max_new_tokens=3, pad_token_id=0)
    assert not decoder.calls
    ours, theirs = both(model, input_ids=prompts(1), max_new_tokens=3)
    assert torch.equal(ours, theirs) and decoder.calls


def test_what_is_no_causal_lm_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot accelerate a Linear\n  because it is no transformers model"):
        accelerate(nn.Linear(2, 2))
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    with pytest.raises(InputError, match=r"cannot accelerate a T5ForCond(.|\n)*an encoder-decoder"):
        accelerate(T5ForConditionalGeneration(T5Config(**sizes)).eval())


def test_twice_is_refused(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    with pytest.raises(InputError, match=r"LlamaForCausalLM is accelerated already(.|\n)*restore"):
        accelerate(model)


# ---------------------------------------------------------------- what cannot be served


def scaled(model: nn.Module) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(1.0)  # type: ignore[union-attr, operator]


def replaced(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # type: ignore[union-attr]


def hooked(model: nn.Module) -> None:
    model.model.norm.register_forward_hook(lambda module, args, output: output)  # type: ignore[union-attr]


def wrapped(model: nn.Module) -> None:
    norm = model.model.norm  # type: ignore[union-attr]
    own = norm.forward
    norm.forward = lambda *args: own(*args)


STATES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "training": (lambda model: model.train(), "training mode"),
    "written": (scaled, "weights have changed"),
    "replaced": (replaced, "weights have changed"),
    "other_dtype": (lambda model: model.double(), "weights have changed"),
    "wrapped": (wrapped, "hooks were registered"),
    "hooks": (hooked, "hooks were registered"),
}
GIVEN: dict[str, tuple[dict[str, Any], str]] = {
    "own_cache": ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
    "static": ({"cache_implementation": "static"}, "cache_implementation='static'"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "hidden_states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    "tokens": ({"max_new_tokens": 59}, "65 tokens do not fit a cache of 64; accelerate with max_tokens=65"),
    "beams": ({"num_beams": 17}, r"17 rows do not fit a cache of 16; accelerate with Options\(max_batch=17\)"),
    "embeds": ({"inputs_embeds": THEIRS.get_input_embeddings()(prompts(1)).detach()}, "take no inputs_embeds"),
    "right_padding": ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]])}, "not left padding"),
    "hole": ({"attention_mask": torch.tensor([[1, 1, 1, 0, 1, 1, 1]])}, "not left padding"),
    "positions": ({"position_ids": torch.arange(7)[None] * 2}, "not the places of the tokens"),
    "chunk_of_padding": (
        {"attention_mask": torch.tensor([[0, 0, 0, 0, 1, 1, 1]]), "prefill_chunk_size": 3},
        "a chunk of padding only",
    ),
}


@pytest.mark.filterwarnings("ignore:A decoder-only architecture", "ignore:.*torch.jit")
@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_runs_as_before_with_one_warning(model: LlamaForCausalLM, decoder: PlainDecoder, name: str) -> None:
    given, why = GIVEN[name]
    arguments = {"input_ids": prompts(1), "max_new_tokens": 4, "pad_token_id": 0, **given}
    if "inputs_embeds" in given:
        del arguments["input_ids"]
    with pytest.warns(UserWarning, match=rf"generate of LlamaForCausalLM runs without the compiled programs: .*{why}"):
        ours = model.generate(**copy.deepcopy(arguments))
    theirs = THEIRS.generate(**copy.deepcopy(arguments))
    assert torch.equal(getattr(ours, "sequences", ours), getattr(theirs, "sequences", theirs))
    again = model.generate(**copy.deepcopy(arguments))  # a second warning would be an error
    assert torch.equal(getattr(again, "sequences", again), getattr(theirs, "sequences", theirs))
    assert not decoder.calls
    ours, theirs = both(model, input_ids=prompts(1), max_new_tokens=3)
    assert torch.equal(ours, theirs) and decoder.calls, "the next call is served"


@pytest.mark.parametrize("name", STATES)
def test_a_changed_model_runs_as_before_with_one_warning(model: LlamaForCausalLM, decoder: PlainDecoder, name: str) -> None:
    change, why = STATES[name]
    change(model)
    with pytest.warns(UserWarning, match=why):
        ours = model.generate(prompts(1), max_new_tokens=4, pad_token_id=0)
    assert torch.equal(ours, THEIRS.generate(prompts(1), max_new_tokens=4, pad_token_id=0))
    assert not decoder.calls


def test_autocast_runs_as_before(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast is on for cpu"):
        model.generate(prompts(1), max_new_tokens=2, pad_token_id=0)
    assert not decoder.calls


def test_weights_written_within_generate(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    def writes(input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == 10:
            scaled(model)
        return scores

    with pytest.raises(InputError, match="weights have changed since it was compiled"):
        model.generate(prompts(1), max_new_tokens=8, logits_processor=LogitsProcessorList([writes]), pad_token_id=0)


# ---------------------------------------------------------------- the cache in the user's hands


def chat(model: nn.Module, copied: Any) -> list[Tensor]:
    """Two answers that go on from one first turn."""
    first = model.generate(prompts(1), max_new_tokens=5, return_dict_in_generate=True, pad_token_id=0)  # type: ignore[operator]
    answers = []
    for seed in (1, 2):
        cache = copied(first.past_key_values) if copied else first.past_key_values
        ids = torch.cat([first.sequences, prompts(1, 4, seed)], 1)
        more = model.generate(ids, past_key_values=cache, max_new_tokens=6, pad_token_id=0)  # type: ignore[operator]
        answers.append(more)
        if not copied:
            break
    return answers


@pytest.mark.parametrize("copied", [None, copy.copy, copy.deepcopy])
def test_generate_goes_on_from_its_own_cache(model: LlamaForCausalLM, decoder: PlainDecoder, copied: Any) -> None:
    for ours, theirs in zip(chat(model, copied), chat(THEIRS, copied and copy.deepcopy), strict=True):
        assert torch.equal(ours, theirs)
    assert [name for name, _ in decoder.calls].count("prefill") == 1


def test_forward_goes_on_from_its_own_cache(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    batch = padded_batch()
    caches = [
        m.generate(**batch, max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0).past_key_values
        for m in (model, THEIRS)
    ]
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.int64)], 1)
    given = {"input_ids": prompts(3, 2), "attention_mask": mask}
    given["position_ids"] = (mask.cumsum(1) - 1)[:, -2:]
    model.generate(prompts(1), max_new_tokens=2, pad_token_id=0)  # another call in between
    with torch.no_grad():
        ours, theirs = (m(**given, past_key_values=cache) for m, cache in zip((model, THEIRS), caches, strict=True))
    torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-4, rtol=1e-4)
    tokens, cache = model(
        prompts(3, 1),
        torch.ones(3, 14) * (torch.arange(14) >= torch.tensor([[0], [4], [7]])),
        past_key_values=caches[0],
        return_dict=False,
    )
    assert tokens.shape == (3, 1, VOCABULARY) and cache is caches[0]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "positions": ({"position_ids": torch.tensor([[3]])}, "not the places of the tokens"),
    "mask_of_other_length": (
        {"attention_mask": torch.ones(1, 5)},
        r"attention_mask is \[1, 5\], and there are 11 tokens in 1 rows",
    ),
    "positions_of_all": ({"position_ids": torch.arange(11)[None]}, r"position_ids is \[1, 11\], and input_ids \[1, 1\]"),
    "other_device": ({"input_ids": torch.zeros(1, 1, dtype=torch.int64, device="meta")}, "input_ids is on meta"),
    "no_zeros_and_ones": ({"attention_mask": torch.full((1, 11), 2)}, "another padding"),
    "mask_with_padding": ({"attention_mask": (torch.arange(11) > 1).long()[None]}, "another padding"),
    "attentions": ({"output_attentions": True}, "take no output_attentions"),
    "embeds": ({"inputs_embeds": torch.zeros(1, 1, 32)}, "take no inputs_embeds"),
    "rows": ({"input_ids": prompts(2, 1)}, "2 rows, and past_key_values 1"),
    "no_cache": ({"use_cache": False}, "use_cache=False"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_call_that_cannot_be_served_is_refused(model: LlamaForCausalLM, decoder: PlainDecoder, name: str) -> None:
    out = model.generate(prompts(1), max_new_tokens=4, return_dict_in_generate=True, pad_token_id=0)
    given, why = BAD[name]
    with pytest.raises(InputError, match=rf"cannot go on from past_key_values\n  because .*{why}(.|\n)*restore"):
        model(**{"input_ids": prompts(1, 1), "past_key_values": out.past_key_values, **given})
    assert model(prompts(1, 1), past_key_values=out.past_key_values).logits.shape == (1, 1, VOCABULARY)


def test_tokens_that_do_not_fit_leave_the_cache_as_it_was(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    caches = [
        m.generate(prompts(1), max_new_tokens=4, return_dict_in_generate=True, pad_token_id=0).past_key_values
        for m in (model, THEIRS)
    ]
    with pytest.raises(CapacityExceeded, match=r"66 tokens do not fit a cache of 64(.|\n)*max_tokens=66"):
        model(prompts(1, 56), past_key_values=caches[0])
    decoder.max_batch = 1
    with pytest.raises(CapacityExceeded, match="2 rows do not fit"):
        caches[0].batch_repeat_interleave(2)
    with torch.no_grad():
        ours, theirs = (m(prompts(1, 3), past_key_values=c) for m, c in zip((model, THEIRS), caches, strict=True))
    torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-4, rtol=1e-4)


def test_the_cache_is_of_no_use_elsewhere(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    cache = model.generate(prompts(1), max_new_tokens=4, return_dict_in_generate=True, pad_token_id=0).past_key_values
    with pytest.raises(InputError, match="cannot be read by a model"):
        THEIRS(prompts(1, 1), past_key_values=cache)
    other = copy.deepcopy(THEIRS)
    attach(other)
    with pytest.raises(InputError, match="made by another accelerated model"):
        other(prompts(1, 1), past_key_values=cache)
    ids = torch.cat([prompts(1), prompts(1, 4, seed=9), prompts(1, 2)], 1)
    with pytest.raises(InputError, match="tokens do not fit a cache of 64"):
        model.generate(ids, past_key_values=cache, max_new_tokens=60, pad_token_id=0)


def test_inference_mode(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    with torch.inference_mode():
        first = model.generate(**padded_batch(), max_new_tokens=3, return_dict_in_generate=True, pad_token_id=0)
        both(model, input_ids=prompts(1), max_new_tokens=3, num_beams=2)
    ids = torch.cat([first.sequences, prompts(3, 2)], 1)
    mask = torch.cat([padded_batch()["attention_mask"], torch.ones(3, 5, dtype=torch.int64)], 1)
    given = {"attention_mask": mask, "max_new_tokens": 4, "pad_token_id": 0}
    ours = model.generate(ids, past_key_values=first.past_key_values, **given)
    assert torch.equal(ours, THEIRS.generate(ids, **given))


def test_defaults_of_a_generation_config(model: LlamaForCausalLM, decoder: PlainDecoder) -> None:
    config = GenerationConfig(max_new_tokens=6, num_beams=2, pad_token_id=0)
    ours = model.generate(prompts(2), generation_config=config)
    assert torch.equal(ours, THEIRS.generate(prompts(2), generation_config=config)) and decoder.calls


def test_a_real_compile() -> None:
    model, theirs = tiny_llama(seed=2), tiny_llama(seed=2)
    with accelerate(model, max_tokens=32) as accelerated:
        assert accelerated.report is not None and len(accelerated.report.sites) == 2
        for seed in range(2):
            ids = prompts(1, seed=seed)
            ours = model.generate(ids, max_new_tokens=12, pad_token_id=0)
            assert torch.equal(ours, theirs.generate(ids, max_new_tokens=12, pad_token_id=0))
