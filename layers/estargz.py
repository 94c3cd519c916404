"""eStargz: a gzip layer with a table of contents as the last entry of its tar.

The table, `stargz.index.json`, and a landmark that says what to fetch ahead are part of the tar, so that
the DiffID is another than that of the plain layer. A footer tells where the table's gzip member begins.
What it shares with zstd:chunked is in `layers.lazylayer`.

Spec: stargz-snapshotter, docs/estargz.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from layers.compression import Compressor, compressor
from layers.lazylayer import Chunk, LazyFormat, LazyWriter, Table
from layers.tarreader import TarEntry

if TYPE_CHECKING:
    from layers.changeset import Sink

TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
"""The descriptor's annotation by which a snapshotter checks the table, and knows that there is one."""
UNCOMPRESSED_SIZE = "io.containers.estargz.uncompressed-size"
TOC_NAME = "stargz.index.json"
NO_PREFETCH = ".no.prefetch.landmark"
"""A file that says: fetch nothing ahead."""

_BLOCK = 512


class EstargzWriter(LazyWriter):
    """Writes one eStargz layer."""

    format: LazyFormat = "estargz"

    def __init__(self, sink: Sink, level: int | None, *, reproducible: bool) -> None:
        super().__init__(sink)
        self._level = level
        self._reproducible = reproducible
        self._member: Compressor | None = None
        self._table = Table()

    def begin(self) -> None:
        self.put(_header(NO_PREFETCH, 1))
        digest = _sha256(b"\x0f")
        entry: dict[str, Any] = {"name": NO_PREFETCH, "type": "reg", "size": 1, "mode": 0o644, "digest": digest}
        self._table.add(entry | {"offset": self.cut(), "chunkDigest": digest})
        self.put(b"\x0f" + bytes(_BLOCK - 1))

    def pack(self, data: bytes) -> None:
        if self._member is None:
            self._member = compressor("gzip", self._level, reproducible=self._reproducible)
        self.emit(self._member.write(data))

    def cut(self) -> int:
        if self._member is not None:
            self.emit(self._member.finish())
            self._member = None
        return self.offset

    def describe(self, entry: TarEntry, described: dict[str, Any], digest: str, chunks: list[Chunk]) -> None:
        if not chunks:
            self._table.add(described)
            return
        first = chunks[0]
        described |= {"digest": digest, "offset": first.offset, "chunkDigest": first.digest}
        if len(chunks) > 1:
            described["chunkSize"] = first.size_bytes
        self._table.add(described)
        for chunk in chunks[1:]:
            self._table.add(
                {
                    "name": described["name"],
                    "type": "chunk",
                    "chunkOffset": chunk.start,
                    "chunkSize": chunk.size_bytes,
                    "offset": chunk.offset,
                    "chunkDigest": chunk.digest,
                }
            )

    def finish(self, padding: int, rest: Iterator[bytes]) -> dict[str, str]:
        # The archive's end mark comes after the table.
        self.put(bytes(padding))
        for _ in rest:
            pass
        table = self._table.end()
        offset = self.cut()
        self.put(_header(TOC_NAME, len(table)))
        self.put(table)
        self.put(bytes(-len(table) % _BLOCK + 2 * _BLOCK))
        self.cut()
        self.emit(footer(offset))
        return {TOC_DIGEST: _sha256(table), UNCOMPRESSED_SIZE: str(self.plain_bytes)}


def footer(toc_offset: int) -> bytes:
    """The empty gzip member of 51 bytes that ends an eStargz blob: its extra field tells where the table begins."""
    extra = b"SG" + (22).to_bytes(2, "little") + b"%016xSTARGZ" % toc_offset
    header = b"\x1f\x8b\x08\x04" + bytes(4) + b"\x00\xff" + len(extra).to_bytes(2, "little")
    return header + extra + b"\x01\x00\x00\xff\xff" + bytes(8)


def read_footer(data: bytes) -> int | None:
    """Where the table of an eStargz blob begins, from its last 51 bytes; None if it is none."""
    if len(data) != 51 or data[:4] != b"\x1f\x8b\x08\x04" or data[12:16] != b"SG\x16\x00" or data[32:38] != b"STARGZ":
        return None
    try:
        return int(data[16:32], 16)
    except ValueError:
        return None


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _header(name: str, size: int) -> bytes:
    import tarfile

    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)
