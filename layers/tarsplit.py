"""tar-split: what of a tar stream is not file data, so that the stream can be put together again.

zstd:chunked carries it beside its table of contents: who pulled single files makes the layer's tar, and
its DiffID, out of them and of this. One JSON document a line: segments (headers and padding as they are)
and files (name, size and CRC-64 of the data that belongs there).

Format: github.com/vbatts/tar-split, tar/storage and tar/asm. Caller: `layers.zstdchunked`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

_SEGMENT_BYTES = 256 << 10
_PIECE_BYTES = 256 << 10  # what fits a processor's cache
_ONES = (1 << 64) - 1


class TarSplit:
    """Writes the lines of one stream to `sink`. `header`, then `data` and `file` for every entry; `end`."""

    def __init__(self, sink: Callable[[bytes], object]) -> None:
        self._sink = sink
        self._position = 0
        self._crc = Crc64()

    def header(self, raw: bytes) -> None:
        """The padding of the entry before and all headers of the next one, as one segment."""
        self._line(b'{"type":2,"payload":"%s","position":%d}\n', base64.b64encode(raw))

    def data(self, piece: bytes | bytearray | memoryview) -> None:
        """Some of the current entry's data."""
        self._crc.update(piece)

    def file(self, name: str, size: int) -> None:
        """The entry whose header and data were given."""
        quoted = json.dumps(name).encode("ascii")
        if size:
            payload = base64.b64encode(self._crc.digest())
            self._line(b'{"type":1,"name":%s,"size":%d,"payload":"%s","position":%d}\n', quoted, size, payload)
            self._crc = Crc64()
        else:
            self._line(b'{"type":1,"name":%s,"payload":null,"position":%d}\n', quoted)

    def end(self, raw: bytes) -> None:
        """What follows the last entry; in any number of pieces."""
        for at in range(0, len(raw), _SEGMENT_BYTES):
            self.header(raw[at : at + _SEGMENT_BYTES])

    def _line(self, form: bytes, *values: object) -> None:
        self._sink(form % (*values, self._position))
        self._position += 1


class Crc64:
    """CRC-64 of ISO 3309 (x^64 + x^4 + x^3 + x + 1), as Go's hash/crc64 has it; some hundred MB/s without a table.

    The data is one large integer, the remainder a polynomial of four terms: by Frobenius x^(64k) is
    x^(4k) + x^(3k) + x^k + 1 for every power of two k, so that the integer is folded in half again
    and again by a few shifts.
    """

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state = _ONES

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Append data."""
        view = memoryview(data)
        for at in range(0, len(view), _PIECE_BYTES):
            piece = view[at : at + _PIECE_BYTES]
            # Bit 0 of the integer is the highest power; the message is followed by 64 zero bits.
            self._state = _remainder(int.from_bytes(piece, "little") ^ self._state, 8 * len(piece) + 64)

    def digest(self) -> bytes:
        """The checksum, big-endian."""
        return (self._state ^ _ONES).to_bytes(8, "big")


def _remainder(value: int, bits: int) -> int:
    """What is left of a polynomial of `bits` coefficients."""
    while bits > 64:
        # Between a third and a half of the coefficients are the low part, and stay.
        step = max(0, (bits // 2 - 1).bit_length() - 7)
        low = 64 << step
        high = bits - low
        width = max(low, high + (4 << step))
        upper = value & ((1 << high) - 1)
        shift = width - high
        value = (value >> high) << (width - low)
        value ^= upper << shift
        value ^= upper << (shift - (1 << step))
        value ^= upper << (shift - (3 << step))
        value ^= upper << (shift - (4 << step))
        bits = width
    return value
