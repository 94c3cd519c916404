"""The parts of a wildcard, the modes of `--chmod`, and the resolution of paths inside a root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from builder.errors import ContextError
from builder.frontend.filemode import parse_mode
from builder.solve import filedata, rootpath
from builder.solve.sourcetree import split_wildcards
from tests.unit.builder.solve.conftest import plant


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("a/b", ("a/b", [])),
        ("a/*.c/d", ("a", ["*.c", "d"])),
        ("*", ("", ["*"])),
        ("a\\*/b", ("a\\*/b", [])),
        ("a/b?", ("a", ["b?"])),
        ("a[/b", ("", ["a[", "b"])),
        ("a\\", ("a\\", [])),
    ],
)
def test_split(path: str, wanted: tuple[str, list[str]]) -> None:
    assert split_wildcards(path) == wanted


@pytest.mark.parametrize(
    ("text", "old", "file", "directory"),
    [
        ("644", 0o777, 0o644, 0o644),
        ("07777", 0, 0o7777, 0o7777),
        ("0", 0o777, 0, 0),
        ("+x", 0o644, 0o755, 0o755),
        ("u+x", 0o644, 0o744, 0o744),
        ("a-w", 0o666, 0o444, 0o444),
        ("go=", 0o777, 0o700, 0o700),
        ("=r", 0o777, 0o444, 0o444),
        ("=rw,+X", 0o711, 0o777, 0o777),
        ("=rw,+X", 0o600, 0o666, 0o777),
        ("+X", 0o644, 0o644, 0o755),
        ("u=rwx,go=rx", 0, 0o755, 0o755),
        ("u=rwx,go=u-w", 0o644, 0o755, 0o755),
        ("g=u", 0o640, 0o660, 0o660),
        ("o=g-w", 0o670, 0o675, 0o675),
        ("u+s,g+s", 0o755, 0o6755, 0o6755),
        ("+s", 0o755, 0o6755, 0o6755),
        ("o+s", 0o755, 0o755, 0o755),
        ("+t", 0o755, 0o1755, 0o1755),
        ("a=rx", 0o7777, 0o1555, 0o1555),
        ("u-s", 0o4755, 0o755, 0o755),
        ("u+x-w", 0o666, 0o566, 0o566),
        ("ug+rwx,o-rwx", 0o007, 0o770, 0o770),
        ("a+rX", 0o600, 0o644, 0o755),
        ("u=", 0o4777, 0o077, 0o077),
        ("u=rwX,go=rX", 0o600, 0o644, 0o755),
        ("u=rwX,go=rX", 0o700, 0o755, 0o755),
        ("u=rwX,go=", 0o4751, 0o700, 0o700),
        ("a-X", 0o711, 0o600, 0o600),
        ("=X", 0o644, 0, 0o111),
    ],
)
def test_modes(text: str, old: int, file: int, directory: int) -> None:
    parsed = parse_mode(text)
    assert oct(parsed.apply(0o100000 | old, is_directory=False)) == oct(file)
    assert oct(parsed.apply(0o040000 | old, is_directory=True)) == oct(directory)


@pytest.mark.parametrize("text", ["64a", "8", "10000", "77777777777", "0o755"])
def test_numbers_that_are_no_modes(text: str) -> None:
    with pytest.raises(ValueError, match="it should be octal string and between 0 and 07777"):
        parse_mode(text)


@pytest.mark.parametrize("text", ["", "u", "x", "u+q", "u+x,", ",u+x", "u+x,,g+x", "u x", "+755"])
def test_words_that_are_no_modes(text: str) -> None:
    with pytest.raises(ValueError, match="invalid chmod parameter"):
        parse_mode(text)


@given(st.text(alphabet="ugoarwxXst+-=,07", max_size=12), st.integers(0, 0o7777))
@example("u=g+x-X", 0o751)
def test_any_mode_is_refused_or_gives_permission_bits(text: str, mode: int) -> None:
    try:
        parsed = parse_mode(text)
    except ValueError:
        return
    for is_directory in (False, True):
        assert 0 <= parsed.apply(mode, is_directory=is_directory) <= 0o7777


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("", ""),
        ("/", ""),
        ("..", ""),
        ("/d/./f", "d/f"),
        ("abs", "d"),
        ("abs/f", "d/f"),
        ("up/d", "d"),
        ("chain", "d/f"),
        ("chain/../f", "f"),
        ("new/abs", "new/abs"),
        ("to-new/x", "some/new/x"),
        ("d/none/../f", "d/f"),
        ("d//f", "d/f"),
    ],
)
def test_resolve(tmp_path: Path, path: str, wanted: str) -> None:
    plant(tmp_path, {"d/f": "", "abs": "-> /d", "up": "-> ../../..", "chain": "-> abs/f", "to-new": "-> /some/new"})
    fd = os.open(tmp_path, os.O_PATH)
    try:
        assert rootpath.resolve(fd, path) == wanted
    finally:
        os.close(fd)


LINKS = st.lists(st.sampled_from(["a", "b", "c", "..", ".", ""]), min_size=1, max_size=5).map("/".join)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(links=st.dictionaries(st.sampled_from(["a", "b", "d/a", "d/b"]), LINKS.filter(bool), max_size=4), path=LINKS)
def test_resolve_agrees_with_the_kernel(
    tmp_path_factory: pytest.TempPathFactory, links: dict[str, str], path: str
) -> None:
    """Where the path exists, its canonical form is the very same file."""
    from layers import linux

    top = tmp_path_factory.mktemp("links")
    plant(top, {"d/c/a": None, "c/b": None} | {name: f"-> {target}" for name, target in links.items()})
    fd = os.open(top, os.O_PATH)
    try:
        # A path is cleaned first, as words are: `..` takes back a component, not a symlink's target.
        cleaned = rootpath.clean(path)
        try:
            found = linux.openat2(fd, cleaned or ".", os.O_PATH)
        except OSError:
            try:
                rootpath.resolve(fd, path)
            except ContextError:
                pass
            return
        canonical = rootpath.resolve(fd, path)
        status = rootpath.lstat(fd, canonical)
        assert status is not None
        assert os.path.samestat(status, os.fstat(found))
        os.close(found)
    finally:
        os.close(fd)


def test_a_mode_is_never_given_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.touch(mode=0o600)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    os.mkfifo(inside / "fifo", 0o600)
    fd = os.open(inside, os.O_RDONLY | os.O_DIRECTORY)
    try:
        filedata.set_mode(fd, "link", 0o4777)
        filedata.set_mode(fd, "fifo", 0o640)
    finally:
        os.close(fd)
    assert outside.stat().st_mode & 0o7777 == 0o600
    assert (inside / "fifo").stat().st_mode & 0o7777 == 0o640
