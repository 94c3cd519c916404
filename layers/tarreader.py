"""Reading tar streams: ustar, PAX, GNU and old V7 archives, one entry after the other.

The stream is untrusted: header sizes are bounded, numbers are checked, data is given in pieces of
what was read anyway. Names are bytes exactly as stored; confinement is `layers.apply`'s business.
Where tar's dialects disagree, this reader decides as Go's archive/tar does, since that is what
other container tools see.

Specs: POSIX.1-2017 pax; GNU tar manual, "Basic Tar Format" and "Storing Sparse Files".
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO
from zlib import adler32

from layers.errors import LayerError
from layers.values import NamedTuple

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

REGULAR = b"0"
HARDLINK = b"1"
SYMLINK = b"2"
CHARACTER_DEVICE = b"3"
BLOCK_DEVICE = b"4"
DIRECTORY = b"5"
FIFO = b"6"
TYPES_BY_FORMAT = {
    stat.S_IFREG: REGULAR,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFCHR: CHARACTER_DEVICE,
    stat.S_IFBLK: BLOCK_DEVICE,
    stat.S_IFIFO: FIFO,
}
"""The entry's type for what S_IFMT gives; sockets have none."""

MAX_HEADER_BYTES = 1 << 20
"""The largest extended header, as in Go: larger ones are refused."""
_MAX_ID = 0xFFFFFFFE  # -1 means "leave it" to chown(2)
_MAX_SIZE = (1 << 63) - 1
_MAX_TIME_S = 1 << 40
_READ_BYTES = 1 << 20
_ZEROS = bytes(512)
_SPLIT = struct.Struct("100s24s12s12s8sc100s8s80s155s12s")
_XATTR = b"SCHILY.xattr."
_HEADER_ONLY = frozenset({HARDLINK, SYMLINK, CHARACTER_DEVICE, BLOCK_DEVICE, DIRECTORY, FIFO})
_NO_XATTRS: dict[str, bytes] = {}
_HINT = "the archive is damaged or was not made by a tar program"


class TarEntry(NamedTuple):
    """One entry. `type` is one of the constants above, or what the header says if it is none of them."""

    name: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    linkname: bytes
    devmajor: int
    devminor: int
    xattrs: dict[str, bytes]


class _Pax(NamedTuple):
    """The records of extended headers; sparse records may repeat, so their order is kept."""

    records: dict[bytes, bytes]
    sparse_pairs: list[int]


