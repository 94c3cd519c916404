"""Whether a layer says what the tree says: `--verify-layers`.

The layer is read beside the same stream of changes that it was written from, entry by entry and
byte by byte, so memory is flat and nothing is unpacked. A difference means a bug in the writer, a
damaged blob, or a file that changed between the two. Called by `builder.solve.layering`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from layers import lowerview, ownership, xattrs
from layers.compression import decompressor
from layers.errors import LayerError
from layers.layerdiff import WHITEOUT_PREFIX, Change
from layers.oci import Digest
from layers.tarreader import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    HARDLINK,
    REGULAR,
    SYMLINK,
    TYPES_BY_FORMAT,
    TarEntry,
    TarReader,
)

_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def verify_layer(
    stream: BinaryIO,
    changes: Iterable[Change],
    root: Path | str,
    *,
    diff_id: Digest | None = None,
    clamp_mtime: int | None = None,
    nanoseconds: bool = False,
) -> int:
    """Compare the layer in `stream` with `changes`, given anew, and the files in `root`; the number of entries.

    The options are those that the layer was written with. Raises: LayerError naming the first
    difference, also that of `diff_id`; OSError.
    """
    hashed = _Hashed(decompressor(stream))
    reader = TarReader(hashed)  # type: ignore[arg-type]  # `read` is all it needs
    entries = iter(reader)
    base = os.fsencode(root)
    count = 0
    for change in changes:
        entry = next(entries, None)
        if entry is None:
            raise _wrong(change.path, "is missing in the layer")
        wanted, place = _expected(change, base)
        seconds = wanted.mtime_ns // 1_000_000_000
        if clamp_mtime is not None and seconds >= clamp_mtime:
            wanted = wanted._replace(mtime_ns=clamp_mtime * 1_000_000_000)
        elif not nanoseconds:
            wanted = wanted._replace(mtime_ns=seconds * 1_000_000_000)
        for field, want, got in zip(TarEntry._fields, wanted, entry, strict=True):
            if want != got:
                raise _wrong(change.path, f"has {field} {got!r} in the layer, but {want!r} on disk")
        if entry.type == REGULAR and entry.size and not lowerview.at(lambda p: _same_data(reader, p), place):
            raise _wrong(change.path, "has other content in the layer than on disk")
        count += 1
    entry = next(entries, None)
    if entry is not None:
        raise _wrong(entry.name, "is in the layer, but not among the changes")
    while hashed.read(1 << 20):
        pass
    if diff_id is not None and hashed.digest() != diff_id:
        raise LayerError(f"the layer's DiffID is {hashed.digest()}, not {diff_id}")
    return count


class _Hashed:
    """The tar stream, hashed as it is read."""

    def __init__(self, plain: BinaryIO) -> None:
        self._plain = plain
        self._hash = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._plain.read(size)
        self._hash.update(data)
        return data

    def digest(self) -> Digest:
        return Digest.from_hasher(self._hash)


def _expected(change: Change, base: bytes) -> tuple[TarEntry, bytes]:
    """The entry that the change stands for, and where its file lies."""
    path, st = change.path, change.st
    place = base + b"/" + path
    if st is None:
        parent, slash, name = path.rpartition(b"/")
        whiteout = parent + slash + WHITEOUT_PREFIX + name
        return TarEntry(whiteout, REGULAR, 0, 0, 0, 0, 0, b"", 0, 0, xattrs.NONE), place
    mode, uid, gid, rdev = st.st_mode, st.st_uid, st.st_gid, st.st_rdev
    device = (os.major(rdev), os.minor(rdev))
    kind = TYPES_BY_FORMAT.get(stat.S_IFMT(mode), b"?")
    if change.link is not None:
        entry = TarEntry(path, HARDLINK, mode & 0o7777, uid, gid, 0, st.st_mtime_ns, change.link, 0, 0, xattrs.NONE)
        return entry, place
    attributes = ownership.without_records(lowerview.at(xattrs.load, place), mode)
    major, minor = device if kind in (CHARACTER_DEVICE, BLOCK_DEVICE) else (0, 0)
    entry = TarEntry(
        path + b"/" if kind == DIRECTORY else path,
        kind,
        mode & 0o7777,
        uid,
        gid,
        st.st_size if kind == REGULAR else 0,
        st.st_mtime_ns,
        lowerview.at(os.readlink, place) if kind == SYMLINK else b"",
        major,
        minor,
        attributes,
    )
    return entry, place


def _same_data(reader: TarReader, place: bytes) -> bool:
    """Whether the file holds the current entry's data, as far as that goes."""
    fd = os.open(place, _OPEN_FILE)
    try:
        for _, piece in reader.segments():
            if os.read(fd, len(piece)) != piece:
                return False
    finally:
        os.close(fd)
    return True


def _wrong(path: bytes, what: str) -> LayerError:
    return LayerError(
        f"the layer does not match its tree: {os.fsdecode(path)!r} {what}",
        hint="something changed the files meanwhile, or the blob is damaged; build the step again",
    )
