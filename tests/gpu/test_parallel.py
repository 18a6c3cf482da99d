"""Two GPUs that share a model, through NCCL and inside CUDA graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SIZES = ["--layers", "2", "--prompt-tokens", "40", "--new-tokens", "24", "--repeats", "1"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("preset", ["llama-3.2-1b", "qwen3-0.6b", "qwen2.5-0.5b"])
def test_tokens_are_those_of_one_gpu(preset: str, tmp_path: Path) -> None:
    """At one row by generated kernels and at three by Inductor; the model comes from the host's memory."""
    script, file = str(ROOT / "scripts" / "measure_parallel.py"), tmp_path / "found.json"
    words = [preset, *SIZES, "--batches", "1,3", "--dtype", "float32", "--load-on", "cpu", "--json", str(file)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    threads = max(1, (os.cpu_count() or 1) // 4)  # torchrun's own choice is 1, with which drawing weights takes long
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    ran = subprocess.run([*RUN, script, *words], env=environment, capture_output=True, text=True, timeout=800, check=False)
    told = [line for line in ran.stderr.splitlines() if "torch/distributed" not in line]  # torchrun's own trace is long
    assert ran.returncode == 0, "\n".join(told)[-12000:]
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["ranks_agree"] and found["equal_tokens"] == [1.0, 1.0]
    assert all("generated kernels a token for one row" in x["decode"] for x in found["together"])
    assert all(x["decode"].endswith("in each other's memory") for x in found["together"])
    whole = found["one"][0]["bytes_per_token"][0]  # most of it weights
    assert all(found["together"][0]["bytes_per_token"][rank] < 0.7 * whole for rank in range(2))
