"""Records of owners and devices: what is written is read, follows its file, and forges nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from layers import ownership, xattrs
from layers.ownership import ATTRIBUTE, DEVICELESS, NATIVE, RECORDED, Record, keep, load

MAKERS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("text"),
    "directory": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("nowhere"),
    "fifo": os.mkfifo,
}


@pytest.fixture(params=MAKERS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "it"
    MAKERS[request.param](path)
    if not stat.S_ISREG(path.lstat().st_mode) and not path.is_dir() and os.geteuid() != 0:
        pytest.skip("security.capability is for root of a user namespace, or of all")
    return path


def test_a_record_follows_its_file(place: Path) -> None:
    mode = place.lstat().st_mode
    assert load(str(place), mode) is None
    keep(str(place), mode, Record(33, 4294967294))
    moved = place.rename(place.with_name("moved"))
    assert load(str(moved), mode) == Record(33, 4294967294)
    st = Record(33, 34).applied(moved.lstat())
    assert (st.st_uid, st.st_gid, st.st_mode) == (33, 34, mode)
    assert (st.st_mtime_ns, st.st_ino, st.st_nlink) == (
        moved.lstat().st_mtime_ns,
        moved.lstat().st_ino,
        1 + moved.is_dir(),
    )
    assert all(ownership.is_record(name, mode) for name in xattrs.names_of(os.fsencode(moved)))
    keep(str(moved), mode, Record())
    assert load(str(moved), mode) is None
    keep(str(moved), mode, Record())


def test_a_device_is_an_empty_file(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        RECORDED.mknod("disk", stat.S_IFBLK | 0o640, os.makedev(8, 1), dir_fd=fd)
        RECORDED.mknod("pipe", stat.S_IFIFO | 0o600, 0, dir_fd=fd)
    finally:
        os.close(fd)
    path = tmp_path / "disk"
    assert path.is_file() and path.stat().st_size == 0
    seen = RECORDED.seen(str(path), path.stat())
    assert stat.S_ISBLK(seen.st_mode) and seen.st_rdev == os.makedev(8, 1)
    assert NATIVE.seen(str(path), path.stat()) == path.stat()
    assert (tmp_path / "pipe").is_fifo()


def test_where_there_are_owners_devices_alone_are_recorded(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        DEVICELESS.mknod("null", stat.S_IFCHR | 0o620, os.makedev(1, 3), dir_fd=fd)
        DEVICELESS.mknod("pipe", stat.S_IFIFO | 0o600, 0, dir_fd=fd)
    finally:
        os.close(fd)
    path = tmp_path / "null"
    assert os.getxattr(path, ATTRIBUTE) == b"::c:1:3"
    (tmp_path / "plain").touch()
    for length in (0, 4):  # whatever was written to it
        path.write_bytes(b"text"[:length])
        seen = DEVICELESS.seen(str(path), path.stat())
        assert stat.S_ISCHR(seen.st_mode) and seen.st_rdev == os.makedev(1, 3) and seen.st_size == 0
        assert (seen.st_uid, seen.st_gid, seen.st_ino) == (path.stat().st_uid, path.stat().st_gid, path.stat().st_ino)
        assert stat.S_ISCHR(RECORDED.seen(str(path), path.stat()).st_mode)
    keep(str(path), stat.S_IFREG, Record(1, 2))
    for name in ("null", "plain", "pipe"):  # of owners, the disk's count
        place = tmp_path / name
        assert DEVICELESS.seen(str(place), place.lstat()) == place.lstat()
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"::",
        b"::c:1",
        b"::x:1:3",
        b"::c:1:3:4",
        b":0:c:1:3",
        b"33",
        b"33:",
        b"-1:0",
        b"4294967295:0",
        b"99999999999:0",
        b"1:2:3",
        b"1:2:c:1",
        b"1:2:x:1:3",
        b"1:2:c:1:x",
        b"\0" * 20,
    ],
)
def test_what_others_wrote_is_no_record(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "file"
    path.touch()
    os.setxattr(path, ATTRIBUTE, value)
    assert load(str(path), path.stat().st_mode) is None
    assert ownership.parse(value, stat.S_IFLNK) is None


def test_directories_stand_for_no_device() -> None:
    assert ownership.parse(b"1:2:c:1:3", stat.S_IFDIR) is None
    assert ownership.parse(b"::c:1:3", stat.S_IFDIR) is None
    assert ownership.parse(b"::b:259:1048575", stat.S_IFREG) == Record(0, 0, stat.S_IFBLK, os.makedev(259, 1048575))
    assert ownership.parse(b"1:2:c:1:3", stat.S_IFREG) == Record(1, 2, stat.S_IFCHR, os.makedev(1, 3))


def test_no_layer_carries_a_record() -> None:
    assert not xattrs.belongs(ATTRIBUTE)
    assert xattrs.belongs(xattrs.CAPABILITY)  # of files; what it holds of others is left out by type
    assert not ownership.is_record(xattrs.CAPABILITY, stat.S_IFREG)
    assert ownership.is_record(xattrs.CAPABILITY, stat.S_IFLNK)
    assert not ownership.is_record(xattrs.CAPABILITY, stat.S_IFLNK, bytes(20)), "a link's own capability is a layer's"


def test_what_a_node_is() -> None:
    assert ownership.is_node(stat.S_IFCHR, 1) and ownership.is_node(stat.S_IFBLK, 0)
    assert not ownership.is_node(stat.S_IFCHR, 0), "overlayfs's whiteout"
    assert not any(ownership.is_node(mode, 5) for mode in (0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK))


def test_whoever_has_ids_has_owners() -> None:
    assert ownership.here() is NATIVE
