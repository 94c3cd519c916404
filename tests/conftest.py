"""Fixtures for every test, and what the whole suite insists on. The fixtures live in `tests.support`."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and no bound on the time of one: a suite that fails by the day or by what else the
# machine does tells nothing. `--hypothesis-profile=default` looks for new ones.
settings.register_profile(
    "steady", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

pytest_plugins = [
    "tests.support.cachedir",
    "tests.support.registries",
    "tests.support.bases",
    "tests.support.accounts",
    "tests.support.cli",
    "tests.support.leaks",
]


def pytest_configure() -> None:
    """A shell starts background jobs with SIGINT ignored, and what the tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _stable_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a developer's shell sets must not change an outcome."""
    for name in list(os.environ):
        if name.startswith("PYBUILD_") or name in {"SOURCE_DATE_EPOCH", "REGISTRY_AUTH_FILE", "DOCKER_CONFIG"}:
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYBUILD_CONFIG", "")
