"""Waiting for what other processes bring about: for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 120.0
"""How long anything may take on a machine that is busy with other things; only failures wait so long."""


def until(
    condition: Callable[[], object],
    words: Callable[[], str] = lambda: "it did not come about in time",
    timeout_s: float = PATIENCE_S,
    pause_s: float = 0.02,
) -> None:
    """Wait for something to become so, or fail with `words`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(words())
        time.sleep(pause_s)
