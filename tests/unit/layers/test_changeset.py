"""Changes into layers: one pass, right digests, the same bytes every time, errors that reach the caller."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from layers.changeset import LayerResult, write_layer
from layers.compression import BLOCK_BYTES, Compression, decompressor
from layers.errors import Cancelled, LayerError
from layers.layerdiff import Change, diff_trees
from layers.oci import MEDIA_OCI_LAYER, MEDIA_OCI_LAYER_GZIP, MEDIA_OCI_LAYER_ZSTD
from layers.ownership import Record, keep
from layers.tarstream import DIRECTORY, HARDLINK, REGULAR, SYMLINK, TarEntry, TarReader
from tests.support.leaks import descriptors


def write(root: Path, **options: object) -> tuple[bytes, LayerResult]:
    out = io.BytesIO()
    result = write_layer(diff_trees(None, root), root, out, **options)  # type: ignore[arg-type]
    return out.getvalue(), result


def entries(blob: bytes) -> dict[bytes, TarEntry]:
    return {entry.name: entry for entry in TarReader(decompressor(io.BytesIO(blob)))}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    top = tmp_path / "root"
    (top / "d/e").mkdir(parents=True)
    (top / "d/small").write_bytes(b"small")
    (top / "d/large").write_bytes(os.urandom(2 * BLOCK_BYTES) + bytes(BLOCK_BYTES + 777))
    (top / "d/e/link").symlink_to("../small")
    os.link(top / "d/small", top / "second")
    os.mkfifo(top / "pipe")
    (top / "d/small").chmod(0o4750)
    return top


@pytest.mark.parametrize("kind", get_args(Compression))
def test_digests_and_sizes_are_those_of_the_bytes(root: Path, kind: Compression) -> None:
    blob, result = write(root, compression=kind)
    plain = decompressor(io.BytesIO(blob)).read()
    assert result.digest == "sha256:" + hashlib.sha256(blob).hexdigest()
    assert result.diff_id == "sha256:" + hashlib.sha256(plain).hexdigest()
    assert (result.size_bytes, result.uncompressed_bytes) == (len(blob), len(plain))
    assert result.entries == 7
    assert result.media_type == {
        "gzip": MEDIA_OCI_LAYER_GZIP, "zstd": MEDIA_OCI_LAYER_ZSTD, "none": MEDIA_OCI_LAYER,
    }[kind]  # fmt: skip
    found = entries(blob)
    assert {name: entry.type for name, entry in found.items()} == {
        b"d/": DIRECTORY, b"d/e/": DIRECTORY, b"d/e/link": SYMLINK, b"d/large": REGULAR, b"d/small": REGULAR,
        b"pipe": b"6", b"second": HARDLINK,
    }  # fmt: skip
    assert found[b"d/small"].mode == 0o4750
    assert found[b"second"].linkname == b"d/small"


@pytest.mark.parametrize("kind", get_args(Compression))
@pytest.mark.parametrize("reproducible", [True, False])
def test_the_bytes_are_the_same_whatever_the_threads(root: Path, kind: Compression, reproducible: bool) -> None:
    assert len({write(root, compression=kind, threads=n, reproducible=reproducible) for n in (1, 2, 5)}) == 1


def test_an_empty_layer_is_a_layer(tmp_path: Path) -> None:
    blob, result = write(tmp_path)
    assert gzip.decompress(blob) == bytes(1024)
    assert (result.entries, result.uncompressed_bytes) == (0, 1024)


def test_deletions_become_whiteouts(tmp_path: Path) -> None:
    out = io.BytesIO()
    write_layer([Change("delete", b"a"), Change("delete", b"d/b")], tmp_path, out)
    found = entries(out.getvalue())
    assert list(found) == [b".wh.a", b"d/.wh.b"]
    assert all((e.size, e.mode, e.mtime_ns, e.type) == (0, 0, 0, REGULAR) for e in found.values())


def test_times_are_clamped(root: Path) -> None:
    os.utime(root / "d/large", ns=(5 * 10**9, 5 * 10**9))
    found = entries(write(root, clamp_mtime=1000)[0])
    assert found[b"d/large"].mtime_ns == 5 * 10**9
    assert found[b"d/small"].mtime_ns == 1000 * 10**9


def test_attributes_are_kept_but_for_overlayfs_own(root: Path) -> None:
    for path in (root / "d", root / "d/small"):
        os.setxattr(path, "user.k", b"\0v")
        os.setxattr(path, "user.overlay.origin", b"x")
    found = entries(write(root)[0])
    assert found[b"d/"].xattrs == found[b"d/small"].xattrs == {"user.k": b"\0v"}


def test_files_of_metadata_alone_are_refused(root: Path) -> None:
    os.setxattr(root / "d/small", "user.overlay.metacopy", b"")
    with pytest.raises(LayerError, match="metacopy"):
        write(root)


def test_owners_may_say_otherwise_than_the_disk(root: Path) -> None:
    (root / "device").write_bytes(b"")
    (root / "device").chmod(0o660)
    (root / "owned").symlink_to("d")
    records = {
        b"device": Record(0, 6, stat.S_IFBLK, os.makedev(8, 1)),
        b"d/small": Record(33, 44),
        b"d": Record(5, 6),
        b"owned": Record(7, 8),
    }
    changes = []
    for change in diff_trees(None, root):
        if change.path in records:
            assert change.st is not None
            keep(os.fsencode(root) + b"/" + change.path, change.st.st_mode, records[change.path])
            change = change._replace(st=records[change.path].applied(change.st))
        changes.append(change)
    out = io.BytesIO()
    write_layer(changes, root, out)
    found = entries(out.getvalue())
    device, small, folder = found[b"device"], found[b"d/small"], found[b"d/"]
    assert (device.type, device.devmajor, device.devminor, device.gid, device.size) == (b"4", 8, 1, 6, 0)
    assert (small.uid, small.gid, small.xattrs, small.size) == (33, 44, {}, 5)
    assert (folder.uid, folder.gid, folder.xattrs) == (5, 6, {})
    assert (found[b"owned"].uid, found[b"owned"].gid, found[b"owned"].xattrs) == (7, 8, {})
    assert found[b"d/large"].uid == os.geteuid()


def test_a_file_that_shrinks_meanwhile_is_an_error(root: Path) -> None:
    def changes() -> Iterator[Change]:
        for change in diff_trees(None, root):
            if change.path == b"d/large":
                os.truncate(root / "d/large", BLOCK_BYTES)
            yield change

    with pytest.raises(LayerError, match="became shorter"):
        write_layer(changes(), root, io.BytesIO())


def test_a_file_that_grows_meanwhile_is_cut_where_it_was(root: Path) -> None:
    def changes() -> Iterator[Change]:
        for change in diff_trees(None, root):
            if change.path == b"d/large":
                with open(root / "d/large", "ab") as file:
                    file.write(b"more")
            yield change

    out = io.BytesIO()
    write_layer(changes(), root, out)
    assert entries(out.getvalue())[b"d/large"].size == 3 * BLOCK_BYTES + 777


def test_a_file_swapped_for_a_symlink_meanwhile_is_not_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")

    def changes() -> Iterator[Change]:
        for change in diff_trees(None, root):
            if change.path == b"d/large":
                (root / "d/large").unlink()
                (root / "d/large").symlink_to(tmp_path / "secret")
            yield change

    with pytest.raises(LayerError, match="cannot read 'd/large': Too many levels of symbolic links"):
        write_layer(changes(), root, io.BytesIO())


class Full(io.RawIOBase):
    """A disk that takes so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: object) -> int:
        size = len(memoryview(data))  # type: ignore[arg-type]
        self.room -= size
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return size


