"""Verify an ONNX model: ONNX Runtime against the program that was captured, before the model is handed out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from trilithon.errors import VerificationFailed
from trilithon.lower.inputs import sequence_inputs
from trilithon.lower.onnx.session import Session
from trilithon.rewrite.unlift import device_of
from trilithon.runtime.verify import TOLERANCE, canary_inputs, compare, require
from trilithon.spec.masks import Mask, parts

ROWS, LENGTHS, LONGEST = 3, (9, 1, 17), 512
NAME = "the ONNX model"
ALLOWED = TOLERANCE | {torch.float64: 1e-6}  # torch.onnx and Attention have numbers, such as a scale, in float32
BUG = "nothing was written. This is a bug of Trilithon, of torch.onnx or of ONNX Runtime: please report it"


@torch.no_grad()
def verify_onnx(
    session: Session,
    general: GraphModule,
    held: Mapping[str, Tensor],
    ranges: Mapping[str, tuple[int, int | None]],
    masks: Iterable[Mask],
) -> float:
    """The largest relative error of an output, over calls of several sizes, padded where a mask is an input.

    Args:
        general: the program as it was captured.
        held: fake tensors of its inputs.
        ranges: of its sizes.
        masks: that were proved; one call is longer than what each of them speaks of.

    Raises:
        VerificationFailed: an output is off by more than rounding explains, or ONNX Runtime cannot run the model.
    """
    lengths = sorted({*LENGTHS, *(n for n in map(_past, masks) if n <= LONGEST)})
    inputs, device, worst = sequence_inputs(held, ranges, ROWS, lengths[-1]), device_of(general), 0.0
    for rows, length in ((1, 1), *((ROWS, n) for n in lengths)):
        given = canary_inputs(inputs, held, (), rows, length, device)
        given = {name: _padded(x) if "mask" in name and x.dim() == 2 else x for name, x in given.items()}
        output = general(*given.values())
        want = [x for x in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(x, Tensor)]
        for mine, theirs in zip(_run(session, given), want, strict=True):
            worst = max(worst, _error(mine, theirs.cpu()))
    return worst


def _past(mask: Mask) -> int:
    """A length at which a mask differs from one without its numbers: of a window, of a chunk."""
    numbers = [n for part in parts(mask) for n in vars(part).values() if isinstance(n, int)]
    return max(numbers, default=0) + 3


def _padded(mask: Tensor) -> Tensor:
    """Row 0 is whole, row 1 has padding behind its tokens, row 2 before them, and so on."""
    row, column = torch.arange(mask.shape[0])[:, None], torch.arange(mask.shape[1])[None, :]
    half = mask.shape[1] // 2
    kept = torch.where(row % 3 == 1, column < mask.shape[1] - half, (row % 3 == 0) | (column >= half))
    return kept.to(mask)


def _run(session: Session, given: Mapping[str, Tensor]) -> list[Tensor]:
    try:
        return session(given)
    except Exception as error:  # ONNX Runtime has a type for each of its codes, without a common base
        sizes = ", ".join(f"{name} {list(x.shape)}" for name, x in given.items())
        why = str(error).splitlines()[0]
        raise VerificationFailed(f"ONNX Runtime cannot run {NAME} with {sizes}", why=why, todo=BUG) from error


def _error(got: Tensor, want: Tensor) -> float:
    if not want.is_floating_point():
        return require(NAME, 0.0 if torch.equal(got, want) else float("inf"), 0.0, "integers are equal", BUG)
    return require(NAME, compare(NAME, got, want), ALLOWED[want.dtype], f"rounding in {want.dtype} explains no more", BUG)
