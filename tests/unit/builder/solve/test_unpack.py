"""ADD of archives: what counts as one, where its entries go, and what a hostile one cannot do."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.errors import ContextError
from builder.solve.unpack import unpack_stream
from layers.errors import Cancelled
from tests.unit.builder.solve.conftest import Trees, harvest, plant

ME = (os.geteuid(), os.getegid())


def entry(name: str, data: bytes = b"", type: bytes = tarfile.REGTYPE, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = type
    info.size = len(data)
    info.mode = 0o755 if type == tarfile.DIRTYPE else 0o644
    info.uid, info.gid = ME
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def directory(name: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.DIRTYPE, **fields)


def link(name: str, target: str, type: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=type, linkname=target)


def archive(*entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


SMALL = archive(directory("d/"), entry("d/f", b"1"))


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("name", ["a.tar", "no-suffix", "picture.png"])
def test_archives_are_known_by_their_content(trees: Trees, compress: Callable[[bytes], bytes], name: str) -> None:
    (trees.source / name).write_bytes(compress(SMALL))
    assert trees.copy(name, "/x", unpack=True) == (3, 1)
    assert trees.result == {"x": None, "x/d": None, "x/d/f": "1"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        b"\0" * 1024,
        b"\0" * 10240,
        gzip.compress(b"text", mtime=0),
        b"\x1f\x8b\x08garbage",
        b"BZh9garbage",
        b"\xfd7zXZ\0garbage",
        b"\x28\xb5\x2f\xfdgarbage",
        SMALL[:300],
        archive(),
        os.urandom(2048),
    ],
)
def test_what_is_no_archive_is_copied(trees: Trees, data: bytes) -> None:
    (trees.source / "a.tar.gz").write_bytes(data)
    trees.copy("a.tar.gz", "/x/", unpack=True)
    assert (trees.dest / "x/a.tar.gz").read_bytes() == data


def test_directories_and_plain_files_beside_an_archive(trees: Trees) -> None:
    trees.given({"d/f": "in d", "t.txt": "text"})
    (trees.source / "z.tar").write_bytes(SMALL)
    (trees.source / "zlink").symlink_to("z.tar")
    trees.copy("*", "/x/", unpack=True)
    assert trees.result == {"x": None, "x/f": "in d", "x/t.txt": "text", "x/d": None, "x/d/f": "1"}
    trees.copy("z.tar", "/y/", unpack=False)
    assert (trees.dest / "y/z.tar").read_bytes() == SMALL


def test_without_unpacking_it_is_a_file_like_any_other(trees: Trees) -> None:
    (trees.source / "a.tar").write_bytes(SMALL)
    trees.copy("a.tar", "/x")
    assert (trees.dest / "x").read_bytes() == SMALL


@pytest.mark.root
@pytest.mark.parametrize(
    ("entries", "existing", "wanted"),
    [
        ([entry("a/b/c", b"1")], {}, {"a": None, "a/b": None, "a/b/c": "1"}),
        ([entry("/abs", b"1"), entry("./dot", b"2")], {}, {"abs": "1", "dot": "2"}),
        ([directory("./"), entry("a//b/../c", b"1")], {}, {"a": None, "a/c": "1"}),
        ([entry("a", b"1")], {"a/was": "a directory"}, {"a": "1"}),
        ([entry("a", b"1")], {"a": "-> b", "b": "kept"}, {"a": "1", "b": "kept"}),
        ([directory("a"), entry("a/f", b"1")], {"a": "a file"}, {"a": None, "a/f": "1"}),
        ([directory("a"), entry("a/f", b"1")], {"a": "-> b", "b": None}, {"a": "-> b", "b": None, "b/f": "1"}),
        ([directory("a"), entry("a/f", b"1")], {"a/g": "kept"}, {"a": None, "a/g": "kept", "a/f": "1"}),
        ([link("l", "t"), entry("l/f", b"1")], {}, {"l": "-> t", "t": None, "t/f": "1"}),
        ([link("l", "/t"), entry("l/f", b"1")], {"t": None}, {"l": "-> /t", "t": None, "t/f": "1"}),
        ([link("l", "../../../t"), entry("l/f", b"1")], {}, {"l": "-> ../../../t", "t": None, "t/f": "1"}),
        ([entry("a", b"1"), link("b", "a", tarfile.LNKTYPE)], {"b": "old"}, {"a": "1", "b": "1"}),
        ([entry("a", b"1"), entry("a", b"2")], {}, {"a": "2"}),
        ([link("l", "gone"), entry("l", b"1")], {}, {"l": "1"}),
        ([entry("a/f", b"1"), link("a", "x"), entry("a/g", b"2")], {}, {"a": "-> x", "x": None, "x/g": "2"}),
        ([entry(".wh.a", b"")], {"a": "kept"}, {".wh.a": "", "a": "kept"}),
    ],
)
def test_where_entries_go(
    trees: Trees,
    entries: list[tuple[tarfile.TarInfo, bytes]],
    existing: dict[str, str | None],
    wanted: dict[str, str | None],
) -> None:
    (trees.source / "a.tar").write_bytes(archive(*entries))
    plant(trees.dest / "x", existing)
    trees.copy("a.tar", "/x", unpack=True)
    assert harvest(trees.dest / "x") == wanted
    assert {p.name for p in trees.dest.iterdir()} == {"x"}
    assert list(trees.outside.iterdir()) == []


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ([entry("../x", b"1")], "outside of the directory"),
        ([entry("a/../../x", b"1")], "outside of the directory"),
        ([entry("..", b"1")], "outside of the directory"),
        ([link("a", "../x", tarfile.LNKTYPE)], "outside of the directory"),
        ([link("a", "/", tarfile.LNKTYPE)], "leads to the directory itself"),
        ([link("a", "none", tarfile.LNKTYPE)], "No such file"),
        ([entry("f", b"1"), entry("f/g", b"2")], "not a directory"),
        ([link("l", "l"), entry("l/f", b"1")], "too many links"),
        ([entry("a", type=b"Z")], "unknown type"),
    ],
)
def test_refused(trees: Trees, entries: list[tuple[tarfile.TarInfo, bytes]], complaint: str) -> None:
    plant(trees.dest, {"x": "kept"})
    (trees.source / "a.tar").write_bytes(archive(*entries))
    with pytest.raises(ContextError, match=complaint):
        trees.copy("a.tar", "/in", unpack=True)
    assert (trees.dest / "x").read_text() == "kept"
    assert list(trees.outside.iterdir()) == []


@pytest.mark.parametrize("cut", [600, 1100, 1500])
def test_an_archive_that_ends_early(trees: Trees, cut: int) -> None:
    data = archive(entry("a", b"1" * 600), entry("b", b"2" * 600))
    (trees.source / "a.tar").write_bytes(data[:cut])
    with pytest.raises(ContextError, match="cannot unpack"):
        trees.copy("a.tar", "/x", unpack=True)


@pytest.mark.root
def test_modes_and_times(trees: Trees) -> None:
    data = archive(
        directory("d", mode=0o1777, mtime=1_000_000_000),
        entry("d/f", b"1", mode=0o4711, mtime=1_100_000_000),
        link("d/l", "f"),
        entry("implied/f", b"", mode=0o600, mtime=-5),
        directory("gone", mtime=5),
        entry("gone", b"file"),
    )
    (trees.source / "a.tar").write_bytes(data)
    trees.copy("a.tar", "/x", unpack=True, mode=0o777)
    status = {p: (trees.dest / "x" / p).lstat() for p in ("d", "d/f", "d/l", "implied", "implied/f")}
    modes = {p: oct(stat.S_IMODE(s.st_mode)) for p, s in status.items() if p != "d/l"}
    assert modes == {"d": "0o1777", "d/f": "0o4711", "implied": "0o755", "implied/f": "0o600"}
    times = [int(status[p].st_mtime) for p in ("d", "d/f", "d/l", "implied/f")]
    assert times == [1_000_000_000, 1_100_000_000, 0, 0]


@pytest.mark.root
def test_owners_and_devices(trees: Trees) -> None:
    data = archive(
        directory("d", uid=5, gid=6),
        entry("d/f", b"1", uid=7, gid=8, mode=0o6755),
        entry("d/pipe", type=tarfile.FIFOTYPE, uid=9, gid=9),
        entry("implied/f", b"", uid=5, gid=5),
    )
    (trees.source / "a.tar").write_bytes(data)

    def owners(top: str) -> list[tuple[int, int]]:
        found = [(trees.dest / top / p).lstat() for p in ("", "d", "d/f", "d/pipe", "implied", "implied/f")]
        return [(s.st_uid, s.st_gid) for s in found]

    trees.copy("a.tar", "/x", unpack=True, reset_owner=True)
    assert owners("x") == [(0, 0), (5, 6), (7, 8), (9, 9), (0, 0), (5, 5)]
    trees.copy("a.tar", "/y", unpack=True, owner=(3, 4))
    assert owners("y") == [(3, 4), (3, 4), (3, 4), (3, 4), (0, 0), (3, 4)]
    assert stat.S_IMODE((trees.dest / "y/d/f").stat().st_mode) == 0o6755
    assert stat.S_ISFIFO((trees.dest / "y/d/pipe").stat().st_mode)


def test_attributes(trees: Trees) -> None:
    info, data = entry("f", b"1")
    info.pax_headers = {"SCHILY.xattr.user.note": "kept", "SCHILY.xattr.user.overlay.origin": "x"}
    (trees.source / "a.tar").write_bytes(archive((info, data)))
    trees.copy("a.tar", "/x", unpack=True)
    assert os.listxattr(trees.dest / "x/f") == ["user.note"]


def test_sparse_and_large_entries(trees: Trees, tmp_path: Path) -> None:
    big = os.urandom(3 << 20)
    (trees.source / "a.tar.gz").write_bytes(gzip.compress(archive(entry("big", big)), 1))
    trees.copy("a.tar.gz", "/x", unpack=True)
    assert (trees.dest / "x/big").read_bytes() == big


def test_the_key_of_an_archive_is_that_of_its_file(trees: Trees) -> None:
    (trees.source / "a.tar").write_bytes(SMALL)
    assert trees.key("a.tar", unpack=True) == trees.key("a.tar", unpack=False)


def test_cancelled(trees: Trees) -> None:
    with pytest.raises(Cancelled):
        unpack_stream(io.BytesIO(SMALL), trees.dest_fd, cancelled=lambda: True)


def test_a_stream_that_cannot_be_sought(trees: Trees) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            super().__init__()
            self.data = io.BytesIO(gzip.compress(SMALL))

        def read(self, size: int = -1) -> bytes:
            return self.data.read(min(size, 7) if size >= 0 else 7)

    assert unpack_stream(Pipe(), trees.dest_fd)  # type: ignore[arg-type]
    assert not unpack_stream(io.BytesIO(b"FROM scratch\n"), trees.dest_fd)
    assert trees.result == {"d": None, "d/f": "1"}
