"""Layers' compression: any reader takes it, equal input gives equal bytes, damage is an error, memory is bounded."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any, get_args

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from layers import compression
from layers.compression import BLOCK_BYTES, Compression, compressor, decompressor, detect
from layers.errors import LayerError
from tests.support.waiting import until

KINDS: tuple[Compression, ...] = get_args(Compression)


def text(size: int, seed: int = 1) -> bytes:
    source = random.Random(seed)
    words = [source.randbytes(source.randint(1, 9)).hex().encode() for _ in range(500)]
    out = bytearray()
    while len(out) < size:
        out += b" ".join(source.choices(words, k=200))
    return bytes(out[:size])


LONG = text(3 * BLOCK_BYTES + 12345)
SIZES = (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES, len(LONG))


def squeeze(kind: Compression, data: bytes, step: int = 1 << 20, *, threads: int = 1, **options: Any) -> bytes:
    engine = compressor(kind, threads=threads, **options)
    out = [engine.write(data[at : at + step]) for at in range(0, len(data), step)]
    return b"".join([*out, engine.finish()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_depend_on_the_data_alone(kind: Compression, size: int) -> None:
    data = LONG[:size]
    results = {
        squeeze(kind, data, step, threads=threads) for step, threads in ((BLOCK_BYTES, 1), (77_777, 3), (9 << 20, 2))
    }
    assert len(results) == 1
    assert decompressor(io.BytesIO(results.pop())).read() == data


@pytest.mark.parametrize("kind", KINDS)
def test_whole_blocks_are_taken_over_uncopied_with_the_same_result(kind: Compression) -> None:
    engine = compressor(kind, threads=2)
    out = [engine.write_block(bytearray(LONG[at : at + BLOCK_BYTES])) for at in range(0, len(LONG), BLOCK_BYTES)]
    assert b"".join([*out, engine.finish()]) == squeeze(kind, LONG)


def test_a_buffer_may_be_reused_after_write() -> None:
    engine = compressor("gzip", threads=2)
    buffer = bytearray(BLOCK_BYTES)
    out = []
    for fill in (b"a", b"b", b"c"):
        buffer[:] = fill * BLOCK_BYTES
        out.append(engine.write(buffer))
    out.append(engine.finish())
    assert gzip.decompress(b"".join(out)) == b"".join(fill * BLOCK_BYTES for fill in (b"a", b"b", b"c"))


@pytest.mark.parametrize(
    "options", [{}, {"reproducible": True}, {"level": 1}, {"level": 3}, {"level": 9}, {"level": 0}]
)
def test_gzip_is_read_by_zlib_and_by_gzip(options: dict[str, Any]) -> None:
    blob = squeeze("gzip", LONG, threads=2, **options)
    assert gzip.decompress(blob) == LONG
    assert blob[:10] == b"\x1f\x8b\x08\0\0\0\0\0\0\xff", "no name, no time"
    one_member = zlib.decompressobj(31)
    one_member.decompress(blob)
    assert one_member.eof
    assert not one_member.unused_data
    if shutil.which("gzip"):
        subprocess.run(["gzip", "-t"], input=blob, check=True)


def test_reproducible_gzip_needs_no_isal() -> None:
    """The bytes of a reproducible build must not depend on whether the fast library is there."""
    script = (
        "import sys; sys.modules['isal'] = None\n"
        "from layers.compression import compressor\n"
        "e = compressor('gzip', reproducible=True); data = bytes(range(256)) * 9999\n"
        "sys.stdout.buffer.write(e.write(data) + e.finish())"
    )
    top = Path(compression.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=top)
    assert done.stdout == squeeze("gzip", bytes(range(256)) * 9999, reproducible=True)


def test_the_bytes_of_reproducible_gzip_are_pinned() -> None:
    """Seen alike on x86-64 from Core 2 to AVX-512 and on arm64: what changes them, changes every digest."""
    state, data = 1, bytearray()
    for _ in range(40_000):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        data += b"%d " % (state >> 16 & 0x3FF)
    blob = squeeze("gzip", bytes(data) * 8, reproducible=True)
    assert gzip.decompress(blob) == data * 8
    assert hashlib.sha256(blob).hexdigest() == "6ba5da46a70b71b9d4c076c411b858521b983a512b675209b914aa9b6e702d20"


@pytest.mark.parametrize("reproducible", [False, True])
def test_blocks_that_do_not_compress_are_stored(reproducible: bool) -> None:
    noise = os.urandom(BLOCK_BYTES)
    blob = squeeze("gzip", noise * 2 + bytes(BLOCK_BYTES), reproducible=reproducible)
    assert gzip.decompress(blob) == noise * 2 + bytes(BLOCK_BYTES)
    assert noise[:40_000] in blob
    assert len(blob) < 2 * len(noise) + 10_000
    # Noise that comes again within what deflate looks back to does compress.
    again = os.urandom(1_000) * 1200
    assert len(squeeze("gzip", again, reproducible=reproducible)) < len(again) // 2
    assert gzip.decompress(squeeze("gzip", again, level=0)) == again


def test_zstd_is_read_by_the_library() -> None:
    blob = squeeze("zstd", LONG, threads=2)
    assert zstandard.ZstdDecompressor().decompressobj().decompress(blob) == LONG


@pytest.mark.parametrize(("kind", "level"), [("gzip", 10), ("gzip", -1), ("zstd", 23), ("zstd", -8)])
def test_a_level_out_of_range_is_refused(kind: Compression, level: int) -> None:
    with pytest.raises(LayerError, match="no compression level") as caught:
        compressor(kind, level)
    assert caught.value.hint


def test_a_stream_given_up_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    engine = compressor("gzip", threads=3)
    for _ in range(5):
        engine.write(LONG[:BLOCK_BYTES])
    engine.close()
    engine.close()
    until(lambda: set(threading.enumerate()) <= before)


def test_an_error_in_a_worker_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(level: int | None, reproducible: bool) -> object:
        def deflate(block: object) -> bytes:
            raise MemoryError("worker")

        return deflate, zlib.crc32

    monkeypatch.setattr(compression, "_deflate_engine", broken)
    engine = compressor("gzip", threads=2)
    with pytest.raises(MemoryError, match="worker"):
        for _ in range(20):
            engine.write(bytes(BLOCK_BYTES))
    engine.close()


# -- reading -----------------------------------------------------------------------------------------

PACKED = {
    "gzip": gzip.compress(LONG, 1),
    "gzip of pybuild": squeeze("gzip", LONG),
    "zstd": zstandard.ZstdCompressor(write_checksum=True, level=1).compress(LONG),
    "zstd of pybuild": squeeze("zstd", LONG),
    "bzip2": bz2.compress(LONG),
    "xz": lzma.compress(LONG, preset=0),
}


@pytest.mark.parametrize("name", PACKED)
def test_members_in_a_row_are_one_stream(name: str) -> None:
    blob = PACKED[name]
    assert decompressor(io.BytesIO(blob + blob)).read() == LONG + LONG


@pytest.mark.parametrize("name", PACKED)
def test_a_stream_cut_short_is_an_error_wherever_it_is_cut(name: str) -> None:
    blob = PACKED[name]
    for cut in (7, 20, len(blob) // 2, len(blob) - 9, len(blob) - 1):
        with pytest.raises(LayerError, match=r"cut short|damaged"):
            decompressor(io.BytesIO(blob[:cut])).read()


@pytest.mark.parametrize("name", PACKED)
def test_garbage_behind_a_stream_is_an_error(name: str) -> None:
    with pytest.raises(LayerError, match=r"something else|damaged"):
        decompressor(io.BytesIO(PACKED[name] + b"garbage, and more of it")).read()


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz"])
def test_zero_padding_behind_a_stream_is_none(name: str) -> None:
    assert decompressor(io.BytesIO(PACKED[name] + bytes(5000))).read() == LONG


@pytest.mark.parametrize("name", ["gzip", "zstd", "bzip2", "xz"])
def test_a_damaged_stream_is_an_error(name: str) -> None:
    blob = bytearray(PACKED[name])
    blob[len(blob) // 2] ^= 0xFF
    blob[len(blob) // 2 + 1] ^= 0xFF
    with pytest.raises(LayerError, match=r"damaged|cut short|something else"):
        decompressor(io.BytesIO(bytes(blob))).read()


def test_skippable_zstd_frames_are_skipped() -> None:
    """zstd:chunked keeps its table of contents in them."""
    small = zstandard.ZstdCompressor().compress(b"data")
    skippable = b"\x53\x2a\x4d\x18" + (300_000).to_bytes(4, "little") + bytes(300_000)
    assert decompressor(io.BytesIO(skippable + small + skippable + small)).read() == b"datadata"
    with pytest.raises(LayerError, match="cut short"):
        decompressor(io.BytesIO(small + skippable[:-1])).read()


@pytest.mark.parametrize("name", ["gzip", "zstd", "bzip2", "xz"])
def test_a_bomb_is_given_piece_by_piece(name: str) -> None:
    zeros = bytes(40 << 20)
    blob = {
        "gzip": lambda: gzip.compress(zeros, 9),
        "zstd": lambda: zstandard.ZstdCompressor(level=19).compress(zeros),
        "bzip2": lambda: bz2.compress(zeros),
        "xz": lambda: lzma.compress(zeros, preset=1),
    }[name]()
    stream = decompressor(io.BytesIO(blob))
    total, largest = 0, 0
    while piece := stream.read(64 << 20):
        total += len(piece)
        largest = max(largest, len(piece))
    assert total == len(zeros)
    assert largest <= 2 << 20


def test_an_absurd_zstd_window_is_refused() -> None:
    # A frame header that asks for a window of 2 GiB, then one empty last block.
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([21 << 3]) + b"\x01\x00\x00"
    with pytest.raises(LayerError, match="damaged"):
        decompressor(io.BytesIO(frame)).read()


def test_plain_data_passes() -> None:
    for data in (b"", b"x", b"\x1f\x8b", b"abcdefgh", LONG):
        assert decompressor(io.BytesIO(data)).read() == data


def test_a_stream_that_gives_little_at_a_time() -> None:
    class Trickle(io.RawIOBase):
        def __init__(self, data: bytes) -> None:
            self.left = data

        def read(self, size: int | None = -1) -> bytes:
            piece, self.left = self.left[:7], self.left[7:]
            return piece

    data = text(30_000)
    for kind in KINDS:
        assert decompressor(Trickle(squeeze(kind, data))).read() == data  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(list(PACKED)))
def test_any_bytes_behind_a_valid_head_end_in_an_error_or_data(tail: bytes, name: str) -> None:
    head = PACKED[name][:12]
    try:
        decompressor(io.BytesIO(head + tail)).read()
    except LayerError:
        pass


def test_reading_in_small_steps_and_into_buffers() -> None:
    stream = decompressor(io.BytesIO(PACKED["gzip"]))
    assert stream.read(5) == LONG[:5]
    assert stream.read(0) == b""
    buffer = bytearray(11)
    assert stream.readinto(buffer) == 11  # type: ignore[attr-defined]
    assert bytes(buffer) == LONG[5:16]
    assert stream.read() == LONG[16:]
    assert stream.read(1) == b""


def test_what_is_detected() -> None:
    assert detect(PACKED["gzip"][:6]) == "gzip"
    assert detect(PACKED["zstd"][:6]) == "zstd"
    assert detect(b"\x50\x2a\x4d\x18\0\0") == "zstd"
    assert detect(PACKED["bzip2"][:6]) == "bzip2"
    assert detect(PACKED["xz"][:6]) == "xz"
    assert detect(b"usr/bi") is None
    assert detect(b"") is None
    assert detect(b"BZh") is None


@pytest.mark.parametrize("kind", KINDS)
def test_media_types_go_both_ways(kind: Compression) -> None:
    assert compression.kind_of_media_type(compression.media_type(kind)) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", "gzip"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "gzip"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", "zstd"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", "none"),
        ("application/vnd.oci.image.config.v1+json", None),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+x", None),
    ],
)
def test_media_types_of_others(name: str, kind: str | None) -> None:
    assert compression.kind_of_media_type(name) == kind
