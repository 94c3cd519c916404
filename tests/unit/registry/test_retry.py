"""Waiting: how long, and until when."""

from __future__ import annotations

import threading

import pytest

from layers.errors import Cancelled
from registry.retry import Pacer, RetryPolicy, parse_retry_after


def test_delays_grow_and_stay_under_the_cap() -> None:
    policy = RetryPolicy(base_s=1, cap_s=10)
    assert [policy.delay_s(n, lambda: 1.0) for n in range(1, 7)] == [1, 2, 4, 8, 10, 10]
    assert policy.delay_s(3, lambda: 0.0) == 2
    assert policy.delay_s(10_000 % 900, lambda: 1.0) == 10


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5", 5.0),
        (" 0 ", 0.0),
        ("Thu, 01 Jan 1970 00:02:00 GMT", 20.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("-1", None),
        ("", None),
        (None, None),
        ("Thu, 01 Jan 99999999 00:00:00 GMT", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, now=lambda: 100.0) == seconds


def test_a_wait_ends_when_cancelled() -> None:
    stop = threading.Event()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            stop.set()

    with pytest.raises(Cancelled):
        Pacer(stop, sleep=sleep).wait(60)
    assert len(slept) == 3
    Pacer(None, sleep=sleep).wait(0)
    assert len(slept) == 3
