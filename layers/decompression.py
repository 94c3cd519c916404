"""Streaming decompression with bounded memory; `layers.compression.decompressor` is its door.

Each codec is a generator of plain pieces of at most about `PIECE_BYTES`, whatever the input claims:
a bomb is paid for piece by piece, by whoever reads on. `_Reader` makes a file object of it.

Specs: RFC 1952 (gzip), RFC 8878 section 3.1 (zstd frames and blocks).
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from layers.compression import Kind, detect
from layers.errors import LayerError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE_BYTES = 1 << 20
_INPUT_BYTES = 128 << 10  # what a bounded decompressor has left over is copied: keep that small
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK_MAX = 128 << 10
_ZSTD_WINDOW_MAX = 128 << 20  # the library's own limit for streams of unknown origin
_HINT = "the blob is damaged or was cut short; fetch or make it again"


def open_stream(stream: BinaryIO, kind: Kind | Literal["none"] | None) -> BinaryIO:
    """See `layers.compression.decompressor`."""
    head = b""
    while len(head) < 6 and (piece := stream.read(6 - len(head))):
        head += piece
    chosen = detect(head) if kind is None else kind
    source = _Source(stream, head)
    if chosen == "gzip":
        return cast(BinaryIO, _Reader(_inflate(source)))
    if chosen == "zstd":
        return cast(BinaryIO, _Reader(_unzstd(source)))
    if chosen == "bzip2":
        import bz2

        return cast(BinaryIO, _Reader(_bounded(source, bz2.BZ2Decompressor, "bzip2", OSError)))
    if chosen == "xz":
        import lzma

        def make() -> Any:
            return lzma.LZMADecompressor(memlimit=_ZSTD_WINDOW_MAX)

        return cast(BinaryIO, _Reader(_bounded(source, make, "xz", lzma.LZMAError)))
    return cast(BinaryIO, _Reader(_plain(source)))


class _Source:
    """The compressed input: bytes pushed back first, then the stream."""

    __slots__ = ("_head", "_stream")

    def __init__(self, stream: BinaryIO, head: bytes) -> None:
        self._stream = stream
        self._head = head

    def read(self, size: int = _INPUT_BYTES) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            return head
        return self._stream.read(size)

    def push_back(self, data: bytes) -> None:
        self._head = data + self._head


class _Reader(io.RawIOBase):
    """A file object over a generator of pieces. `read(n)` gives at most n bytes, often one piece uncopied."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._pieces = pieces
        self._piece = b""
        self._at = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        piece, at = self._piece, self._at
        while at == len(piece):
            if size == 0:
                return b""
            self._piece = piece = next(self._pieces, b"")
            self._at = at = 0
            if not piece:
                return b""
        if at == 0 and len(piece) <= size:
            self._piece = b""
            return piece
        self._at = min(at + size, len(piece))
        return piece[at : at + size]

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(PIECE_BYTES), b""))

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


def _plain(source: _Source) -> Iterator[bytes]:
    while piece := source.read(PIECE_BYTES):
        yield piece


def _inflate(source: _Source) -> Iterator[bytes]:
    """Every member of a gzip stream, zero padding allowed at its end."""
    engine: Any = zlib
    try:
        from isal import isal_zlib as engine
    except ImportError:
        pass
    while True:
        member = engine.decompressobj(31)
        data = source.read()
        while not member.eof:
            try:
                piece = member.decompress(data, PIECE_BYTES)
            except (zlib.error, engine.error) as e:
                raise LayerError(f"gzip stream is damaged: {e}", hint=_HINT) from e
            data = member.unconsumed_tail
            if piece:
                yield piece
            # A full piece without a tail does not mean that nothing is held back (ISA-L): ask again.
            if not data and len(piece) < PIECE_BYTES and not member.eof:
                data = source.read()
                if not data and not piece:
                    raise LayerError("gzip stream is cut short", hint=_HINT)
        rest = member.unused_data
        while rest or (rest := source.read()):
            rest = rest.lstrip(b"\0")
            if rest:
                break
        if not rest:
            return
        if len(rest) < 3:
            rest += source.read()
        if not rest.startswith(b"\x1f\x8b\x08"):
            raise LayerError("gzip stream is followed by something else", hint=_HINT)
        source.push_back(rest)


