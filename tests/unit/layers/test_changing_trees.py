"""Layers of trees that a running container changes: what becomes a link meanwhile is not gone through."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from layers import layerdiff
from layers.changeset import Change, diff_overlay, diff_trees, write_layer
from layers.errors import LayerError

SECRET = b"of the host alone..."


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree whose files have the names and sizes of the host's."""
    for top in (tmp_path / "host", tmp_path / "tree" / "a"):
        (top / "b").mkdir(parents=True)
    (tmp_path / "host" / "b" / "f").write_bytes(SECRET)
    (tmp_path / "tree" / "a" / "b" / "f").write_bytes(b"." * len(SECRET))
    return tmp_path / "tree"


def swapping(changes: Iterator[Change], tree: Path, name: str) -> Iterator[Change]:
    """The changes; before the last file is read, the directory `name` becomes a link to the host's."""
    for change in changes:
        if change.path.endswith(b"/f"):
            (tree / name).rename(tree / "aside")
            (tree / name).symlink_to(tree.parent / "host" / name.removeprefix("a").removeprefix("/"))
        yield change


@pytest.mark.parametrize("overlay", [True, False])
@pytest.mark.parametrize("name", ["a", "a/b"])
def test_a_directory_that_becomes_a_link_is_not_entered(tree: Path, name: str, overlay: bool) -> None:
    found = diff_overlay(tree, (), "user") if overlay else diff_trees(None, tree)
    # Where the directory is open already, what is read is what was listed.
    changes = list(found)
    written = io.BytesIO()
    with pytest.raises(LayerError, match="cannot read 'a/b/f'"):
        write_layer(swapping(iter(changes[-1:]), tree, name), tree, written, compression="none")
    assert SECRET not in written.getvalue()


def test_a_walk_does_not_come_back_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerdiff, "_HELD_FRAMES", 2)
    deep = tmp_path / "tree" / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    (tmp_path / "host" / "z").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "z").mkdir()
    walk = diff_trees(None, tmp_path / "tree")
    for change in walk:
        if change.path == b"a/b/c/d":
            break
    (tmp_path / "tree" / "a").rename(tmp_path / "tree" / "old")
    (tmp_path / "tree" / "a").symlink_to(tmp_path / "host")
    with pytest.raises(LayerError, match="cannot read"):
        list(walk)


def test_paths_of_any_length(tmp_path: Path) -> None:
    names = ["n" * 200] * 30
    here = os.open(tmp_path, os.O_RDONLY)
    for name in names:
        os.mkdir(name, dir_fd=here)
        deeper = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    written = io.BytesIO()
    assert write_layer(diff_trees(None, tmp_path), tmp_path, written, compression="none").entries == 31
