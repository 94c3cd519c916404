"""The reference grammar, with Docker's defaults."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidReference
from registry.reference import Reference, is_short_name

D = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "domain", "path", "tag", "digest", "familiar"),
    [
        ("debian", "docker.io", "library/debian", None, None, "debian"),
        ("debian:bookworm", "docker.io", "library/debian", "bookworm", None, "debian:bookworm"),
        ("docker.io/debian", "docker.io", "library/debian", None, None, "debian"),
        ("index.docker.io/debian:1", "docker.io", "library/debian", "1", None, "debian:1"),
        ("team/app:v1", "docker.io", "team/app", "v1", None, "team/app:v1"),
        ("docker.io/library/debian", "docker.io", "library/debian", None, None, "debian"),
        ("library/a/b", "docker.io", "library/a/b", None, None, "library/a/b"),
        ("localhost/foo", "localhost", "foo", None, None, "localhost/foo"),
        ("localhost:5000", "docker.io", "library/localhost", "5000", None, "localhost:5000"),
        ("localhost:5000/foo", "localhost:5000", "foo", None, None, "localhost:5000/foo"),
        ("127.0.0.1:5000/a/b:c", "127.0.0.1:5000", "a/b", "c", None, "127.0.0.1:5000/a/b:c"),
        ("[::1]:5000/x", "[::1]:5000", "x", None, None, "[::1]:5000/x"),
        ("[fe80::1]/x:y", "[fe80::1]", "x", "y", None, "[fe80::1]/x:y"),
        ("ghcr.io/a/b@" + D, "ghcr.io", "a/b", None, D, "ghcr.io/a/b@" + D),
        ("a.b/c:t@" + D, "a.b", "c", "t", D, "a.b/c:t@" + D),
        ("UPPER/x", "UPPER", "x", None, None, "UPPER/x"),
        ("a__b/c-d.e---f", "docker.io", "a__b/c-d.e---f", None, None, "a__b/c-d.e---f"),
        ("x:_T.a-g", "docker.io", "library/x", "_T.a-g", None, "x:_T.a-g"),
        ("x:" + "t" * 128, "docker.io", "library/x", "t" * 128, None, "x:" + "t" * 128),
        ("h.x/" + "a" * 255, "h.x", "a" * 255, None, None, "h.x/" + "a" * 255),
    ],
)
def test_parse(text: str, domain: str, path: str, tag: str | None, digest: str | None, familiar: str) -> None:
    ref = Reference.parse(text)
    assert (ref.domain, ref.path, ref.tag, ref.digest) == (domain, path, tag, digest)
    assert ref.familiar() == familiar
    assert Reference.parse(ref.familiar()) == ref
    assert Reference.parse(str(ref)) == ref


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("Debian", "lowercase"),
        ("a/B", "lowercase"),
        ("a//b", "repository name"),
        ("/a", "registry host|repository name"),
        ("a/", "repository name"),
        ("a:", "not a tag"),
        ("a:b c", "not a tag"),
        ("a:" + "t" * 129, "not a tag"),
        ("a:.b", "not a tag"),
        ("a@", "not a digest"),
        ("a@sha256:abc", "not a digest"),
        ("a@md5:" + "a" * 32, "not a digest"),
        ("a@" + D.upper(), "not a digest"),
        ("a@" + D + "@" + D, "not a digest"),
        ("a___b", "repository name"),
        ("a._b", "repository name"),
        ("-a", "repository name"),
        ("a-", "repository name"),
        ("a b", "repository name"),
        ("é", "repository name"),
        ("a\n", "repository name"),
        ("a:b\n", "not a tag"),
        ("-h.x/a", "registry host"),
        ("h..x/a", "registry host"),
        ("h.x:port/a", "registry host"),
        ("https://h.x/a", "registry host"),
        ("ab" * 32, "image ID"),
        ("h.x/" + "a" * 256, "255"),
        ("a" * 5000, "longer"),
    ],
)
def test_refused(text: str, part: str) -> None:
    with pytest.raises(InvalidReference, match=part) as caught:
        Reference.parse(text)
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 1200


def test_with() -> None:
    ref = Reference.parse("a.b/c:t@" + D)
    assert str(ref.with_tag("u")) == "a.b/c:u"
    assert str(ref.with_digest(D)) == "a.b/c@" + D
    assert str(ref.without_target()) == "a.b/c" == ref.repository
    assert ref.with_default_tag() is ref
    assert str(Reference.parse("a.b/c").with_default_tag()) == "a.b/c:latest"
    assert (ref.target, Reference.parse("a").target, Reference.parse("a:b").target) == (D, "latest", "b")
    with pytest.raises(InvalidReference):
        ref.with_tag("a/b")
    with pytest.raises(InvalidReference):
        ref.with_digest("sha256:0")


def test_short_names() -> None:
    assert is_short_name("debian:1") and is_short_name("a/b@" + D) and is_short_name("localhost:5000")
    assert not is_short_name("docker.io/a") and not is_short_name("localhost/a") and not is_short_name("h:5/a")


@given(st.text(alphabet="aA0._-:/@[]", max_size=40))
def test_what_parses_round_trips(text: str) -> None:
    try:
        ref = Reference.parse(text)
    except InvalidReference:
        return
    assert Reference.parse(ref.canonical()) == ref
    assert Reference.parse(ref.familiar()) == ref
    assert ref.path == ref.path.lower()


def test_no_input_takes_long() -> None:
    started = time.thread_time()
    for text in ("a-" * 500 + "!", "a__" * 340, "a/" * 500 + "A", "a." * 510 + "/x", "a" * 1023 + "!"):
        with pytest.raises(InvalidReference):
            Reference.parse(text)
    assert time.thread_time() - started < 10  # of this thread's own work: the machine may be busy
