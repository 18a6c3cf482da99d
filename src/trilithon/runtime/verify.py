"""Verify what was built: run it once against eager before handing it out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trilithon.errors import VerificationFailed
from trilithon.runtime.decoder import CachedDecoder
from trilithon.runtime.program import Program
from trilithon.spec.assumption import Assumption

# Relative error (Frobenius) that rounding explains. Reordered sums in a deep random network stay far below it;
# a wrong mask, scale or position is of order 1.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def relative_error(got: Tensor, want: Tensor) -> float:
    """`||got - want|| / ||want||`, computed in float64; inf where `got` is not finite and `want` is."""
    a, b = got.double(), want.double()
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def verify(name: str, got: Tensor, want: Tensor) -> float:
    """The relative error of `got`, which eager says should be `want`.

    Raises:
        VerificationFailed: the shapes differ, or the error is more than rounding explains.
    """
    if got.shape != want.shape:
        raise VerificationFailed(f"{name} gives {list(got.shape)}, eager gives {list(want.shape)}", todo="please report this")
    error = relative_error(got, want)
    limit = TOLERANCE.get(want.dtype, 1e-3)
    if not error <= limit:
        raise VerificationFailed(
            f"{name} disagrees with eager",
            why=f"the relative error on the canary input is {error:.2e}; rounding in {want.dtype} explains {limit:.0e}",
            todo="nothing was compiled. This is a bug of Trilithon or of a kernel: please report it with trilithon doctor",
        )
    return error


@torch.no_grad()
def verify_program(program: Program, held: Mapping[str, Tensor], device: torch.device, rows: int = 2) -> float:
    """Run the fast and the general module on one random input that meets the guards; see `verify`.

    Args:
        held: fake tensors of the inputs, as exported; their symbolic sizes become small numbers.
        device: of the program's weights.
        rows: batch size of the run.
    """
    assert program.general is not None
    generator = torch.Generator().manual_seed(0)
    arguments = [
        _canary(name, held[name], rows, program.guards, generator).to(held[name].dtype).to(device) for name in program.inputs
    ]
    return max(
        verify("the rewritten program", got, want)
        for got, want in zip(_tensors(program.fast(*arguments)), _tensors(program.general(*arguments)), strict=True)
        if want.is_floating_point()
    )


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(x, Tensor)]


def _canary(name: str, held: Tensor, rows: int, guards: tuple[Assumption, ...], generator: torch.Generator) -> Tensor:
    """A small random input: what its guard asks for, and for other integers what the usual name says."""
    shape = tuple(
        size if isinstance(size, int) else max(_lowest(size), n) for size, n in zip(held.shape, (rows, 9, 9, 9), strict=False)
    )
    guard = next((g for g in guards if g.table == name), None)
    if guard is not None:
        return guard.sample(shape, held.dtype, generator)
    if held.is_floating_point():
        return torch.randn(shape, generator=generator)
    if "mask" in name:
        return torch.ones(shape)
    if "position" in name:
        return torch.arange(shape[-1]).expand(shape)
    return torch.randint(0, 2 if held.dtype == torch.bool or "type" in name else 5, shape, generator=generator)


def _lowest(size: Any) -> int:
    try:
        return int(size.node.shape_env.var_to_range[size.node.expr].lower)
    except (AttributeError, KeyError, TypeError, ValueError):
        return 1


@torch.no_grad()
def verify_decoder(decoder: CachedDecoder, model: nn.Module) -> float:
    """Prefill and decode a short random prompt and compare each step's logits with the model's full forward.

    Run with and without left padding where the cache has room for it.
    """
    rows = min(2, decoder.max_batch)
    prompt, total = min(6, decoder.cache_tokens - 1), min(9, decoder.cache_tokens)
    ids = torch.randint(0, 5, (rows, total), generator=torch.Generator().manual_seed(0)).to(decoder.device)
    want = model(input_ids=ids, use_cache=False).logits
    none = torch.zeros(rows, dtype=torch.int64, device=decoder.device)
    got = [decoder.prefill(ids[:, :prompt], none).clone()]
    got += [decoder.decode(ids[:, i]).clone() for i in range(prompt, total)]
    error = verify("prefill and decode", torch.stack(got, 1), want[:, prompt - 1 :])
    if prompt < 3:
        return error
    pads = [0, 2][-rows:]  # of one row the padding is cut off, of two rows that of the second is masked
    pad = torch.tensor(pads, device=decoder.device)
    padded = torch.stack([torch.cat([torch.zeros_like(row[:p]), row[: prompt - p]]) for row, p in zip(ids, pads, strict=True)])
    got = [decoder.prefill(padded, pad).clone()]
    row = torch.arange(rows, device=decoder.device)
    got += [decoder.decode(ids[row, i - pad]).clone() for i in range(prompt, total)]
    wanted = torch.stack([logits[prompt - 1 - p : total - p] for logits, p in zip(want, pads, strict=True)])
    return max(error, verify("prefill and decode with left padding", torch.stack(got, 1), wanted))
