"""The working directory that a step finds missing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.sandbox.rootfs import make_workdir


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_what_is_missing_is_made(root_fd: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o700)
    make_workdir(root_fd, "/a/b/c", None)
    make_workdir(root_fd, "/a/b/c", None)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b", "a/b/c")] == [0o700, 0o755, 0o755]


def test_a_part_before_dots_is_made_too(root_fd: int, tmp_path: Path) -> None:
    """The kernel looks it up, on the way to the directory."""
    make_workdir(root_fd, "/gone/../here", None)
    assert sorted(os.listdir(tmp_path)) == ["gone", "here"]


def test_links_stay_in_the_image(root_fd: int, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("../../../../outside")
    (tmp_path / "abs").symlink_to("/inside")
    make_workdir(root_fd, "/out/x", None)
    make_workdir(root_fd, "/abs", None)
    assert (tmp_path / "outside/x").is_dir() and (tmp_path / "inside").is_dir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        make_workdir(root_fd, "/loop", None)
