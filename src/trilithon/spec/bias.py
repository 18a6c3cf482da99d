"""Additive biases of attention scores. A site with one keeps its tensor; only masks are rewritten so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bias:
    """Base of all biases."""


@dataclass(frozen=True)
class Dense(Bias):
    """Any tensor `[b h s t]`, known only at run time."""

    def __str__(self) -> str:
        return "dense"
