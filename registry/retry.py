"""When to try again, how long to wait, and how to be stopped while waiting.

Pure but for the clock: what is retried is decided by the class of the error (`RegistryError.retryable`)
or the status of the answer; a 4xx that will not change is never sent twice.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from layers.errors import Cancelled
from layers.values import NamedTuple

CancelCheck = Callable[[], bool]

RETRYABLE_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_SLICE_S = 0.1


class RetryPolicy(NamedTuple):
    """How often and how soon. `attempts` counts the first one; waits are in seconds."""

    attempts: int = 5
    base_s: float = 0.25
    cap_s: float = 20.0
    max_retry_after_s: float = 120.0

    def delay_s(self, failures: int, jitter: Callable[[], float] = random.random) -> float:
        """The wait after the `failures`-th failure: exponential, with up to half of it taken off at random."""
        full = min(self.cap_s, self.base_s * 2.0 ** max(0, failures - 1))
        return float(full * (0.5 + jitter() / 2))


class Pacer:
    """The clock, the dice and the caller's wish to stop, as one parameter. Thread-safe."""

    def __init__(
        self,
        cancelled: CancelCheck | threading.Event | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if isinstance(cancelled, threading.Event):
            self.cancelled: CancelCheck = cancelled.is_set
        else:
            self.cancelled = cancelled or (lambda: False)
        self._sleep = sleep
        self.clock = clock
        self.jitter = jitter

    def check(self) -> None:
        """Raises: Cancelled if the caller wants to stop."""
        if self.cancelled():
            raise Cancelled()

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than the caller wants to go on. Raises: Cancelled."""
        left = seconds
        while True:
            self.check()
            if left <= 0:
                return
            step = min(left, _SLICE_S)
            self._sleep(step)
            left -= step


def parse_retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110 section 10.2.3: seconds or a date); None if unusable."""
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now())
    except (ValueError, TypeError, OverflowError):
        return None
