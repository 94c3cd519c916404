"""Layers of which single files can be fetched: what eStargz and zstd:chunked have in common.

Both are the layer's tar, compressed in pieces: each file's data begins a piece of its own, that of a large
file several, and a table of contents at the end says where. For everybody else they are a tar.gz or a
tar.zst. `write_lazy` makes one of a stream of changes, `convert_to_lazy` of a plain tar; the formats
themselves are in `layers.estargz` and `layers.zstdchunked`.

The table's entries: stargz-snapshotter, docs/estargz.md, "TOC". Callers: `builder.solve.layering`,
`registry.recompress`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from layers.compression import Compression
from layers.errors import LayerError
from layers.oci import Digest
from layers.tarreader import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    FIFO,
    HARDLINK,
    REGULAR,
    SYMLINK,
    TarEntry,
    TarReader,
)
from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.changeset import LayerResult, Sink

LazyFormat = Literal["estargz", "zstd:chunked"]

CODECS: dict[LazyFormat, Compression] = {"estargz": "gzip", "zstd:chunked": "zstd"}
"""What a layer of the format is to whoever does not know it."""

CHUNK_BYTES = 4 << 20
"""The data of one piece. Part of the format: changing it changes digests."""

_PIPE_BYTES = 1 << 20
_SECONDS = range(-30610224000, 253402300800)  # the years 1000 to 9999, which RFC 3339 has four digits for
_TYPES = {
    REGULAR: "reg",
    DIRECTORY: "dir",
    SYMLINK: "symlink",
    HARDLINK: "hardlink",
    CHARACTER_DEVICE: "char",
    BLOCK_DEVICE: "block",
    FIFO: "fifo",
}


class LazyLayer(NamedTuple):
    """A written layer and what its descriptor must say."""

    diff_id: Digest
    digest: Digest
    size_bytes: int
    uncompressed_bytes: int
    media_type: str
    annotations: dict[str, str]


def write_lazy(
    format: LazyFormat,
    produce: Callable[[Sink], LayerResult],
    sink: Sink,
    *,
    level: int | None = None,
    reproducible: bool = False,
) -> LazyLayer:
    """Turn the plain tar that `produce` writes to the sink it is given into a layer of that format in `sink`.

    `produce` runs in a thread of its own; memory is flat but for the table of contents.
    Raises: what `produce` and `sink.write` raise, LayerError.
    """
    read, write = os.pipe()
    failure: list[BaseException] = []

    def run() -> None:
        # Unbuffered: nothing is left to be flushed into a broken pipe. A pipe takes all it is given.
        with open(write, "wb", buffering=0) as pipe:
            try:
                produce(cast("Sink", pipe))
            except BaseException as e:  # noqa: BLE001 - raised by the caller's thread
                failure.append(e)

    thread = threading.Thread(target=run, name="layer-tar", daemon=True)
    thread.start()
    written: LazyLayer | None = None
    error: BaseException | None = None
    try:
        with open(read, "rb", buffering=0) as plain:
            written = convert_to_lazy(format, cast(BinaryIO, plain), sink, level=level, reproducible=reproducible)
    except BaseException as e:  # noqa: BLE001 - told below, once the thread is done
        error = e
    thread.join()
    # Each side's failure breaks the pipe for the other: the cause is the one that is no broken pipe.
    cause = next((e for e in failure if not isinstance(e, BrokenPipeError)), error)
    if cause is not None:
        raise cause
    assert written is not None
    return written


def convert_to_lazy(
    format: LazyFormat, plain: BinaryIO, sink: Sink, *, level: int | None = None, reproducible: bool = False
) -> LazyLayer:
    """Turn a plain tar stream into a layer of that format in `sink`; reads it to its end.

    Raises: LayerError for what the format cannot express, a malformed tar, or a level out of range, and
    what `plain.read` and `sink.write` raise.
    """
    writer: LazyWriter
    if format == "estargz":
        from layers.estargz import EstargzWriter

        writer = EstargzWriter(sink, level, reproducible=reproducible)
    else:
        from layers.zstdchunked import ZstdChunkedWriter

        writer = ZstdChunkedWriter(sink, level)
    return writer.convert(plain)


class Chunk(NamedTuple):
    """A part of a file's data and the piece that holds it."""

    start: int
    size_bytes: int
    offset: int
    digest: str


