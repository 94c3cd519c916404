"""zstd:chunked: a zstd layer with a table of contents in skippable frames after its tar.

The tar, and so the DiffID, is that of the plain layer. Behind it come three frames that every zstd reader
skips: the table, the tar-split (`layers.tarsplit`) by which a puller of single files proves that they are
the layer of that DiffID, and a footer. The descriptor's annotations tell where they are. What it shares
with eStargz is in `layers.lazylayer`.

Format: containers/storage, docs/containers-storage-zstd-chunked.md and pkg/chunked/internal/minimal.
"""

from __future__ import annotations

import hashlib
import posixpath
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from layers.compression import ZstdFrames
from layers.errors import LayerError
from layers.lazylayer import CHUNK_BYTES, Chunk, LazyFormat, LazyWriter, Table
from layers.tarreader import TarEntry
from layers.tarsplit import TarSplit

if TYPE_CHECKING:
    from layers.changeset import Sink

MANIFEST_CHECKSUM = "io.github.containers.zstd-chunked.manifest-checksum"
"""The annotation that says that there is a table, and the digest of its compressed bytes."""
MANIFEST_POSITION = "io.github.containers.zstd-chunked.manifest-position"
"""`offset:compressed size:size:type` of the table."""
TARSPLIT_POSITION = "io.github.containers.zstd-chunked.tarsplit-position"

_SKIPPABLE = b"\x50\x2a\x4d\x18"
_FOOTER_MAGIC = b"GNUlInUx"
_FOOTER = struct.Struct("<7Q8s")
_TYPE_CRFS = 1
_TABLE_MOST_BYTES = 150 << 20  # the largest that containers/storage reads


class ZstdChunkedWriter(LazyWriter):
    """Writes one zstd:chunked layer."""

    format: LazyFormat = "zstd:chunked"

    def __init__(self, sink: Sink, level: int | None) -> None:
        super().__init__(sink)
        self._frames = ZstdFrames(level)
        self._frame = bytearray()
        self._in_data = False
        self._table = Table()
        self._packed_table = _Packed(self._frames)
        self._packed_split = _Packed(self._frames)
        self._split = TarSplit(self._packed_split.write)
        self._names: set[bytes] = set()

    def pack(self, data: bytes) -> None:
        self._frame += data
        # Headers, too, are held in pieces of bounded size; data is cut by whoever gives it.
        if len(self._frame) > CHUNK_BYTES:
            self.cut()

    def cut(self) -> int:
        if self._frame:
            frame, self._frame = self._frame, bytearray()
            self.emit(self._frames.pack(frame))
        return self.offset

    def headers(self, raw: bytes) -> None:
        # Whoever fetches a file's frames gets nothing but the file.
        if self._in_data:
            self.cut()
            self._in_data = False
        self.put(raw)
        self._split.header(raw)

    def data(self, piece: bytes) -> None:
        self._in_data = True
        self.put(piece)
        self._split.data(piece)

    def describe(self, entry: TarEntry, described: dict[str, Any], digest: str, chunks: list[Chunk]) -> None:
        self._check(entry)
        if chunks:
            described |= {"digest": digest, "offset": chunks[0].offset, "endOffset": self.cut()}
            self._in_data = False
        if len(chunks) > 1:
            described |= {"chunkSize": chunks[0].size_bytes, "chunkDigest": chunks[0].digest}
        self._table.add(described)
        for chunk in chunks[1:]:
            self._table.add(
                {
                    "type": "chunk",
                    "name": described["name"],
                    "offset": chunk.offset,
                    "chunkSize": chunk.size_bytes,
                    "chunkOffset": chunk.start,
                    "chunkDigest": chunk.digest,
                }
            )
        self._split.file(described["name"], described.get("size", 0))
        self._packed_table.write(self._table.take())

    def _check(self, entry: TarEntry) -> None:
        """Refuse what would make a layer that podman cannot pull. Raises: LayerError."""
        for name in (entry.name, entry.linkname):
            try:
                name.decode("utf-8")
            except UnicodeDecodeError:
                raise self.inexpressible(entry, "has a name that is not UTF-8") from None
        name = posixpath.normpath(entry.name)
        if name in self._names:
            raise self.inexpressible(entry, "is in the layer twice")
        self._names.add(name)

    def finish(self, padding: int, rest: Iterator[bytes]) -> dict[str, str]:
        for piece in rest:
            self.put(piece)
            self._split.end(piece)
        self.cut()
        split = self._packed_split.end()
        split_bytes = self._packed_split.plain_bytes
        self._packed_table.write(self._table.end(tarSplitDigest=_sha256(split)))
        table = self._packed_table.end()
        table_bytes = self._packed_table.plain_bytes
        for name, size in (("table of contents", table_bytes), ("tar-split", split_bytes)):
            if size > _TABLE_MOST_BYTES:
                raise LayerError(
                    f"the layer's {name} would take {size} bytes, more than zstd:chunked's readers take",
                    hint="use --compression zstd",
                )
        table_at = self._skippable(table)
        split_at = self._skippable(split)
        sizes = (table_at, len(table), table_bytes, _TYPE_CRFS, split_at, len(split), split_bytes)
        self._skippable(_FOOTER.pack(*sizes, _FOOTER_MAGIC))
        # Not also under podman 4.3's names of these annotations: its partial pulls lose owners and times.
        return {
            MANIFEST_CHECKSUM: _sha256(table),
            MANIFEST_POSITION: f"{table_at}:{len(table)}:{table_bytes}:{_TYPE_CRFS}",
            TARSPLIT_POSITION: f"{split_at}:{len(split)}:{split_bytes}",
        }

    def _skippable(self, content: bytes) -> int:
        """Append a frame that readers skip; where its content begins."""
        self.emit(_SKIPPABLE + len(content).to_bytes(4, "little"))
        at = self.offset
        self.emit(content)
        return at


class _Packed:
    """Text compressed as it comes, in frames of a bounded size."""

    def __init__(self, frames: ZstdFrames) -> None:
        self._frames = frames
        self._text = bytearray()
        self._packed = bytearray()
        self.plain_bytes = 0

    def write(self, text: bytes) -> None:
        self._text += text
        self.plain_bytes += len(text)
        if len(self._text) >= CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._packed += self._frames.pack(self._text)
        self._text = bytearray()

    def end(self) -> bytes:
        """All of it."""
        if self._text:
            self._flush()
        return bytes(self._packed)


def read_footer(data: bytes) -> tuple[int, int, int, int] | None:
    """Offset and compressed size of table and tar-split, from a blob's last 64 bytes; None if it has none."""
    if len(data) != _FOOTER.size or data[-8:] != _FOOTER_MAGIC:
        return None
    table_at, table_size, _, kind, split_at, split_size, _, _ = _FOOTER.unpack(data)
    return (table_at, table_size, split_at, split_size) if kind == _TYPE_CRFS else None


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
