"""`cp` and `export` of a container that makes its directories links to the host's, and back, all the time."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from tests.integration.containers.boxes import IMAGE, box, start
from tests.support.cli import Pybuild

__all__ = ["box"]

ROUNDS = 4
SECRET = b"of the host alone"


def swapping(box: Pybuild, canary: Path) -> str:
    """A container in which /d, and /d/in, is a directory with files one moment, and a link to the canary the next."""
    script = (
        f"mkdir -p /d/in /spare/in; echo mine > /d/in/file; echo mine > /d/file; echo mine > /spare/in/file;"
        f"ln -s {canary} /link; ln -s {canary}/in /inlink; echo ready;"
        "while :; do mv -T /d /old; mv -T /link /d; mv -T /d /link; mv -T /old /d;"
        " mv -T /d/in /d/old; mv -T /inlink /d/in; mv -T /d/in /inlink; mv -T /d/old /d/in; done"
    )
    name = start(box, IMAGE, "sh", "-c", script)
    # That it does so is seen from within: both kinds, again and again.
    look = "a=; b=; while [ ! $a$b = 11 ]; do [ -L /d ] && a=1; [ -d /d/in -a ! -L /d ] && b=1; done"
    box.run("exec", name, "timeout", "60", "sh", "-c", look)
    return name


@pytest.fixture
def canary(box: Pybuild, tmp_path: Path) -> Path:
    home = box.account.home if box.account else tmp_path
    place = home / f"canary-{os.getpid()}"
    (place / "in").mkdir(parents=True)
    for name in ("file", "in/file"):
        (place / name).write_bytes(SECRET)
        (place / name).chmod(0o600)
    if box.account:  # what is another's is safe from an ordinary user's container anyway
        for path in (place, *place.rglob("*")):
            os.chown(path, box.account.uid, box.account.gid)
    return place


def intact(canary: Path) -> bool:
    found = {str(p.relative_to(canary)): p.stat().st_mode for p in canary.rglob("*")}
    contents = {(canary / name).read_bytes() for name in ("file", "in/file")}
    return sorted(found) == ["file", "in", "in/file"] and found["file"] & 0o7777 == 0o600 and contents == {SECRET}


def archive() -> bytes:
    """Of everything whose mode, owner or data is set by name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind in (("in", tarfile.DIRTYPE), ("in/new", tarfile.REGTYPE), ("in/fifo", tarfile.FIFOTYPE),
                           ("in/file", tarfile.FIFOTYPE), ("file", tarfile.FIFOTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, 0o777
            tar.addfile(member)
        link = tarfile.TarInfo("in/hard")
        link.type, link.linkname, link.mode = tarfile.LNKTYPE, "in/new", 0o777
        tar.addfile(link)
    return out.getvalue()


def test_nothing_of_the_host_comes_out_or_is_written_to(box: Pybuild, canary: Path) -> None:
    home = canary.parent
    source = home / f"source-{os.getpid()}"
    (source / "in").mkdir(parents=True)
    (source / "in" / "file").write_text("new")
    (source / "file").write_text("new")
    os.mkfifo(source / "in" / "fifo")
    name = swapping(box, canary)
    packed = archive()
    for number in range(ROUNDS):
        out = home / f"out-{os.getpid()}-{number}"
        out.mkdir(mode=0o777)
        out.chmod(0o777)
        # Whether one succeeds is the container's to say; where it leads to is not.
        for path in ("/d/.", "/d/in/.", "/d/in/file", "/d/file"):
            box.run("cp", f"{name}:{path}", out, check=False)
            tar = box.run("cp", f"{name}:{path}", "-", check=False).stdout
            assert SECRET not in tar
        box.run("cp", f"{source}/.", f"{name}:/d/", check=False)
        box.run("cp", source / "file", f"{name}:/d/in/file", check=False)
        box.run("cp", "-", f"{name}:/d", stdin=packed, check=False)
        assert not any(p.is_file() and not p.is_symlink() and p.read_bytes() == SECRET for p in out.rglob("*"))
        assert intact(canary)
    assert SECRET not in box.run("export", name, check=False).stdout
    assert intact(canary)
    box.run("rm", "-f", name)
