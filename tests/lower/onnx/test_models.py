"""Models as ONNX: ONNX Runtime gives eager's numbers, proved sites are `Attention`, and nothing rests on what nobody checks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import trilithon
from models.configs import CONFIGS
from trilithon.capture import hf
from trilithon.lower.onnx import translate
from trilithon.lower.onnx.library import onnx
from trilithon.lower.onnx.session import Session

CLOSE = {torch.float32: 1e-5, torch.float16: 1e-2}


def one_layer(name: str) -> Any:
    """A model of one narrow layer, heads as they are in the real one."""
    config: Any = CONFIGS[name]()
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return config


def attentions(made: trilithon.OnnxModel) -> list[dict[str, Any]]:
    """Of each Attention: its attributes, and the shape of each of its inputs."""
    library = onnx()
    model = library.shape_inference.infer_shapes(library.load(str(made.path)), data_prop=True)
    library.checker.check_model(model)
    assert [o.version for o in model.opset_import if not o.domain] == [made.opset]
    shapes = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.value_info, *model.graph.input)
    }
    return [
        {a.name: library.helper.get_attribute_value(a) for a in node.attribute}
        | {"inputs": [shapes.get(x) for x in node.input]}
        for node in model.graph.node
        if node.op_type == "Attention"
    ]


def ids(b: int, s: int) -> Tensor:
    return torch.randint(3, 60, (b, s), generator=torch.Generator().manual_seed(b * s))


def padding(b: int, s: int) -> Tensor:
    """A whole row, one padded on the right, one on the left, one that is nothing else."""
    kept = torch.ones(b, s, dtype=torch.int64)
    for row, gone in zip(kept[1:], (slice(s // 2 + 1, None), slice(0, s // 2), slice(None)), strict=False):
        row[gone] = 0
    return kept


@torch.no_grad()
def agree(made: trilithon.OnnxModel, model: Any, sizes: tuple[tuple[int, int], ...]) -> None:
    """ONNX Runtime gives what eager gives without a cache, at each number of rows and tokens."""
    session = Session(made.path, threads=1)
    for b, s in sizes:
        given = {"input_ids": ids(b, s)} | ({"attention_mask": padding(b, s)} if "attention_mask" in session.inputs else {})
        assert set(session.inputs) == set(given)
        for got, want in zip(session(given), model(**given).to_tuple(), strict=True):
            assert (got - want).norm() <= CLOSE[want.dtype] * want.norm(), (b, s)


def runs_on(made: trilithon.OnnxModel) -> list[str]:
    return [site.runs_on for site in made.report.sites]


PRESETS = {  # the type, the opset, and what attention becomes
    "qwen2.5": (torch.float32, 24, "ONNX Attention, mask window(6), grouped heads"),
    "qwen3": (torch.float16, 23, "ONNX Attention, is_causal=1, grouped heads"),
    "llama-3.2": (torch.float32, 23, "ONNX Attention, is_causal=1, grouped heads"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, tmp_path: Path) -> None:
    """Qwen2.5 with a window as long as the longest input: nobody checks that inputs are not longer."""
    dtype, opset, form = PRESETS[name]
    config = one_layer(name)
    config.use_cache = False
    if "window" in form:
        config.layer_types, config.sliding_window, config.max_position_embeddings = ["sliding_attention"], 6, 6
    model: Any = hf.from_config(config).to(dtype)
    made = trilithon.export_onnx(model, tmp_path / "new" / "m.onnx", opset=opset, verify=False)
    assert runs_on(made) == [form]
    (node,) = attentions(made)
    assert (node["is_causal"], len(node["inputs"])) == ((0, 4) if "mask" in form else (1, 3))
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    assert tuple(shape[1] for shape in node["inputs"][:3]) == heads, "K and V as they are"
    assert node.get("softmax_precision") == (1 if dtype == torch.float16 else None), "softmax in float32"
    agree(made, model, ((1, 1), (4, 20)))


def test_minilm_with_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real weights, of the first layer."""
    model: Any = trilithon.load_model("minilm")
    model.encoder.layer = model.encoder.layer[:1]
    monkeypatch.setattr(translate, "LARGE", 1 << 20)
    made = trilithon.export_onnx(model, tmp_path / "m.onnx")
    assert [file.name for file in made.files] == ["m.onnx", "m.onnx.data"]
    assert made.error is not None and made.error <= CLOSE[torch.float32]
    assert sorted(tmp_path.iterdir()) == sorted(made.files)
    assert runs_on(made) == ["ONNX Attention, mask padding(attention_mask)"]
    agree(made, model, ((1, 1), (4, 33)))


class Given:
    """What the attentions below are made of."""

    def __init__(self, x: Tensor, positions: Tensor, kept: Tensor) -> None:
        heads = x.view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)
        self.q, self.k, self.v = heads, heads * 0.5, heads + 1.0
        self.place = torch.arange(x.shape[1])
        self.distance = (self.place - self.place[:, None]).to(x.dtype)
        self.slopes = torch.tensor([[[0.5]], [[0.25]]])
        self.causal = self.place <= self.place[:, None]
        self.blocked = torch.where(self.causal, 0.0, -torch.inf)
        self.positions, self.kept = positions, kept[:, None, None, :] != 0

    def sdpa(self, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.q, self.k, self.v, mask)


KEPT = "ONNX Attention with the mask as exported"
OTHERS: dict[str, tuple[Callable[[Given], Tensor], str]] = {
    "a bias by position": (
        lambda x: x.sdpa(x.slopes * x.distance + x.blocked),
        "ONNX Attention, mask causal and bias by position",
    ),
    "a bias of activations": (lambda x: x.sdpa(x.q @ x.v.mT), KEPT),
    "positions": (lambda x: x.sdpa(x.positions[:, None, None, :] <= x.positions[:, None, :, None]), KEPT),
    "the mean of V": (lambda x: x.sdpa(torch.where(x.kept, 0.0, torch.finfo(x.q.dtype).min)), KEPT),
}


class Others(nn.Module):
    def forward(self, x: Tensor, positions: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        given = Given(x, positions, kept)
        return tuple(make(given) for make, _ in OTHERS.values())


def test_other_attentions(tmp_path: Path) -> None:
    """Biases, and what would be causal or padding if inputs were checked: they are run where that is not so."""
    example = {
        "x": torch.randn(2, 5, 16),
        "positions": torch.arange(5).expand(2, 5),
        "kept": torch.ones(2, 5, dtype=torch.int64),
    }
    model, b, s = Others().eval(), Dim("b", min=1, max=64), Dim("s", min=1, max=64)
    made = trilithon.export_onnx(model, tmp_path / "m.onnx", example, dynamic_shapes={name: {0: b, 1: s} for name in example})
    for site, form in zip(made.report.sites, (form for _, form in OTHERS.values()), strict=True):
        assert site.runs_on.startswith(form), site.reason
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [5, 4, 3, 2, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]])
    given = {"x": torch.randn(3, 7, 16), "positions": packed, "kept": padding(4, 7)[1:]}
    for name, got, want in zip(OTHERS, Session(made.path, threads=1)(given), model(**given), strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm(), name
