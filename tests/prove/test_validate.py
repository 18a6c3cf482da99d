"""Translation validation: the program's own mask, run by torch, against the mask that was proved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

import trilithon
from masks import PROVED, export_case
from models.configs import tiny
from trilithon.capture import hf
from trilithon.capture.export import capture
from trilithon.lift.handlers import HANDLERS
from trilithon.lift.registry import Call
from trilithon.lift.symtensor import SymTensor
from trilithon.prove.mask_graph import MaskGraph
from trilithon.prove.program import Examined, examine_program, size_ranges
from trilithon.prove.prove import Ranges
from trilithon.prove.validate import ROUNDS, Validation, validate
from trilithon.prove.verdict import Verdict
from trilithon.spec import term as t
from trilithon.spec.masks import Causal, Full, Mask, SlidingWindow

aten = torch.ops.aten
Shapes = dict[str, Any]


def examined(model: nn.Module, example: dict[str, Any], shapes: Shapes | None = None) -> list[Examined]:
    return examine_program(capture(model.eval(), example, shapes).program)


def validation_of(found: Examined) -> Validation:
    assert found.is_proved, found.proof
    assert found.validated is not None
    return found.validated


@cache
def row(name: str) -> tuple[Examined, Ranges]:
    """A row of the table of masks, examined."""
    program = export_case(PROVED[name]).program
    (found,) = examine_program(program)
    return found, size_ranges(program)


def against(name: str, mask: Mask, **changes: Any) -> Validation:
    """A row, compared with another mask than the one it is."""
    found, ranges = row(name)
    assert found.meaning is not None and found.proof is not None
    graph = MaskGraph.of(found.site, found.meaning.tables)
    return validate(graph, found.site, found.meaning, replace(found.proof, mask=mask, **changes), ranges)


ROWS = (
    "causal",
    "causal_finfo_min",
    "causal_triu_inf",
    "lower_right",
    "window_4",
    "padding_bool",
    "padding_finfo_min",
    "causal_padding",
    "documents",
    "packed_positions",
)


@pytest.mark.parametrize("name", ROWS)
def test_what_was_proved_agrees(name: str) -> None:
    validated = validation_of(row(name)[0])
    assert len(validated.sizes) == ROUNDS and not validated.skipped
    assert validated.cells > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        ("qwen3", ("input_ids", "position_ids")),
        ("gpt2", ("input_ids", "attention_mask")),
        ("mistral", ("input_ids",)),
        ("bert", ("input_ids", "attention_mask")),
    ],
)
def test_every_site_of_a_model_agrees(model: str, inputs: tuple[str, ...], attention: str) -> None:
    module = tiny(model, attention, layers=1)
    for found in examined(module, *hf.example_for(module, inputs)):
        validated = validation_of(found)
        assert validated.cells > 0 and len(validated.sizes) == ROUNDS


def test_the_edge_of_a_window_is_looked_at() -> None:
    wider = against("window_4", SlidingWindow(5))
    assert wider.difference
    assert against("window_4", SlidingWindow(4)).sizes[2].endswith("s=13 t=13")


@pytest.mark.parametrize(
    ("name", "mask", "says"),
    [
        ("causal", Full(), "the program blocks what full allows"),
        ("full", Causal(), "the program allows what causal blocks"),
        ("causal_inf", Full(), "the program blocks what full allows"),
        ("packed_positions", SlidingWindow(3), "the program allows what window(3) blocks"),
    ],
)
def test_a_difference_names_its_cell(name: str, mask: Mask, says: str) -> None:
    found = against(name, mask)
    assert found.cells == 0 and found.sizes == ()
    assert found.difference.startswith("at b=0 h=0 q=")
    assert found.difference.endswith(says)
    assert " with b=3 h=2 s=" in found.difference


class Eager(nn.Module):
    """Attention written out. What is asked for decides how its scores are scaled and what a kept cell adds."""

    def __init__(self, scale: float = 0.5, added: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale, self.added, self.dtype = scale, added, dtype

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        keep = i[None, :] <= i[:, None]
        scores = q @ k.transpose(-1, -2) * self.scale
        mask = torch.where(keep, self.added, torch.finfo(self.dtype).min).to(self.dtype)
        return torch.softmax(scores + mask, dim=-1) @ v


def attend(model: nn.Module, dtype: torch.dtype = torch.float32, **sizes: Any) -> Examined:
    b, s = sizes.get("b", Dim("b", min=1, max=64)), sizes.get("s", Dim("s", min=1, max=512))
    axes = {axis: size for axis, size in ((0, b), (2, s)) if size is not None}
    example = {name: torch.randn(2, 2, 6, 4, dtype=dtype) for name in "qkv"}
    (found,) = examined(model, example, dict.fromkeys("qkv", axes))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_eager_attention_are_compared(dtype: torch.dtype) -> None:
    found = attend(Eager(scale=0.3, dtype=dtype), dtype)
    assert found.site.kind == "decomposed"
    assert validation_of(found).cells > 0


def test_another_factor_on_the_scores_is_found() -> None:
    program = capture(Eager().eval(), {name: torch.randn(2, 2, 6, 4) for name in "qkv"}).program
    (found,) = examine_program(program)
    assert found.meaning is not None and found.proof is not None
    graph = MaskGraph.of(found.site, found.meaning.tables)
    other = replace(found.meaning, scale=0.51)
    result = validate(graph, found.site, other, found.proof, size_ranges(program))
    assert "which neither keeps nor blocks" in result.difference


SIZES = {"vocab_size": 64, "hidden_size": 32}
NAMES = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
BEYOND: dict[str, tuple[Callable[[], Any], str]] = {  # models whose scores are more than masked, and what is more
    "bloom": (lambda: transformers.BloomConfig(**SIZES, **NAMES, n_layer=1, n_head=4), "bias"),
    "gemma2": (
        lambda: transformers.Gemma2Config(
            **SIZES,
            **NAMES,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            attn_logit_softcapping=0.5,
        ),
        "softcap",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BEYOND)
def test_what_is_added_to_kept_cells_is_compared(name: str, dtype: torch.dtype) -> None:
    config, field = BEYOND[name]
    model = hf.from_config(config(), attention="eager", dtype=dtype)
    program = capture(model, *hf.example_for(model, ("input_ids",))).program
    (found,) = examine_program(program)
    assert validation_of(found).cells > 0
    assert found.meaning is not None and found.proof is not None
    assert getattr(found.meaning, field) is not None
    without = replace(found.meaning, **{field: None})
    graph = MaskGraph.of(found.site, found.meaning.tables)
    result = validate(graph, found.site, without, found.proof, size_ranges(program))
    assert "which neither keeps nor blocks" in result.difference


def lift_le_as_lt(call: Call, x: SymTensor, other: SymTensor) -> SymTensor:
    rank = max(x.rank, other.rank)
    return call.result(lambda i: x.broadcast_at(i[-rank:]) < other.broadcast_at(i[-rank:]))


def lift_and_as_or(call: Call, x: SymTensor, other: SymTensor) -> SymTensor:
    return call.result(lambda i: x.broadcast_at(i) | other.broadcast_at(i))


def lift_where_upside_down(call: Call, condition: SymTensor, x: SymTensor, other: SymTensor) -> SymTensor:
    return call.result(lambda i: t.ite(condition.broadcast_at(i), other.broadcast_at(i), x.broadcast_at(i)))


class Masked(nn.Module):
    """Attention under a mask that a function of q and k makes."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask(i[:, None], i[None, :]))


