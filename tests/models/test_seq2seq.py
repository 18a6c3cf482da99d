"""Encoder-decoders: `generate` reads the prompt once, decodes over a cache, and gives transformers' greedy tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import trilithon
from trilithon import Compiled, GuardFailed, InputError, Options
from trilithon.capture.generation import generation_settings
from zoo.families import SEQ2SEQ, T5

NEW = 14
WHISPER = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64, "suppress_tokens": []}
ONE = {"encoder_layers": 1, "decoder_layers": 1}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", T5 | {"num_layers": 1}),
    "bart": ("Bart", SEQ2SEQ | ONE),
    "whisper": ("Whisper", SEQ2SEQ | ONE | WHISPER | {"begin_suppress_tokens": []}),
}
STD = {"bart": 0.8}  # its layers are normalised at their ends
MADE: dict[str, tuple[Any, Compiled]] = {}


def lively(name: str) -> Any:
    """A random model whose greedy tokens are not all alike and that never stops."""
    kind, values = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**values)
    model: Any = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(std=STD.get(name, 0.3))
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn_like(head.weight))
    for held in (model.config, model.generation_config):
        held.eos_token_id = held.forced_eos_token_id = None
    return model


def made(name: str) -> tuple[Any, Compiled]:
    """The model and what it was compiled to, once for all tests."""
    if name not in MADE:
        model = lively(name)
        MADE[name] = model, trilithon.compile(model, max_tokens=32, options=Options(max_batch=3))
    return MADE[name]


def prompts() -> tuple[Tensor, Tensor]:
    """Three rows, one with padding at the right, one at the left."""
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, :4] = 0
    return ids, mask


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_text(name: str) -> None:
    model, llm = made(name)
    ids, mask = prompts()
    for given in (mask, torch.ones_like(mask)):
        want = model.generate(ids, attention_mask=given, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(llm.generate(ids, attention_mask=given, max_new_tokens=NEW), want)
        assert len(set(want.flatten().tolist())) > 3
    unmasked = llm.generate(ids, max_new_tokens=NEW)
    assert torch.equal(unmasked, want)  # without a mask all tokens are read, as in transformers


def test_speech() -> None:
    model, llm = made("whisper")
    sound = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1))
    want = model.generate(sound, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True).sequences
    assert torch.equal(llm.generate(input_features=sound, max_new_tokens=NEW), want)
    assert torch.equal(llm.generate(sound, decoder_input_ids=want[:, :4], max_new_tokens=NEW - 3), want)
    assert len(set(want.flatten().tolist())) > 3


def test_decoder_prompts_of_unequal_lengths() -> None:
    """T5 has relative positions, so that transformers is right with padding before a decoder's prompt."""
    model, llm = made("t5")
    ids, mask = prompts()
    start = torch.tensor([[0, 7, 9], [0, 0, 8], [0, 5, 5]])
    given = {"attention_mask": mask, "decoder_input_ids": start, "decoder_attention_mask": torch.ones_like(start)}
    given["decoder_attention_mask"][1, 0] = 0
    want = model.generate(ids, max_new_tokens=NEW, do_sample=False, **given)
    assert torch.equal(llm.generate(ids, max_new_tokens=NEW, **given), want)
    bare = model.generate(ids, decoder_input_ids=start[:, 1:] + 1, max_new_tokens=4, do_sample=False)
    assert torch.equal(llm.generate(ids, decoder_input_ids=start[:, 1:] + 1, max_new_tokens=4), bare)


def test_streams_take_turns_and_prompts_are_repeated() -> None:
    model, llm = made("bart")
    (ids, mask), steps = prompts(), []
    want = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for tokens in llm.stream(ids, attention_mask=mask, max_new_tokens=6):
        steps.append(tokens)
        llm.generate(ids[:1, :5], max_new_tokens=2)  # another prompt, which the stream must not see
    assert torch.equal(torch.stack(steps, 1), want[:, 1:])
    cold = llm.generate(ids[1:2], do_sample=True, temperature=1e-4, num_return_sequences=3, max_new_tokens=6, seed=0)
    assert torch.equal(cold, llm.generate(ids[1:2], max_new_tokens=6).expand(3, -1))
    with pytest.raises(InputError, match="holds no conversation"):
        llm.conversation()
    guessed = llm.generate(ids[:1], max_new_tokens=NEW, prompt_lookup_num_tokens=4)
    assert torch.equal(guessed, llm.generate(ids[:1], max_new_tokens=NEW))


def test_the_generation_config_is_honoured_or_refused() -> None:
    model, (ids, mask) = lively("bart"), prompts()
    wanted = {"forced_bos_token_id": 7, "forced_eos_token_id": 2, "suppress_tokens": [5, 9], "begin_suppress_tokens": [11]}
    wanted |= {"no_repeat_ngram_size": 2, "min_length": 6, "max_length": 12, "eos_token_id": 2, "bad_words_ids": [[3, 4]]}
    for name, value in wanted.items():
        setattr(model.generation_config, name, value)
    llm = trilithon.compile(model, max_tokens=32, options=Options(max_batch=3, verify=False))
    want = model.generate(ids, attention_mask=mask, do_sample=False)
    assert torch.equal(llm.generate(ids, attention_mask=mask), want)
    assert set(want[:, 1].tolist()) == {7} and want.shape[1] <= 12
    model.generation_config.num_beams = 4
    with pytest.raises(InputError, match="asks for num_beams=4"):
        generation_settings(model).check()


def test_what_an_encoder_is_not_proved_for_is_refused() -> None:
    _, llm = made("t5")
    ids, mask = prompts()
    nothing = mask.clone()
    nothing[0] = 0
    with pytest.raises(GuardFailed, match="attention_mask"):
        llm.generate(ids, attention_mask=nothing, max_new_tokens=2)
    with pytest.raises(InputError, match="3 rows, and the encoder 2"):
        llm.generate(ids[:2], decoder_input_ids=ids[:, :1], max_new_tokens=2)


def test_padding_that_no_mask_hides_is_refused() -> None:
    _, llm = made("whisper")
    sound, mask = torch.zeros(1, 8, 32), torch.ones(1, 32, dtype=torch.int64)
    llm.generate(sound, attention_mask=mask, max_new_tokens=2)
    mask[0, 20:] = 0
    with pytest.raises(InputError, match="takes no padding"):
        llm.generate(sound, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(InputError, match="needs input_features"):
        llm.generate(max_new_tokens=2)
