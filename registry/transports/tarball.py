"""Tar archives as places of blobs: a table of their members, and room for several to be written at once.

An archive is read where it lies: one pass over its headers gives a table of members, which is the
only thing that names from the archive ever look up; none becomes a path. A compressed archive or a
pipe (`-`) is first spooled to an anonymous file. Writing goes to a temporary beside the target, with
room reserved for each blob, so that blobs may arrive in parallel; the commit renames it, or copies
it out if the target is `-`. An archive that was there is replaced.

Layers are read as streams, by `layers.tarreader`. Callers: `oci-archive:` and `docker-archive:`.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from pathlib import Path
from typing import BinaryIO, cast

from layers.errors import ImageError, StoreError
from layers.values import NamedTuple
from registry.recompress import FileSpan, open_scratch
from registry.transport import CHUNK_BYTES
from registry.transports.local import write_all

_BLOCK = 512
_MAX_MEMBERS = 200_000
_MAX_EXTENDED_BYTES = 1 << 20
_MAX_NAME_CHARS = 4096
_MAX_LINKS = 8


class Member(NamedTuple):
    """A file in an archive; or, with `link`, another name for one."""

    offset: int
    size_bytes: int
    link: str = ""


class TarReader:
    """An archive's members by name. Thread-safe.

    Raises: StoreError if the file cannot be read, ImageError if it is no tar archive.
    """

    def __init__(self, path: Path, scratch_dir: Path) -> None:
        self.path = path
        self._file = _open_archive(path, scratch_dir)
        try:
            self.members = _scan(self._file.fileno(), str(path))
        except BaseException:
            self._file.close()
            raise

    def find(self, name: str) -> Member | None:
        """The file of that name, links followed within the archive."""
        name = _normal(name)
        for _ in range(_MAX_LINKS):
            member = self.members.get(name)
            if member is None or not member.link:
                return member
            name = member.link
        return None

    def open(self, member: Member, offset: int = 0) -> FileSpan:
        return FileSpan(self._file.fileno(), member.offset + offset, max(0, member.size_bytes - offset))

    def read(self, name: str, limit_bytes: int) -> bytes | None:
        """A small member whole; None if there is none. Raises: ImageError if it is larger than the limit."""
        member = self.find(name)
        if member is None:
            return None
        if member.size_bytes > limit_bytes:
            raise ImageError(f"{name} in {self.path} is larger than the {limit_bytes} bytes allowed")
        return os.pread(self._file.fileno(), member.size_bytes, member.offset)

    def close(self) -> None:
        self._file.close()


def _open_archive(path: Path, scratch_dir: Path) -> BinaryIO:
    """The archive as a seekable, uncompressed file."""
    from layers.compression import decompressor, detect

    try:
        if str(path) == "-":
            stream = cast(BinaryIO, sys.stdin.buffer)
        else:
            stream = open(path, "rb", buffering=0)  # noqa: SIM115  # kept open by the caller
    except OSError as e:
        raise StoreError(f"cannot open {path}: {e.strerror}") from e
    try:
        regular = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
        if regular and detect(os.pread(stream.fileno(), 16, 0)) is None:
            return stream
        spool = open_scratch(scratch_dir)
        try:
            plain = decompressor(stream)
            while data := plain.read(CHUNK_BYTES):
                _write_all(spool.fileno(), data)
        except BaseException:
            spool.close()
            raise
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror}") from e
    stream.close()
    return spool


def _normal(name: str) -> str:
    """The name as a key: what differs only in `./`, `//` and `..` within is one."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in {"", "."}:
            parts.append(part)
    return "/".join(parts)


def _scan(fd: int, name: str) -> dict[str, Member]:
    """Every file and link of the tar archive, by its normal name; the last of a name wins."""
    members: dict[str, Member] = {}
    end = os.fstat(fd).st_size
    position = 0
    extended: dict[str, str] = {}
    count = 0
    while position + _BLOCK <= end:
        header = os.pread(fd, _BLOCK, position)
        if header == bytes(_BLOCK):
            break
        count += 1
        if count > _MAX_MEMBERS:
            raise ImageError(f"{name} has more than {_MAX_MEMBERS} members")
        if not _checksum_fits(header):
            what = "is not a tar archive" if count == 1 else f"is damaged at byte {position}"
            raise ImageError(f"{name} {what}")
        kind = header[156:157]
        size = _number(header[124:136])
        data = position + _BLOCK
        if kind in {b"x", b"L", b"K"}:
            if size > _MAX_EXTENDED_BYTES or data + size > end:
                raise ImageError(f"{name}: an extended header of {size} bytes is more than is allowed")
            extended.update(_extended(kind, os.pread(fd, size, data)))
        else:
            size = _decimal(extended.get("size", ""), size)
            path = extended.get("path") or _header_name(header)
            link = extended.get("linkpath") or _text(header[157:257])
            extended = {}
            if len(path) > _MAX_NAME_CHARS or len(link) > _MAX_NAME_CHARS:
                raise ImageError(f"{name} has a member with too long a name")
            if kind in {b"0", b"\0", b"7"}:
                if data + size > end:
                    raise ImageError(f"{name} is cut short: {path!r} ends beyond it")
                members[_normal(path)] = Member(data, size)
            elif kind == b"1":
                members[_normal(path)] = Member(0, 0, _normal(link))
            elif kind == b"2":
                members[_normal(path)] = Member(0, 0, _normal(path.rpartition("/")[0] + "/" + link))
            if kind in {b"1", b"2", b"3", b"4", b"5", b"6"}:
                size = 0
        position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK
    if 0 < end < _BLOCK:
        raise ImageError(f"{name} is not a tar archive")
    return members


