"""References to git repositories: told from paths and URLs, and taken apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.frontend.gitref import GitRef, is_git_source, is_http_source, parse_git_ref


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://example.com/foo.git", GitRef("https://example.com/foo.git")),
        ("https://example.com/foo.git#v1", GitRef("https://example.com/foo.git", "v1")),
        ("https://example.com/foo.git#v1:sub/dir", GitRef("https://example.com/foo.git", "v1", "sub/dir")),
        ("https://example.com/foo.git#:sub", GitRef("https://example.com/foo.git", "", "sub")),
        ("https://u:p@example.com:8443/a/b.git", GitRef("https://u:p@example.com:8443/a/b.git")),
        ("http://example.com/foo.git", GitRef("http://example.com/foo.git")),
        ("git://example.com/foo", GitRef("git://example.com/foo")),
        ("ssh://git@example.com/foo", GitRef("ssh://git@example.com/foo")),
        ("git@example.com:foo/bar.git#main", GitRef("git@example.com:foo/bar.git", "main")),
        ("user@host:path", GitRef("user@host:path")),
        ("github.com/foo/bar", GitRef("https://github.com/foo/bar", like_a_path=True)),
        ("github.com/foo/bar#x", GitRef("https://github.com/foo/bar", "x", like_a_path=True)),
        ("https://e.com/f.git?ref=v1&subdir=s", GitRef("https://e.com/f.git", "v1", "s")),
        ("https://e.com/f.git?tag=v1", GitRef("https://e.com/f.git", "refs/tags/v1")),
        ("https://e.com/f.git?branch=main", GitRef("https://e.com/f.git", "refs/heads/main")),
        ("https://e.com/f.git?checksum=abc1234", GitRef("https://e.com/f.git", "abc1234", checksum="abc1234")),
        ("https://e.com/f.git?commit=abc1234#main", GitRef("https://e.com/f.git", "main", checksum="abc1234")),
        ("https://e.com/f.git?keep-git-dir=1", GitRef("https://e.com/f.git", keep_git_dir=True)),
        ("https://e.com/f.git?keep-git-dir", GitRef("https://e.com/f.git", keep_git_dir=True)),
        ("https://e.com/f.git?submodules=false", GitRef("https://e.com/f.git", submodules=False)),
        ("git@e.com:f.git?subdir=a", GitRef("git@e.com:f.git", "", "a")),
        ("https://e.com/foo", None),
        ("https://e.com/foo.git/x", None),
        ("https://e.com/foo?x=.git", None),
        ("./foo.git", None),
        ("../user@host:x", None),
        ("foo/bar.git", None),
        ("ftp://e.com/foo.git", None),
        ("file:///foo.git", None),
        ("ext::sh -c id", None),
        ("https:///foo.git", None),
        ("https://e.com:port/foo.git", None),
        ("https://e.com/foo\n.git", None),
        ("", None),
    ],
)
def test_parse(text: str, wanted: GitRef | None) -> None:
    assert parse_git_ref(text) == wanted


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("x=1", "unexpected query 'x'"),
        ("ref=", "query 'ref' has no value"),
        ("ref=a&ref=b", "multiple values"),
        ("ref=a#b", "ref conflicts: 'b' vs 'a'"),
        ("subdir=a#x:b", "subdir conflicts"),
        ("tag=a&branch=b", "branch conflicts with tag"),
        ("keep-git-dir=perhaps", "invalid keep-git-dir value"),
        ("checksum=a&commit=b", "mean the same"),
        ("tag=a&ref=b", "ref conflicts"),
    ],
)
def test_contradictions(query: str, complaint: str) -> None:
    text = f"https://example.com/foo.git?{query}"
    with pytest.raises(ValueError, match=complaint):
        parse_git_ref(text)
    assert is_git_source(text)


@pytest.mark.parametrize(
    ("text", "git", "http"),
    [
        ("https://e.com/foo.git", True, False),
        ("https://e.com/foo.tar.gz", False, True),
        ("http://e.com/", False, True),
        ("github.com/foo/bar", False, False),
        ("git@e.com:foo", True, False),
        ("file.txt", False, False),
        ("HTTPS://e.com/foo", False, False),
    ],
)
def test_classes(text: str, git: bool, http: bool) -> None:
    assert (is_git_source(text), is_http_source(text)) == (git, http)


@pytest.mark.parametrize("text", ["https://e.com/~foo/bar", "http://e.com/bar"])
def test_known_to_be_a_repository(text: str) -> None:
    assert is_git_source(text, known=True)
    assert parse_git_ref(f"{text}#main:sub", known=True) == GitRef(text, "main", "sub")
    assert not is_git_source("file.txt", known=True)


@given(st.text(max_size=40), st.sampled_from(["", "https://", "git@h:", "github.com/", "https://e.com/f.git?"]))
def test_nothing_but_value_errors(text: str, prefix: str) -> None:
    try:
        found = parse_git_ref(prefix + text)
    except ValueError:
        return
    assert found is None or not found.remote.startswith("-")
