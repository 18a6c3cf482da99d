"""The floor against numbers worked out by hand for three models on an H200 (2048 tokens in, 128 out, fp16)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from trilithon.bench.roofline import DecoderSize, Job, Machine, copy_bandwidth, floor_of, machine_name, matmul_rate, versions

H200 = Machine(name="H200", bytes_per_second=4.3e12, flops_per_second=790e12)


@dataclass(frozen=True)
class Expected:
    weights_gb: float
    kv_mb_at_2048: float
    prefill_tflop: float
    prefill_ms: float
    step_ms: float
    job_ms: float


MODELS = {
    "qwen2.5-0.5b": (
        DecoderSize(layers=24, hidden=896, heads=14, kv_heads=2, head_dim=64, intermediate=4864, vocabulary=151936),
        Expected(weights_gb=0.988, kv_mb_at_2048=25, prefill_tflop=1.65, prefill_ms=2.1, step_ms=0.236, job_ms=32.0),
    ),
    "qwen3-0.6b": (
        DecoderSize(layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, intermediate=3072, vocabulary=151936),
        Expected(weights_gb=1.192, kv_mb_at_2048=235, prefill_tflop=2.29, prefill_ms=2.9, step_ms=0.334, job_ms=45.3),
    ),
    "llama-3.2-1b": (
        DecoderSize(layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, intermediate=8192, vocabulary=128256),
        Expected(weights_gb=2.472, kv_mb_at_2048=67, prefill_tflop=4.26, prefill_ms=5.4, step_ms=0.591, job_ms=80.4),
    ),
}


def job_of(size: DecoderSize) -> Job:
    return Job(size=size, value_bytes=2, prompt_tokens=2048, new_tokens=128)


@pytest.mark.parametrize("name", MODELS)
def test_floor_is_the_one_worked_out_by_hand(name: str) -> None:
    size, expected = MODELS[name]
    job = job_of(size)
    floor = floor_of(job, H200)
    found = Expected(
        weights_gb=job.weight_bytes / 1e9,
        kv_mb_at_2048=2048 * job.kv_bytes_per_token / 1e6,
        prefill_tflop=job.prefill_flops / 1e12,
        prefill_ms=floor.prefill_seconds * 1e3,
        step_ms=job.step_bytes(2048) / H200.bytes_per_second * 1e3,
        job_ms=floor.seconds * 1e3,
    )
    for quantity, value in vars(expected).items():
        assert getattr(found, quantity) == pytest.approx(value, rel=0.03), quantity
    assert found.job_ms == pytest.approx(expected.job_ms, abs=0.1)


def test_first_new_token_comes_from_prefill() -> None:
    job = replace(job_of(MODELS["llama-3.2-1b"][0]), new_tokens=1)
    assert floor_of(job, H200).decode_seconds == 0
    assert floor_of(replace(job, new_tokens=2), H200).decode_seconds == job.step_bytes(2049) / H200.bytes_per_second


def test_batch_shares_the_weights_and_nothing_else() -> None:
    job = job_of(MODELS["llama-3.2-1b"][0])
    four = replace(job, batch=4)
    assert four.prefill_flops == 4 * job.prefill_flops
    assert four.step_bytes(100) - four.weight_bytes == 4 * (job.step_bytes(100) - job.weight_bytes)


def test_window_limits_what_a_token_reads() -> None:
    job = job_of(MODELS["llama-3.2-1b"][0])
    windowed = replace(job, size=replace(job.size, window_keys=256))
    assert windowed.step_bytes(2048) == job.step_bytes(256)
    assert windowed.step_bytes(200) == job.step_bytes(200)
    assert replace(job, size=replace(job.size, window_keys=2048)).prefill_flops == job.prefill_flops
    attention = job.prefill_flops - replace(job, size=replace(job.size, window_keys=0)).prefill_flops
    assert attention == job.size.layers * 4 * (2048 * 2048 / 2) * job.size.heads * job.size.head_dim


def test_slower_of_bytes_and_flops_decides() -> None:
    job = replace(job_of(MODELS["qwen3-0.6b"][0]), prompt_tokens=1, new_tokens=2)
    assert floor_of(job, H200).prefill_seconds == job.prefill_bytes / H200.bytes_per_second
    slow = replace(H200, flops_per_second=1e9)
    assert floor_of(job, slow).decode_seconds == job.step_flops(2) / 1e9


def test_rates_are_measured_on_this_machine() -> None:
    cpu = torch.device("cpu")
    assert 1e8 < copy_bandwidth(cpu, copied_bytes=2**22) < 1e13
    assert 1e7 < matmul_rate(cpu, torch.float32, size=128) < 1e15
    assert versions(cpu)["torch"] == torch.__version__


@pytest.mark.parametrize(("threads", "words"), [(1, ", 1 thread"), (2, ", 2 threads")])
def test_a_cpu_is_named_with_its_threads(threads: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert machine_name(torch.device("cpu")).endswith(words)
