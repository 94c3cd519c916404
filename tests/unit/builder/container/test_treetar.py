"""Tars of trees that a container has made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from builder.container.treetar import TreeTar
from layers.errors import LayerError


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
