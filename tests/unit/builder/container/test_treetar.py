"""Tars of trees that a container has made."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from builder.container.treetar import TreeTar
from layers.errors import LayerError


def test_a_hard_link_is_one_entry(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    os.link(tmp_path / "a", tmp_path / "b")
    written: list[bytes] = []
    fd = os.open(tmp_path, os.O_RDONLY)
    tree = TreeTar(written.append)
    tree.add_contents(fd)
    tree.finish()
    os.close(fd)
    with tarfile.open(fileobj=io.BytesIO(b"".join(written))) as tar:
        assert [(entry.name, entry.isreg(), entry.linkname, entry.size) for entry in tar] == [
            ("a", True, "", 4),
            ("b", False, "a", 0),
        ]


@pytest.mark.parametrize(("depth", "fits"), [(390, True), (450, False), (800, False)])
def test_a_tree_without_floor_is_one_error(tmp_path: Path, depth: int, fits: bool) -> None:
    top = fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        if fd != top:
            os.close(fd)
        fd = below
    os.close(fd)
    written: list[bytes] = []
    try:
        if fits:
            TreeTar(written.append).add_contents(top)
        else:
            with pytest.raises(LayerError, match="nested"):
                TreeTar(written.append).add_contents(top)
    finally:
        os.close(top)
