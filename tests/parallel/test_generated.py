"""Generated kernels of a share's step, with collectives between them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.fx import GraphModule

from parallel.shares import alone, compiled
from parallel.together import Together
from trilithon.lower.inputs import Input, cached_inputs
from trilithon.lower.native import step as step_module
from trilithon.lower.native.fused import launch
from trilithon.lower.native.fused.fuse import fuse_step
from trilithon.lower.native.fused.launch import AFTER_RANKS
from trilithon.lower.native.lower import lower_native
from trilithon.lower.native.one_product import one_product
from trilithon.rewrite.insert_cache import cache_shapes, insert_cache

PRESET, SLOTS = "llama-3.2-1b", 40
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="for Triton's interpreter"
)


def step() -> tuple[GraphModule, tuple[Input, ...]]:
    """A share's step of one row, before kernels are made."""
    _, program = compiled(PRESET, True)
    gm = lower_native(insert_cache(program, "step"), split=True)
    return gm, cached_inputs(gm, cache_shapes(program), SLOTS, 1, most_tokens=1)


def given(inputs: tuple[Input, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    shapes = [[axis.high if i else 1 for i, axis in enumerate(x.axes)] for x in inputs[3:]]
    caches = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.tensor([[5]]), torch.tensor([17]), torch.tensor([1]), *caches]


def few_programs(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter runs them one by one."""
    for name, value in (("FILLED", 4), ("TUNED_SLOTS", 40)):
        patch.setattr(launch, name, value)


def generated() -> dict[str, Any]:
    gm, inputs = step()
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch)
        fused = fuse_step(gm, inputs)
    held, own = given(inputs), given(inputs)
    with torch.no_grad():
        logits, _ = gm(*held)
        found, best = fused(*own)
    calls = [n for n in fused.graph.nodes if n.op.startswith("call_")]
    names = ["kernel" if n.op == "call_module" else str(n.target) for n in calls]
    kernels = [fused.get_submodule(n.target) for n in calls if n.op == "call_module"]
    return {
        "order": [name.removeprefix("_c10d_functional.") for name in names if name == "kernel" or "c10d" in name],
        "after": [getattr(kernel, AFTER_RANKS) for kernel in kernels],
        "others": {name for name in names if "aten" in name},
        "error": float((found - logits).norm() / logits.norm()),
        "caches": all(torch.allclose(a, b, atol=1e-4) for a, b in zip(held[3:], own[3:], strict=True)),
        "best": (best.tolist(), logits[:, -1].argmax(-1).tolist()),
        "logits": found.flatten().tolist(),
    }


SUM = ["all_reduce_.default", "wait_tensor.default"]
JOIN = ["all_gather_into_tensor.default", "wait_tensor.default"]


@torch.no_grad()
def test_ranks_meet_between_kernels(pair: Together) -> None:
    alone(PRESET)
    first, other = pair(generated)
    for found in (first, other):
        assert found["error"] < 1e-5 and found["caches"]
        assert found["best"][0] == found["best"][1]
        # positions; q, k and v; attention; output; gate and up; down; logits; the largest
        assert found["order"] == [*["kernel"] * 4, *SUM, *["kernel"] * 2, *SUM, "kernel", *JOIN, "kernel"]
        assert found["after"] == [False] * 4 + [True, False, True, True]
        assert found["others"] <= {"aten.permute.default", "aten.view.default", "aten.slice.Tensor", "aten.select.int"}  # views
    assert first["logits"] == other["logits"]


def merged() -> dict[str, Any]:
    """A share's prompt, of which products of one vector become one."""
    _, program = compiled(PRESET, True)
    gm = lower_native(insert_cache(program, "prompt"))
    inputs = cached_inputs(gm, cache_shapes(program), SLOTS, 1)
    tokens = [torch.tensor([[5, 7, 11]]), torch.tensor([0]), torch.tensor([3])]
    held, own = ([*tokens, *given(inputs)[3:]] for _ in range(2))
    cut = [x for name, x in program.state_dict.items() if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]
    before = [x.clone() for x in cut]
    with torch.no_grad():
        logits = gm(*held)
        one_product(gm)
        found = gm(*own)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in cut}
    return {
        "linears": sum(n.target is torch.ops.aten.linear.default for n in gm.graph.nodes),
        "same": torch.allclose(found, logits, atol=1e-4) and all(map(torch.allclose, own, held)),
        "weights": all(map(torch.equal, before, cut)),
        "bytes": (list(storages.values()), sum(x.nbytes for x in cut)),
    }


def test_products_of_a_share_become_one_in_its_prompts(pair: Together) -> None:
    """No weight is held twice: those of the share become views."""
    alone(PRESET)
    for found in pair(merged):
        assert found["same"] and found["weights"]
        assert found["linears"] == 5  # queries, keys and values; output; gate and up; down; logits
        held, needed = found["bytes"]
        assert held == [needed]


def notes(refuses: bool) -> tuple[str, bool]:
    """What a step says where the second rank cannot tune its kernels, and whether it is of kernels."""
    gm, inputs = step()

    def tune(*_: Any, **__: Any) -> int:
        if refuses and dist.get_rank():
            raise RuntimeError("no such type")
        return 0

    def compare(plain: GraphModule, fused: GraphModule, _: Any) -> None:
        """Once, on the first rank alone."""
        if not dist.get_rank():
            torch.testing.assert_close(fused(*given(inputs))[0], plain(*given(inputs))[0], atol=1e-4, rtol=1e-4)

    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch)
        patch.setattr(step_module, "tune", tune)
        patch.setattr(step_module, "_compare", compare)
        made = step_module.make_step(gm, inputs)
    return made.note, made.one_row is not None


def test_all_ranks_use_kernels_or_none_does(pair: Together) -> None:
    alone(PRESET)
    note = "decode: 9 generated kernels a token for one row; for more, compiled by Inductor; ranks meet 3 times "
    assert pair(notes, False) == [(f"{note}by torch.distributed (ranks share no memory on this device)", True)] * 2
    text = "decode: compiled by Inductor; no generated kernels: "
    assert pair(notes, True) == [(f"{text}another rank cannot use them", False), (f"{text}RuntimeError: no such type", False)]
