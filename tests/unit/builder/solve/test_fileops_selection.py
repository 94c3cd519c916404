"""Which entries COPY takes: the ignore file, `--exclude`, and `--parents` with its patterns."""

from __future__ import annotations

import os
import posixpath
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.errors import ContextError
from builder.frontend.ignorefile import IgnoreMatcher
from builder.solve.contenthash import content_key
from builder.solve.copyoptions import CopyOptions, selection
from builder.solve.fileops import copy
from builder.solve.sourcetree import SourceTree
from tests.unit.builder.solve.conftest import Trees, harvest

TREE = {"a.md": "a", "b.txt": "b", "d/c.md": "c", "d/e/f.md": "f", "d/e/g.txt": "g", "h/i.md": "i"}


def tree(*paths: str) -> dict[str, str | None]:
    """The paths of TREE, those that end in / being directories."""
    return {path.rstrip("/"): None if path.endswith("/") else TREE[path] for path in paths}


@pytest.mark.parametrize(
    ("ignore", "wanted"),
    [
        ("", ("a.md", "b.txt", "d/", "d/c.md", "d/e/", "d/e/f.md", "d/e/g.txt", "h/", "h/i.md")),
        ("*.md", ("b.txt", "d/", "d/c.md", "d/e/", "d/e/f.md", "d/e/g.txt", "h/", "h/i.md")),
        ("**/*.md", ("b.txt", "d/", "d/e/", "d/e/g.txt", "h/")),
        ("d", ("a.md", "b.txt", "h/", "h/i.md")),
        ("d\n!d/e/f.md", ("a.md", "b.txt", "d/", "d/e/", "d/e/f.md", "h/", "h/i.md")),
        ("*\n!d/e", ("d/", "d/e/", "d/e/f.md", "d/e/g.txt")),
        ("*\n!**/*.txt", ("b.txt", "d/", "d/e/", "d/e/g.txt")),
        ("*\n!nothing", ()),
        ("d/e\n!d/e/none", ("a.md", "b.txt", "d/", "d/c.md", "h/", "h/i.md")),
        ("*", ()),
        ("**", ()),
    ],
)
def test_ignored(trees: Trees, ignore: str, wanted: tuple[str, ...]) -> None:
    trees.given(TREE)
    trees.copy(".", "/", ignore=ignore)
    assert trees.result == tree(*wanted)


@pytest.mark.parametrize("source", ["d", "d/c.md", "d/e/f.md", "link"])
def test_what_is_ignored_is_not_found(trees: Trees, source: str) -> None:
    trees.given(TREE | {"link": "-> d/c.md"})
    with pytest.raises(ContextError, match="not found"):
        trees.copy(source, "/x", ignore="d")
    assert trees.result == {}


def test_a_source_within_an_ignored_directory(trees: Trees) -> None:
    trees.given(TREE)
    trees.copy("d/e/f.md", "/x", ignore="d\n!d/e/f.md")
    trees.copy("d", "/y", ignore="d\n!d/e/f.md")
    assert trees.result == {"x": "f", "y": None, "y/e": None, "y/e/f.md": "f"}


def test_wildcards_see_only_what_is_not_ignored(trees: Trees) -> None:
    trees.given(TREE)
    trees.copy("*", "/x/", ignore="*.md\nd\n!d/e/g.txt\nh\n!h/none")
    assert trees.result == {"x": None, "x/b.txt": "b", "x/e": None, "x/e/g.txt": "g"}


