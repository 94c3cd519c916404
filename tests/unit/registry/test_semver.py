"""Ranges of versions: what fits, what does not, what is refused."""

from __future__ import annotations

import time

import pytest

from registry.errors import ConfigError
from registry.semver import Version, VersionRange


@pytest.mark.parametrize(
    ("text", "fits", "fits_not"),
    [
        ("1.2.3", ["1.2.3", "v1.2.3", "1.2.3+build.7"], ["1.2.4", "1.2.3-rc1", "latest", "1.2.3.4", ""]),
        (">=3.12.0", ["3.12", "3.12.0", "v4"], ["3.11.9", "3.13.0-rc1"]),
        (">= 1.2, < 3.0.0", ["1.2.0", "2.9.9"], ["3.0.0", "1.1", "3"]),
        (">=1.2 <2 !=1.4.1", ["1.4.0", "1.9"], ["1.4.1", "2.0.0"]),
        ("=>1,=<2", ["1.0.0", "2.9.9"], ["3.0.0", "0.9"]),
        ("<=2.1", ["2.1.9", "1"], ["2.2.0"]),
        ("<2.1", ["2.0.9"], ["2.1.0", "2.1.9"]),
        (">11", ["12.0.0"], ["11.1.0", "11"]),
        (">11.1", ["11.2.0", "12"], ["11.1.1"]),
        ("> 11.1.1", ["11.1.2"], ["11.1.1"]),
        ("1.x", ["1.0.0", "1.99"], ["2.0.0", "0.9"]),
        ("1.2.*", ["1.2.0", "1.2.7"], ["1.3"]),
        ("*", ["0.0.1", "9"], ["latest", "1.0-rc1"]),
        ("", ["0.0.1"], ["latest"]),
        ("!=1.x", ["2.0"], ["1.5"]),
        ("!=1.2.x", ["1.3.0"], ["1.2.3"]),
        ("~1.2.3", ["1.2.3", "1.2.9"], ["1.2.2", "1.3.0"]),
        ("~1.2", ["1.2.0"], ["1.3"]),
        ("~1", ["1.9"], ["2"]),
        ("~>2.0.1", ["2.0.5"], ["2.1.0"]),
        ("^1.2.3", ["1.2.3", "1.9"], ["2.0.0", "1.2.2"]),
        ("^1.2", ["1.2", "1.9.9"], ["2"]),
        ("^0.2.3", ["0.2.3", "0.2.9"], ["0.3.0"]),
        ("^0.0.3", ["0.0.3"], ["0.0.4"]),
        ("^0.0", ["0.0.9"], ["0.1.0"]),
        ("^0", ["0.9.9"], ["1.0.0"]),
        ("^*", ["3.1"], []),
        ("1.2 - 1.4.5", ["1.2.0", "1.4.5"], ["1.4.6", "1.1.9"]),
        ("1 - 2", ["2.9"], ["3"]),
        ("~1.2 || ^3.1 || 7.0.0", ["1.2.5", "3.9", "7.0.0"], ["2.0", "3.0", "7.0.1"]),
        (">=1.0.0-rc.2", ["1.0.0-rc.2", "1.0.0-rc.10", "1.0.0", "1.1.0-alpha"], ["1.0.0-rc.1", "1.0.0-beta"]),
        ("^1.0.0-0", ["1.0.0-alpha", "1.5.0"], ["2.0.0", "0.9"]),
    ],
)
def test_ranges(text: str, fits: list[str], fits_not: list[str]) -> None:
    parsed = VersionRange.parse(text)
    assert [t for t in fits if not parsed.fits(t)] == []
    assert [t for t in fits_not if parsed.fits(t)] == []


@pytest.mark.parametrize("text", ["latest", ">=", "1.2.3.4", ">>1", "1 2..3", "1;2", "| 1", "1 - ", "^ ^1", "a" * 600])
def test_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        VersionRange.parse(text)


def test_order() -> None:
    """The example of the specification's section 11."""
    texts = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11",
             "1.0.0-rc.1", "1.0.0", "2.0.0", "2.1.0", "2.1.1"]  # fmt: skip
    versions = [Version.parse(t) for t in texts]
    assert sorted((v for v in reversed(versions) if v), key=lambda v: v.order) == versions


def test_hostile_tags_are_quick() -> None:
    parsed = VersionRange.parse(">=1.2")
    begun = time.thread_time()
    for tag in ("1." * 64, "1-" + "a." * 60, "1-" + "-" * 120 + "!", "9" * 128):
        assert not parsed.fits(tag)
    with pytest.raises(ConfigError):
        VersionRange.parse("1-" + "a-" * 200 + "!")
    assert time.thread_time() - begun < 10  # of this thread's own work: the machine may be busy
