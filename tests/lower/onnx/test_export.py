"""What `export_onnx` refuses, and that a wrong model is never written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

import trilithon
from trilithon import CannotLower, InputError, VerificationFailed
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


def test_a_number_that_float32_does_not_have(tmp_path: Path) -> None:
    class Blocked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * torch.finfo(torch.float64).min).softmax(-1)

    with pytest.raises(CannotLower, match="writes numbers in float32"):
        trilithon.export_onnx(Blocked().eval(), tmp_path / "m.onnx", {"x": torch.zeros(2, 3, dtype=torch.float64)})


def test_a_program_rewritten_before_is_refused(tmp_path: Path) -> None:
    """`trilithon.lower` may make a mask causal under a guard, or for some sizes, which ONNX would not check."""
    program = torch.export.export(Padded().eval(), (), EXAMPLE)
    with pytest.raises(InputError, match="it was rewritten already"):
        trilithon.export_onnx(trilithon.lower(program), tmp_path / "m.onnx")


def test_a_number_is_no_input(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, count: int) -> Tensor:
            return x * count

    shapes = {"x": {0: Dim.AUTO}, "count": Dim.DYNAMIC}
    with pytest.raises(InputError, match="cannot export count"):
        trilithon.export_onnx(Scaled().eval(), tmp_path / "m.onnx", {"x": torch.randn(2, 3), "count": 5}, dynamic_shapes=shapes)


def test_a_width_that_is_not_fixed(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scaled_dot_product_attention(x, x, x)

    shapes = {"x": {3: Dim.AUTO}}
    with pytest.raises(CannotLower, match="its scale follows from a width that is not fixed"):
        trilithon.export_onnx(Wide().eval(), tmp_path / "m.onnx", {"x": torch.randn(1, 1, 3, 8)}, dynamic_shapes=shapes)


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
