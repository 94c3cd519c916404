"""Go's %q and durations, as the history has them."""

from __future__ import annotations

import pytest

from builder.plan.gotext import go_duration, go_quoted


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), "[]"),
        (("a", "b c"), '["a" "b c"]'),
        (('say "hi"', "back\\slash"), '["say \\"hi\\"" "back\\\\slash"]'),
        (("a\nb\tc\x07\x0b",), '["a\\nb\\tc\\a\\v"]'),
        (("\x00\x1b\x7f",), '["\\x00\\x1b\\x7f"]'),
        (("é→😀",), '["é→😀"]'),
        (("\u200b\ufeff\U000e0001",), '["\\u200b\\ufeff\\U000e0001"]'),
        ((b"\xff".decode("utf-8", "surrogateescape"),), '["\\xff"]'),
    ],
)
def test_quoted(words: tuple[str, ...], wanted: str) -> None:
    assert go_quoted(words) == wanted


@pytest.mark.parametrize(
    ("ns", "wanted"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1500, "1.5µs"),
        (1_000_000, "1ms"),
        (250_500_000, "250.5ms"),
        (1_000_000_000, "1s"),
        (1_500_000_000, "1.5s"),
        (90_000_000_000, "1m30s"),
        (3_600_000_000_000, "1h0m0s"),
        (3_661_000_000_001, "1h1m1.000000001s"),
        (100 * 3_600_000_000_000, "100h0m0s"),
    ],
)
def test_durations(ns: int, wanted: str) -> None:
    assert go_duration(ns) == wanted
