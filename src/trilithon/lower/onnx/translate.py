"""A rewritten program as an ONNX model: torch.onnx translates it, `Attention` is ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from trilithon.capture.program import known_size
from trilithon.errors import CannotLower
from trilithon.lower.onnx.decompose import DECOMPOSITIONS, prepare
from trilithon.lower.onnx.library import onnxscript, quiet
from trilithon.lower.onnx.op import ONNX_ATTENTION
from trilithon.passes import bound_arguments
from trilithon.rewrite.op import ATTENTION
from trilithon.rewrite.unlift import fake_inputs

FLOAT32 = 1  # onnx.TensorProto.FLOAT

LARGE = 1 << 26  # bytes of weights from which on they lie in a file of their own


def lower_onnx(program: ExportedProgram) -> ExportedProgram:
    """Replace every `trilithon::attention` and SDPA by `trilithon::onnx_attention`, or write it out; it runs in PyTorch too."""
    for node in program.graph.find_nodes(op="call_function", target=ATTENTION):
        prepare(bound_arguments(node))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export itself
        lowered: ExportedProgram = program.run_decompositions(dict(DECOMPOSITIONS))
    return lowered


def translate(program: ExportedProgram, opset: int, outputs: Sequence[str] | None = None) -> Any:
    """A lowered program as a `torch.onnx.ONNXProgram`.

    Args:
        outputs: their names; None = those of the program's nodes.

    Raises:
        CannotLower: torch.onnx has no translation for an operation.
    """
    _require_float32(program)
    table: dict[Any, Any] = {ONNX_ATTENTION: attention_of(onnxscript().opset23)}
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # of torch.export and onnxscript
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                output_names=outputs,
                custom_translation_table=table,
                optimize=False,  # it fuses what looks like a rotary embedding, whatever the batch of its cosines
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise CannotLower(
                "cannot export to ONNX", why=reason(error), todo="see torch.onnx.export(..., report=True)"
            ) from error
        assert made is not None
        _fix_axes(made, program)
        onnxscript().optimizer.optimize(made.model)
    return made


def _require_float32(program: ExportedProgram) -> None:
    """Raises CannotLower for a number that is infinite in float32, in which torch.onnx writes numbers."""
    for node in program.graph.nodes:
        for x in tree_leaves((node.args, node.kwargs)):
            if isinstance(x, float) and math.isfinite(x) and abs(x) > torch.finfo(torch.float32).max:
                why = f"{node.name} uses {x:g}, and torch.onnx writes numbers in float32"
                raise CannotLower("cannot export to ONNX", why=why, todo="convert the model: model.float()")


def _fix_axes(made: Any, program: ExportedProgram) -> None:
    """An axis of an input that can have one size has it in the model too, where ONNX Runtime looks at it in each call."""
    held = fake_inputs(program)
    for value in made.model.graph.inputs:
        for axis, size in enumerate(held[value.name].shape):
            known = known_size(size)
            if known is not None:
                value.shape[axis] = known


def attention_of(op: Any) -> Any:
    """The translation of `trilithon::onnx_attention`; its annotations tell torch.onnx what is an attribute."""

    def attention(q: Any, k: Any, v: Any, mask: Any = None, scale: float = 1.0, is_causal: bool = False) -> Any:
        is_half = str(q.dtype) in ("FLOAT16", "BFLOAT16")
        exact = {"softmax_precision": FLOAT32} if is_half else {}  # as the canonical op computes it
        made, *_ = op.Attention(q, k, v, mask, scale=scale, is_causal=int(is_causal), **exact)
        return made

    return attention


def reason(error: BaseException) -> str:
    """What is behind an error of torch.onnx: the last cause, its first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def save(made: Any, path: Path, notes: Mapping[str, str]) -> list[Path]:
    """Write a translated program, large weights in one file beside it; what was written.

    Args:
        notes: to keep in the model's `metadata_props`.
    """
    made.model.metadata_props.update(notes)
    weights = sum(x.const_value.nbytes for x in made.model.graph.initializers.values() if x.const_value is not None)
    made.save(path, external_data=weights >= LARGE)
    data = path.with_name(f"{path.name}.data")
    return [path, data] if data.exists() else [path]
