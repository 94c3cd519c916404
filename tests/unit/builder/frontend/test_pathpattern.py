"""Go's filepath.Match, and the patterns with `**`, against oracles written from the definitions."""

from __future__ import annotations

import re
import time
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from builder.frontend.pathpattern import BadPattern, IgnorePattern, go_match, has_wildcard


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("", "", True),
        ("", "a", False),
        ("name", "name", True),
        ("*", "", True),
        ("*", ".hidden", True),
        ("*", "a/b", False),
        ("*/*", "a/b", True),
        ("a*", "a", True),
        ("a*c", "abbc", True),
        ("a*c", "a/c", False),
        ("?", "é", True),
        ("?", "/", False),
        ("?", "", False),
        ("a?c", "ac", False),
        ("[a-c]x", "bx", True),
        ("[a-c]x", "dx", False),
        ("[^a-c]x", "dx", True),
        ("[^a-c]x", "ax", False),
        ("[!a]x", "!x", True),
        ("[!a]x", "ax", True),
        ("[!a]x", "bx", False),
        ("[^a]", "/", True),
        ("[c-a]", "b", False),
        ("[^c-a]", "b", True),
        (r"[\]]", "]", True),
        (r"[a\-c]", "b", False),
        (r"[a\-c]", "-", True),
        ("[α-ω]", "λ", True),
        ("[*?]", "*", True),
        ("[[]", "[", True),
        ("[&&~~||]", "|", True),
        (r"\*", "*", True),
        (r"\*", "x", False),
        (r"a\bc", "abc", True),
        ("a.c", "abc", False),
        ("(a|b)+", "(a|b)+", True),
        ("**", "ab", True),
        ("**", "a/b", False),
        ("*.tar.*", "x.tar.gz", True),
        ("a\nb", "a\nb", True),
        ("a?b", "a\nb", True),
        ("*b*d*", "abcd", True),
        ("*ab", "aab", True),
        ("*a*a", "aa", True),
        ("x*y", "xy\n", False),
    ],
)
def test_go_match(pattern: str, name: str, matches: bool) -> None:
    assert go_match(pattern, name) is matches


@pytest.mark.parametrize(
    "pattern",
    ["[", "[]", "[]a]", "[^", "[^]", "[a", "[a-", "[a-]", "[-a]", "[a-b-c]", "\\", "a\\", "*[", "x[a\\", "[\\]"],
)
def test_go_match_refuses(pattern: str) -> None:
    for name in ("", "a", "completely different"):
        with pytest.raises(BadPattern, match="syntax error in pattern"):
            go_match(pattern, name)


@cache
def glob_fits(pattern: str, name: str) -> bool:
    """`*` and `?` by the definition, trying everything."""
    if not pattern:
        return not name
    if pattern[0] == "*":
        return glob_fits(pattern[1:], name) or (name[:1] not in ("", "/") and glob_fits(pattern, name[1:]))
    if not name or (name[0] == "/" if pattern[0] == "?" else name[0] != pattern[0]):
        return False
    return glob_fits(pattern[1:], name[1:])


@given(st.text("ab*?/", max_size=8), st.text("ab/", max_size=8))
def test_go_match_against_the_definition(pattern: str, name: str) -> None:
    assert go_match(pattern, name) is glob_fits(pattern, name)


@given(st.text("ab[]^-\\*?/", max_size=8), st.text("ab-^]/", max_size=5))
def test_go_match_never_crashes(pattern: str, name: str) -> None:
    try:
        go_match(pattern, name)
    except BadPattern:
        assert "[" in pattern or "\\" in pattern


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("name", "exact"),
        ("a/b.c", "exact"),
        ("dir/**", "prefix"),
        ("dir**", "prefix"),
        ("**/name", "suffix"),
        ("**name", "suffix"),
        ("**", "suffix"),
        ("**/**", "regex"),
        ("*", "regex"),
        ("a?", "regex"),
        ("a**/b", "regex"),
        (r"a\*", "regex"),
    ],
)
def test_kinds(pattern: str, kind: str) -> None:
    assert IgnorePattern(pattern).kind == kind


