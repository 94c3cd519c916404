"""Whole ignore files: the order of lines, parents, exceptions, the deciding line, pruning."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.errors import ContextError
from builder.frontend.ignorefile import Deciding, IgnoreMatcher, clean_path

SEEN, HIDDEN = False, True

TABLE = [
    # pattern lines, path, ignored
    ("", "a", SEEN),
    ("a", "a", HIDDEN),
    ("a", "a/b/c", HIDDEN),
    ("a", "b/a", SEEN),  # anchored at the root, unlike git's
    ("*.md", "x.md", HIDDEN),
    ("*.md", "d/x.md", SEEN),
    ("*/*.md", "d/x.md", HIDDEN),
    ("**/*.md", "x.md", HIDDEN),
    ("**/*.md", "d/e/x.md", HIDDEN),
    ("temp?", "temp1", HIDDEN),
    ("temp?", "d/temp1", SEEN),
    ("temp?", "temp", SEEN),
    (".git", ".git/config", HIDDEN),
    (".git", "sub/.git/config", SEEN),
    ("node_modules", "web/node_modules/x", SEEN),
    ("**/node_modules", "web/node_modules/x", HIDDEN),
    ("node_modules/**", "node_modules", SEEN),
    ("node_modules/**", "node_modules/x", HIDDEN),
    ("foo/", "foo", HIDDEN),  # a slash at the end means nothing, also for files
    ("foo/", "foo/x", HIDDEN),
    ("./foo", "foo", HIDDEN),
    ("/foo", "foo", HIDDEN),
    ("/foo", "d/foo", SEEN),
    ("foo//bar", "foo/bar", HIDDEN),
    ("foo/../bar", "bar", HIDDEN),
    ("foo/../bar", "foo/bar", SEEN),
    ("../foo", "foo", SEEN),
    ("/", "a", SEEN),
    (".", "a", SEEN),
    ("  spaced \t", "spaced", HIDDEN),
    ("# a", "# a", SEEN),
    (" # a", "# a", HIDDEN),
    ("#a\na", "a", HIDDEN),
    ("a\r\nb\r\n", "b", HIDDEN),
    ("\ufeffa", "a", HIDDEN),
    ("[ab]", "b", HIDDEN),
    ("[!a]x", "!x", HIDDEN),
    ("[!a]x", "bx", SEEN),
    ("[^a]x", "bx", HIDDEN),
    ("*", ".hidden", HIDDEN),
    ("*", "d/e", HIDDEN),
    ("**", "d/e", HIDDEN),
    ("A", "a", SEEN),
    ("é*", "été", HIDDEN),
    # exceptions: the last line that matches decides
    ("*\n!a", "a", SEEN),
    ("*\n!a", "b", HIDDEN),
    ("!a\n*", "a", HIDDEN),
    ("d\n!d/keep", "d/keep", SEEN),
    ("d\n!d/keep", "d/keep/x", SEEN),
    ("d\n!d/keep", "d/other", HIDDEN),
    ("d/*\n!d/keep", "d/keep", SEEN),
    ("d\n!d/keep\nd/keep/x", "d/keep/x", HIDDEN),
    ("d\n!d/keep\nd/keep/x", "d/keep/y", SEEN),
    ("d\n!d/keep\nd", "d/keep", SEEN),  # the walk met d at the first line; the third says nothing new
    ("**\n!a/b", "a/b/c", SEEN),
    ("**\n!a/b", "a", HIDDEN),
    ("*.md\n!README*.md\nREADME-secret.md", "README-secret.md", HIDDEN),
    ("*.md\n!README*.md\nREADME-secret.md", "README-public.md", SEEN),
    ("*.md\nREADME-secret.md\n!README*.md", "README-secret.md", SEEN),
    ("! a\n*\n!  a ", "a", SEEN),
    ("*\n!/a/", "a", SEEN),
    ("*\n!!a", "!a", SEEN),
    ("*\n./!a", "a", SEEN),
    ("*\n!**/*.txt", "d/e/f.txt", SEEN),
]


@pytest.mark.parametrize(("text", "path", "ignored"), TABLE)
def test_the_table(text: str, path: str, ignored: bool) -> None:
    matcher = IgnoreMatcher.parse(text)
    assert matcher.match(path) is ignored
    assert matcher.decide(path)[0] is ignored


def test_the_root_is_never_ignored() -> None:
    matcher = IgnoreMatcher.parse("**\n*\n.")
    for root in (".", "", "/"):
        assert not matcher.match(root)
        assert matcher.decide(root) == (False, None)
        assert not matcher.can_prune(root)


def test_the_deciding_line() -> None:
    matcher = IgnoreMatcher.parse("# head\n*.log\n\n!keep.log\n/keep.log/\n", "web.dockerignore")
    assert matcher.decide("a.log") == (True, Deciding("web.dockerignore", 2, "*.log"))
    assert matcher.decide("keep.log") == (True, Deciding("web.dockerignore", 5, "/keep.log/"))
    assert matcher.decide("a.log/x") == (True, Deciding("web.dockerignore", 2, "*.log"))
    assert matcher.decide("other") == (False, None)
    assert IgnoreMatcher.parse("*\n!a").decide("a/x") == (False, Deciding(".dockerignore", 2, "!a"))


def test_a_path_may_have_slashes_around_it() -> None:
    assert IgnoreMatcher.parse("a/b").match("/a/b/")


@pytest.mark.parametrize(
    ("text", "directory", "prunable"),
    [
        ("d", "d", True),
        ("d", "e", False),
        ("d\n!d/keep", "d", False),
        ("d\n!d/keep", "d/other", True),
        ("d\n!d/keep", "d/keep", False),
        ("*\n!d/e/f", "d/e", False),
        ("*\n!d/e/f", "d/x", True),
        ("*\n!d/*.txt", "d/x", False),
        ("*\n!d/*.txt", "e", True),
        ("*\n!**/x", "e", False),
        ("*\n!dd", "d", True),
        ("d/e\n!d", "d/e", True),  # at d nothing was hidden yet, so the ! says nothing for what is in it
        ("!d\nd/e", "d/e", True),
        ("*\n!d/x*/y", "d/z", False),
    ],
)
def test_pruning(text: str, directory: str, prunable: bool) -> None:
    assert IgnoreMatcher.parse(text).can_prune(directory) is prunable


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n!\n", r'f:2: illegal exclusion pattern: "!"'),
        ("! \n", "f:1: illegal exclusion"),
        ("./!", "f:1: illegal exclusion"),
        ("a\n\n[b", "f:3: syntax error in pattern"),
        ("b\\", "f:1: syntax error in pattern"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ContextError, match=message):
        IgnoreMatcher.parse(text, "f")


def test_patterns_of_copy_exclude() -> None:
    matcher = IgnoreMatcher.from_patterns(["*.md", "", " d/ "], "--exclude")
    assert [matcher.match(p) for p in ("a.md", "d/x", "b")] == [True, True, False]
    assert matcher
    assert not IgnoreMatcher.from_patterns([], "--exclude")


def test_a_deep_path() -> None:
    matcher = IgnoreMatcher.parse("**/q\n!**/q/r")
    assert matcher.match("q/" + "d/" * 2000 + "x")
    assert matcher.decide("q/" + "d/" * 2000 + "x")[0]


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("a/./b/../c/", "a/c"), ("//a", "/a"), ("", "."), ("a/..", "."), ("../a", "../a"), ("/..", "/")],
)
def test_clean(path: str, wanted: str) -> None:
    assert clean_path(path) == wanted


PATTERN = st.text("ab*/", min_size=1, max_size=5).map(lambda p: p.strip("/")).filter(bool)
LINES = st.lists(st.tuples(st.booleans(), PATTERN), max_size=5)
PATHS = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=4)


@given(LINES, PATHS)
def test_blocks_and_rules_agree(lines: list[tuple[bool, str]], parts: list[str]) -> None:
    """`match` tests neighbouring lines together, `decide` one by one; both walk down from the root."""
    try:
        matcher = IgnoreMatcher.parse("\n".join("!" * negated + pattern for negated, pattern in lines))
    except ContextError:
        return
    for depth in range(1, len(parts) + 1):
        path = "/".join(parts[:depth])
        assert matcher.match(path) is matcher.decide(path)[0]


@given(LINES, PATHS, PATHS)
def test_what_is_pruned_holds_nothing_visible(
    lines: list[tuple[bool, str]], above: list[str], below: list[str]
) -> None:
    try:
        matcher = IgnoreMatcher.parse("\n".join("!" * negated + pattern for negated, pattern in lines))
    except ContextError:
        return
    if matcher.can_prune("/".join(above)):
        assert matcher.match("/".join(above + below))
