"""Compression of layers: gzip, zstd or none, written in parallel and read as a stream.

`compressor` turns pieces of a tar stream into pieces of a blob; `decompressor` is the inverse and
finds out by itself what it is given. Both release the GIL for nearly all of their time, so that
hashing, reading and compressing overlap in threads. Digests live with the callers
(`layers.changeset`, `layers.apply`).

gzip output is one member made of independent deflate blocks of `BLOCK_BYTES` input each: any reader
takes it, and its bytes depend on nothing but the input, the level and the library. The fastest library
(ISA-L) chooses differently on some processors; `reproducible` uses zlib-ng instead.

Specs: RFC 1952 (gzip), RFC 8878 (zstd), image-spec layer.md (media types).
"""

from __future__ import annotations

import queue
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from layers.errors import LayerError
from layers.oci import (
    MEDIA_DOCKER_FOREIGN_GZIP,
    MEDIA_DOCKER_LAYER,
    MEDIA_DOCKER_LAYER_GZIP,
    MEDIA_DOCKER_LAYER_ZSTD,
    MEDIA_OCI_LAYER,
    MEDIA_OCI_LAYER_GZIP,
    MEDIA_OCI_LAYER_ZSTD,
)
from layers.values import Protocol

if TYPE_CHECKING:
    from typing import BinaryIO

Compression = Literal["gzip", "zstd", "none"]
"""How a layer's blob is compressed."""

Kind = Literal["gzip", "zstd", "bzip2", "xz"]
"""What `detect` can tell; the latter two are read (for ADD) and never written."""

BLOCK_BYTES = 1 << 20
"""Input bytes of one independently compressed gzip block. Part of the format: changing it changes digests."""

Buffer = bytes | bytearray | memoryview

_GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # no name, no time, OS unknown
_DEFLATE_END = b"\x03\0"  # an empty final block
_LEVELS: dict[Compression, range] = {"gzip": range(10), "zstd": range(-7, 23), "none": range(1)}
_SAMPLE_BYTES = 32 << 10  # part of the format, too
_STORED_BYTES = 0xFFFF
_ZSTD_LEVEL = 3
_ZSTD_JOB_BYTES = 2 << 20  # part of the format, too; larger ones cost memory in every worker
_MOST_THREADS: dict[Compression, int] = {"gzip": 8, "zstd": 4, "none": 1}  # each holds some MiB

_MEDIA_TYPES: dict[Compression, str] = {
    "gzip": MEDIA_OCI_LAYER_GZIP,
    "zstd": MEDIA_OCI_LAYER_ZSTD,
    "none": MEDIA_OCI_LAYER,
}
_KINDS: dict[str, Compression] = {
    MEDIA_OCI_LAYER_GZIP: "gzip",
    MEDIA_OCI_LAYER_ZSTD: "zstd",
    MEDIA_OCI_LAYER: "none",
    MEDIA_DOCKER_LAYER_GZIP: "gzip",
    MEDIA_DOCKER_LAYER_ZSTD: "zstd",
    MEDIA_DOCKER_LAYER: "none",
    MEDIA_DOCKER_FOREIGN_GZIP: "gzip",
}
_NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar"


class Compressor(Protocol):
    """Takes a tar stream piece by piece, gives the blob piece by piece. Not thread-safe."""

    def write(self, data: Buffer) -> bytes:
        """Compress `data`; whatever output is ready, possibly none. The caller may reuse `data` afterwards."""

    def write_block(self, block: bytes | bytearray) -> bytes:
        """As `write`, but takes the block over uncopied: the caller must not change it any more."""

    def finish(self) -> bytes:
        """The rest of the output. Nothing may be written afterwards."""

    def close(self) -> None:
        """Stop the threads of a stream given up; idempotent, needless after `finish`."""


def media_type(kind: Compression) -> str:
    """The OCI media type of a layer compressed so."""
    return _MEDIA_TYPES[kind]


def kind_of_media_type(name: str) -> Compression | None:
    """How a layer of that media type (OCI or Docker) is compressed; None if it is not a layer's type."""
    kind = _KINDS.get(name)
    if kind is None and name.startswith(_NONDISTRIBUTABLE):
        suffix = name[len(_NONDISTRIBUTABLE) :]
        kind = {"": "none", "+gzip": "gzip", "+zstd": "zstd"}.get(suffix)  # type: ignore[assignment]
    return kind


