"""The one door to TensorRT: `tensorrt_rtx`, else `tensorrt`, imported when first needed; and its one logger."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import Any

import torch

from trilithon.errors import CannotLower

PACKAGES = ("tensorrt_rtx", "tensorrt")  # the first builds engines without a GPU, for the GPU that it is told
HARMLESS = "catchCudaError"  # logged after each real error on a machine without a GPU
INSTALL = "pip install 'tensorrt-rtx>=1.6,<1.7'"
BREAKS_BUILDING = {"tensorrt_rtx 1.7": "its builder ends the process on decode steps of two layers or more (1.7.1.116)"}
BREAKS_RUNNING = {  # docs/backends.md, "A crash"
    "tensorrt_rtx 1.5": "several processes that run engines of many sizes on one GPU may end in a corrupted heap (1.5.0.114)"
}
log = logging.getLogger(__name__)


@cache
def library() -> Any:
    """The TensorRT module.

    Raises:
        CannotLower: none is installed, or it has no attention layer.
    """
    for name in PACKAGES:
        try:
            found = importlib.import_module(name)
        except ImportError:
            continue
        if not hasattr(found.INetworkDefinition, "add_attention_v2"):
            raise CannotLower(
                f"cannot use {name} {found.__version__}",
                why="it has no INetworkDefinition.add_attention_v2",
                todo=INSTALL,
            )
        return found
    raise CannotLower(
        "cannot lower with backend 'tensorrt'",
        why=f"neither {' nor '.join(PACKAGES)} is installed",
        todo="pip install 'trilithon[tensorrt]', or use backend='native'",
    )


def version() -> str:
    """Which package is used, e.g. "tensorrt_rtx 1.6.1.120"."""
    return f"{library().__name__} {library().__version__}"


def check_builder() -> None:
    """Refuse a TensorRT that ends the process that builds an engine, without a word.

    Raises:
        CannotLower: it is one, or there is none.
    """
    if (why := BREAKS_BUILDING.get(_minor())) is not None:
        raise CannotLower(f"cannot build an engine with {version()}", why=why, todo=INSTALL)


def warn_of_running() -> None:
    if (why := BREAKS_RUNNING.get(_minor())) is not None:
        log.warning("%s: %s; %s", version(), why, INSTALL)


def _minor() -> str:
    return ".".join(version().split(".")[:2])


@cache
def dtypes() -> dict[torch.dtype, Any]:
    """TensorRT's data type for each of PyTorch's that it has."""
    trt = library()
    return {
        torch.float32: trt.float32,
        torch.float16: trt.float16,
        torch.bfloat16: trt.bfloat16,
        torch.int32: trt.int32,
        torch.int64: trt.int64,
        torch.bool: trt.bool,
        torch.int8: trt.int8,
        torch.uint8: trt.uint8,
    }


@cache
def torch_dtypes() -> dict[Any, torch.dtype]:
    """PyTorch's data type for each of TensorRT's."""
    return {theirs: ours for ours, theirs in dtypes().items()}


@cache
def logger() -> Any:
    """The logger of this process: TensorRT wants one. It keeps what it is told; see `messages_since`."""
    base: Any = library().ILogger

    class Log(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((severity.name, message))

    return Log()


def mark() -> int:
    """A place in the log."""
    return len(logger().messages)


def messages_since(place: int, *severities: str) -> list[str]:
    """What was logged behind `place`, of these severities (all if none is given)."""
    return [text for severity, text in logger().messages[place:] if not severities or severity in severities]


def errors_since(place: int) -> list[str]:
    """The errors behind `place`; without what is logged for lack of a GPU."""
    return [x for x in messages_since(place, "ERROR", "INTERNAL_ERROR") if HARMLESS not in x]
