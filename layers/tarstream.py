"""Writing tar streams: equal entries give equal bytes, whatever the host, the time or the reader's locale.

Headers are ustar; what does not fit there (long names, large ids, sizes and times, extended
attributes) goes into a PAX header before them, as Go's archive/tar does it. No user or group
names, no access or change times; modification times are whole seconds unless asked otherwise.
Reading is in `layers.tarreader`, whose names are re-exported here.

Specs: POSIX.1-2017 pax, "ustar Interchange Format"; image-spec layer.md, File Attributes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from zlib import adler32

from layers.errors import LayerError
from layers.tarreader import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    FIFO,
    HARDLINK,
    MAX_HEADER_BYTES,
    REGULAR,
    SYMLINK,
    TYPES_BY_FORMAT,
    TarEntry,
    TarReader,
)

__all__ = [
    "BLOCK_DEVICE",
    "CHARACTER_DEVICE",
    "DIRECTORY",
    "FIFO",
    "HARDLINK",
    "REGULAR",
    "SYMLINK",
    "TYPES_BY_FORMAT",
    "TarEntry",
    "TarReader",
    "TarWriter",
]

_NO_XATTRS: Mapping[str, bytes] = {}
_END_BYTES = 1024
_OCTAL_7 = 0o7777777
_OCTAL_11 = 0o77777777777
_MAGIC = b"ustar\x0000" + bytes(64)  # then no user and group names
_NO_DEVICE = b"0000000\x000000000\x00"
_PLAIN_TAIL = bytes(100) + _MAGIC + _NO_DEVICE + bytes(167)


def _byte_sum(data: bytes) -> int:
    """The sum of all bytes, fifty times as fast as `sum`: Adler-32's low half, exact up to 256 bytes."""
    total = 0
    for at in range(0, len(data), 256):
        total += (adler32(data[at : at + 256]) & 0xFFFF) - 1
    return total


_PLAIN_TAIL_SUM = _byte_sum(_PLAIN_TAIL)


