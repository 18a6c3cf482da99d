"""In which order an engine is told what to do; engines themselves run in tests/gpu."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trilithon.lower.inputs import Input, rows, tokens
from trilithon.lower.tensorrt.engine import Engine
from trilithon.lower.tensorrt.execute import Executor


@pytest.mark.parametrize("capturing", [False, True])
def test_other_shapes_wait_for_the_last_run(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture cannot wait; runs of the same shapes need not."""
    did: list[str] = []
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: did.append("wait"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: None)
    context = SimpleNamespace(
        engine=SimpleNamespace(num_io_tensors=1, get_tensor_name=lambda i: "x"),
        set_input_shape=lambda name, shape: did.append(f"shape {shape[1]}") or True,
        set_tensor_address=lambda name, address: None,
        execute_async_v3=lambda stream: did.append("run") or True,
    )
    inputs = (Input("x", torch.float32, (rows(2), tokens(9))),)
    run = Executor(Engine(Path("a.plan"), inputs, (), {}, (), "sm80", (), (), 0.0), {})
    run.__dict__["_loaded"] = (context,)
    for length in (3, 3, 4, 3):
        run(torch.zeros(1, length))
    wait = [] if capturing else ["wait"]
    assert did == ["shape 3", "run", "shape 3", "run", *wait, "shape 4", "run", *wait, "shape 3", "run"]
