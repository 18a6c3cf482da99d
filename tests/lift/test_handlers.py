"""Each handler against torch, element by element, on random tables (never arange), at fixed and at dynamic sizes."""

from __future__ import annotations

import pytest

from lift.programs import UNDECOMPOSED, check_dynamic, check_fixed, check_undecomposed
from lift.rows import DYNAMIC, STATIC


@pytest.mark.parametrize("name", STATIC | DYNAMIC)
def test_handler_agrees_with_torch(name: str) -> None:
    check_fixed(name)


@pytest.mark.parametrize("name", DYNAMIC)
def test_handler_agrees_at_other_sizes(name: str) -> None:
    check_dynamic(name)


@pytest.mark.parametrize("name", UNDECOMPOSED)
def test_handler_agrees_without_decomposition(name: str) -> None:
    check_undecomposed(name)
