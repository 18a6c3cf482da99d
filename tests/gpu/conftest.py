"""Set-up of tests on a GPU."""

from __future__ import annotations

import os

import pytest

from trilithon.errors import CannotLower
from trilithon.lower.tensorrt.library import library

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # TensorRT-RTX reads it once: without it float32 engines multiply in TF32
ENGINES = ("test_tensorrt_", "test_turned_values")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs engines is skipped without TensorRT."""
    try:
        library()
    except CannotLower as error:
        for item in items:
            if item.path.name.startswith(ENGINES):
                item.add_marker(pytest.mark.skip(reason=error.why))
