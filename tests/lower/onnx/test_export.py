"""What `export_onnx` refuses, and that a wrong model is never written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import trilithon
from trilithon import InputError, VerificationFailed
from trilithon.lower.onnx import decompose, library
from trilithon.lower.onnx.forms import Form


class Padded(nn.Module):
    """Causal attention over a batch with padding."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q = x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        index = torch.arange(x.shape[1])
        allowed = (index <= index[:, None]) & (attention_mask != 0)[:, None, None, :]
        return scaled_dot_product_attention(q, q, q, allowed)


EXAMPLE = {"x": torch.randn(2, 5, 8), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}


def export(path: Path, **options: object) -> trilithon.OnnxModel:
    return trilithon.export_onnx(Padded().eval(), path, EXAMPLE, **options)  # type: ignore[arg-type]


def test_a_wrong_model_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lowering that forgets the padding is caught by the padded call, and the file from before is left as it was."""
    (tmp_path / "m.onnx").write_text("before")
    monkeypatch.setattr(decompose, "form_of", lambda _: Form("causal"))
    with pytest.raises(VerificationFailed, match="the ONNX model disagrees with eager"):
        export(tmp_path / "m.onnx")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("m.onnx", "before")]


def test_without_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "RUNTIME", "no_such_package")
    made = export(tmp_path / "m.onnx")
    assert (made.error, made.note) == (None, "not verified: onnxruntime is not installed")
    assert made.path.exists()


def test_a_program_rewritten_before_is_refused(tmp_path: Path) -> None:
    """`trilithon.lower` may make a mask causal under a guard, or for some sizes, which ONNX would not check."""

    class Positions(nn.Module):
        def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
            q = x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
            allowed = position_ids[:, None, None, :] <= position_ids[:, None, :, None]
            return scaled_dot_product_attention(q, q, q, allowed)

    example = {"x": EXAMPLE["x"], "position_ids": torch.arange(5).expand(2, 5)}
    shapes = {"x": {1: torch.export.Dim("s", min=2, max=64)}, "position_ids": {1: torch.export.Dim("s", min=2, max=64)}}
    program = torch.export.export(Positions().eval(), (), example, dynamic_shapes=shapes)
    with pytest.raises(InputError, match="it was rewritten already"):
        trilithon.export_onnx(trilithon.lower(program), tmp_path / "m.onnx")
    made = trilithon.export_onnx(program, tmp_path / "m.onnx")
    assert made.report.sites[0].runs_on.startswith("ONNX Attention with the mask as exported")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"opset": 22}, "opset 22 is not supported"),
        ({"inputs": ("input_ids",)}, "cannot take inputs"),
    ],
)
def test_arguments(tmp_path: Path, arguments: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        export(tmp_path / "m.onnx", **arguments)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a folder"):
        export(tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PACKAGES", ("no_such_package",))
    with pytest.raises(InputError, match=r"no_such_package is not installed\n  pip install 'trilithon\[onnx\]'"):
        export(tmp_path / "m.onnx")
