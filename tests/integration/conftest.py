"""Integration tests run real processes on a real kernel: none may leave anything behind."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _leaves_nothing(no_leaks: None) -> None:
    """Every test here is checked for leaked mounts, processes and cgroups."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Markers that follow from the fixtures used, so that `-m 'not registry'` means what it says."""
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        if names & {"registry", "fresh_registry", "password_registry", "tls_registry"}:
            item.add_marker(pytest.mark.registry)
        if names & {"rootless_user", "pybuild_rootless"}:
            item.add_marker(pytest.mark.rootless)
        if "debian_layout" in names:
            item.add_marker(pytest.mark.slow)
