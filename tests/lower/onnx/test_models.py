"""Models as ONNX: ONNX Runtime gives eager's numbers, proved sites are `Attention`, and nothing rests on what nobody checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import trilithon
from models.configs import tiny
from trilithon.capture import hf
from trilithon.lower.onnx.library import onnx
from trilithon.lower.onnx.session import Session
from zoo.families import FAMILIES

CLOSE = 1e-5
HEADS, KEY_HEADS = 32, 8  # of llama-3.2-1b


def attentions(made: trilithon.OnnxModel) -> list[dict[str, Any]]:
    """Of each Attention: its attributes, and the shape of each of its inputs."""
    library = onnx()
    model = library.shape_inference.infer_shapes(library.load(str(made.path)), data_prop=True)
    library.checker.check_model(model)
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
    """A whole row, one padded on the right, one on the left, one with a hole."""
    kept = torch.ones(b, s, dtype=torch.int64)
    for row, gone in zip(kept[1:], (slice(s // 2 + 1, None), slice(0, s // 2), slice(1, 2)), strict=False):
        row[gone] = 0
    return kept


@torch.no_grad()
def agree(made: trilithon.OnnxModel, model: Any, **given: Tensor) -> None:
    """The first output is eager's, without a cache."""
    model.config.use_cache = False
    want = model(**given)[0]
    (got, *_), session = (session := Session(made.path, threads=1))(given), session
    assert set(session.inputs) == set(given)
    error = float((got - want).norm() / want.norm())
    assert error <= CLOSE, {name: list(x.shape) for name, x in given.items()}


def runs_on(made: trilithon.OnnxModel) -> list[str]:
    return [site.runs_on for site in made.report.sites]


def test_minilm_with_padding(tmp_path: Path) -> None:
    """Real weights; rows of padding, and a row that is nothing else."""
    model: Any = trilithon.load_model("minilm")
    made = trilithon.export_onnx(model, tmp_path / "m.onnx")
    assert made.error is not None and made.error <= CLOSE
    assert [file.name for file in made.files] == ["m.onnx", "m.onnx.data"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert runs_on(made) == ["ONNX Attention, mask padding(attention_mask)"] * 6
    assert len(attentions(made)) == 6
    session = Session(made.path, threads=1)
    assert session.inputs == ("input_ids", "attention_mask")
    for b, s in ((1, 1), (4, 7), (3, 33), (2, 128)):
        given = {"input_ids": ids(b, s), "attention_mask": padding(b, s)}
        if b == 3:
            given["attention_mask"][-1] = 0
        with torch.no_grad():
            want = model(**given)
        for got, theirs in zip(session(given), (want.last_hidden_state, want.pooler_output), strict=True):
            assert (got - theirs).norm() <= CLOSE * theirs.norm(), (b, s)


def test_causal_with_grouped_heads(tmp_path: Path) -> None:
    model = tiny("llama-3.2")
    compiled = trilithon.compile(model, max_tokens=32)
    made = compiled.to_onnx(tmp_path / "new" / "llama.onnx", opset=24)
    found = attentions(made)
    assert [node["is_causal"] for node in found] == [1, 1]
    assert [(o.domain, o.version) for o in onnx().load(str(made.path)).opset_import] == [("", 24)]
    for node in found:
        assert [shape[1] for shape in node["inputs"]] == [HEADS, KEY_HEADS, KEY_HEADS], "no mask, and K and V as they are"
    assert runs_on(made) == ["ONNX Attention, is_causal=1, grouped heads"] * 2
    for b, s in ((1, 1), (3, 9), (2, 40)):
        agree(made, model, input_ids=ids(b, s))


def test_a_padded_batch(tmp_path: Path) -> None:
    """What is causal without padding has it in its mask: left padding leaves rows without any key."""
    model = FAMILIES["qwen2"].make()
    made = trilithon.export_onnx(model, tmp_path / "m.onnx", inputs=("input_ids", "attention_mask"))
    assert [node["is_causal"] for node in attentions(made)] == [0]
    assert "causal & padding(attention_mask)" in runs_on(made)[0]
    for b, s in ((4, 9), (3, 2), (1, 5)):
        agree(made, model, input_ids=ids(b, s), attention_mask=padding(b, s))


def test_positions_that_are_an_input_prove_nothing(tmp_path: Path) -> None:
    """Causal only if positions count up, which ONNX cannot check: packed documents must stay apart."""
    model = FAMILIES["llama"].make()
    made = trilithon.export_onnx(model, tmp_path / "m.onnx", inputs=("input_ids", "position_ids"))
    assert runs_on(made) == ["ONNX Attention with the mask as exported"]
    assert "it is causal only if each row of position_ids is consecutive, which nobody checks" in made.report.sites[0].reason
    assert [node["is_causal"] for node in attentions(made)] == [0]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
    agree(made, model, input_ids=ids(2, 7), position_ids=packed)


def test_a_length_that_nobody_checks_proves_nothing(tmp_path: Path) -> None:
    """A window as long as the longest input is causal here, and a window where inputs may be longer."""
    config: Any = FAMILIES["mistral"].make().config
    config.max_position_embeddings = config.sliding_window
    model = hf.from_config(config)
    assert {str(site.mask) for site in trilithon.explain(model).sites} == {"causal"}
    made = trilithon.export_onnx(model, tmp_path / "m.onnx")
    assert runs_on(made) == [f"ONNX Attention, mask window({config.sliding_window}), grouped heads"]
    for s in (3, 20):
        agree(made, model, input_ids=ids(2, s))


def test_softcap_is_written_out(tmp_path: Path) -> None:
    config: Any = FAMILIES["gemma2"].make("eager").config
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    model = hf.from_config(config, attention="eager")
    made = trilithon.export_onnx(model, tmp_path / "m.onnx")
    assert attentions(made) == []
    assert all("matmul-softmax-matmul: versions of Attention differ" in text for text in runs_on(made))
    agree(made, model, input_ids=ids(2, 9))


def test_a_bias_by_position(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 60}
    torch.manual_seed(0)
    model: Any = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    made = trilithon.export_onnx(model, tmp_path / "m.onnx", inputs=("input_ids",))
    assert runs_on(made) == ["ONNX Attention, bias by position"]
    (node,) = attentions(made)
    assert len(node["inputs"]) == 4
    for b, s in ((2, 9), (1, 40)):
        agree(made, model, input_ids=ids(b, s))


class RandomBias(nn.Module):
    """Attention with a bias that activations decide."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.score = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        bias = (self.score(x) @ x.mT)[:, None]
        return nn.functional.scaled_dot_product_attention(q, k, v, bias)


def test_a_bias_of_activations_stays(tmp_path: Path) -> None:
    model = RandomBias().eval()
    made = trilithon.export_onnx(model, tmp_path / "m.onnx", {"x": torch.randn(2, 5, 16)})
    (text,) = runs_on(made)
    assert text.startswith("ONNX Attention with the mask as exported"), text
    x = torch.randn(3, 8, 16)
    (got,) = Session(made.path, threads=1)({"x": x})
    assert (got - model(x)).norm() <= CLOSE * got.norm()
