"""Mounts by fuse-overlayfs: what fails is told in its words, and nothing lingers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layers import fusemount
from tests.support.machine import need_mounts, need_root, need_tool
from tests.support.waiting import until


@pytest.fixture
def program() -> str:
    need_root()
    need_mounts()
    need_tool("fuse-overlayfs")
    found = fusemount.find_program()
    if found is None:
        pytest.skip("no /dev/fuse here")
    return found


def serving() -> set[int]:
    """The programs that this process started and has not reaped."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("fuse-overl")}


def test_as_many_layers_as_the_kernel_takes(program: str, tmp_path: Path) -> None:
    layers = []
    for number in range(500):
        layer = tmp_path / f"a,b:{number}"  # characters that part options
        layer.mkdir()
        (layer / f"file{number}").touch()
        layers.append(str(layer))
    upper, work = tmp_path / "upper", tmp_path / "work"
    upper.mkdir()
    work.mkdir()
    tree = fusemount.mount(program, layers, str(upper), str(work))
    listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=tree)
    assert len(os.listdir(listed)) == 500
    os.unlink("file7", dir_fd=tree)
    os.close(listed)
    os.close(tree)
    assert (upper / "file7").is_char_device()


def test_it_ends_with_its_mount(program: str, tmp_path: Path) -> None:
    tmp_path.joinpath("lower").mkdir()
    before = serving()
    for _ in range(4):
        os.close(fusemount.mount(program, [str(tmp_path / "lower")]))

    def ended() -> bool:
        fusemount._reap()
        return serving() <= before

    until(ended)


def test_what_it_refuses_is_told(program: str, tmp_path: Path) -> None:
    tmp_path.joinpath("lower").mkdir()
    before = serving()
    with pytest.raises(OSError, match=r"workdir|directory|No such"):
        fusemount.mount(program, [str(tmp_path / "lower")], str(tmp_path / "lower"), str(tmp_path / "none"))
    script = tmp_path / "fuse-overlayfs"
    script.write_text("#!/bin/sh\necho these are its words >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(OSError, match="these are its words"):
        fusemount.mount(str(script), [str(tmp_path / "lower")])
    assert serving() <= before
