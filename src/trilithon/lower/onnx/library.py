"""The one door to onnx, onnxscript and onnxruntime, imported when first needed."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from trilithon.errors import InputError

PACKAGES = ("onnx", "onnxscript")  # torch.onnx needs both
RUNTIME = "onnxruntime"
OPSETS = (23, 24)


def require_onnx() -> None:
    """Raises InputError unless what torch.onnx needs is installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            "cannot export to ONNX", why=f"{' and '.join(missing)} is not installed", todo="pip install 'trilithon[onnx]'"
        )


def onnx() -> Any:
    require_onnx()
    return importlib.import_module("onnx")


def onnxscript() -> Any:
    require_onnx()
    return importlib.import_module("onnxscript")


def has_runtime() -> bool:
    return find_spec(RUNTIME) is not None


def runtime() -> Any:
    """ONNX Runtime.

    Raises:
        InputError: it is not installed.
    """
    if not has_runtime():
        raise InputError("cannot run an ONNX model", why=f"{RUNTIME} is not installed", todo="pip install 'trilithon[onnx]'")
    return importlib.import_module(RUNTIME)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx logs a line for each operation of torchvision where that is not installed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
