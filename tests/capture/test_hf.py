"""Loading from folders: what has no tokenizer, and what can be cut to its first layers."""

from __future__ import annotations

import pytest
import transformers

from trilithon.capture import hf
from trilithon.errors import InputError

LAYERS = 4


def saved(path, kind=transformers.LlamaConfig, **changes):
    kind(
        **{"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2} | changes
    ).save_pretrained(path)
    return str(path)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert hf.load_tokenizer(saved(tmp_path)) is None


def test_a_hub_id_without_a_tokenizer_has_none(monkeypatch):
    asked = []
    monkeypatch.setattr(hf, "cached_file", lambda source, file, **_: asked.append((source, file)))
    assert hf.load_tokenizer("org/model") is None
    assert asked == [("org/model", file) for file in hf.TOKENIZER_FILES]


def test_a_broken_tokenizer_is_not_an_unknown_model(tmp_path):
    name = saved(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError) as caught:
        hf.load_tokenizer(name)
    assert f"cannot load {name}" in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_preset_with_weights_has_a_tokenizer():
    assert hf.load_tokenizer("byte-llama") is not None
    assert hf.load_tokenizer("gpt2") is None


@pytest.mark.parametrize("kind", [transformers.LlamaConfig, transformers.Qwen2Config, transformers.GPT2Config])
def test_layers_of_a_folder_without_weights(tmp_path, kind):
    model = hf.load_model(saved(tmp_path, kind), device="meta", layers=2)
    blocks = model.transformer.h if kind is transformers.GPT2Config else model.model.layers
    assert len(blocks) == 2
    assert len(getattr(model.config, "layer_types", None) or [0, 0]) == 2


@pytest.mark.parametrize("layers", [0, LAYERS + 1])
def test_layers_out_of_range(tmp_path, layers):
    with pytest.raises(InputError, match=f"layers={layers} is not between 1 and {LAYERS}"):
        hf.load_model(saved(tmp_path), device="meta", layers=layers)


def test_layers_that_cannot_be_cut(tmp_path):
    transformers.T5Config(num_layers=2).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="T5Config does not describe one stack"):
        hf.load_model(str(tmp_path), device="meta", layers=1)
    with pytest.raises(InputError, match='load with device="meta"'):
        hf.load_model("byte-llama", layers=1)
