"""Run an ONNX model with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trilithon.errors import CannotLower
from trilithon.lower.onnx.library import runtime


class Session:
    """An ONNX model on the CPU.

    Raises:
        CannotLower: ONNX Runtime has no kernel for it, such as those of bfloat16 on a CPU.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        ort = runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except ort.capi.onnxruntime_pybind11_state.NotImplemented as error:
            why = str(error).splitlines()[0]
            raise CannotLower("ONNX Runtime cannot run it on a CPU", why=why) from error
        self.inputs = tuple(x.name for x in self._session.get_inputs())

    def __call__(self, given: Mapping[str, Tensor]) -> list[Tensor]:
        """What the model gives, in order."""
        arrays = {name: given[name].detach().cpu().numpy() for name in self.inputs}
        return [torch.from_numpy(x) for x in self._session.run(None, arrays)]
