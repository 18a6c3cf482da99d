"""Settings that cannot be compiled, or cannot run, leave nothing behind."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from trilithon.lower.native.fused import tune

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


class Model:
    """What a caller holds in its frame."""


def kernel(**more: Any) -> SimpleNamespace:
    one = {"warps": 4}
    return SimpleNamespace(name="k", candidates=lambda: [one], settings=lambda: one, use=lambda _: None, **more)


def test_a_kernel_that_does_not_compile_holds_no_caller() -> None:
    """Triton keeps what it was to compile, and with it the error; an error holds the frames that it went through."""
    active = importlib.import_module("triton.runtime._async_compile").active_mode
    kept: list[Any] = []

    def prepare(*_: Any) -> None:
        def fails() -> None:
            raise ValueError("too many registers") from KeyError("r255")

        kept.append(active.get().submit("key", fails, lambda made: made))

    def caller() -> weakref.ref[Model]:
        model = Model()
        one = kernel(prepare=prepare)
        tune._compile([(one, ())], {id(one)})
        return weakref.ref(model)

    gone = caller()
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match="too many registers"):
        kept[0].result()


def test_a_kernel_that_does_not_run_holds_no_caller() -> None:
    kept = RuntimeError("out of resource")

    def measure(_: list[Any]) -> float:
        raise kept

    def caller() -> weakref.ref[Model]:
        model = Model()
        tune._fastest([kernel()], measure)
        return weakref.ref(model)

    gone = caller()
    gc.collect()
    assert gone() is None and kept.__traceback__ is None
