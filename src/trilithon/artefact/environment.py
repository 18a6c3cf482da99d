"""Versions and the GPU that an artefact was made with, and whether they serve on this machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from trilithon.compiled import Compiled
from trilithon.errors import CannotLower, InputError
from trilithon.lower.tensorrt.engine import TARGETS
from trilithon.lower.tensorrt.library import version as tensorrt_version

COMPARED = ("trilithon", "torch")  # of which another version may give other numbers, or be slower
log = logging.getLogger(__name__)


def versions_of(compiled: Compiled, engines: bool) -> dict[str, str]:
    """What it was compiled with."""
    if compiled.origin is not None and compiled.origin.versions:
        return dict(compiled.origin.versions)
    found = dict(compiled.report.versions)
    for package in ("safetensors", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if engines:
        found["tensorrt"] = tensorrt_version()
    return found


def device_for(target: Mapping[str, Any], device: str | torch.device | None) -> torch.device:
    """Where a model is to be loaded.

    Args:
        target: as the manifest has it.
        device: as the user gave it; None = of the kind that it was compiled for.

    Raises:
        InputError: there is no such device.
    """
    chosen = torch.device(target["device"] if device is None else device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        engines = target["backend"] == "tensorrt"
        raise InputError(
            f"cannot load a model on {chosen}",
            why="it holds engines for a GPU, and torch sees none here" if engines else "torch sees no GPU here",
            todo="load it where the GPU is" + ("" if engines else ", or with device='cpu', where its programs run too"),
        )
    return chosen


def check_versions(saved: Mapping[str, str], target: Mapping[str, Any], device: torch.device) -> None:
    """Refuse engines that this TensorRT or this GPU cannot run; warn of what may differ otherwise.

    Raises:
        InputError: they cannot run here.
        CannotLower: there is no TensorRT.
    """
    for package in COMPARED:
        here = _installed(package)
        if _minor(saved.get(package, "")) != _minor(here):
            log.warning("the model was compiled with %s %s, and this is %s", package, saved.get(package), here)
    if target["backend"] != "tensorrt":
        return
    try:
        here = tensorrt_version()
    except CannotLower:
        if device.type == "cuda":
            raise
        return  # nothing can run, and the rest can be read
    if here.split()[0] != saved["tensorrt"].split()[0] or _minor(here.split()[1]) != _minor(saved["tensorrt"].split()[1]):
        raise InputError(
            "cannot load the engines",
            why=f"they were built with {saved['tensorrt']}, and this is {here}",
            todo=f"install {saved['tensorrt'].replace(' ', '==')}, or compile the model again",
        )
    gpu = TARGETS.get(torch.cuda.get_device_capability(device), "another") if device.type == "cuda" else target["gpu"]
    if gpu != target["gpu"]:
        raise InputError(
            "cannot load the engines",
            why=f"they were built for {target['gpu']}, and {torch.cuda.get_device_name(device)} runs engines for {gpu}",
            todo=f"compile the model again with gpu={gpu!r}, or load it on a GPU that it was built for",
        )


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _minor(version: str) -> tuple[str, ...]:
    """Its first two numbers."""
    return tuple(version.partition("+")[0].split(".")[:2])