def _checksum_fits(header: bytes) -> bool:
    try:
        stored = int(header[148:156].rstrip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    return stored == sum(header[:148]) + sum(header[156:]) + 8 * 32


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return max(0, int(field.strip(b" \0") or b"0", 8))
    except ValueError as e:
        raise ImageError("a tar header has a malformed size") from e


def _decimal(text: str, default: int) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else default


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _header_name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:262] == b"ustar" and header[262:263] == b"\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """What a GNU or PAX header says of the next member: `path`, `linkpath`, `size`."""
    if kind != b"x":
        return {"path" if kind == b"L" else "linkpath": _text(data)}
    found: dict[str, str] = {}
    while data:
        length_text, space, _ = data.partition(b" ")
        if not space or not length_text.isdigit() or len(length_text) > 8 or int(length_text) <= len(length_text):
            break
        record, data = data[: int(length_text)], data[int(length_text) :]
        key, equals, value = record[len(length_text) + 1 :].removesuffix(b"\n").partition(b"=")
        if equals and key in {b"path", b"linkpath", b"size"}:
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
    return found


class TarWriter:
    """An archive being written. `reserve` gives room that several threads may fill at once.

    Every member is a plain file of root, mode 0644, time 0: equal images give equal archives as far
    as their blobs arrive in the same order. Raises: StoreError.
    """

    def __init__(self, path: Path, scratch_dir: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._end = 0
        self._temporary: Path | None = None
        if str(path) == "-":
            self._file = open_scratch(scratch_dir)
        else:
            self._temporary = path.parent / f".{path.name}.{os.getpid()}.{id(self):x}.tmp"
            try:
                self._file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115  # kept open
            except OSError as e:
                raise StoreError(f"cannot write {path}: {e.strerror}") from e
        self.fd = self._file.fileno()

    def reserve(self, name: str, size_bytes: int) -> int:
        """Append a member's header; its data belong at the returned offset."""
        with self._lock:
            start = self._end
            self._end = start + _BLOCK + _padded(size_bytes)
        self.write_at(start, tar_header(name, size_bytes))
        return start + _BLOCK

    def append(self, name: str, data: bytes) -> None:
        self.write_at(self.reserve(name, len(data)), data)

    def begin(self) -> int:
        """Where the data of a member whose name and size are not known yet will lie: see `end`."""
        return self._end + _BLOCK

    def end(self, name: str, size_bytes: int) -> None:
        """Make what was written at `begin()` a member. The caller lets nothing else write in between."""
        self.reserve(name, size_bytes)

    def abandon(self) -> None:
        """Forget what was written at `begin()`, so that no byte of it shows in a later member's padding."""
        try:
            os.ftruncate(self.fd, self._end)
        except OSError as e:
            raise StoreError(f"cannot write {self.path}: {e.strerror}") from e

    def write_at(self, offset: int, data: bytes) -> None:
        try:
            write_all(self.fd, data, offset)
        except OSError as e:
            raise StoreError(f"cannot write {self.path}: {e.strerror}") from e

    def commit(self) -> None:
        """Finish the archive and put it in its place."""
        try:
            # Two empty blocks, and up to a whole record, as tar(1) pads.
            os.ftruncate(self.fd, (self._end + 2 * _BLOCK + 10239) // 10240 * 10240)
            if self._temporary is not None:
                os.rename(self._temporary, self.path)
                self._temporary = None
                return
            sys.stdout.flush()
            span = FileSpan(self.fd, 0, os.fstat(self.fd).st_size)
            while data := span.read(CHUNK_BYTES):
                _write_all(sys.stdout.fileno(), data)
        except OSError as e:
            raise StoreError(f"cannot write {self.path}: {e.strerror}") from e

    def close(self) -> None:
        """Drop what was not committed."""
        self._file.close()
        if self._temporary is not None:
            try:
                os.unlink(self._temporary)
            except OSError:
                pass
            self._temporary = None


def _padded(size_bytes: int) -> int:
    return (size_bytes + _BLOCK - 1) // _BLOCK * _BLOCK


def tar_header(name: str, size_bytes: int) -> bytes:
    """A ustar header of a plain file; sizes from 8 GiB on in GNU's base-256 form."""
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > 100:
        raise StoreError(f"{name!r} is too long a name in an archive")
    size = b"%011o\0" % size_bytes if size_bytes < 8**11 else b"\x80" + size_bytes.to_bytes(11, "big")
    kind = b"5" if name.endswith("/") else b"0"
    mode = b"0000755\0" if kind == b"5" else b"0000644\0"
    owner = b"0000000\0"
    fields = [encoded.ljust(100, b"\0"), mode, owner, owner, size, b"%011o\0" % 0, b" " * 8, kind, bytes(100)]
    header = bytearray(b"".join([*fields, b"ustar\x0000"]).ljust(_BLOCK, b"\0"))
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