class TarWriter:
    """Builds a tar stream in blocks of `block_bytes` and hands each to `sink`, which then owns it.

    Every block but the last is of exactly that size. `clamp_mtime_s` is SOURCE_DATE_EPOCH: later
    times become it. `nanoseconds` keeps fractions of seconds in a PAX header. Not thread-safe.
    """

    def __init__(
        self,
        sink: Callable[[bytearray], object],
        *,
        block_bytes: int = 1 << 20,
        clamp_mtime_s: int | None = None,
        nanoseconds: bool = False,
    ) -> None:
        if block_bytes <= 0 or block_bytes % 512:
            raise ValueError("block_bytes must be a multiple of 512")
        self._sink = sink
        self._block_bytes = block_bytes
        self._clamp_s = clamp_mtime_s
        self._nanoseconds = nanoseconds
        self._block = bytearray(block_bytes)
        self._view = memoryview(self._block)
        self._at = 0
        self._owners: dict[tuple[int, int, int], bytes] = {}
        self._flushed = 0

    @property
    def offset(self) -> int:
        """Bytes of the stream so far."""
        return self._flushed + self._at

    def add(
        self,
        name: bytes,
        kind: bytes,
        *,
        mode: int,
        uid: int,
        gid: int,
        size: int = 0,
        mtime_ns: int = 0,
        linkname: bytes = b"",
        device: tuple[int, int] | None = None,
        xattrs: Mapping[str, bytes] = _NO_XATTRS,
    ) -> None:
        """Write one entry's header. `name` is relative; of a directory, without its slash at the end.

        `size` bytes of data must follow (`write`, `copy_from`), then `pad`.
        Raises: LayerError if no tar header can hold the entry.
        """
        if kind == DIRECTORY:
            name += b"/"
        seconds = mtime_ns // 1_000_000_000
        clamped = self._clamp_s is not None and seconds >= self._clamp_s
        if clamped:
            seconds = self._clamp_s  # type: ignore[assignment]
        prefix = b""
        if (
            len(name) > 100
            or len(linkname) > 100
            or xattrs
            or not 0 <= seconds <= _OCTAL_11
            or size > _OCTAL_11
            or uid > _OCTAL_7
            or gid > _OCTAL_7
            or (self._nanoseconds and not clamped and mtime_ns % 1_000_000_000)
        ):
            exact_ns = seconds * 1_000_000_000 if clamped or not self._nanoseconds else mtime_ns
            name, prefix = self._add_pax(name, linkname, uid, gid, size, exact_ns, xattrs)
            linkname = linkname[:100]
            uid = uid if uid <= _OCTAL_7 else 0
            gid = gid if gid <= _OCTAL_7 else 0
            size = size if size <= _OCTAL_11 else 0
            seconds = seconds if 0 <= seconds <= _OCTAL_11 else 0
        self._put(name, kind, (mode & 0o7777, uid, gid), size, seconds, linkname, device, prefix)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append data of the entry last added."""
        view = memoryview(data)
        while len(view):
            room = self._block_bytes - self._at
            part = view[:room]
            self._view[self._at : self._at + len(part)] = part
            self._advance(len(part))
            view = view[room:]

    def copy_from(self, fd: int, size: int) -> int:
        """Append up to `size` bytes read from `fd`; how many there were. The file's offset moves."""
        left = size
        while left:
            at = self._at
            end = min(at + left, self._block_bytes)
            got = os.readv(fd, [self._view[at:end]])
            if got == 0:
                break
            left -= got
            self._advance(got)
        return size - left

    def pad(self) -> None:
        """Fill up to the next header's place."""
        rest = self._at & 511
        if rest:
            # A fresh block is all zeros already.
            self._advance(512 - rest)

    def finish(self) -> int:
        """Write the end mark and hand over the last block; the stream's size in bytes."""
        for _ in range(_END_BYTES // 512):
            self._advance(512)
        total = self.offset
        if self._at:
            self._view.release()
            del self._block[self._at :]
            self._sink(self._block)
        return total

    def _advance(self, count: int) -> None:
        self._at += count
        if self._at == self._block_bytes:
            self._flushed += self._at
            self._view.release()
            self._sink(self._block)
            self._block = bytearray(self._block_bytes)
            self._view = memoryview(self._block)
            self._at = 0

    def _put(
        self,
        name: bytes,
        kind: bytes,
        owner: tuple[int, int, int],
        size: int,
        seconds: int,
        linkname: bytes,
        device: tuple[int, int] | None,
        prefix: bytes,
    ) -> None:
        """Pack one ustar header; everything fits by now."""
        packed = self._owners.get(owner)
        if packed is None:
            if len(self._owners) > 4096:
                self._owners.clear()
            packed = self._owners[owner] = b"%07o\0%07o\0%07o\0" % owner
        head = name.ljust(100, b"\0") + packed + b"%011o\0%011o\0" % (size, seconds)
        if linkname or prefix or device:
            numbers = b"%07o\0%07o\0" % device if device else _NO_DEVICE
            tail = linkname.ljust(100, b"\0") + _MAGIC + numbers + prefix.ljust(167, b"\0")
            total = _byte_sum(tail)
        else:
            tail, total = _PLAIN_TAIL, _PLAIN_TAIL_SUM
        # 148 bytes cannot overflow Adler-32's low half; eight spaces stand for the checksum itself.
        total += (adler32(head) & 0xFFFF) - 1 + kind[0] + 256
        at = self._at
        self._view[at : at + 512] = head + b"%06o\0 " % total + kind + tail
        self._advance(512)

    def _add_pax(
        self, name: bytes, linkname: bytes, uid: int, gid: int, size: int, mtime_ns: int, xattrs: Mapping[str, bytes]
    ) -> tuple[bytes, bytes]:
        """Write the PAX header that the entry needs, if any; its name and prefix for the ustar header."""
        records: list[tuple[bytes, bytes]] = []
        short, prefix = _split_name(name)
        if short is None:
            records.append((b"path", name))
            short = name[:99] + b"/" if name.endswith(b"/") else name[:100]
        if len(linkname) > 100:
            records.append((b"linkpath", linkname))
        if uid > _OCTAL_7:
            records.append((b"uid", b"%d" % uid))
        if gid > _OCTAL_7:
            records.append((b"gid", b"%d" % gid))
        if size > _OCTAL_11:
            records.append((b"size", b"%d" % size))
        if mtime_ns % 1_000_000_000 or not 0 <= mtime_ns // 1_000_000_000 <= _OCTAL_11:
            records.append((b"mtime", _pax_time(mtime_ns)))
        records.extend((b"SCHILY.xattr." + _xattr_keyword(key), value) for key, value in xattrs.items())
        if records:
            records.sort()
            body = b"".join(_pax_record(key, value) for key, value in records)
            if len(body) > MAX_HEADER_BYTES:
                raise LayerError(
                    f"the attributes of {os.fsdecode(name)!r} take {len(body)} bytes,"
                    f" more than the {MAX_HEADER_BYTES} that readers of layers accept",
                    hint="remove its extended attributes, or exclude the file",
                )
            own = b"PaxHeaders.0/" + name.rstrip(b"/").rpartition(b"/")[2][:80]
            self._put(own, b"x", (0o644, 0, 0), len(body), 0, b"", None, b"")
            self.write(body)
            self.pad()
        return short, prefix


def _split_name(name: bytes) -> tuple[bytes | None, bytes]:
    """Name and prefix as ustar holds them; (None, b"") if it cannot."""
    if len(name) <= 100:
        return name, b""
    cut = name.rfind(b"/", 0, min(156, len(name) - 1))
    if cut <= 0 or len(name) - cut - 1 > 100:
        return None, b""
    return name[cut + 1 :], name[:cut]


def _pax_record(key: bytes, value: bytes) -> bytes:
    """`length key=value\\n`, where the length counts its own digits."""
    size = len(key) + len(value) + 3
    length = size + len(str(size))
    if len(str(length)) != len(str(size)):
        length = size + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _pax_time(time_ns: int) -> bytes:
    sign, size = (b"-", -time_ns) if time_ns < 0 else (b"", time_ns)
    seconds, fraction = divmod(size, 1_000_000_000)
    text = b"%s%d" % (sign, seconds)
    return text + (b".%09d" % fraction).rstrip(b"0") if fraction else text


def _xattr_keyword(name: str) -> bytes:
    """A PAX keyword ends at the first `=`: one within is escaped, as GNU tar does it."""
    raw = os.fsencode(name)
    if b"=" in raw or b"%3D" in raw or b"%25" in raw:
        return raw.replace(b"%", b"%25").replace(b"=", b"%3D")
    return raw
