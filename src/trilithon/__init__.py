"""Trilithon: a compiler that proves what attention masks mean, and makes attention fast where the proof allows.

The public names are loaded when first used, so that `trilithon --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
import types
import typing

if typing.TYPE_CHECKING:
    from trilithon.artefact import load
    from trilithon.capture.hf import load_model, load_tokenizer
    from trilithon.compiled import Compiled
    from trilithon.compiler import compile, explain, lower
    from trilithon.errors import (
        CannotCache,
        CannotLift,
        CannotLower,
        CapacityExceeded,
        CaptureError,
        GuardFailed,
        InputError,
        PassBroke,
        ShapeError,
        TrilithonError,
        VerificationFailed,
    )
    from trilithon.lower.native.flex import mask_mod
    from trilithon.onnx_export import OnnxModel, export_onnx
    from trilithon.options import Options
    from trilithon.parallel.share import tensor_parallel
    from trilithon.prove.verdict import Proof, Verdict
    from trilithon.spec.assumption import Assumption, Input, attention_mask, position_ids
    from trilithon.spec.bias import Alibi, Bias, Dense, RelativeBias
    from trilithon.spec.masks import (
        And,
        CacheLength,
        Causal,
        Chunked,
        Documents,
        Formula,
        Full,
        LocalWindow,
        Mask,
        Or,
        Padding,
        PrefixLM,
        SlidingWindow,
    )

_HOMES = {
    "artefact": "load",
    "capture.hf": "load_model load_tokenizer",
    "compiled": "Compiled",
    "compiler": "compile explain lower",
    "errors": "CannotCache CannotLift CannotLower CapacityExceeded CaptureError GuardFailed InputError PassBroke ShapeError"
    " TrilithonError VerificationFailed",
    "lower.native.flex": "mask_mod",
    "onnx_export": "OnnxModel export_onnx",
    "options": "Options",
    "parallel.share": "tensor_parallel",
    "prove.verdict": "Proof Verdict",
    "spec.assumption": "Assumption Input attention_mask position_ids",
    "spec.bias": "Alibi Bias Dense RelativeBias",
    "spec.masks": "And CacheLength Causal Chunked Documents Formula Full LocalWindow Mask Or Padding PrefixLM SlidingWindow",
}
_HOME = {name: f"trilithon.{module}" for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Alibi",
    "And",
    "Assumption",
    "Bias",
    "CacheLength",
    "CannotCache",
    "CannotLift",
    "CannotLower",
    "CapacityExceeded",
    "CaptureError",
    "Causal",
    "Chunked",
    "Compiled",
    "Dense",
    "Documents",
    "Formula",
    "Full",
    "GuardFailed",
    "Input",
    "InputError",
    "LocalWindow",
    "Mask",
    "OnnxModel",
    "Options",
    "Or",
    "Padding",
    "PassBroke",
    "PrefixLM",
    "Proof",
    "RelativeBias",
    "ShapeError",
    "SlidingWindow",
    "TrilithonError",
    "Verdict",
    "VerificationFailed",
    "attention_mask",
    "compile",
    "explain",
    "export_onnx",
    "load",
    "load_model",
    "load_tokenizer",
    "lower",
    "mask_mod",
    "position_ids",
    "tensor_parallel",
]


def __getattr__(name: str) -> typing.Any:
    if name == "__version__":
        return importlib.import_module("trilithon.report.versions").versions()["trilithon"]
    if name not in _HOME:
        raise AttributeError(f"module 'trilithon' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _Package(types.ModuleType):
    """Importing the folder `trilithon.lower` must not hide the function `trilithon.lower`."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
