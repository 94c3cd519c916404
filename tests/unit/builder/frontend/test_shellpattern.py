"""`#`, `%` and `/` patterns, against an oracle that tries every split."""

from __future__ import annotations

import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.frontend.shellpattern import remove_prefix, remove_suffix, replace
from builder.frontend.words import WordError

PATTERNS = st.text("ab?*\n", max_size=6)
VALUES = st.text("ab\n", max_size=8)


@cache
def fits(pattern: str, text: str) -> bool:
    """Whether a whole text matches, by the definition."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return fits(pattern[1:], text) or (text[:1] not in ("", "\n") and fits(pattern, text[1:]))
    if not text or (text[0] == "\n" if pattern[0] == "?" else text[0] != pattern[0]):
        return False
    return fits(pattern[1:], text[1:])


@given(VALUES, PATTERNS, st.booleans())
def test_prefixes(value: str, pattern: str, longest: bool) -> None:
    ends = [i for i in range(len(value) + 1) if fits(pattern, value[:i])]
    wanted = value[(max(ends) if longest else min(ends)) :] if ends else value
    assert remove_prefix(value, pattern, longest=longest) == wanted


@given(VALUES, PATTERNS, st.booleans())
def test_suffixes(value: str, pattern: str, longest: bool) -> None:
    starts = [i for i in range(len(value) + 1) if fits(pattern, value[i:])]
    wanted = value[: min(starts) if longest else max(starts)] if starts else value
    assert remove_suffix(value, pattern, longest=longest) == wanted


@given(VALUES, PATTERNS)
def test_the_first_match_is_replaced(value: str, pattern: str) -> None:
    places = [(i, j) for i in range(len(value) + 1) for j in range(len(value), i - 1, -1) if fits(pattern, value[i:j])]
    wanted = value[: places[0][0]] + "<>" + value[places[0][1] :] if places else value
    assert replace(value, pattern, "<>", everywhere=False, limit=1000) == wanted


@pytest.mark.parametrize(
    ("value", "pattern", "new", "wanted"),
    [
        ("aXbXc", "X", "-", "a-b-c"),
        ("abc", "*", "x", "x"),
        ("abc", "", "-", "-a-b-c-"),
        ("", "", "-", "-"),
        ("abab", "b", "[$0]", "a[b]a[b]"),
        ("ab", "b", "$$ $1 ${name}.", "a$  ."),
        ("ab", "b", "${", "a${"),
        ("a*b", r"\*", "+", "a+b"),
        ("a?b", r"\?", "+", "a+b"),
        (r"a\b", r"\\", "/", "a/b"),
        ("a}b", r"\}", "{", "a{b"),
        ("a.b.c", ".", "", "abc"),
        ("one\ntwo", "o*", "x", "x\ntwx"),
    ],
)
def test_all_matches_are_replaced(value: str, pattern: str, new: str, wanted: str) -> None:
    assert replace(value, pattern, new, everywhere=True, limit=1000) == wanted


@pytest.mark.parametrize("pattern", [r"\a", "x\\", r"\["])
def test_a_bad_escape(pattern: str) -> None:
    with pytest.raises(WordError, match="invalid escape"):
        replace("x", pattern, "", everywhere=True, limit=10)


def test_many_stars_take_linear_time() -> None:
    start = time.thread_time()
    assert remove_prefix("a" * 20_000, "*a" * 30 + "b", longest=True) == "a" * 20_000
    assert replace("a" * 20_000, "*a" * 30 + "b", "", everywhere=True, limit=10**6) == "a" * 20_000
    assert time.thread_time() - start < 30  # backtracking would need longer than the universe has