def _bounded(source: _Source, make: Any, name: str, error: type[Exception]) -> Iterator[bytes]:
    """Streams of the stdlib's bz2 and lzma shape; several in a row are one."""
    data = source.read()
    while data:
        stream = make()
        while not stream.eof:
            try:
                piece = stream.decompress(data, PIECE_BYTES)
            except (error, EOFError) as e:
                raise LayerError(f"{name} stream is damaged: {e}", hint=_HINT) from e
            data = b""
            if piece:
                yield piece
            if stream.needs_input and not stream.eof:
                data = source.read()
                if not data:
                    raise LayerError(f"{name} stream is cut short", hint=_HINT)
        data = (stream.unused_data or source.read()).lstrip(b"\0")


def _unzstd(source: _Source) -> Iterator[bytes]:
    """Every frame of a zstd stream, skippable ones skipped.

    The frame's blocks are walked here and given to the library a few at a time: its stream reader
    takes a truncated frame for a whole one, and its other interfaces have no bound on their output.
    """
    import zstandard

    buffer = bytearray(source.read())
    context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
    try:
        while _need(source, buffer, 1):
            _require(source, buffer, 4)
            if buffer[0] >> 4 == 5 and buffer[1:4] == b"\x2a\x4d\x18":
                _require(source, buffer, 8)
                _skip(source, buffer, 8 + int.from_bytes(buffer[4:8], "little"))
                continue
            if buffer[:4] != _ZSTD_MAGIC:
                raise LayerError("zstd stream is followed by something else", hint=_HINT)
            yield from _zstd_frame(source, buffer, context)
    except zstandard.ZstdError as e:
        raise LayerError(f"zstd stream is damaged: {e}", hint=_HINT) from e


def _zstd_frame(source: _Source, buffer: bytearray, context: Any) -> Iterator[bytes]:
    _require(source, buffer, 6)
    descriptor = buffer[4]
    single = descriptor >> 5 & 1
    header = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + (single, 2, 4, 8)[descriptor >> 6]
    frame = context.decompressobj()
    _require(source, buffer, header)
    at, blocks, last = header, 0, False
    while not last:
        _require(source, buffer, at + 3)
        block = int.from_bytes(buffer[at : at + 3], "little")
        last = bool(block & 1)
        # An RLE block (type 1) stores one byte, whatever its size says.
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
        blocks += 1
        if block >> 3 > _ZSTD_BLOCK_MAX:
            raise LayerError("zstd stream is damaged: a block is too large", hint=_HINT)
        if last:
            at += 4 * (descriptor >> 2 & 1)
        if last or blocks * _ZSTD_BLOCK_MAX >= PIECE_BYTES:
            _require(source, buffer, at)
            piece = frame.decompress(bytes(memoryview(buffer)[:at]))
            del buffer[:at]
            at = blocks = 0
            if piece:
                yield piece


def _need(source: _Source, buffer: bytearray, size: int) -> bool:
    """Have `size` bytes in the buffer; False if the input ends first."""
    while len(buffer) < size:
        data = source.read()
        if not data:
            return False
        buffer += data
    return True


def _require(source: _Source, buffer: bytearray, size: int) -> None:
    if not _need(source, buffer, size):
        raise LayerError("zstd stream is cut short", hint=_HINT)


def _skip(source: _Source, buffer: bytearray, size: int) -> None:
    """Drop `size` bytes without ever holding them all."""
    while len(buffer) < size:
        size -= len(buffer)
        buffer.clear()
        _require(source, buffer, 1)
    del buffer[:size]
