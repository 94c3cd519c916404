"""Tar streams: what is written is read back by us, by Python and by GNU tar; what others write, we read."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.errors import LayerError
from layers.tarstream import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    FIFO,
    HARDLINK,
    REGULAR,
    SYMLINK,
    TarEntry,
    TarReader,
    TarWriter,
)


def written(*entries: tuple[dict[str, Any], bytes], **options: Any) -> bytes:
    """A tar stream of these entries with their data."""
    blocks: list[bytes] = []
    writer = TarWriter(lambda block: blocks.append(bytes(block)), **options)
    for entry, data in entries:
        writer.add(entry["name"], entry["kind"], **{k: v for k, v in entry.items() if k not in {"name", "kind"}})
        writer.write(data)
        writer.pad()
    size = writer.finish()
    stream = b"".join(blocks)
    assert len(stream) == size
    assert size % 512 == 0
    return stream


def entry(name: bytes = b"f", kind: bytes = REGULAR, **fields: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "mode": 0o644, "uid": 0, "gid": 0, "size": 0, "mtime_ns": 0} | fields


def read(stream: bytes) -> list[tuple[TarEntry, bytes]]:
    found = []
    reader = TarReader(io.BytesIO(stream))
    for item in reader:
        buffer = bytearray(min(item.size, 1 << 22) + 1)
        count = reader.readinto(buffer)
        found.append((item, bytes(buffer[:count])))
    return found


names = st.binary(min_size=1, max_size=300).map(
    lambda raw: b"/".join(part for part in raw.replace(b"\0", b"n").split(b"/") if part) or b"x"
)
xattr_maps = st.dictionaries(
    st.sampled_from(["user.a", "user.a=b", "user.50%", "user.%3D", "security.capability", "user.ü"]),
    st.binary(max_size=90),
    max_size=3,
)


@settings(max_examples=120, deadline=None)
@given(
    items=st.lists(
        st.tuples(
            names,
            st.sampled_from([REGULAR, DIRECTORY, SYMLINK, HARDLINK, FIFO, CHARACTER_DEVICE, BLOCK_DEVICE]),
            st.integers(0, 0o7777),
            st.integers(0, 2**32 - 2),
            st.integers(0, 2**32 - 2),
            st.integers(-(2**34), 2**36),
            names,
            xattr_maps,
            st.binary(max_size=1500),
        ),
        max_size=8,
    ),
    block=st.sampled_from([512, 1024, 1 << 20]),
)
def test_everything_written_is_read_back(items: list[Any], block: int) -> None:
    wanted, entries = [], []
    for name, kind, mode, uid, gid, seconds, link, xattrs, data in items:
        body = data if kind == REGULAR else b""
        linkname = link if kind in (SYMLINK, HARDLINK) else b""
        device = (uid % 4096, gid % 1048576) if kind in (CHARACTER_DEVICE, BLOCK_DEVICE) else None
        fields = entry(
            name, kind, mode=mode, uid=uid, gid=gid, size=len(body), mtime_ns=seconds * 10**9 + 5,
            linkname=linkname, device=device, xattrs=xattrs,
        )  # fmt: skip
        entries.append((fields, body))
        shown = name + b"/" if kind == DIRECTORY else name
        major, minor = device or (0, 0)
        wanted.append(
            (TarEntry(shown, kind, mode, uid, gid, len(body), seconds * 10**9, linkname, major, minor, xattrs), body)
        )
    stream = written(*entries, block_bytes=block)
    assert read(stream) == wanted
    assert written(*entries, block_bytes=block) == stream


def test_short_entries_need_no_pax_header() -> None:
    assert len(written((entry(b"n" * 100, size=1), b"x"))) == 512 + 512 + 1024
    assert len(written((entry(b"d" * 99 + b"/" + b"n" * 100), b""))) == 512 + 1024, "prefix and name"
    assert len(written((entry(b"n" * 101), b""))) == 3 * 512 + 1024


@pytest.mark.parametrize(
    "fields",
    [
        {"name": b"x/" * 2000 + b"y"},
        {"name": b"d" * 200},
        {"name": b"d" * 155 + b"/" + b"e" * 99, "kind": DIRECTORY},
        {"name": b"d" * 155 + b"/" + b"e" * 100, "kind": DIRECTORY},
        {"name": b"d" * 156 + b"/" + b"e" * 60},
        {"name": "ü".encode() * 60},
        {"kind": SYMLINK, "linkname": b"t" * 101},
        {"uid": 2**21, "gid": 2**32 - 2},
        {"mtime_ns": -1},
        {"mtime_ns": 8**11 * 10**9},
        {"kind": HARDLINK, "linkname": b"a"},
        {"kind": CHARACTER_DEVICE, "device": (4095, 1048575)},
    ],
)
def test_python_and_gnu_tar_agree(fields: dict[str, Any], tmp_path: Path) -> None:
    item = entry(**fields) if "name" in fields else entry(b"f", **fields)
    stream = written((entry(b"before", size=3), b"abc"), (item, b""))
    (_, _), (mine, _) = read(stream)
    with tarfile.open(fileobj=io.BytesIO(stream), errors="surrogateescape") as tar:
        second = tar.getmembers()[1]
    assert os.fsencode(second.name) == mine.name.rstrip(b"/")
    assert (second.uid, second.gid, second.mode) == (mine.uid, mine.gid, mine.mode)
    assert second.mtime == mine.mtime_ns / 10**9
    assert os.fsencode(second.linkname) == mine.linkname
    assert (second.devmajor, second.devminor) == (mine.devmajor, mine.devminor)
    if shutil.which("tar"):
        path = tmp_path / "t.tar"
        path.write_bytes(stream)
        done = subprocess.run(["tar", "-tf", path, "--quoting-style=literal"], capture_output=True, check=True)
        assert done.stdout.split(b"\n")[1] == mine.name
        assert not done.stderr


def test_huge_sizes_go_into_pax() -> None:
    blocks: list[bytes] = []
    writer = TarWriter(lambda block: blocks.append(bytes(block)), block_bytes=512)
    writer.add(b"huge", REGULAR, mode=0o600, uid=0, gid=0, size=8**11)
    stream = b"".join(blocks)
    reader = iter(TarReader(io.BytesIO(stream)))
    assert next(reader).size == 8**11


def test_times_are_cut_clamped_or_kept() -> None:
    item = (entry(mtime_ns=1_600_000_000_987_654_321), b"")
    assert read(written(item))[0][0].mtime_ns == 1_600_000_000 * 10**9
    assert read(written(item, clamp_mtime_s=1_500_000_000))[0][0].mtime_ns == 1_500_000_000 * 10**9
    assert read(written(item, clamp_mtime_s=1_700_000_000))[0][0].mtime_ns == 1_600_000_000 * 10**9
    assert read(written(item, nanoseconds=True))[0][0].mtime_ns == 1_600_000_000_987_654_321
    before = (entry(mtime_ns=-1_500_000_000), b"")
    assert read(written(before, nanoseconds=True))[0][0].mtime_ns == -1_500_000_000
    assert read(written(before))[0][0].mtime_ns == -2 * 10**9, "the second before, as with any other time"
    assert read(written(item, nanoseconds=True, clamp_mtime_s=1_600_000_000))[0][0].mtime_ns == 1_600_000_000 * 10**9


def test_attributes_too_large_for_any_reader_are_refused() -> None:
    with pytest.raises(LayerError, match="attributes"):
        written((entry(xattrs={"user.big": bytes(1 << 20)}), b""))


def test_a_checksum_of_nothing_but_high_bytes() -> None:
    """Sums beyond 65520 are where the fast sum would wrap."""
    name, link = b"\xff" * 155 + b"/" + b"\xff" * 100, b"\xff" * 100
    stream = written((entry(name, SYMLINK, linkname=link), b""))
    assert int(stream[148:154], 8) == sum(stream[:148]) + 8 * 32 + sum(stream[156:512])
    assert read(stream)[0][0].name == name


def test_copying_from_a_descriptor_across_blocks(tmp_path: Path) -> None:
    data = os.urandom(5000)
    (tmp_path / "f").write_bytes(data)
    blocks: list[bytes] = []
    writer = TarWriter(lambda block: blocks.append(bytes(block)), block_bytes=1024)
    writer.add(b"f", REGULAR, mode=0o644, uid=0, gid=0, size=5000)
    with open(tmp_path / "f", "rb") as file:
        assert writer.copy_from(file.fileno(), 5000) == 5000
        assert writer.copy_from(file.fileno(), 10) == 0
    writer.pad()
    writer.finish()
    assert all(len(block) == 1024 for block in blocks[:-1])
    assert read(b"".join(blocks))[0][1] == data


# -- what others write -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_python(form: int) -> None:
    out = io.BytesIO()
    long = "d/" * 80 + "f" if form != tarfile.USTAR_FORMAT else "d/f"
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, kind, link in ((long, tarfile.REGTYPE, ""), ("l", tarfile.SYMTYPE, long), ("d", tarfile.DIRTYPE, "")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mtime = kind, link, 1_234_567
            member.uid = 3_000_000 if form != tarfile.USTAR_FORMAT else 7
            if kind == tarfile.REGTYPE:
                member.size = 1000
            tar.addfile(member, io.BytesIO(b"d" * 1000))
    (file, data), (link_entry, _), (folder, _) = read(out.getvalue())
    assert (file.name, file.type, data) == (long.encode(), REGULAR, b"d" * 1000)
    assert (link_entry.type, link_entry.linkname) == (SYMLINK, long.encode())
    assert (folder.name, folder.type) == (b"d/", DIRECTORY)
    assert file.uid in (3_000_000, 7)
    assert file.mtime_ns == 1_234_567 * 10**9


@pytest.mark.parametrize("form", ["oldgnu", "gnu", "pax 0.0", "pax 0.1", "pax 1.0"])
def test_sparse_archives_of_gnu_tar(form: str, tmp_path: Path) -> None:
    if not shutil.which("tar"):
        pytest.skip("needs tar")
    with open(tmp_path / "s", "wb") as file:
        for number in range(40):
            file.seek(number * 100_000 + 12_345)
            file.write(b"%d" % number * 2000)
        file.truncate(5_000_000)
    kind, _, version = form.partition(" ")
    flags = [f"--sparse-version={version}"] if version else []
    done = subprocess.run(
        ["tar", "-C", tmp_path, "--hole-detection=raw", "-S", f"--format={kind}", *flags, "-cf", "-", "s"],
        capture_output=True,
        check=True,
    )
    assert len(done.stdout) < 1_000_000
    reader = TarReader(io.BytesIO(done.stdout))
    (item,) = [i for i in reader if reader.sparse and _content(reader, i.size) == (tmp_path / "s").read_bytes()]
    assert item == item._replace(name=b"s", type=REGULAR, size=5_000_000)


def _content(reader: TarReader, size: int) -> bytes:
    buffer = bytearray(size)
    assert reader.readinto(buffer) == size
    return bytes(buffer)


def test_old_v7_directories_end_with_a_slash() -> None:
    header = bytearray(written((entry(b"dir/", b"\0"), b""))[:512])
    header[257:512] = bytes(255)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    assert read(bytes(header) + bytes(1024))[0][0].type == DIRECTORY


def test_stars_prefix_is_shorter_than_ustars() -> None:
    header = bytearray(written((entry(b"name"), b""))[:512])
    header[345 : 345 + 3] = b"pre"
    header[345 + 131 : 345 + 131 + 12] = b"14000000000\0"
    header[508:512] = b"tar\0"
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    assert read(bytes(header) + bytes(1024))[0][0].name == b"pre/name"
