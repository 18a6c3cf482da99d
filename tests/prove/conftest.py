"""Profiles of the random tests: `quick` is what runs by itself; for longer ones `pytest --hypothesis-profile=long`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings

SLOW = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", derandomize=True, max_examples=3, phases=[Phase.explicit, Phase.generate], **SLOW)
settings.register_profile("long", max_examples=200, **SLOW)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile("quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Longer profiles take as long as they take."""
    if config.getoption("--hypothesis-profile", default=None):
        for item in items:
            item.add_marker(pytest.mark.timeout(0))