def oracle(pattern: str) -> re.Pattern[str]:
    """The regular expression that the definition of `**` asks for, without any care for speed."""
    text, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**", at):
            at += 3 if pattern.startswith("**/", at) else 2
            text += "(.*/)?" if at < len(pattern) else ".*"
        else:
            text += {"*": "[^/]*", "?": "[^/]"}.get(pattern[at], re.escape(pattern[at]))
            at += 1
    return re.compile(text + r"\Z")


@given(st.text("ab*?/", min_size=1, max_size=9), st.text("ab/", max_size=9))
@example("**/a/**/b", "a/b/a/b")
@example("a**b**b", "ab/b/b")
@example("*a/**/*b*/**", "xa/b/c")
def test_double_stars_against_the_definition(pattern: str, path: str) -> None:
    try:
        compiled = IgnorePattern(pattern)
    except BadPattern:
        assert pattern.count("**") > 2
        return
    if compiled.kind == "regex" or compiled.kind == "exact":
        assert compiled.tester()(path) is (oracle(pattern).match(path) is not None)


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("**x", "dir/abx", True),  # the end of any path, not of a component
        ("x**", "xyz/abc", True),
        ("**", "", True),
        ("**/a", "a", True),
        ("**/a", "ba", False),
        ("**/a", "b/a", True),
        ("a[b-d]e", "ace", True),
        ("a[^b-d]e", "aze", True),
        ("a[^b]e", "a/e", True),
        ("[!a]x", "!x", True),
        ("[!a]x", "bx", False),
        ("[[:digit:]]x", "7x", True),
        ("[[:digit:]]x", "ax", False),
        ("[^[:alpha:]]x", "7x", True),
        (r"[\*]", "*", True),
        ("[*]", "*", False),  # the star is read before the bracket: a class of [ ^ /, repeated, and a ]
        ("[*]", "[/]", True),
        ("[?]", "/]", True),
        ("^a*", "^a", False),  # ^ is an anchor once there is a wildcard
        ("^a", "^a", True),
        (r"\d", "7", True),  # what follows a backslash is the regular expression's
        (r"a\.b*", "a.bc", True),
        (r"a\.b*", "axbc", False),
        ("a.b*", "axb", False),
        ("a|b*", "a|bc", True),
        ("a]b", "a]b", True),
        ("a?b", "a\nb", True),
        ("**/b", "a\nc/b", True),
        ("**/*b", "a\nc/b", False),  # `.` does not match a line feed
    ],
)
def test_oddities(pattern: str, path: str, matches: bool) -> None:
    assert IgnorePattern(pattern).tester()(path) is matches


@pytest.mark.parametrize("pattern", ["[", "[z-a]*", "[[:nope:]]*", r"\y*", r"[\d]*", "a\\", "[a**b**c**d**e"])
def test_refused(pattern: str) -> None:
    with pytest.raises(BadPattern):
        IgnorePattern(pattern)


def test_too_many_wildcards_that_cannot_be_fast() -> None:
    with pytest.raises(BadPattern, match="too many wildcards"):
        IgnorePattern("a**b**c**d")
    with pytest.raises(BadPattern, match="too many wildcards"):
        IgnorePattern("[^x]*a*b*c")


@given(st.text("ab[]^-!\\*?/:", min_size=1, max_size=9), st.text("ab-^]/", max_size=5))
def test_never_crashes(pattern: str, path: str) -> None:
    try:
        compiled = IgnorePattern(pattern)
    except BadPattern:
        return
    if compiled.text or compiled.kind != "suffix":
        compiled.tester()(path)


@pytest.mark.parametrize("pattern", ["*a" * 60 + "b", "**/a/" * 30 + "q", "**/*a*a*a*/**/*b*b*b*/**/q", "a**a**b"])
def test_hostile_patterns_are_fast(pattern: str) -> None:
    matches = IgnorePattern(pattern).tester()
    start = time.thread_time()
    for path in ("a" * 255, "a/" * 2000, "aaa/" * 1000 + "b"):
        assert not matches(path) or path.endswith("b")
    assert time.thread_time() - start < 20  # backtracking would not end


def test_wildcards() -> None:
    assert [has_wildcard(p) for p in ("a", "a*", "a?", "[a", "a\\", "a]")] == [False, True, True, True, True, False]