@pytest.mark.parametrize("room", [0, 100_000, 2_090_000])
def test_a_full_disk_reaches_the_caller_and_leaves_no_thread(root: Path, room: int) -> None:
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="No space"):
        write_layer(diff_trees(None, root), root, Full(room))
    assert set(threading.enumerate()) <= before


def test_cancellation_leaves_no_thread(root: Path) -> None:
    before = set(threading.enumerate())
    calls = iter([False, False, True])
    with pytest.raises(Cancelled):
        write_layer(diff_trees(None, root), root, io.BytesIO(), cancelled=lambda: next(calls, True))
    assert set(threading.enumerate()) <= before


def test_an_error_of_the_walk_leaves_no_thread_and_no_descriptor(root: Path) -> None:
    def changes() -> Iterator[Change]:
        yield from diff_trees(None, root)
        raise LayerError("the walk failed")

    threads, opened = set(threading.enumerate()), descriptors()
    with pytest.raises(LayerError, match="the walk failed"):
        write_layer(changes(), root, io.BytesIO())
    assert set(threading.enumerate()) <= threads and descriptors() <= opened


def test_a_sink_that_takes_little_at_a_time(root: Path) -> None:
    class Slow(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def write(self, data: object) -> int:
            part = bytes(memoryview(data)[:70_000])  # type: ignore[arg-type]
            self.data += part
            return len(part)

    slow = Slow()
    result = write_layer(diff_trees(None, root), root, slow)
    assert (bytes(slow.data), result) == write(root)
