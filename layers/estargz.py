"""eStargz: a gzip layer of which single files can be fetched, with a table of contents at its end.

Every file's data begins a gzip member of its own, large files in several; the table, `stargz.index.json`, is
the last entry of the tar, and a footer tells where its member begins. For everybody else it is a tar.gz. The
table is part of the tar, so that the DiffID is another than that of the plain layer.

Spec: stargz-snapshotter, docs/estargz.md. Caller: `builder.solve.layering`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from layers.compression import Compressor, compressor, media_type
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

TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
"""The descriptor's annotation by which a snapshotter checks the table, and knows that there is one."""
UNCOMPRESSED_SIZE = "io.containers.estargz.uncompressed-size"
TOC_NAME = "stargz.index.json"
NO_PREFETCH = ".no.prefetch.landmark"
"""A file that says: fetch nothing ahead."""

_CHUNK_BYTES = 4 << 20
_BLOCK = 512
_PIPE_BYTES = 1 << 20
_TYPES = {
    REGULAR: "reg",
    b"\0": "reg",
    DIRECTORY: "dir",
    SYMLINK: "symlink",
    HARDLINK: "hardlink",
    CHARACTER_DEVICE: "char",
    BLOCK_DEVICE: "block",
    FIFO: "fifo",
}


class EstargzLayer(NamedTuple):
    """A written layer and what its descriptor must say."""

    diff_id: Digest
    digest: Digest
    size_bytes: int
    uncompressed_bytes: int
    media_type: str
    annotations: dict[str, str]


def write_estargz(
    produce: Callable[[Sink], LayerResult], sink: Sink, *, level: int | None = None, reproducible: bool = False
) -> EstargzLayer:
    """Turn the plain tar that `produce` writes to the sink it is given into an eStargz layer in `sink`.

    `produce` runs in a thread of its own; memory is flat. Raises: what `produce` and `sink.write` raise, LayerError.
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
    written: EstargzLayer | None = None
    error: BaseException | None = None
    try:
        with open(read, "rb", buffering=0) as plain:
            written = _Writer(sink, level, reproducible).run(cast(BinaryIO, plain))
    except BaseException as e:  # noqa: BLE001 - told below, once the thread is done
        error = e
    thread.join()
    # Each side's failure breaks the pipe for the other: the cause is the one that is no broken pipe.
    cause = next((e for e in failure if not isinstance(e, BrokenPipeError)), error)
    if cause is not None:
        raise cause
    assert written is not None
    return written


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


class _Writer:
    """Writes one layer."""

    def __init__(self, sink: Sink, level: int | None, reproducible: bool) -> None:
        self._sink = sink
        self._level = level
        self._reproducible = reproducible
        self._blob = hashlib.sha256()
        self._diff = hashlib.sha256()
        self._size = 0
        self._plain_size = 0
        self._member: Compressor | None = None
        self._toc: list[dict[str, Any]] = []

    def run(self, plain: BinaryIO) -> EstargzLayer:
        self._landmark()
        tee = _Tee(plain)
        reader = TarReader(cast(BinaryIO, tee))
        left = 0
        for entry in reader:
            if reader.sparse:
                raise LayerError(f"{os.fsdecode(entry.name)!r} is stored sparse, which eStargz cannot express")
            self._put(tee.take(reader.offset))
            self._entry(entry, reader, tee)
            left = -entry.size % _BLOCK if entry.type == REGULAR else 0
        # The archive's end mark comes after the table.
        self._put(bytes(left))
        while tee.read():
            tee.take(1 << 62)
        return self._finish()

    def _landmark(self) -> None:
        self._put(_header(NO_PREFETCH, 1))
        entry: dict[str, Any] = {"name": NO_PREFETCH, "type": "reg", "size": 1, "mode": 0o644}
        entry |= {"digest": _sha256(b"\x0f"), "offset": self._cut(), "chunkDigest": _sha256(b"\x0f")}
        self._toc.append(entry)
        self._put(b"\x0f" + bytes(_BLOCK - 1))

    def _entry(self, entry: TarEntry, reader: TarReader, tee: _Tee) -> None:
        kind = _TYPES.get(entry.type)
        if kind is None:
            return
        described: dict[str, Any] = {
            "name": entry.name.decode("utf-8", "surrogateescape"),
            "type": kind,
            "modtime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.mtime_ns // 10**9)),
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
        self._toc.append(described)
        if kind == "reg" and entry.size:
            self._data(described, entry, reader, tee)

    def _data(self, described: dict[str, Any], entry: TarEntry, reader: TarReader, tee: _Tee) -> None:
        """A file's data in chunks, each a member."""
        whole = hashlib.sha256()
        described["size"] = entry.size
        chunk = described
        start = position = 0
        hasher = hashlib.sha256()
        chunk["offset"] = self._cut()
        for _, piece in reader.segments():
            data = memoryview(tee.take(reader.offset))
            assert len(data) == len(piece)
            whole.update(data)
            while data:
                if position - start == _CHUNK_BYTES:
                    chunk["chunkDigest"] = f"sha256:{hasher.hexdigest()}"
                    chunk["chunkSize"] = _CHUNK_BYTES
                    start, hasher = position, hashlib.sha256()
                    chunk = {"name": described["name"], "type": "chunk", "chunkOffset": start, "offset": self._cut()}
                    self._toc.append(chunk)
                part = data[: start + _CHUNK_BYTES - position]
                hasher.update(part)
                self._put(bytes(part))
                position += len(part)
                data = data[len(part) :]
        chunk["chunkDigest"] = f"sha256:{hasher.hexdigest()}"
        if chunk is not described:
            chunk["chunkSize"] = position - start
        described["digest"] = f"sha256:{whole.hexdigest()}"

    def _finish(self) -> EstargzLayer:
        document = {"version": 1, "entries": self._toc}
        table = json.dumps(document, separators=(",", ":"), ensure_ascii=True).encode("ascii")
        offset = self._cut()
        self._put(_header(TOC_NAME, len(table)))
        self._put(table)
        self._put(bytes(-len(table) % _BLOCK + 2 * _BLOCK))
        self._cut()
        self._emit(footer(offset))
        annotations = {TOC_DIGEST: _sha256(table), UNCOMPRESSED_SIZE: str(self._plain_size)}
        return EstargzLayer(
            Digest.from_hasher(self._diff),
            Digest.from_hasher(self._blob),
            self._size,
            self._plain_size,
            media_type("gzip"),
            annotations,
        )

    def _put(self, data: bytes) -> None:
        """Append to the tar."""
        if not data:
            return
        self._diff.update(data)
        self._plain_size += len(data)
        if self._member is None:
            self._member = compressor("gzip", self._level, reproducible=self._reproducible)
        self._emit(self._member.write(data))

    def _cut(self) -> int:
        """End the gzip member; where the next one begins."""
        if self._member is not None:
            self._emit(self._member.finish())
            self._member = None
        return self._size

    def _emit(self, data: bytes) -> None:
        if data:
            self._blob.update(data)
            self._size += len(data)
            self._sink.write(data)


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
