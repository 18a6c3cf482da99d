"""What ranks cannot share."""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx import Graph

import trilithon
from parallel.together import Together
from trilithon import Options
from trilithon.errors import CaptureError, InputError, VerificationFailed
from trilithon.parallel.plan import make_plan
from trilithon.parallel.share import Ranks, _require_same
from trilithon.parallel.sites import DIFFERS, HIDDEN
from trilithon.prove.verdict import Verdict
from trilithon.runtime.agree import require_same_choices, require_same_program, verified_by_all


class Sloped(nn.Module):
    """Attention with ALiBi, whose slopes follow from how many heads there are."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.head_dim, self.num_heads, self.num_key_value_groups = 8, heads, 1
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(heads * 8, heads * 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, -1, 8).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        slopes = torch.arange(1, q.shape[1] + 1).view(-1, 1, 1).float() * self.slope
        places = torch.arange(s)
        bias = (slopes * places).masked_fill(places > places[:, None], float("-inf"))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return self.o_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    slope = 0.5


class Model(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.attn = Sloped(heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)  # type: ignore[no-any-return]


def sloped(slope: float, heads: int) -> str:
    """The text that refuses it."""
    torch.manual_seed(0)
    model: Any = Model(heads).eval()
    model.attn.slope = slope
    names = {f"attn.{name}_proj": "colwise" for name in "qkv"} | {"attn.o_proj": "rowwise"}
    example = {"x": torch.randn(2, 9, heads * 8, generator=torch.Generator().manual_seed(0))}
    if slope == SMALL:
        model.tp_plan = names
        model = trilithon.tensor_parallel(model, example)
    else:
        plan = {name: ColwiseParallel() if style == "colwise" else RowwiseParallel() for name, style in names.items()}
        parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    with pytest.raises(trilithon.TrilithonError) as refused:
        trilithon.explain(model, example)
    return f"{type(refused.value).__name__}: {refused.value}"


SMALL = 1e-7  # too small for a comparison of results to see


@pytest.mark.parametrize(
    ("slope", "heads", "why"),
    [
        (0.5, 4, DIFFERS),
        (SMALL, 3, DIFFERS),  # the first rank has one head, and sees no difference: both refuse it
        (SMALL, 2, HIDDEN),
    ],
)
def test_slopes_of_heads_are_refused(slope: float, heads: int, why: str, pair: Together):
    for text in pair(sloped, slope, heads):
        assert why in text, text


def program(target: str, device: str = "cpu") -> tuple[Graph, Any]:
    """What a rank found, and where it meets the others."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(2, device=device)
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    graph.call_function(getattr(torch.ops._c10d_functional, target).default, (x, "sum", group))
    return graph, SimpleNamespace(name="attn", verdict=Verdict.PROVED, mask="causal", bias=None)


def disagreeing() -> list[str]:
    """The texts that refuse programs which differ on the second rank."""
    rank = dist.get_rank()
    graph, site = program("all_reduce")
    require_same_program(graph, "eager", [site])
    require_same_program(program("all_reduce", "meta")[0], "eager", [site])  # a model that is only explained
    require_same_choices(graph, "native", Options(solver_seconds=1.0 + rank), 32)  # may differ
    other, unproved = program("all_reduce_" if rank else "all_reduce")[0], copy(site)
    unproved.verdict = Verdict.UNKNOWN if rank else Verdict.PROVED
    texts = []
    for call in (
        lambda: require_same_program(graph, "eager", [unproved]),
        lambda: require_same_program(other, "eager", [site]),
        lambda: require_same_choices(graph, "native", Options(max_batch=1 + rank), 32),
        lambda: require_same_choices(graph, "native", Options(), 32 + rank),
        lambda: require_same_choices(graph, "native", Options(), None if rank else 32),
        lambda: require_same_choices(graph, "eager" if rank else "native", Options(), 32),
    ):
        with pytest.raises(CaptureError) as error:
            call()
        texts.append(str(error.value).splitlines()[0])
    return texts


def verified() -> str:
    """The error of ranks of which the second is wrong."""

    def verify() -> None:
        if dist.get_rank():
            raise VerificationFailed("decode disagrees with eager")

    with pytest.raises(VerificationFailed) as error:
        verified_by_all(program("all_reduce")[0], verify)
    return error.value.what


def test_what_is_wrong_on_one_rank_is_refused_by_all(pair: Together):
    assert pair(verified) == ["what another rank compiled disagrees with eager", "decode disagrees with eager"]


def test_ranks_that_come_to_different_programs_all_stop(pair: Together):
    texts = ["ranks came to different programs"] * 2 + ["ranks compile different programs"] * 4
    assert pair(disagreeing) == [texts] * 2


def test_without_a_process_group_nothing_is_shared():
    with pytest.raises(InputError) as refused:
        trilithon.tensor_parallel(nn.Linear(2, 2))
    assert str(refused.value) == (
        "cannot share a model among ranks\n  because there is no process group\n"
        "  start with torchrun, and call torch.distributed.init_process_group() first"
    )


def test_a_model_whose_parts_do_not_say_how_they_were_cut_is_refused():
    model = nn.Linear(2, 2)
    model._tp_size = 2  # type: ignore[assignment]
    with pytest.raises(CaptureError, match="transformers has cut it already, and its parts are no DTensors"):
        trilithon.explain(model, {"input": torch.zeros(1, 2)})


@pytest.mark.parametrize(
    ("style", "what"), [("moe_tp_experts", "experts, packed weights and others"), ("colwise", "other than linear layers")]
)
def test_a_plan_that_says_what_is_not_known_is_refused(style: str, what: str):
    model: Any = nn.ModuleDict({"layers": nn.ModuleList([nn.LayerNorm(2)])})
    model.tp_plan = {"layers.*": style}
    with pytest.raises(CaptureError, match=f"has '{style}' for layers.0, and .*{what} are not known here"):
        make_plan(model, 0, 2)


class Gives(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value


def compared() -> str:
    """A model that gives no number on the second rank, and a share that does."""
    model, ranks = Gives(float("nan") if dist.get_rank() else 1.0), Ranks(dist.group.WORLD, dist.get_rank(), 2)
    with pytest.raises(VerificationFailed) as refused:
        _require_same(model, Gives(1.0), {"x": torch.ones(1)}, ranks)
    return str(refused.value)


def test_a_model_that_gives_no_number_on_one_rank_is_refused_on_all(pair: Together):
    """The largest error of several ranks may leave out what is no number."""
    for text in pair(compared):
        assert text.startswith("the shares of Gives disagree with it\n  because the relative error is inf")


def unplanned() -> str:
    with pytest.raises(CaptureError) as refused:
        trilithon.tensor_parallel(nn.Linear(2, 2))
    return str(refused.value)


def test_a_model_without_a_plan_is_refused(pair: Together):
    text = (
        "cannot share Linear among ranks\n  because it has no tp_plan, and none of its parameters is a DTensor\n"
        "  use torch.distributed.tensor.parallel.parallelize_module on it first, or run it on one rank"
    )
    assert pair(unplanned) == [text] * 2
