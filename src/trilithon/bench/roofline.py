"""How fast a job could be: bytes over a measured copy bandwidth, FLOPs over a measured matmul rate.

The floor of `prompt_tokens` in and `new_tokens` out, for b prompts of s tokens, is that of a program with a KV cache,
whatever program a row of the table runs:

    prefill   max( FLOPs / rate,  (weights + KV of b*s tokens) / bandwidth )
              FLOPs = b * [ 2 * P * s  +  layers * 2 * 2 * s*s/2 * h*d  +  2 * v * hidden ]
    step i    max( FLOPs / rate,  (weights + KV of b*(s+i) tokens) / bandwidth ),     i = 1 .. new_tokens - 1
              FLOPs = b * [ 2 * (P + v * hidden)  +  layers * 2 * 2 * (s+i) * h*d ]

P counts the values of the layers' matrices. The first new token comes from prefill, so there is one step fewer than new
tokens; prefill needs the logits of one position. Attention under a causal mask does half of s*s. A window of w keys makes
min(w, s+i) of s+i, and w*s - w*w/2 of s*s/2. Weights are the layers' matrices and the output head: an embedding table of
its own is left out, since only one row a token is read; norms and biases are less than a thousandth and left out too.

Both rates are measured, not the data sheet's, so a ratio is against what this machine reaches in practice. A program can
come out slightly below the floor where reading alone is faster than copying, or where the weights stay in a cache.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trilithon.bench.timing import synchronize

_RUNS = 7  # the median of so many is the rate,
_RUN_SECONDS = 2.0  # or of fewer, once they took so long (half precision on a CPU without it)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device as it was measured.

    Attributes:
        name: of the GPU, or of the CPU with the number of threads.
        bytes_per_second: of a copy, read and written bytes together.
        flops_per_second: of a square matmul of random values in the dtype of the job; a multiply-add is 2.
        versions: of what ran, e.g. python, torch, cuda, driver.
    """

    name: str
    bytes_per_second: float
    flops_per_second: float
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DecoderSize:
    """The sizes of a dense decoder-only transformer that its floor depends on.

    Attributes:
        heads, kv_heads: query heads h and key/value heads g.
        head_dim: d, of queries, keys and values.
        mlp_matrices: matrices of `hidden * intermediate` values in a layer; 3 with a gate, 2 without.
        window_keys: visible keys including the token itself; None = all before it.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    mlp_matrices: int = 3
    window_keys: int | None = None

    @property
    def layer_values(self) -> int:
        """Values in the matrices of all layers (P)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + self.mlp_matrices * self.hidden * self.intermediate)

    @property
    def head_values(self) -> int:
        """Values in the output head, whether or not it is the embedding table too."""
        return self.vocabulary * self.hidden

    def visible_keys(self, tokens: int) -> int:
        """Keys that the last of `tokens` tokens may see."""
        return tokens if self.window_keys is None else min(tokens, self.window_keys)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A generation: `batch` prompts of `prompt_tokens` tokens in, `new_tokens` tokens out for each.

    Attributes:
        value_bytes: bytes of one weight or cache value.
    """

    size: DecoderSize
    value_bytes: int
    prompt_tokens: int
    new_tokens: int
    batch: int = 1

    @property
    def weight_bytes(self) -> int:
        """Read once a step."""
        return (self.size.layer_values + self.size.head_values) * self.value_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one prompt."""
        return 2 * self.size.layers * self.size.kv_heads * self.size.head_dim * self.value_bytes

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values that are seen when the job ends, of all prompts."""
        return self.batch * self.size.visible_keys(self.prompt_tokens + self.new_tokens) * self.kv_bytes_per_token

    @property
    def prefill_flops(self) -> float:
        s, w = self.prompt_tokens, self.size.visible_keys(self.prompt_tokens)
        pairs = w * s - w * w / 2
        head = 2 * self.size.head_values
        return self.batch * (2.0 * self.size.layer_values * s + self._attention_flops(pairs) + head)

    @property
    def prefill_bytes(self) -> int:
        return self.weight_bytes + self.batch * self.prompt_tokens * self.kv_bytes_per_token

    def step_flops(self, tokens: int) -> float:
        """Of the decode step after which a prompt has grown to `tokens` tokens."""
        matmuls = 2.0 * (self.size.layer_values + self.size.head_values)
        return self.batch * (matmuls + self._attention_flops(self.size.visible_keys(tokens)))

    def step_bytes(self, tokens: int) -> int:
        return self.weight_bytes + self.batch * self.size.visible_keys(tokens) * self.kv_bytes_per_token

    def _attention_flops(self, pairs: float) -> float:
        return self.size.layers * 2 * 2 * pairs * self.size.heads * self.size.head_dim


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least seconds a job can take on a machine, see the head of this file."""

    prefill_seconds: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds


def floor_of(job: Job, machine: Machine) -> Floor:
    """The floor of `job` on `machine`, by the formulas at the head of this file."""

    def least(flops: float, moved_bytes: float) -> float:
        return max(flops / machine.flops_per_second, moved_bytes / machine.bytes_per_second)

    held = range(job.prompt_tokens + 1, job.prompt_tokens + job.new_tokens)
    return Floor(
        prefill_seconds=least(job.prefill_flops, job.prefill_bytes),
        decode_seconds=sum(least(job.step_flops(tokens), job.step_bytes(tokens)) for tokens in held),
    )


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure `device`: a copy of 1 GiB (CPU: 256 MiB) and an 8192^3 (CPU: 1024^3) matmul in `dtype`.

    Takes 4 GiB of GPU memory (half a GiB on a CPU) and a second or two.
    """
    gpu = device.type != "cpu"
    return Machine(
        name=machine_name(device),
        bytes_per_second=copy_bandwidth(device, copied_bytes=2**30 if gpu else 2**28),
        flops_per_second=matmul_rate(device, dtype, size=8192 if gpu else 1024),
        versions=versions(device),
    )


def copy_bandwidth(device: torch.device, *, copied_bytes: int) -> float:
    """Bytes a second of a copy within the device's memory, read and written bytes together."""
    source = torch.ones(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * copied_bytes / _median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, size: int) -> float:
    """FLOPs a second of a `size`^3 matmul of random values: zeros would draw less power and run faster."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device)


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call. On a GPU ten are queued at a time, so that launching them is not what is measured."""
    queued = 10 if device.type != "cpu" else 1
    samples: list[float] = []
    while len(samples) < 2 or (len(samples) <= _RUNS and queued * sum(samples) < _RUN_SECONDS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(queued):
            call()
        synchronize(device)
        samples.append((time.perf_counter() - start) / queued)
    return statistics.median(samples[1:])  # the first warms up


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {'1 thread' if threads == 1 else f'{threads} threads'}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), platform.processor() or platform.machine())


def versions(device: torch.device) -> dict[str, str]:
    """Versions of Python and torch, and on CUDA of the toolkit that torch was built with and of the driver."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "system": sys.platform}
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = _driver_version()
    return found


def _driver_version() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return next(iter(answer.stdout.split()), "unknown") if answer.returncode == 0 else "unknown"