BROKEN: dict[str, tuple[Any, Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "le_as_lt": (aten.le.Tensor, lift_le_as_lt, lambda q, k: (k <= q + 1) & (q == q)),
    "and_as_or": (aten.__and__.Tensor, lift_and_as_or, lambda q, k: (k <= q) & (k < q)),
    "where_upside_down": (
        aten.where.self,
        lift_where_upside_down,
        lambda q, k: torch.where(k > q, torch.zeros(()), torch.full((), -torch.inf)),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_handler_is_found_and_nothing_is_rewritten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, broken, mask = BROKEN[name]
    model = Masked(mask).eval()
    example = {name: torch.randn(2, 2, 6, 4) for name in "qkv"}
    shapes = {name: {0: Dim("b", min=1, max=8), 2: Dim("s", min=1, max=64)} for name in "qkv"}
    assert op in HANDLERS
    monkeypatch.setitem(HANDLERS, op, broken)
    report = trilithon.explain(model, example, shapes)
    (site,) = report.sites
    assert site.verdict is Verdict.UNKNOWN
    assert site.reason.startswith("the lifted formula and the program's own mask disagree: at b=")
    assert site.reason.endswith(". This is a bug of Trilithon: please report it")
    assert site.alternatives == ()
    assert report.passes["fuse-attention"] == 0


def test_sizes_that_depend_on_each_other() -> None:
    class Doubled(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
            return scaled_dot_product_attention(q, k, v, attn_mask=j[None, :] <= i[:, None])

    half = Dim("half", min=1, max=64)
    example = {"q": torch.randn(1, 2, 5, 4), "k": torch.randn(1, 2, 10, 4), "v": torch.randn(1, 2, 10, 4)}
    (found,) = examined(Doubled(), example, {"q": {2: half}, "k": {2: 2 * half}, "v": {2: 2 * half}})
    for text in validation_of(found).sizes:
        sizes = dict(part.split("=") for part in text.split())
        assert int(sizes["t"]) == 2 * int(sizes["s"])


def test_a_static_mask_is_one_case() -> None:
    validated = validation_of(attend(Masked(lambda q, k: k <= q), b=None, s=None))
    assert validated == Validation(cells=36, sizes=("b=2 h=2 s=6 t=6",))


def test_a_mask_that_is_too_large_is_skipped() -> None:
    example = {name: torch.randn(1, 1, 4000, 2) for name in "qkv"}
    shapes = {name: {2: Dim("s", min=4000, max=5000)} for name in "qkv"}
    (found,) = examined(Masked(lambda q, k: k <= q), example, shapes)
    validated = validation_of(found)
    assert validated.cells == 0 and validated.difference == ""
    assert "16000000 cells at b=1 h=1 s=4000 t=4000, too many to compare" in validated.skipped


def test_parameters_and_meta_tensors_are_not_needed() -> None:
    model = hf.load_model("qwen3-0.6b", device="meta", layers=1)
    (found,) = examined(model, *hf.example_for(model, ("input_ids", "position_ids")))
    assert validation_of(found).cells > 0


def test_nothing_is_run_without_a_proof_or_a_mask() -> None:
    refused = attend(Masked(lambda q, k: torch.sort(k, dim=-1, stable=True)[0] <= q))
    assert refused.finding is None and refused.validated is None

    class Flag(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    assert attend(Flag()).is_proved
    assert attend(Flag()).validated is None


def test_the_random_state_of_the_caller_is_left_alone() -> None:
    program = export_case(PROVED["packed_positions"]).program
    torch.manual_seed(7)
    before = torch.get_rng_state()
    examine_program(program)
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_nodes_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[MaskGraph] = []
    real = MaskGraph.run
    monkeypatch.setattr(MaskGraph, "run", lambda self, *given: ran.append(self) or real(self, *given))
    model = tiny("gpt2", "eager")
    assert len(examined(model, *hf.example_for(model, ("input_ids",)))) == 2
    assert len(ran) == ROUNDS


def test_inputs_meet_the_assumptions_of_the_proof() -> None:
    """Without the proof's assumption the masks differ, so inputs must be drawn from it."""
    assert against("packed_positions", Causal()).difference == ""
    assert against("packed_positions", Causal(), assumptions=()).difference
