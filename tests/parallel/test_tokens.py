"""Ranks that share a model give the tokens of one process: presets of small depth and width, gloo on a CPU."""

from __future__ import annotations

import gc
import weakref
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.export import ExportedProgram

import trilithon
from models import configs
from parallel.together import Together
from trilithon import Options, compiler
from trilithon.capture import hf
from trilithon.errors import CannotLower, InputError
from trilithon.parallel import share as share_module

NEW, CAPACITY = 12, 32
PROMPTS = """ranks were given different prompts
  because they share one model, and compute each token together
  call it with the same arguments on every rank"""
SAVED = f"""cannot save <trilithon.Compiled {{}}: 1 attention sites, cache of {CAPACITY} tokens>
  because this process holds one rank's share of it, and meets the others in collectives of their process group
  keep the model's weights, and compile them where they run"""


def small(preset: str) -> nn.Module:
    """One layer; weights so large that tokens differ."""
    config = configs.preset(preset)
    config.num_hidden_layers, config.initializer_range, config.vocab_size = 1, 0.3, 301  # which does not divide
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return hf.from_config(config)


def prompts() -> Tensor:
    return torch.randint(0, 301, (2, 7), generator=torch.Generator().manual_seed(0))


@cache
def alone(preset: str) -> list[list[int]]:
    model: Any = small(preset)
    return model.generate(prompts(), max_new_tokens=NEW, do_sample=False).tolist()  # type: ignore[no-any-return]


def parallelised(model: Any) -> nn.Module:
    """By PyTorch's own styles."""
    layer = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    layer |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        parallelize_module(block, mesh, layer)
    return model  # type: ignore[no-any-return]


@cache  # of a rank that lives through several tests
def compiled(preset: str, by_hand: bool = False) -> tuple[trilithon.Compiled, ExportedProgram]:
    """The share, and the program that it was made of."""
    model, kept = small(preset), list[compiler.Analysis]()
    given = parallelised(model) if by_hand else trilithon.tensor_parallel(model)

    def analyse(*arguments: Any, **more: Any) -> compiler.Analysis:
        kept.append(own(*arguments, **more))
        return kept[-1]

    own = compiler.analyse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "analyse", analyse)
        made = trilithon.compile(given, max_tokens=CAPACITY, backend="native", options=Options(max_batch=2))
    return made, kept[0].rewritten


def refused(made: trilithon.Compiled) -> list[str]:
    """What they cannot do together."""
    texts = []
    for call in (lambda: made.generate(prompts() + dist.get_rank()), lambda: made.save("nowhere")):
        with pytest.raises((InputError, CannotLower)) as error:
            call()
        texts.append(str(error.value))
    return texts


def tokens_of(preset: str, by_hand: bool = False) -> dict[str, Any]:
    made, _ = compiled(preset, by_hand)
    (site,) = made.report.sites
    return {
        "greedy": made.generate(prompts(), max_new_tokens=NEW).tolist(),
        "drafts": made.generate(prompts()[:1], max_new_tokens=NEW, prompt_lookup_num_tokens=3).tolist(),
        "drawn": made.generate(prompts(), max_new_tokens=NEW, do_sample=True, temperature=2.0).tolist(),
        "mask": str(site.mask),
        "heads": [shape.g for shape in made.decoder.shapes],
        "notes": made.report.notes,
        "model": made.report.model,
        "refused": refused(made),
    }


def check(found: list[dict[str, Any]], preset: str, kv: int) -> None:
    for each in found:
        assert each["greedy"] == alone(preset)
        assert each["drafts"] == alone(preset)[:1]
        assert each["drawn"] == found[0]["drawn"] != each["greedy"]
        assert (each["mask"], each["heads"]) == ("causal", [kv])
        assert any(note.startswith("tensor parallel: ") and f"over {len(found)} ranks" in note for note in each["notes"])
        assert each["refused"] == [PROMPTS, SAVED.format(each["model"])]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("preset", "by_hand"), [("llama-3.2-1b", True), ("qwen3-0.6b", False)])
def test_tokens_are_those_of_one_process(preset: str, by_hand: bool, pair: Together) -> None:
    alone(preset)  # now, so that the ranks need not import the model
    check(pair(tokens_of, preset, by_hand), preset, 4)


def memory_of(preset: str) -> dict[str, Any]:
    """What a share holds, and what of the model is left when it is dropped."""
    model: Any = small(preset)
    whole = sum(x.nbytes for x in model.parameters())
    share: Any = trilithon.tensor_parallel(model)
    before = [(id(x), x.data_ptr()) for x in model.parameters()]
    share.to(torch.float64)
    cut = [x for name, x in share.named_parameters() if name.endswith("_proj.weight")]
    same = before == [(id(x), x.data_ptr()) for x in model.parameters()]
    gone = [weakref.ref(x) for x in (model, *model.parameters())]
    del model
    gc.collect()
    return {
        "left": sum(x() is not None for x in gone),
        "model stays": same,
        "own memory": all(x.untyped_storage().nbytes() == x.nbytes for x in cut),
        "part": sum(x.nbytes for x in cut) / 2 / whole,
    }


@pytest.mark.parametrize("preset", ["llama-3.2-1b", "qwen3-0.6b"])
def test_a_share_holds_no_more_than_its_part(preset: str, pair: Together) -> None:
    for found in pair(memory_of, preset):
        assert (found["left"], found["model stays"], found["own memory"]) == (0, True, True)
        assert 0 < found["part"] < 0.5


def on_meta(preset: str) -> list[str]:
    """Where the tensors of a share are that is kept on another device than the model."""
    share = trilithon.tensor_parallel(small(preset), device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(share_module, "_require_same", lambda *_: None)
        moved = trilithon.tensor_parallel(small(preset), device="meta")
    kinds = {str(x.device) for x in (*moved.parameters(), *moved.buffers())}
    shapes = [(name, x.shape) for name, x in moved.state_dict().items()]
    assert shapes == [(name, x.shape) for name, x in share.state_dict().items()]
    return sorted(kinds)


def test_all_of_a_share_is_on_its_device(pair: Together) -> None:
    assert pair(on_meta, "llama-3.2-1b") == [["meta"]] * 2


@pytest.mark.timeout(300)
def test_heads_that_do_not_divide(three: Together) -> None:
    """One rank holds 7 query heads; two hold 3 and 4, and the same head of keys and values."""
    alone("qwen2.5-0.5b")
    check(three(tokens_of, "qwen2.5-0.5b"), "qwen2.5-0.5b", 1)
