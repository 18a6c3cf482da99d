"""What this machine has, what each backend and integration can do on it, and why not."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist

from trilithon.bench.roofline import machine_name
from trilithon.errors import InputError, TrilithonError
from trilithon.integrations import dynamo, torch_tensorrt
from trilithon.lower.backend import resolve_backend
from trilithon.lower.onnx.library import OPSETS, require_onnx
from trilithon.lower.tensorrt.engine import targets
from trilithon.lower.tensorrt.library import version
from trilithon.options import BACKENDS

PACKAGES = ("trilithon", "torch", "transformers", "z3-solver", "numpy", "safetensors", "triton", "onnx", "onnxruntime")
TENSORRT_PACKAGES = ("tensorrt-rtx", "tensorrt", "tensorrt-cu13", "tensorrt-cu12")
COLUMN = 16  # characters


def diagnose() -> dict[str, Any]:
    """Versions, devices, backends and integrations as plain data.

    Returns:
        `versions` (package -> version or None), `devices` (name -> what it is), `backends` and `integrations`
        (name -> `works`, and in `says` what it does here, or why it cannot).
    """
    found = {package: _version(package) for package in (*PACKAGES, *TENSORRT_PACKAGES)}
    missing = {package for package in TENSORRT_PACKAGES[1:] if found[package] is None}
    versions = {"python": platform.python_version()} | {name: v for name, v in found.items() if name not in missing}
    return {
        "versions": versions,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "devices": _devices(),
        "backends": {name: _answer(partial(_backend, name)) for name in BACKENDS},
        "integrations": {name: _answer(says) for name, says in INTEGRATIONS.items()},
    }


def as_text(found: dict[str, Any]) -> str:
    """The diagnosis for people."""
    lines = ["versions", *(f"  {name:{COLUMN}}{version or 'not installed'}" for name, version in found["versions"].items())]
    lines += [
        "machine",
        f"  {'system':{COLUMN}}{found['system']}",
        *(f"  {name:{COLUMN}}{text}" for name, text in found["devices"].items()),
    ]
    for kind in ("backends", "integrations"):
        lines.append(kind)
        for name, answer in found[kind].items():
            lines.append(f"  {name:{COLUMN}}{'works' if answer['works'] else 'does not work'}: {answer['says']}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    devices = {"cpu": machine_name(torch.device("cpu"))}
    for index in range(torch.cuda.device_count()):
        held = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{held.name}, {held.total_memory / 2**30:.0f} GiB, compute capability {held.major}.{held.minor}"
        )
    if not torch.cuda.is_available():
        built = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch was built without CUDA"
        devices["cuda"] = f"none; {built}"
    return devices


def _answer(says: Callable[[], str]) -> dict[str, Any]:
    """What something does here, or the reason with which it refuses."""
    try:
        return {"works": True, "says": says()}
    except TrilithonError as error:
        return {"works": False, "says": "; ".join(part for part in (error.why or error.what, error.todo) if part)}


def _backend(name: str) -> str:
    chosen = resolve_backend(name)
    return f"chooses {chosen}" if name == "auto" else _ability(name)


def _ability(name: str) -> str:
    """What a backend that works here does."""
    if name == "eager":
        return "the canonical op written out in PyTorch, on any device: the reference"
    if name == "tensorrt":
        runs = "and runs them" if torch.cuda.is_available() else "no GPU here: networks are interpreted on the CPU"
        return f"{version()} builds engines for {', '.join(targets())}; {runs}"
    if torch.cuda.is_available():
        return "PyTorch SDPA on the GPU, through Inductor, prompts and decode steps as CUDA graphs"
    compiler = _compiler()
    inductor = f"Inductor on request ({compiler})" if compiler else "no Inductor: it needs a C++ compiler"
    return f"PyTorch SDPA on the CPU; {inductor}; no CUDA graphs: no GPU"


def _compiler() -> str | None:
    return next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def _torch_compile() -> str:
    known = f'backend="{dynamo.NAME}"' if dynamo.is_known() else "after trilithon.integrations.dynamo.register()"
    if not torch.cuda.is_available() and _compiler() is None:
        raise InputError("cannot use Inductor", why="Inductor needs a C++ compiler", todo="install g++")
    return f"{known}, then Inductor"


def _transformers() -> str:
    return f"accelerate() runs the generate of transformers {_version('transformers')} on compiled programs"


def _onnx() -> str:
    require_onnx()
    runtime = _version("onnxruntime")
    verified = f"verified with ONNX Runtime {runtime}" if runtime else "not verified: onnxruntime is not installed"
    return f"export_onnx() writes models of opset {' or '.join(map(str, OPSETS))}, {verified}"


def _torchrun() -> str:
    if not dist.is_available() or not dist.is_gloo_available():
        raise InputError("cannot share a model", why="this torch was built without torch.distributed or gloo")
    gpus = torch.cuda.device_count()
    joined = f"{gpus} GPUs by NCCL" if gpus and dist.is_nccl_available() else "processes by gloo; no GPU, or no NCCL, here"
    return f"tensor_parallel() shares a model: {joined}"


def _ray() -> str:
    found = _version("ray")
    if found is None:
        raise InputError("cannot use Ray", why="Ray is not installed", todo="pip install 'trilithon[ray]'")
    return f"trilithon batch --engine ray answers files of prompts by workers of Ray {found}"


INTEGRATIONS: dict[str, Callable[[], str]] = {
    "transformers": _transformers,
    "torch.compile": _torch_compile,
    "onnx": _onnx,
    "torch-tensorrt": lambda: f"install() plugs into Torch-TensorRT {torch_tensorrt.version()}",
    "torchrun": _torchrun,
    "ray": _ray,
}
