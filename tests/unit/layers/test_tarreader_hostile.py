"""Tar streams that lie: each is one clear error, and costs neither memory nor time."""

from __future__ import annotations

import io
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.errors import LayerError
from layers.tarreader import MAX_HEADER_BYTES, REGULAR, TarReader

END = bytes(1024)


def header(
    name: bytes = b"f", kind: bytes = b"0", size: int | bytes = 0, *, mode: bytes = b"0000644\0",
    uid: bytes = b"0000000\0", mtime: bytes = b"00000000000\0", magic: bytes = b"ustar\x0000", tail: bytes = b"",
    checksum: int | None = None, link: bytes = b"", major: bytes = b"0000000\0",
) -> bytes:  # fmt: skip
    size_field = size if isinstance(size, bytes) else b"%011o\0" % size
    raw = bytearray(
        struct.pack("100s8s8s8s12s12s8sc100s8s64s8s8s155s12x", name, mode, uid, b"0000000\0", size_field, mtime,
                    b"        ", kind, link, magic, b"", major, b"0000000\0", b"")
    )  # fmt: skip
    raw[345 : 345 + len(tail)] = tail
    raw[148:156] = b"%06o\0 " % (sum(raw) if checksum is None else checksum)
    return bytes(raw)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    body = b"".join(record(*pair) for pair in records)
    return header(b"pax", kind, len(body)) + body + bytes(-len(body) % 512)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length = len(str(length)) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def drain(stream: bytes) -> list[Any]:
    reader = TarReader(io.BytesIO(stream))
    return [(item, b"".join(bytes(piece) for _, piece in reader.segments())) for item in reader]


def test_the_forger_is_not_what_fails() -> None:
    stream = pax((b"path", b"long")) + header(b"x", size=3) + b"abc".ljust(512, b"\0") + END
    ((item, data),) = drain(stream)
    assert (item.name, data) == (b"long", b"abc")


NINE = (b"GNU.sparse.size", b"9")
REAL_NINE = (b"GNU.sparse.realsize", b"9")

