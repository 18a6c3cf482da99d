"""Kernels that are compiled before they are launched."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trilithon.lower.native.fused.ahead import import_beside

TESTS = Path(__file__).parent.parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_what_is_compiled_serves_all_lengths(tmp_path: Path) -> None:
    """Else the first long prompt, or a step with larger caches, would wait for Triton, and run what was not compared."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "TRILITHON_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "lower.compile_ahead"]
    done = subprocess.run(command, cwd=TESTS, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    assert {"values", "attention_2_8", "put_together", "largest"} < set(found["step"])
    assert sum(name.startswith("products") for name in found["step"]) == 5
    assert sum(name.startswith("tokens") for name in found["prompt"]) >= 3
    assert found["step, 2 parts"] == ["put_together"]  # which is compiled for a number of parts
    for name in ("step, 302 slots", "prompt, 576 tokens", "prompt, 1 token"):
        assert found[name] == [], name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_has_hashed_its_files_before_it_is_asked() -> None:
    from triton.runtime.cache import triton_key

    triton_key.cache_clear()
    import_beside()
    for thread in threading.enumerate():
        if thread.name == "triton":
            thread.join()
    assert triton_key.cache_info().currsize == 1