@pytest.mark.parametrize(
    ("exclude", "wanted"),
    [
        (("*.md",), ("b.txt", "d/", "d/c.md", "d/e/", "d/e/f.md", "d/e/g.txt", "h/", "h/i.md")),
        (("**/*.md",), ("b.txt", "d/", "d/e/", "d/e/g.txt", "h/")),
        (("d", "h/*"), ("a.md", "b.txt", "h/")),
        (("d/*", "!d/e"), ("a.md", "b.txt", "d/", "d/e/", "d/e/f.md", "d/e/g.txt", "h/", "h/i.md")),
        (("*", "!*.txt"), ("b.txt",)),
        (("d", "!d/e/f.md"), ("a.md", "b.txt", "d/", "d/e/", "d/e/f.md", "h/", "h/i.md")),
    ],
)
def test_excluded(trees: Trees, exclude: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    trees.given(TREE)
    trees.copy(".", "/", exclude=exclude)
    assert trees.result == tree(*wanted)


def test_excludes_are_relative_to_the_source_and_spare_it(trees: Trees) -> None:
    trees.given(TREE)
    trees.copy("d", "/x", exclude=("d", "e/*.txt"))
    trees.copy("b.txt", "/y", exclude=("*",))
    assert trees.result == {"x": None, "x/c.md": "c", "x/e": None, "x/e/f.md": "f", "y": "b"}


@pytest.mark.parametrize(
    ("source", "include", "exclude", "wanted"),
    [
        ("/", ("d/e/f.md",), (), ("d/", "d/e/", "d/e/f.md")),
        ("/", ("d/*.md",), (), ("d/", "d/c.md")),
        ("/", ("*/*.md",), (), ("d/", "d/c.md", "h/", "h/i.md")),
        ("/", ("**/*.txt",), (), ("b.txt", "d/", "d/e/", "d/e/g.txt")),
        ("/", ("d",), (), ("d/", "d/c.md", "d/e/", "d/e/f.md", "d/e/g.txt")),
        ("/", ("d/",), ("d/e",), ("d/", "d/c.md")),
        ("/", ("d",), ("**/*.md",), ("d/", "d/e/", "d/e/g.txt")),
        ("/", ("none*",), (), ()),
        ("/", ("",), (), ()),
    ],
)
def test_parents(
    trees: Trees, source: str, include: tuple[str, ...], exclude: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    trees.given(TREE)
    trees.copy(source, "/", include=include, exclude=exclude)
    assert trees.result == tree(*wanted)


def test_parents_from_the_pivot_on(trees: Trees) -> None:
    trees.given(TREE)
    trees.copy("d", "/x/", include=("e/*.md",))
    assert trees.result == {"x": None, "x/e": None, "x/e/f.md": "f"}


def test_parents_are_made_with_their_own_metadata(trees: Trees) -> None:
    trees.given({"p/q/f": "1"}, {"old/p": None})
    (trees.source / "p").chmod(0o711)
    (trees.source / "p/q").chmod(0o700)
    trees.copy("/", "/new", include=("p/q/f",))
    trees.copy("/", "/old", include=("p/q/f",))
    modes = {p: stat.S_IMODE((trees.dest / p).stat().st_mode) for p in ("new/p", "new/p/q", "old/p", "old/p/q")}
    assert modes == {"new/p": 0o711, "new/p/q": 0o700, "old/p": 0o711, "old/p/q": 0o700}


def test_an_ignored_directory_that_shows_something_is_like_any_other(trees: Trees) -> None:
    """BuildKit copies it even where `--exclude` then leaves nothing of what it shows."""
    trees.given(TREE)
    trees.copy(".", "/", ignore="*\n!d/e/g.txt", exclude=("**/*.txt",))
    assert trees.result == tree("d/", "d/e/")


def test_only_what_patterns_can_reach_is_walked(trees: Trees) -> None:
    trees.given(TREE)
    (trees.source / "h").chmod(0)
    entered = []
    options = trees.options(None, {"include": ("d/e/*.md",)})
    for directory, leaving in SourceTree(trees.source_fd).walk("", selection(options)):
        if not leaving:
            entered.append(directory.path)
    assert entered == ["", "d", "d/e"]


# Against a model: paths in, paths out

NAMES = st.sampled_from(["a", "b", "c.md", "d.txt"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
PATTERNS = st.lists(
    st.one_of(PATHS, st.sampled_from(["*", "**", "*.md", "**/*.md", "a/*", "*/b", "**/a", "a/**"])).flatmap(
        lambda p: st.sampled_from([p, f"!{p}"])
    ),
    max_size=4,
)


def model(paths: set[str], ignore: list[str], exclude: list[str]) -> set[str]:
    """What a copy of the whole tree leaves, by asking about each path alone."""
    ignored = IgnoreMatcher.from_patterns(ignore, "ignore").match
    excluded = IgnoreMatcher.from_patterns(exclude, "exclude").match
    everything = paths | {"/".join(p.split("/")[:n]) for p in paths for n in range(1, p.count("/") + 1)}
    seen = {p for p in everything if not ignored(p)}
    seen |= {parent for p in seen for parent in _parents(p)}
    taken = {p for p in seen if not excluded(p)}
    return taken | {parent for p in taken for parent in _parents(p)}


def _parents(path: str) -> set[str]:
    found = set()
    while path := posixpath.dirname(path):
        found.add(path)
    return found


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(paths=st.sets(PATHS, min_size=1, max_size=8), ignore=PATTERNS, exclude=PATTERNS)
def test_against_a_model(
    tmp_path_factory: pytest.TempPathFactory, paths: set[str], ignore: list[str], exclude: list[str]
) -> None:
    files = {p for p in paths if not any(q.startswith(p + "/") for q in paths)}
    top = tmp_path_factory.mktemp("model")
    trees = Trees(top)
    try:
        trees.given(dict.fromkeys(files, "x"))
        matcher = IgnoreMatcher.from_patterns(ignore, "ignore") if ignore else None
        options = CopyOptions(ignore=matcher, exclude=tuple(exclude))
        copy(trees.source_fd, "/", trees.dest_fd, "/", options)
        taken = model(files, ignore, exclude)
        assert set(harvest(trees.dest)) == taken
        key = content_key(trees.source_fd, ["/"], options)
        assert {entry.path for entry in key.entries() or ()} == taken
    finally:
        os.close(trees.source_fd)
        os.close(trees.dest_fd)