REFUSED = {
    "a wrong checksum": header(checksum=1) + END,
    "a checksum that is no number": header()[:148] + b"zzzzzz\0 " + header()[156:] + END,
    "a header cut short": header()[:300],
    "data cut short": header(size=1000) + bytes(600),
    "padding cut short": header(size=10) + bytes(10),
    "a size that is no number": header(size=b"12z45678901\0") + END,
    "a size with an underscore": header(size=b"0000001_000\0") + END,
    "a size in decimal": header(size=b"00000000009\0") + END,
    "a signed size": header(size=b"-0000000001\0") + END,
    "a negative base-256 size": header(size=b"\xff" * 12) + END,
    "a size beyond 63 bits": header(size=b"\x80" + b"\xff" * 11) + END,
    "a PAX size that is negative": pax((b"size", b"-1")) + header() + END,
    "a PAX size that is absurd": pax((b"size", b"9" * 30)) + header() + END,
    "a PAX size that is no number": pax((b"size", b"0x10")) + header() + END,
    "a uid of -1": pax((b"uid", b"4294967295")) + header() + END,
    "a negative base-256 uid": header(uid=b"\xff" * 8) + END,
    "an absurd time": pax((b"mtime", b"9999999999999")) + header() + END,
    "a time that is none": pax((b"mtime", b"yesterday")) + header() + END,
    "a NUL in a name": pax((b"path", b"a\0b")) + header() + END,
    "a NUL in a link": pax((b"linkpath", b"a\0b")) + header(kind=b"2") + END,
    "a PAX header and nothing after": pax((b"path", b"a")),
    "a long name and nothing after": header(b"././@LongLink", b"L", 600) + b"n" * 600 + bytes(424),
    "a PAX header that is too large": header(b"p", b"x", MAX_HEADER_BYTES + 1),
    "a long name that is too large": header(b"p", b"L", 1 << 40),
    "a long name of negative size": header(b"p", b"L", b"\xff" * 12),
    "a PAX record without length": header(b"p", b"x", 10) + b"path=value".ljust(512, b"\0") + header() + END,
    "a PAX record with a length of 0": header(b"p", b"x", 6) + b"0 a=b\n".ljust(512, b"\0") + header() + END,
    "a PAX record longer than its header": header(b"p", b"x", 8) + b"99 a=b\n\n".ljust(512, b"\0") + header() + END,
    "a PAX record without its newline": header(b"p", b"x", 6) + b"6 a=bc".ljust(512, b"\0") + header() + END,
    "a PAX record without a value": header(b"p", b"x", 5) + b"5 ab\n".ljust(512, b"\0") + header() + END,
    "global headers without end": b"".join(pax((b"k%d" % n, b"v" * 1000_000), kind=b"g") for n in range(3)) + header(),
    "a sparse entry without a size": pax((b"GNU.sparse.map", b"0,1")) + header(size=1) + bytes(512) + END,
    "a sparse map of odd length": pax((b"GNU.sparse.map", b"0,1,5"), NINE) + header(size=1) + END,
    "a sparse map out of order": pax((b"GNU.sparse.map", b"5,1,0,1"), NINE) + header(size=2) + END,
    "a sparse map beyond the size": pax((b"GNU.sparse.map", b"5,9"), NINE) + header(size=9) + END,
    "a sparse map that overlaps": pax((b"GNU.sparse.map", b"0,3,1,3"), NINE) + header(size=6) + END,
    "a sparse map that does not fit": pax((b"GNU.sparse.map", b"0,3"), NINE) + header(size=6) + END,
    "a sparse map that is negative": pax((b"GNU.sparse.map", b"-5,3"), NINE) + header(size=3) + END,
    "a sparse map 1.0 cut short": pax((b"GNU.sparse.major", b"1"), REAL_NINE)
    + header(size=100) + b"9\n".ljust(512, b"0") + END,
    "a sparse map 1.0 that never ends": pax((b"GNU.sparse.major", b"1"), REAL_NINE)
    + header(size=1 << 30) + b"99999999999\n" + b"0\n" * 2_000_000,
    "an old sparse map that goes on for ever": header(kind=b"S", tail=bytes(137) + b"\x01")
    + (bytes(504) + b"\x01" + bytes(7)) * 3,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(LayerError, match="invalid tar stream") as caught:
        drain(REFUSED[name])
    assert "at byte" in caught.value.message


def test_what_readers_of_layers_accept() -> None:
    assert drain(b"") == []
    assert drain(END) == []
    assert drain(header())[0][0].name == b"f", "no end mark"
    assert drain(header() + END + b"garbage" * 100)[0][0].name == b"f", "something behind the end mark"
    empty_records = pax((b"path", b""), (b"size", b"")) + header(b"own") + END
    assert drain(empty_records)[0][0].name == b"own", "an empty value takes a record back"
    assert drain(header(uid=b"  17 \0  ") + END)[0][0].uid == 0o17
    assert drain(header(uid=b"\0" * 8) + END)[0][0].uid == 0
    assert drain(header(uid=b"\x80\0\0\0\x00\x30\0\0") + END)[0][0].uid == 0x300000
    assert drain(header(mtime=b"\xff" * 12) + END)[0][0].mtime_ns == -(10**9)
    assert drain(header(kind=b"5", size=99) + header(b"next") + END)[1][0].name == b"next", "directories have no data"
    assert drain(header(kind=b"V") + header(b"x") + END)[0][0].name == b"x", "a volume label"
    signed = header("nä".encode("latin-1"))
    low = sum(b - 256 if b > 127 else b for b in signed[:148] + b" " * 8 + signed[156:])
    assert len(drain(header("nä".encode("latin-1"), checksum=low) + END)) == 1, "checksums of signed bytes"


def test_global_records_hold_until_they_are_replaced() -> None:
    stream = pax((b"uid", b"5"), kind=b"g") + header(b"a") + pax((b"uid", b"6")) + header(b"b") + header(b"c") + END
    assert [item.uid for item, _ in drain(stream)] == [5, 6, 5]


def test_an_unknown_type_is_handed_on() -> None:
    assert drain(header(kind=b"Q", size=5) + b"12345".ljust(512, b"\0") + END)[0][0].type == b"Q"


def test_a_huge_claim_costs_nothing() -> None:
    """A sparse file of petabytes is a claim of a few bytes: whoever reads it has to bound it."""
    stream = pax((b"GNU.sparse.map", b""), (b"GNU.sparse.size", str(1 << 60).encode())) + header(b"s") + END
    tracemalloc.start()
    try:
        ((item, data),) = drain(stream)
        assert (item.size, data) == (1 << 60, b"")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=6), st.integers(0, 6000))
def test_a_damaged_stream_is_read_or_refused(changes: list[tuple[int, int]], length: int) -> None:
    stream = bytearray(
        pax((b"path", b"p" * 200), (b"SCHILY.xattr.user.k", b"v")) + header(size=700) + b"d" * 700 + bytes(324)
        + header(b"l", b"2", link=b"t") + pax((b"GNU.sparse.map", b"0,3"), NINE) + header(size=3)
        + b"abc".ljust(512, b"\0") + END
    )  # fmt: skip
    for at, value in changes:
        stream[at] = value
    try:
        for item, data in drain(bytes(stream[:length] if length < len(stream) else stream)):
            assert len(data) <= item.size or item.type != REGULAR
    except LayerError:
        pass


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600), st.sampled_from([b"x", b"g", b"L", b"K"]))
def test_any_extended_header_is_read_or_refused(body: bytes, kind: bytes) -> None:
    try:
        drain(header(b"h", kind, len(body)) + body + bytes(-len(body) % 512) + header() + END)
    except LayerError:
        pass
