"""What the rows of a benchmark are made of: the sizes behind the floor, and the guards against a row that misleads."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations import flex_attention

from trilithon import compiler
from trilithon.bench import torch_tensorrt_row
from trilithon.bench.candidates import (
    EVERYWHERE,
    ROWS,
    TENSORRT_ROWS,
    TORCH_TENSORRT_ROWS,
    candidates,
    decoder_size,
    runnable,
)
from trilithon.capture import hf
from trilithon.errors import CannotLower, InputError
from trilithon.lower.tensorrt import library


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "gpt2", "mistral-7b"])
def test_the_floor_counts_the_matrices_that_the_model_has(name):
    model = hf.load_model(name, device="meta", layers=2)
    size = decoder_size(model)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n)
    matrices -= sum(p.numel() for n, p in model.named_parameters() if n.split(".")[-2] in ("wte", "wpe"))
    assert size.layer_values == matrices
    assert size.head_values == model.get_output_embeddings().weight.numel()
    assert size.window_keys == (4096 if name == "mistral-7b" else None)


def test_rows_are_named_after_the_mask():
    model = hf.load_model("mistral-7b", device="meta", layers=1)
    names = [c.name for c in candidates(model, torch.zeros(1, 4, dtype=torch.int64), 2)]
    assert "Trilithon window(4096), no cache" in names
    assert len(names) == len(ROWS)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:_compile flag on create_block_mask")
def test_the_flex_row_generates_with_the_same_weights_by_flex_attention(monkeypatch):
    calls = []

    def attend(query, key, value, training=False, **arguments):  # as it is, uncompiled: compiling takes long
        calls.append(arguments["block_mask"])
        return flex_attention.flex_attention(query, key, value, **arguments)

    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", attend)
    model = hf.load_model("byte-llama")
    ids = torch.arange(6)[None]
    before = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    (candidate,) = candidates(model, ids, 3, rows=("hf-flex",))
    run = candidate.make()
    assert torch.equal(run(3), before)
    assert len(calls) == 3 * model.config.num_hidden_layers
    assert run(1).shape == (1, 7)
    assert model.config._attn_implementation == "sdpa"


def test_a_copy_shares_the_weights_and_no_traces_of_generation():
    model = hf.load_model("byte-llama")
    model.generate(torch.arange(6)[None], max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert model._previous_max_cache_length == 8
    made = hf.sharing_weights(model)
    assert [p.data_ptr() for p in made.parameters()] == [p.data_ptr() for p in model.parameters()]
    assert not hasattr(made, "_previous_max_cache_length")
    assert made.config is not model.config and made.model.layers[0] is not model.model.layers[0]


def test_a_model_with_its_own_attention_has_no_flex_row():
    model = hf.load_model("byte-llama")
    model._can_set_attn_implementation = lambda: False
    with pytest.raises(InputError, match="LlamaForCausalLM with its own attention"):
        hf.sharing_weights(model, attention="flex_attention")


@pytest.mark.parametrize("tensorrt", [False, True])
@pytest.mark.parametrize("torch_tensorrt", [False, True])
def test_runnable_rows_are_those_of_installed_packages(monkeypatch, caplog, tensorrt, torch_tensorrt):
    def package(installed):
        def found(*device):
            if not installed:
                raise CannotLower("it is not installed")

        return found

    monkeypatch.setattr(library, "library", package(tensorrt))
    monkeypatch.setattr(torch_tensorrt_row, "library", package(torch_tensorrt))
    rows = runnable(torch.device("cuda"))
    assert set(rows) == {*EVERYWHERE, *(TENSORRT_ROWS if tensorrt else ()), *(TORCH_TENSORRT_ROWS if torch_tensorrt else ())}
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2 - tensorrt - torch_tensorrt and all(x.endswith(": it is not installed") for x in texts)
    assert runnable(torch.device("cpu")) == EVERYWHERE
    assert "rows left out: torch-tensorrt, torch-tensorrt-masked: the model is on cpu, not on a GPU" in caplog.text
    assert "hf-flex" in EVERYWHERE and set(ROWS) <= set(EVERYWHERE)


def test_only_a_causal_language_model_can_be_measured():
    with pytest.raises(InputError, match="cannot measure generation with Linear"):
        candidates(nn.Linear(2, 2), torch.zeros(1, 4, dtype=torch.int64), 2)


def test_the_row_that_keeps_its_mask_runs_the_program_as_it_was_exported(monkeypatch):
    built = []

    def lower(gm, *arguments, **named):
        built.append([n for n in gm.graph.nodes if n.op == "call_function" and "attention" in str(n.target)])
        return gm

    monkeypatch.setattr(compiler, "lower_module", lower)
    model = hf.load_model("byte-llama")
    ids = torch.arange(6)[None]
    made = [c.make() for c in candidates(model, ids, 3, rows=("pytorch", "kept"), backend="native", proof_cache=False)]
    assert torch.equal(made[0](3), made[1](3))
    assert [n.args[3] is not None for n in built[0]] == [True] * model.config.num_hidden_layers