class LazyWriter:
    """Writes one layer. A format says how pieces are compressed, what an entry is, and what the end is."""

    format: LazyFormat

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._blob = hashlib.sha256()
        self._diff = hashlib.sha256()
        self._size = 0
        self._plain_size = 0

    # -- what a format gives ---------------------------------------------------------------------

    def begin(self) -> None:
        """Write what comes before the first entry."""

    def pack(self, data: bytes) -> None:
        """Compress a part of the tar into the current piece."""
        raise NotImplementedError

    def cut(self) -> int:
        """End the current piece; where in the blob the next one begins."""
        raise NotImplementedError

    def headers(self, raw: bytes) -> None:
        """Append the padding of the entry before and the headers of the next one."""
        self.put(raw)

    def data(self, piece: bytes) -> None:
        """Append data of the current entry."""
        self.put(piece)

    def describe(self, entry: TarEntry, described: dict[str, Any], digest: str, chunks: list[Chunk]) -> None:
        """Take an entry into the table, after its data. `digest` is of all of that, "" if there is none."""
        raise NotImplementedError

    def finish(self, padding: int, rest: Iterator[bytes]) -> dict[str, str]:
        """Write the table and what follows; the descriptor's annotations.

        `rest` is what follows the last entry: `padding` bytes of its own and the end of the archive.
        """
        raise NotImplementedError

    # -- what they share -------------------------------------------------------------------------

    def convert(self, plain: BinaryIO) -> LazyLayer:
        """Write the layer of a tar stream."""
        from layers.compression import media_type

        self.begin()
        padding = 0
        tee = _Tee(plain)
        reader = TarReader(cast(BinaryIO, tee))
        for entry in reader:
            kind = _TYPES.get(entry.type)
            if kind is None or reader.sparse:
                what = "is stored sparse" if reader.sparse else "is of an unknown type"
                raise self.inexpressible(entry, what)
            self.headers(tee.take(reader.offset))
            digest, padding = "", 0
            chunks: list[Chunk] = []
            if kind == "reg" and entry.size:
                digest, chunks = self._data(reader, tee)
                padding = -entry.size % 512
            self.describe(entry, self._attributes(entry, kind), digest, chunks)
        annotations = self.finish(padding, tee.rest())
        return LazyLayer(
            Digest.from_hasher(self._diff),
            Digest.from_hasher(self._blob),
            self._size,
            self._plain_size,
            media_type(CODECS[self.format]),
            annotations,
        )

    def inexpressible(self, entry: TarEntry, what: str) -> LayerError:
        """The error for an entry that the format has no words for."""
        return LayerError(
            f"{os.fsdecode(entry.name)!r} {what}, which {self.format} cannot express",
            hint=f"use --compression {CODECS[self.format]}",
        )

    def put(self, data: bytes) -> None:
        """Append to the tar."""
        if data:
            self._diff.update(data)
            self._plain_size += len(data)
            self.pack(data)

    def emit(self, data: bytes) -> None:
        """Append to the blob."""
        if data:
            self._blob.update(data)
            self._size += len(data)
            self._sink.write(data)

    @property
    def offset(self) -> int:
        """Where the blob ends so far."""
        return self._size

    @property
    def plain_bytes(self) -> int:
        """The size of the tar so far."""
        return self._plain_size

    def _attributes(self, entry: TarEntry, kind: str) -> dict[str, Any]:
        """The fields of the table that tell what tar headers do."""
        seconds, fraction_ns = divmod(entry.mtime_ns, 1_000_000_000)
        if seconds not in _SECONDS:
            raise self.inexpressible(entry, "has a modification time beyond the years 1000 to 9999")
        fraction = f".{fraction_ns:09}".rstrip("0") if fraction_ns else ""
        described: dict[str, Any] = {
            "type": kind,
            "name": entry.name.decode("utf-8", "surrogateescape"),
            "modtime": time.strftime(f"%Y-%m-%dT%H:%M:%S{fraction}Z", time.gmtime(seconds)),
            "mode": entry.mode,
            "uid": entry.uid,
            "gid": entry.gid,
        }
        if kind in {"symlink", "hardlink"}:
            described["linkName"] = entry.linkname.decode("utf-8", "surrogateescape")
        if kind in {"char", "block"}:
            described |= {"devMajor": entry.devmajor, "devMinor": entry.devminor}
        if entry.xattrs:
            described["xattrs"] = {name: base64.b64encode(v).decode() for name, v in entry.xattrs.items()}
        if kind == "reg" and entry.size:
            described["size"] = entry.size
        return described

    def _data(self, reader: TarReader, tee: _Tee) -> tuple[str, list[Chunk]]:
        """Write an entry's data in chunks: the digest of all of it, and they."""
        whole = hashlib.sha256()
        part = hashlib.sha256()
        chunks: list[Chunk] = []
        start = position = 0
        offset = self.cut()
        for _, piece in reader.segments():
            data = memoryview(tee.take(reader.offset))
            assert len(data) == len(piece)
            while data:
                if position - start == CHUNK_BYTES:
                    chunks.append(Chunk(start, CHUNK_BYTES, offset, f"sha256:{part.hexdigest()}"))
                    whole, part = (part.copy() if start == 0 else whole), hashlib.sha256()
                    start, offset = position, self.cut()
                now = data[: start + CHUNK_BYTES - position]
                part.update(now)
                if start:
                    whole.update(now)
                self.data(bytes(now))
                position += len(now)
                data = data[len(now) :]
        digest = f"sha256:{part.hexdigest()}"
        chunks.append(Chunk(start, position - start, offset, digest))
        return (f"sha256:{whole.hexdigest()}" if start else digest), chunks


class Table:
    """The entries of a table of contents as JSON text, taken in pieces so that few are held as objects."""

    def __init__(self) -> None:
        self._text = bytearray(b'{"version":1,"entries":[')
        self._first = True

    def add(self, entry: dict[str, Any]) -> None:
        """Append one entry."""
        if not self._first:
            self._text += b","
        self._first = False
        self._text += json.dumps(entry, separators=(",", ":"), ensure_ascii=True).encode("ascii")

    def take(self) -> bytes:
        """The text since the last call."""
        text, self._text = bytes(self._text), bytearray()
        return text

    def end(self, **fields: str) -> bytes:
        """The rest of the text, with further fields of the document."""
        more = json.dumps(fields, separators=(",", ":"))[1:-1]
        return self.take() + b"]" + (b"," + more.encode("ascii") if more else b"") + b"}"


class _Tee:
    """The tar stream, of which the bytes not yet passed on are kept."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._kept = bytearray()
        self._base = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, _PIPE_BYTES) if size > 0 else _PIPE_BYTES)
        self._kept += data
        return data

    def take(self, end: int) -> bytes:
        """What lies between the last take and the offset `end` of the stream."""
        data = bytes(self._kept[: end - self._base])
        del self._kept[: len(data)]
        self._base += len(data)
        return data

    def rest(self) -> Iterator[bytes]:
        """All that was not taken yet, to the stream's end."""
        while data := self.take(1 << 62) or (self.read() and self.take(1 << 62)):
            yield data
