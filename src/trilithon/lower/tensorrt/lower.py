"""Lower a canonical module to a TensorRT engine, or find the engine that an earlier run built."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch.fx import GraphModule

from trilithon.lower.inputs import Input
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.engine import build, resolve_target
from trilithon.lower.tensorrt.module import TensorRTModule
from trilithon.options import Options


def lower_tensorrt(gm: GraphModule, inputs: Sequence[Input], name: str, options: Options) -> TensorRTModule:
    """Convert and build.

    Args:
        gm: of ATen and `trilithon` operations; weights are its attributes.
        inputs: one for each placeholder.
        name: of the engine, e.g. "decode".

    Raises:
        CannotLower: there is no such GPU, an operation has no converter, or TensorRT refuses the network.
    """
    target = resolve_target(options.gpu)
    net = convert(gm, inputs, attention=options.attention)
    engine = build(net, inputs, target, _folder() / f"{name}.plan")
    return TensorRTModule(engine, net)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="trilithon-engines-")


def _folder() -> Path:
    """A new folder for one engine; removed when the process ends."""
    return Path(tempfile.mkdtemp(dir=_scratch().name))
