"""What kernels of our own for Hopper GPUs share: where they can be, and a comparison before they are used."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from trilithon.lower.native.split_kv import has_triton

LEAST_TOKENS = 512  # fewer make too few tiles for a large GPU
AGREED = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # largest error, of the largest number
log = logging.getLogger(__name__)


def is_for(device: torch.device, dtype: torch.dtype) -> bool:
    """Is it a Hopper GPU, and a type of 16 bits?"""
    return device.type == "cuda" and dtype in AGREED and torch.cuda.get_device_capability(device)[0] == 9 and has_triton()


def works(what: str, by_kernel: Callable[[], Tensor], plain: Callable[[], Tensor]) -> bool:
    """Does a kernel compile, and give what PyTorch gives? A warning says why not.

    Args:
        what: PyTorch does if not, for the warning.
    """
    try:
        expected = plain()
        error = float((by_kernel().float() - expected.float()).abs().max() / expected.float().abs().max())
        why = f"it is off by {error:.1e}" if not error <= AGREED[expected.dtype] else ""
    except Exception as refusal:  # Triton's errors have no common class
        why = f"{type(refusal).__name__}: {next(iter(str(refusal).splitlines()), 'no message')}"
    if why:
        log.warning("%s, since the kernel of our own cannot be used here: %s", what, why)
    return not why
