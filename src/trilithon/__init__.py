"""Trilithon: a compiler that proves what attention masks mean, and makes attention fast where the proof allows."""

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
from trilithon.options import Options
from trilithon.prove.verdict import Proof, Verdict
from trilithon.spec.assumption import Assumption, Input, attention_mask, position_ids
from trilithon.spec.masks import And, Causal, Documents, Formula, Full, Mask, Padding, SlidingWindow

__all__ = [
    "And",
    "Assumption",
    "CannotCache",
    "CannotLift",
    "CannotLower",
    "CapacityExceeded",
    "CaptureError",
    "Causal",
    "Compiled",
    "Documents",
    "Formula",
    "Full",
    "GuardFailed",
    "Input",
    "InputError",
    "Mask",
    "Options",
    "Padding",
    "PassBroke",
    "Proof",
    "ShapeError",
    "SlidingWindow",
    "TrilithonError",
    "Verdict",
    "VerificationFailed",
    "attention_mask",
    "compile",
    "explain",
    "load_model",
    "load_tokenizer",
    "lower",
    "position_ids",
]
