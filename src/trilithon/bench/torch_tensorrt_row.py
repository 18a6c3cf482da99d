"""The one door to Torch-TensorRT: a Hugging Face model exported and compiled as its users do, for a row of the benchmark.

`torch_tensorrt` cannot be imported without a GPU, so nothing of it is imported before a row is built.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from trilithon.errors import TrilithonError

INSTALL = (
    "for torch 2.11: pip install torch-tensorrt-rtx==2.11.0 'tensorrt-rtx<1.5' (see docs/backends.md); or leave the row out"
)


@dataclass(frozen=True)
class Built:
    """A model compiled by Torch-TensorRT.

    Attributes:
        logits: ids `[b s]` -> logits `[b, s or 1, v]`.
        made_of: versions, number of engines, how much was left to PyTorch, and how far the logits are off eager's.
    """

    logits: Callable[[Tensor], Tensor]
    made_of: str


def library(device: torch.device) -> Any:
    """The module `torch_tensorrt`.

    Raises:
        TrilithonError: it is not installed, `device` is no GPU, or it cannot be imported beside this TensorRT.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise TrilithonError("cannot measure Torch-TensorRT", why="torch_tensorrt is not installed", todo=INSTALL)
    if device.type != "cuda":
        raise TrilithonError(
            "cannot measure Torch-TensorRT here", why=f"the model is on {device.type}, not on a GPU", todo="leave the row out"
        )
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # it raises bare Exception where TensorRT is missing or of another version
        why = f"importing it fails: {type(error).__name__}: {error}"
        raise TrilithonError("cannot measure Torch-TensorRT", why=why, todo=INSTALL) from error


def build(
    torch_tensorrt: Any,
    model: nn.Module,
    ids: Tensor,
    max_tokens: int,
    only_last: Mapping[str, int],
    settings: Mapping[str, Any],
) -> Built:
    """Export and compile `model` for the batch of `ids` and 1 to `max_tokens` tokens, best at the length of `ids`.

    Args:
        torch_tensorrt: as `library` gives it.
        only_last: arguments of `model` that leave all logits but the last token's away.
        settings: of `torch_tensorrt.dynamo.compile` that differ from its defaults. By default networks are strongly
            typed: each operation runs in the type that the model has it in.

    Source: torch_tensorrt 2.11.0, dynamo/_compiler.py. Sizes come from the program: range from its symbols, and the size
    to optimise for from the example. A parameter that needs a gradient, traced outside `no_grad`, asks attention for its
    log-sum-exp, which has no converter.
    """
    one_tensor = _Logits(model, only_last)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one says at each call that a default is deprecated
        program = export(one_tensor, ids, max_tokens)
        compiled = torch_tensorrt.dynamo.compile(program, arg_inputs=[ids], device=ids.device, **settings)

    def logits(ids: Tensor) -> Tensor:
        output: Any = compiled(ids)
        return output if isinstance(output, Tensor) else output[0]

    with torch.no_grad():
        error = _relative_error(logits(ids)[:, -1], one_tensor(ids)[:, -1])
    return Built(logits, f"{_versions(torch_tensorrt)}: {parts(compiled)}, logits off by {error:.1e} of eager's")


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def export(model: nn.Module, ids: Tensor, max_tokens: int) -> ExportedProgram:
    """`model`, from one tensor of ids to one of logits, as a program of 2 to `max_tokens` tokens."""
    tokens = Dim("tokens", min=2, max=max_tokens)  # Torch-TensorRT reads 2 as 1: export has no symbol for sizes below 2
    return torch.export.export(
        model,
        (ids,),
        dynamic_shapes=({1: tokens},),
        strict=False,
        # on a GPU, SDPA asks about strides when its kernel is chosen; as guards they contradict the range of tokens
        prefer_deferred_runtime_asserts_over_guards=True,
    )


class _Logits(nn.Module):
    """One tensor in, one tensor out."""

    def __init__(self, model: nn.Module, only_last: Mapping[str, int]) -> None:
        super().__init__()
        self.model, self.only_last = model, dict(only_last)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False, **self.only_last).logits  # type: ignore[no-any-return]


def parts(compiled: nn.Module) -> str:
    """How many engines a compiled module holds, and how many operations run in PyTorch between them."""
    engines = sum("_run_on_acc" in name for name, _ in compiled.named_children())
    graphs = [module.graph for module in compiled.modules() if isinstance(module, GraphModule)]
    left = sum(isinstance(node.target, torch._ops.OpOverload) for graph in graphs for node in graph.nodes)
    return (
        f"{engines or 'no'} engine{'' if engines == 1 else 's'}, {left or 'no'} operation{'' if left == 1 else 's'} in PyTorch"
    )


def _versions(torch_tensorrt: Any) -> str:
    tensorrt: Any = sys.modules["tensorrt"]  # torch_tensorrt puts the package that it runs on under this name
    name = "TensorRT-RTX" if getattr(tensorrt, "_package_name", "") == "tensorrt_rtx" else "TensorRT"
    return f"{torch_tensorrt.__version__} on {name} {tensorrt.__version__}"
