"""Who may look into a store: nobody but its user, where set-id programs and secrets may be, whatever the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.containers.boxes import IMAGE, box
from tests.support.cli import Pybuild

__all__ = ["box"]

CLOSED = {"volumes", "containers", "cachemounts", "snapshots", "builds", "stubs"}


@pytest.fixture
def careless() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_what_containers_and_builds_keep_is_closed(box: Pybuild, tmp_path: Path, careless: None) -> None:
    home = box.account.home if box.account else tmp_path
    box.run("run", "--name", "kept", "--network", "none", "-v", "data:/data", IMAGE, "sh", "-c",
            "cp /bin/busybox /data/busybox; chmod 4755 /data/busybox")  # fmt: skip
    context = home / f"modes-{os.getpid()}"
    context.mkdir(mode=0o755)
    (context / "Containerfile").write_text(f"FROM {IMAGE}\nRUN --mount=type=cache,target=/c echo x > /c/x\n")
    box.build(context, "-t", "cached:1")
    box.run("from", "--name", "working", IMAGE)
    mounted = box.run("image", "mount", IMAGE, check=False)  # an ordinary user's is gone with the command
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(box.root) if entry.is_dir()}
    assert set(modes) >= CLOSED | ({"mounts"} if mounted.status == 0 else set())
    closed = CLOSED | ({"mounts"} & set(modes))
    assert {name: oct(modes[name]) for name in closed if modes[name] & 0o077} == {}
    assert not [name for name, mode in modes.items() if mode & 0o022]
    documents = [*box.root.glob("events*"), *box.root.glob("containers/*/*.json"), *box.root.glob("builds/*")]
    assert len(documents) >= 3
    assert not [path for path in documents if path.stat().st_mode & 0o077]
    if mounted.status == 0:
        box.run("image", "unmount", IMAGE)
    box.run("rm", "kept", "working")
    assert box.run("volume", "ls", "-q").text.split() == ["data"]
