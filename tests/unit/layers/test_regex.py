"""Linear regular expressions: what Python's find, and an end to what Python's never end."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.regex import compile_pattern

LEAVES = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", "1", "^", "$", r"\b", "(?:a|b1)", "(?i:A)"])


def deeper(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    ends = st.sampled_from(["?", "*", "+", "{2}", "{1,3}", "{2,}", "??", "*?", "+?", "{0,2}?"])
    solid = st.sampled_from(["a", "b", ".", "[ab]", "(a|b)", "(ab|a)", r"(\w1?)"])
    return (
        st.lists(inner, min_size=1, max_size=3).map("".join)
        | st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})")
        | st.tuples(solid, ends).map("".join)
    )


@settings(deadline=None, max_examples=300)
@given(st.recursive(LEAVES, deeper, max_leaves=8), st.text(alphabet="ab1A_\n -é", max_size=12))
def test_it_finds_what_python_finds(pattern: str, text: str) -> None:
    ours, theirs = compile_pattern(pattern).search(text), re.search(pattern, text)
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert (ours.start, ours.end) == theirs.span()
        assert ours.groups == (theirs[0], *theirs.groups())


@pytest.mark.parametrize(
    ("pattern", "text", "whole"),
    [
        (r"^v(?P<major>\d+)\.(\d+)$", "v12.3", ("v12.3", "12", "3")),
        (r"(?s)a.b", "a\nb", ("a\nb",)),
        (r"(?m)^b$", "a\nb\nc", ("b",)),
        (r"(?a)\w+", "éa", ("a",)),
        (r"(a*)*b", "aab", ("aab", "aa")),  # Python's group is the last turn's nothing
        (r"(?i)[k-m]+", "xKLM", ("KLM",)),
        (r"x{0}y", "xy", ("y",)),
        (r"", "a", ("",)),
    ],
)
def test_groups(pattern: str, text: str, whole: tuple[str, ...]) -> None:
    found = compile_pattern(pattern).search(text)
    assert found is not None
    assert found.groups == whole


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"^(a|a)*$", r"(.*a){20}$", r"(a*)*(a*)*(a*)*b", r"(a?){30}a{30}c"])
def test_what_python_never_finishes(pattern: str) -> None:
    assert compile_pattern(pattern).search("a" * 60 + "!") is None


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(a)\1", "not possible"),
        (r"(?=a)b", "not possible"),
        (r"(?<!a)b", "not possible"),
        (r"(a)(?(1)b|c)", "not possible"),
        (r"a++", "not possible"),
        (r"(?>a)", "not possible"),
        (r"(", "unterminated"),
        (r"a{1001}", "1000"),
        (r"(a{900}){900}", "too large"),
        ("(" * 5000 + ")" * 5000, "deeply"),
        ("a" * 10_000, "too large"),
        (r"a{99999999999999999999}", "repetition"),
    ],
)
def test_what_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        compile_pattern(pattern)


def test_a_search_has_an_end() -> None:
    slow = compile_pattern(r"(a?){500}(a?){500}b")
    with pytest.raises(ValueError, match="too long"):
        slow.search("a" * 100_000)


def test_nothing_right_after_a_match_is_not_replaced() -> None:
    assert compile_pattern("b*").sub(lambda found: f"<{found.groups[0]}>", "a1b22c") == "<>a<>1<b>2<>2<>c<>"


@pytest.mark.parametrize("pattern", [r"\d+", r"b+?", r"", r"a|b", r"(?m)^", r"\b", r"x(?i:A)?"])
def test_replacing_is_pythons(pattern: str) -> None:
    for text in ("", "a1b22c", "bbb", "ab\nab", "xax"):
        ours = compile_pattern(pattern).sub(lambda found: f"<{found.groups[0]}>", text)
        assert ours == re.sub(pattern, lambda found: f"<{found[0]}>", text)
