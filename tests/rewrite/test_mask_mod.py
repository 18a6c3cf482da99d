"""Any proved mask as FlexAttention's mask_mod, compared with `materialize` and, through FlexAttention, with the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from masks import NEVER, PROVED, export_case
from trilithon.errors import InputError
from trilithon.lower.native.flex import mask_mod
from trilithon.prove.program import examine_program
from trilithon.prove.verdict import Verdict
from trilithon.spec.masks import Documents, Mask, Padding
from trilithon.spec.reference import reference_attention

B, H, S = 3, 2, 37


def proved_mask(name: str) -> Mask:
    (found,) = examine_program(export_case((PROVED | NEVER)[name]).program)
    assert found.finding is not None
    proofs = [p for p in (found.finding.proof, *found.finding.alternatives) if p.verdict is Verdict.PROVED]
    return next((p.mask for p in proofs if isinstance(p.mask, Documents)), proofs[0].mask)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    restarts = torch.arange(S) % 9
    return {
        "attention_mask": torch.randint(0, 2, (B, S), generator=generator),
        "segments": torch.randint(0, 4, (B, S), generator=generator),
        "position_ids": restarts.expand(B, S).contiguous(),
    }


NAMES = ("causal", "window_4", "chunked", "local_window", "prefix_lm_of_row", "cache_length", "causal_padding", "documents")
FORMULAS = ("dilated", "flipped_cell", "one_head_full", "bends_late")


@pytest.mark.parametrize("name", [*NAMES, "packed_positions", *FORMULAS])
def test_says_what_materialize_says(name: str) -> None:
    mask, tables = proved_mask(name), inputs()
    got = create_mask(mask_mod(mask, B, S, S, tables), B, H, S, S, device="cpu")
    assert torch.equal(got, mask.materialize(B, H, S, S, tables))


@pytest.mark.parametrize("name", ["window_4", "packed_positions", "one_head_full"])
def test_flex_attention_agrees_with_the_reference(name: str) -> None:
    mask, tables = proved_mask(name), inputs()
    q, k, v = (torch.randn(B, H, S, 8, dtype=torch.float64) for _ in range(3))
    blocks = create_block_mask(mask_mod(mask, B, S, S, tables), B, H, S, S, device="cpu", BLOCK_SIZE=16)
    got = flex_attention(q, k, v, block_mask=blocks, scale=0.3)
    expected = reference_attention(q, k, v, mask.materialize(B, H, S, S, tables), 0.3, torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_names_a_missing_table() -> None:
    with pytest.raises(InputError, match="attention_mask"):
        mask_mod(Padding(), B, S, S)