class TarReader:
    """Iterate for the entries; before the next one, read this one's data with `segments` or `readinto`, or not at all.

    `stream` needs `read` alone. Raises: LayerError while iterating or reading, for anything malformed.
    Afterwards the stream is at some place after the end mark; `trailing` gives what was read beyond it.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._chunk = b""
        self._at = 0
        self._before = 0
        self._left = 0  # of the entry's stored data
        self._padding = 0
        self._sparse: list[tuple[int, int]] | None = None
        self._size = 0
        self._globals: dict[bytes, bytes] = {}
        self._owners: dict[bytes, tuple[int, int, int]] = {}
        self._expanded: Iterator[memoryview] | None = None
        self._piece = memoryview(b"")

    @property
    def offset(self) -> int:
        """Bytes of the stream consumed so far."""
        return self._before + self._at

    @property
    def sparse(self) -> bool:
        """Whether the current entry has holes."""
        return self._sparse is not None

    def __iter__(self) -> Iterator[TarEntry]:
        long_name = long_link = None
        pax: _Pax | None = None
        while True:
            self._skip_data()
            header = self._header(long_name is not None or long_link is not None or pax is not None)
            if header is None:
                return
            kind = header[156:157]
            if kind == b"x" or kind == b"g":
                records = self._read_pax(header)
                if kind == b"g":
                    self._globals.update(records.records)
                    if sum(map(len, self._globals.values())) > MAX_HEADER_BYTES:
                        raise self._error("global headers are too large")
                else:
                    pax = records
            elif kind == b"L":
                long_name = self._extended(header).partition(b"\0")[0]
            elif kind == b"K":
                long_link = self._extended(header).partition(b"\0")[0]
            elif kind == b"V":
                continue  # a volume label
            else:
                yield self._entry(header, kind, long_name, long_link, pax)
                long_name = long_link = pax = None

    # -- data of the current entry ---------------------------------------------------------------

    def segments(self) -> Iterator[tuple[int, memoryview]]:
        """The entry's data as (offset in the file, piece); holes are left out. A piece is valid until the next."""
        if self._sparse is None:
            offset = 0
            for piece in self._pieces():
                yield offset, piece
                offset += len(piece)
            return
        for start, length in self._sparse:
            while length:
                piece = self._some(length)
                yield start, piece
                start += len(piece)
                length -= len(piece)

    def small_data(self) -> bytes | memoryview | None:
        """All data at once, uncopied, where it lies in the buffer; None where it does not or is sparse."""
        at, size = self._at, self._left
        if self._sparse is not None or at + size > len(self._chunk):
            return None
        self._at = at + size
        self._left = 0
        return self._chunk[at : at + size]

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill `buffer` with the next data of the entry, holes as zeros; how many bytes, 0 at its end."""
        target = memoryview(buffer).cast("B")
        if self._expanded is None:
            self._expanded = self._with_holes()
        filled = 0
        while filled < len(target):
            if not self._piece:
                piece = next(self._expanded, None)
                if piece is None:
                    break
                self._piece = piece
                continue
            part = self._piece[: len(target) - filled]
            target[filled : filled + len(part)] = part
            filled += len(part)
            self._piece = self._piece[len(part) :]
        return filled

    def trailing(self) -> bytes:
        """What was read from the stream beyond the end mark; once."""
        rest = self._chunk[self._at :]
        self._at = len(self._chunk)
        return rest

    def _with_holes(self) -> Iterator[memoryview]:
        zeros = memoryview(bytes(64 << 10))
        at = 0
        for offset, piece in self.segments():
            while at < offset:
                gap = zeros[: offset - at]
                yield gap
                at += len(gap)
            yield piece
            at += len(piece)
        while at < self._size:
            gap = zeros[: self._size - at]
            yield gap
            at += len(gap)

    # -- the stream ------------------------------------------------------------------------------

    def _fill(self) -> bool:
        """Have at least one byte in the buffer; False at the end of the stream."""
        while self._at == len(self._chunk):
            self._before += len(self._chunk)
            self._chunk = self._stream.read(_READ_BYTES)
            self._at = 0
            if not self._chunk:
                return False
        return True

    def _some(self, limit: int) -> memoryview:
        """Between 1 and `limit` bytes of the entry's data."""
        if not self._fill():
            raise self._error("the archive ends within an entry's data")
        at = self._at
        piece = memoryview(self._chunk)[at : at + min(limit, self._left)]
        if not piece:
            raise self._error("an entry's sparse map exceeds its data")
        self._at = at + len(piece)
        self._left -= len(piece)
        return piece

    def _pieces(self) -> Iterator[memoryview]:
        while self._left:
            yield self._some(self._left)

    def _exactly(self, size: int) -> bytes:
        """`size` bytes, which the caller has bounded."""
        at = self._at
        data = self._chunk[at : at + size]
        self._at = at + len(data)
        if len(data) == size:
            return data
        parts = [data]
        missing = size - len(data)
        while missing:
            if not self._fill():
                raise self._error("the archive is cut short")
            part = self._chunk[self._at : self._at + missing]
            self._at += len(part)
            missing -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _skip_data(self) -> None:
        self._expanded = None
        self._piece = memoryview(b"")
        left = self._left + self._padding
        self._left = self._padding = 0
        while left:
            if not self._fill():
                raise self._error("the archive ends within an entry's data")
            step = min(left, len(self._chunk) - self._at)
            self._at += step
            left -= step

    def _error(self, what: str) -> LayerError:
        return LayerError(f"invalid tar stream: {what} (at byte {self.offset})", hint=_HINT)

    # -- headers ---------------------------------------------------------------------------------

    def _header(self, pending: bool) -> bytes | None:
        """The next header, its checksum verified; None at the end mark or, between entries, the stream's end."""
        at = self._at
        header = self._chunk[at : at + 512]
        if len(header) == 512:
            self._at = at + 512
        else:
            if not self._fill():
                if pending:
                    raise self._error("the archive ends after an extended header")
                return None
            header = self._exactly(512)
        if header == _ZEROS:
            return None
        field = header[148:156]
        stored = self._number(field, "checksum")
        # Adler-32's low half is 1 + the sum of the bytes modulo 65521; the field itself counts as spaces.
        total = (adler32(header) & 0xFFFF) - 1 - sum(field) + 256
        if (total - stored) % 65521 and stored != sum(b - 256 if b > 127 else b for b in header) - sum(field) + 256:
            raise self._error("wrong header checksum")
        return header

    def _number(self, field: bytes, what: str) -> int:
        """An octal or base-256 field."""
        text = field[:-1]
        if text.isdigit() and field[-1] in (0, 32):
            try:
                return int(text, 8)
            except ValueError:
                raise self._error(f"{what} {text[:24]!r} is not octal") from None
        if field[0] & 0x80:
            value = int.from_bytes(field, "big", signed=field[0] & 0x40 != 0)
            return value if field[0] == 0xFF else value & ((1 << (len(field) * 8 - 1)) - 1)
        text = field.strip(b" \0").partition(b"\0")[0].rstrip(b" ")
        if not text:
            return 0
        if not text.isdigit():
            raise self._error(f"{what} {text[:24]!r} is not a number")
        try:
            return int(text, 8)
        except ValueError:
            raise self._error(f"{what} {text[:24]!r} is not octal") from None

    def _owner(self, packed: bytes) -> tuple[int, int, int]:
        """Mode, uid and gid, remembered: most entries share a few."""
        numbers = (
            self._number(packed[:8], "mode") & 0o7777,
            self._number(packed[8:16], "uid"),
            self._number(packed[16:], "gid"),
        )
        if len(self._owners) > 4096:
            self._owners.clear()
        self._owners[packed] = numbers
        return numbers

    def _extended(self, header: bytes) -> bytes:
        """The body of an extended header."""
        size = self._number(header[124:136], "size")
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise self._error(f"an extended header of {size} bytes is larger than the {MAX_HEADER_BYTES} allowed")
        self._left = size
        self._padding = -size & 511
        body = self._exactly(size)
        self._left = 0
        return body

    def _read_pax(self, header: bytes) -> _Pax:
        body = self._extended(header)
        pax = _Pax({}, [])
        at = 0
        while at < len(body):
            space = body.find(b" ", at, at + 8)
            digits = body[at:space]
            if space < 0 or not digits.isdigit():
                if not body[at:].strip(b"\0"):
                    break
                raise self._error("malformed extended header record")
            end = at + int(digits)
            key, found, value = body[space + 1 : end - 1].partition(b"=")
            if not found or end > len(body) or body[end - 1 : end] != b"\n":
                raise self._error("malformed extended header record")
            at = end
            if key in {b"GNU.sparse.offset", b"GNU.sparse.numbytes"}:
                pax.sparse_pairs.append(self._decimal(value, key))
            else:
                pax.records[key] = value
        return pax

    def _decimal(self, value: bytes, what: bytes) -> int:
        if not value.isdigit() or len(value) > 19 or int(value) > _MAX_SIZE:
            raise self._error(f"{what.decode('latin-1')} {value[:24]!r} is not a sensible number")
        return int(value)

    def _time_ns(self, value: bytes) -> int:
        sign = -1 if value.startswith(b"-") else 1
        whole, _, fraction = value.removeprefix(b"-").partition(b".")
        if not whole.isdigit() or not (fraction + b"0").isdigit() or len(whole) > 13:
            raise self._error(f"mtime {value[:24]!r} is not a time")
        return sign * (int(whole) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0")))

    def _entry(
        self, header: bytes, kind: bytes, long_name: bytes | None, long_link: bytes | None, pax: _Pax | None
    ) -> TarEntry:
        name, owner, size_field, time_field, _, _, link, magic, _, prefix, _ = _SPLIT.unpack(header)
        name = name.partition(b"\0")[0]
        if magic == b"ustar\x0000" and prefix[0]:
            if header[508:] == b"tar\0":
                prefix = prefix[:131]  # star's own variant keeps times after it
            name = prefix.partition(b"\0")[0] + b"/" + name
        mode, uid, gid = self._owners.get(owner) or self._owner(owner)
        size = self._number(size_field, "size")
        mtime_ns = self._number(time_field, "mtime") * 1_000_000_000
        linkname = link.partition(b"\0")[0] if link[0] else b""
        if long_name is not None:
            name = long_name
        if long_link is not None:
            linkname = long_link
        if kind == b"\0" or kind == b"7":
            kind = DIRECTORY if kind == b"\0" and name.endswith(b"/") else REGULAR
        elif kind == b"D":
            kind = DIRECTORY
        entry = TarEntry(name, kind, mode, uid, gid, size, mtime_ns, linkname, 0, 0, _NO_XATTRS)
        if kind in (CHARACTER_DEVICE, BLOCK_DEVICE):
            entry = entry._replace(
                devmajor=self._number(header[329:337], "device"), devminor=self._number(header[337:345], "device")
            )
        if pax is not None or self._globals:
            entry = self._with_pax(entry, pax)
        self._sparse = None
        if kind == b"S" or (pax is not None and (pax.sparse_pairs or any(map(_is_sparse_key, pax.records)))):
            return self._checked(self._sparse_entry(entry, header, pax))
        self._size = entry.size
        self._left = 0 if kind in _HEADER_ONLY else entry.size
        self._padding = -self._left & 511
        return self._checked(entry)

    def _checked(self, entry: TarEntry) -> TarEntry:
        if not 0 <= entry.size <= _MAX_SIZE:
            raise self._error(f"absurd size {entry.size}")
        if not (0 <= entry.uid <= _MAX_ID and 0 <= entry.gid <= _MAX_ID):
            raise self._error(f"absurd owner {entry.uid}:{entry.gid}")
        if abs(entry.mtime_ns) > _MAX_TIME_S * 1_000_000_000:
            raise self._error("absurd modification time")
        if not (0 <= entry.devmajor < 1 << 32 and 0 <= entry.devminor < 1 << 32):
            raise self._error("absurd device number")
        if b"\0" in entry.name or b"\0" in entry.linkname:
            raise self._error("a name holds a NUL byte")
        return entry

    def _with_pax(self, entry: TarEntry, pax: _Pax | None) -> TarEntry:
        records = self._globals | pax.records if pax is not None else self._globals
        changes: dict[str, object] = {}
        xattrs: dict[str, bytes] = {}
        for key, value in records.items():
            if key.startswith(_XATTR):
                xattrs[os.fsdecode(_unescaped(key[len(_XATTR) :]))] = value
            elif not value:
                continue  # an empty value takes a record back
            elif key == b"path":
                changes["name"] = value
            elif key == b"linkpath":
                changes["linkname"] = value
            elif key in {b"uid", b"gid", b"size"}:
                changes[key.decode()] = self._decimal(value, key)
            elif key == b"mtime":
                changes["mtime_ns"] = self._time_ns(value)
        return entry._replace(xattrs=xattrs, **changes)  # type: ignore[arg-type]

    # -- GNU's sparse files ----------------------------------------------------------------------

    def _sparse_entry(self, entry: TarEntry, header: bytes, pax: _Pax | None) -> TarEntry:
        """Work out the map of a sparse entry and its real size and name."""
        stored = entry.size
        self._left = stored
        self._padding = -stored & 511
        if entry.type == b"S":
            real, numbers = self._old_sparse(header)
            entry = entry._replace(type=REGULAR)
        else:
            assert pax is not None
            records = pax.records
            real_field = records.get(b"GNU.sparse.realsize", records.get(b"GNU.sparse.size"))
            if real_field is None or entry.type != REGULAR:
                raise self._error("a sparse entry lacks its size")
            real = self._decimal(real_field, b"sparse size")
            if records.get(b"GNU.sparse.name"):
                entry = entry._replace(name=records[b"GNU.sparse.name"])
            if records.get(b"GNU.sparse.major") == b"1":
                numbers = self._sparse_map_1()
            elif b"GNU.sparse.map" in records:
                numbers = [self._decimal(n, b"sparse map") for n in records[b"GNU.sparse.map"].split(b",") if n]
            else:
                numbers = pax.sparse_pairs
        if len(numbers) % 2:
            raise self._error("a sparse map is incomplete")
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        end = 0
        for start, length in pairs:
            if start < end or start + length > real:
                raise self._error("a sparse map is out of order")
            end = start + length
        if sum(length for _, length in pairs) != self._left:
            raise self._error("a sparse map does not fit its data")
        self._sparse = [(start, length) for start, length in pairs if length]
        self._size = real
        return entry._replace(size=real)

    def _old_sparse(self, header: bytes) -> tuple[int, list[int]]:
        """GNU's first format: four pairs in the header, twenty-one in each block that follows."""
        numbers: list[int] = []
        block, at, count, more = header, 386, 4, header[482]
        while True:
            for _ in range(count):
                pair = block[at : at + 24]
                if not pair[0]:
                    break
                numbers += [self._number(pair[:12], "sparse map"), self._number(pair[12:], "sparse map")]
                at += 24
            if not more:
                break
            if len(numbers) * 24 > MAX_HEADER_BYTES:
                raise self._error("a sparse map is too large")
            block = self._exactly(512)
            at, count, more = 0, 21, block[504]
        return self._number(header[483:495], "size"), numbers

    def _sparse_map_1(self) -> list[int]:
        """PAX 1.0: decimal lines in whole blocks before the data."""
        blocks: list[bytes] = []
        lines_seen = 0
        wanted: int | None = None
        while wanted is None or lines_seen < wanted + 1:
            if self._left < 512 or len(blocks) * 512 >= MAX_HEADER_BYTES:
                raise self._error("a sparse map is incomplete or too large")
            block = self._exactly(512)
            self._left -= 512
            blocks.append(block)
            lines_seen += block.count(b"\n")
            if wanted is None:
                if not lines_seen:
                    raise self._error("a sparse map does not begin with its length")
                wanted = 2 * self._decimal(block.partition(b"\n")[0], b"sparse map")
                if wanted > MAX_HEADER_BYTES:
                    raise self._error("a sparse map is too large")
        return [self._decimal(n, b"sparse map") for n in b"".join(blocks).split(b"\n")[1 : wanted + 1]]


def normal_name(name: bytes) -> bytes:
    """A name without `.`, `//`, a leading slash, and with `..` resolved by text, which never leaves the root."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in {b"", b"."}:
            parts.append(part)
    return b"/".join(parts)


def _is_sparse_key(key: bytes) -> bool:
    return key.startswith(b"GNU.sparse.")


def _unescaped(keyword: bytes) -> bytes:
    """The inverse of the writer's escape of `=` in attribute names."""
    if b"%" in keyword:
        return keyword.replace(b"%3D", b"=").replace(b"%25", b"%")
    return keyword