def detect(head: bytes) -> Kind | None:
    """The compression that a stream beginning with `head` (6 bytes or more) has; None for plain data."""
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    # A zstd stream may begin with skippable frames (zstd:chunked puts its table of contents in one).
    if head.startswith(b"\x28\xb5\x2f\xfd") or (len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    if head.startswith(b"BZh") and len(head) > 3 and 0x31 <= head[3] <= 0x39:
        return "bzip2"
    if head.startswith(b"\xfd7zXZ\0"):
        return "xz"
    return None


def compressor(
    kind: Compression, level: int | None = None, threads: int = 1, *, reproducible: bool = False
) -> Compressor:
    """A compressor of that kind. `threads` changes the speed, never the bytes.

    `level` None is the default; gzip 1–3 uses ISA-L, 4–9 and 0 zlib, all zlib-ng if `reproducible`. With
    `reproducible` the bytes depend on no processor. Raises: LayerError for a level out of range.
    """
    _check_level(kind, level)
    threads = max(1, min(threads, _MOST_THREADS[kind]))
    if kind == "gzip":
        deflate, crc32 = _deflate_engine(level, reproducible)
        return _GzipCompressor(deflate, crc32, threads)
    if kind == "zstd":
        return _ZstdCompressor(_ZSTD_LEVEL if level is None else level, threads)
    return _Stored()


def _check_level(kind: Compression, level: int | None) -> None:
    if level is not None and level not in _LEVELS[kind] and kind != "none":
        allowed = _LEVELS[kind]
        raise LayerError(f"{kind} has no compression level {level}", hint=f"use {allowed.start} to {allowed.stop - 1}")


class _Stored:
    """No compression."""

    def write(self, data: Buffer) -> bytes:
        return bytes(data)

    def write_block(self, block: bytes | bytearray) -> bytes:
        return block  # type: ignore[return-value]  # a bytearray nobody changes any more

    def finish(self) -> bytes:
        return b""

    def close(self) -> None:
        return


def _deflate_engine(
    level: int | None, reproducible: bool
) -> tuple[Callable[[Buffer], bytes], Callable[[Buffer, int], int]]:
    """A function that deflates one block to a byte boundary, and a CRC-32."""
    isal: Any = None
    zlib_ng: Any = None
    # Where there is no wheel of them for a machine, zlib takes their place.
    with suppress(ImportError):
        from isal import isal_zlib as isal
    if reproducible:
        with suppress(ImportError):
            from zlib_ng import zlib_ng
    crc32 = isal.crc32 if isal is not None else zlib.crc32
    if isal is not None and not reproducible and (level is None or 1 <= level <= 3):
        # Level 2: as fast as 1 and smaller; 3 costs a third of the speed for two percent.
        make = isal.compressobj
        chosen = 2 if level is None else level
    elif zlib_ng is not None:
        # Seen to give the same bytes from Core 2 to AVX-512 and on arm64, at twice zlib's speed. ISA-L does so from
        # SSE 4.2 on, but not on arm64; the system's zlib may be any fork. Level 3: as fast as 2, three percent smaller.
        make = zlib_ng.compressobj
        chosen = 3 if level is None else level
    else:
        # zlib 4: twice the speed of 6 for three percent more bytes.
        make = zlib.compressobj
        chosen = 4 if level is None else level

    def deflate(block: Buffer) -> bytes:
        if chosen and len(block) > 4 * _SAMPLE_BYTES and not compresses(block):
            return _stored(block)
        return whole(block)

    def whole(block: Buffer) -> bytes:
        stream = make(chosen, zlib.DEFLATED, -15)
        head: bytes = stream.compress(block)
        return head + bytes(stream.flush(zlib.Z_SYNC_FLUSH))

    def compresses(block: Buffer) -> bool:
        """Whether there is a percent to gain, by two samples that are as long as deflate looks back."""
        view, middle = memoryview(block), len(block) // 2
        samples = (view[:_SAMPLE_BYTES], view[middle : middle + _SAMPLE_BYTES])
        return any(len(whole(sample)) < _SAMPLE_BYTES * 99 // 100 for sample in samples)

    return deflate, crc32


def _stored(block: Buffer) -> bytes:
    """Deflate's blocks without compression (RFC 1951, 3.2.4): what is packed already costs next to no time."""
    view = memoryview(block)
    out: list[Buffer] = []
    for at in range(0, len(view), _STORED_BYTES):
        part = view[at : at + _STORED_BYTES]
        out += (struct.pack("<BHH", 0, len(part), len(part) ^ 0xFFFF), part)
    return b"".join(out)


class _Job:
    """One block on its way through a worker; `done` is held until `result` or `error` is there."""

    __slots__ = ("block", "done", "error", "result")

    def __init__(self, block: Buffer) -> None:
        self.block: Buffer = block
        self.result = b""
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()


class _GzipCompressor:
    """gzip in independent blocks. The threads start with the second block, so that small layers need none."""

    def __init__(self, deflate: Callable[[Buffer], bytes], crc32: Callable[[Buffer, int], int], threads: int) -> None:
        self._deflate = deflate
        self._crc32 = crc32
        self._threads = threads
        self._pending = bytearray()
        self._crc = 0
        self._length = 0
        self._jobs: deque[_Job] = deque()
        self._todo: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._first: Buffer | None = None
        self._started = False
        self._stopped = False

    def write(self, data: Buffer) -> bytes:
        pending = self._pending
        out = []
        view = memoryview(data)
        while len(pending) + len(view) >= BLOCK_BYTES:
            room = BLOCK_BYTES - len(pending)
            pending += view[:room]
            view = view[room:]
            out.append(self._submit(bytes(pending)))
            pending.clear()
        pending += view
        return b"".join(out)

    def write_block(self, block: bytes | bytearray) -> bytes:
        if self._pending or len(block) != BLOCK_BYTES:
            return self.write(block)
        return self._submit(block)

    def finish(self) -> bytes:
        try:
            out = [self._submit(bytes(self._pending))] if self._pending else []
            self._pending = bytearray()
            out.append(self._flush_first())
            out.extend(self._collect(job) for job in self._jobs)
            self._jobs.clear()
        finally:
            self.close()
        if not self._started:
            out.append(_GZIP_HEADER)
        out.append(_DEFLATE_END + struct.pack("<LL", self._crc, self._length & 0xFFFFFFFF))
        return b"".join(out)

    def close(self) -> None:
        self._stopped = True
        for _ in self._workers:
            self._todo.put(None)
        for worker in self._workers:
            worker.join()
        self._workers.clear()

    def _submit(self, block: Buffer) -> bytes:
        self._crc = self._crc32(block, self._crc)
        self._length += len(block)
        if not self._started and self._first is None:
            self._first = block
            return b""
        out = []
        if self._first is not None:
            first, self._first = self._first, None
            out.append(self._dispatch(first))
        out.append(self._dispatch(block))
        return b"".join(out)

    def _flush_first(self) -> bytes:
        """A stream of one block is compressed here and now, whatever the number of threads."""
        if self._first is None:
            return b""
        first, self._first = self._first, None
        return self._begin() + self._deflate(first)

    def _begin(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        return _GZIP_HEADER

    def _dispatch(self, block: Buffer) -> bytes:
        head = self._begin()
        if self._threads == 1:
            return head + self._deflate(block)
        if len(self._workers) < self._threads:
            worker = threading.Thread(target=self._work, name="gzip", daemon=True)
            self._workers.append(worker)
            worker.start()
        job = _Job(block)
        self._jobs.append(job)
        self._todo.put(job)
        out = [head]
        # Two blocks more than workers keep every worker busy; the bound keeps memory flat.
        while len(self._jobs) > self._threads + 2:
            out.append(self._collect(self._jobs.popleft()))
        while self._jobs and not self._jobs[0].done.locked():
            out.append(self._collect(self._jobs.popleft()))
        return b"".join(out)

    @staticmethod
    def _collect(job: _Job) -> bytes:
        job.done.acquire()
        job.done.release()
        if job.error is not None:
            raise job.error
        return job.result

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            try:
                if not self._stopped:
                    job.result = self._deflate(job.block)
            except BaseException as e:  # noqa: BLE001  # carried to the caller's thread
                job.error = e
            job.block = b""
            job.done.release()


class _ZstdCompressor:
    """One zstd frame. Its bytes are those of the library's multi-threaded mode for every number of threads.

    Input of one block or less is compressed in one go instead: the library's threads cost more than that.
    """

    def __init__(self, level: int, threads: int) -> None:
        self._level = level
        self._threads = threads
        self._first = bytearray()
        self._stream: Any = None

    def write(self, data: Buffer) -> bytes:
        if self._stream is None:
            if len(self._first) + len(data) <= BLOCK_BYTES:
                self._first += data
                return b""
            import zstandard

            parameters = zstandard.ZstdCompressionParameters.from_level(
                self._level, threads=self._threads, job_size=_ZSTD_JOB_BYTES
            )
            self._stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
            out: bytes = self._stream.compress(bytes(self._first))
            self._first = bytearray()
            rest: bytes = self._stream.compress(data)
            return out + rest
        packed: bytes = self._stream.compress(data)
        return packed

    def write_block(self, block: bytes | bytearray) -> bytes:
        return self.write(block)

    def finish(self) -> bytes:
        if self._stream is not None:
            return bytes(self._stream.flush())
        import zstandard

        return zstandard.ZstdCompressor(level=self._level).compress(bytes(self._first))

    def close(self) -> None:
        self._stream = None


class ZstdFrames:
    """Compresses data as zstd frames of their own, one after the other. Raises: LayerError for a level out of range."""

    def __init__(self, level: int | None = None) -> None:
        import zstandard

        _check_level("zstd", level)
        self._context = zstandard.ZstdCompressor(level=_ZSTD_LEVEL if level is None else level)

    def pack(self, data: Buffer) -> bytes:
        """One frame."""
        return self._context.compress(data)


def decompressor(stream: BinaryIO, *, kind: Kind | Literal["none"] | None = None) -> BinaryIO:
    """A readable stream of what `stream` holds: gzip and zstd of any number of members or frames, bzip2, xz, plain.

    `kind` None detects it. Memory is bounded whatever the input claims. Closing it does not close `stream`.
    Reading raises: LayerError for data that is damaged, cut short or followed by garbage.
    """
    from layers.decompression import open_stream

    return open_stream(stream, kind)
