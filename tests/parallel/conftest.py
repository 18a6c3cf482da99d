"""Groups of ranks, each started once for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parallel.together import Together


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    """Two ranks."""
    made = Together(2, tmp_path_factory.mktemp("pair"))
    yield made
    made.end()


@pytest.fixture
def three(tmp_path: object) -> Iterator[Together]:
    """Three ranks."""
    made = Together(3, tmp_path)  # type: ignore[arg-type]
    yield made
    made.end()
