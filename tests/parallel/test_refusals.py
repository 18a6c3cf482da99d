"""What cannot be shared among ranks, and the texts that say so; and what else ranks must not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from models import configs
from parallel.together import together
from trilithon.capture import hf
from trilithon.capture.collectives import of_first_rank
from trilithon.errors import InputError, TrilithonError
from trilithon.parallel.share import tensor_parallel

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
TIED = {"tie_word_embeddings": True}


def llama(seed: int = 0, heads: int = 2) -> nn.Module:
    return hf.from_config(
        transformers.LlamaConfig(**SMALL, **TIED, num_attention_heads=heads, num_key_value_heads=1, head_dim=16), seed=seed
    )


def mixtral() -> nn.Module:
    return hf.from_config(
        transformers.MixtralConfig(**SMALL, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    )


def texts() -> list[str]:
    found = []
    for model in (hf.from_config(configs.gpt2()), mixtral(), llama(heads=1), llama(seed=dist.get_rank())):
        with pytest.raises(TrilithonError) as refused:
            tensor_parallel(model)
        found.append(str(refused.value))
    return found


def test_what_is_not_shared_is_refused(tmp_path):
    one, other = together(2, tmp_path, texts)
    assert one == other
    assert one[:3] == [
        "cannot share GPT2LMHeadModel among ranks\n"
        "  because it has no tp_plan, and none of its parameters is a DTensor\n"
        "  use torch.distributed.tensor.parallel.parallelize_module on it first, or run it on one rank",
        "cannot share MixtralForCausalLM among ranks\n"
        "  because its tp_plan has 'packed_colwise' for model.layers.0.mlp.experts.gate_up_proj, and parallel styles of "
        "experts, packed weights and others are not known here\n"
        "  run it on one rank",
        "cannot share 1 query heads among 2 ranks\n  because a rank would hold none\n  start 1 ranks or fewer",
    ]
    assert one[3].startswith("the shares of LlamaForCausalLM disagree with it\n  because the relative error is ")


def test_without_a_process_group_nothing_is_shared():
    with pytest.raises(InputError, match="there is no process group") as refused:
        tensor_parallel(llama())
    assert "start with torchrun" in str(refused.value)


def shares() -> dict[str, Any]:
    model: Any = llama()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        made: Any = tensor_parallel(model)
        error = float((made(ids).logits - model(ids).logits).abs().max())
    tied = made.lm_head.weight.untyped_storage().data_ptr() == model.model.embed_tokens.weight.untyped_storage().data_ptr()
    own = made.model.layers[0].self_attn
    rank = dist.get_rank()
    return {
        "error": error,
        "tied": tied,
        "shapes": [tuple(x.weight.shape) for x in (own.q_proj, own.k_proj, own.o_proj, made.model.layers[0].mlp.down_proj)],
        "whole": tuple(model.model.layers[0].self_attn.q_proj.weight.shape),
        "first": [of_first_rank(torch.tensor([rank == 0]), made.lm_head.group).item()],
    }


def test_a_share_holds_its_part_of_the_weights_and_the_model_stays_as_it_is(tmp_path):
    for each in together(2, tmp_path, shares):
        assert each["error"] < 1e-5
        assert each["tied"], "an output layer that is tied takes no memory"
        assert each["shapes"] == [(16, 32), (16, 32), (32, 16), (32, 24)]
        assert (each["whole"], each["first"]) == ((32, 32), [True])
