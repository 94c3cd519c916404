"""zstd:chunked layers as a lazy puller reads them: by annotations, table, single frames and the tar-split."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import posixpath
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from layers.apply import apply_layer
from layers.changeset import write_layer
from layers.errors import LayerError
from layers.layerdiff import diff_trees
from layers.lazylayer import LazyLayer, convert_to_lazy, write_lazy
from layers.tarsplit import Crc64
from layers.zstdchunked import MANIFEST_CHECKSUM, MANIFEST_POSITION, TARSPLIT_POSITION, read_footer


def tree(root: Path) -> Path:
    (root / "d/e").mkdir(parents=True)
    (root / "d/small").write_bytes(b"small")
    (root / "d/large").write_bytes(os.urandom(9 << 20))
    (root / "d/exact").write_bytes(bytes(8 << 20))
    (root / "d/empty").touch(0o600)
    (root / "d/link").symlink_to("small")
    os.link(root / "d/small", root / "d/z-hard")
    os.mkfifo(root / "fifo")
    (root / ("n" * 200)).write_bytes(b"long name")
    os.setxattr(root / "d/small", "user.note", b"\x00\xff")
    return root


def written(root: Path, **options: Any) -> tuple[bytes, LazyLayer]:
    out = io.BytesIO()
    layer = write_lazy(
        "zstd:chunked", lambda sink: write_layer(diff_trees(None, root), root, sink, compression="none"), out, **options
    )
    return out.getvalue(), layer


def inflated(frames: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(frames, read_across_frames=True) as stream:
        return stream.read()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def parts(blob: bytes, layer: LazyLayer) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The table and the lines of the tar-split, found by the annotations as podman finds them."""
    at, size, plain, kind = map(int, layer.annotations[MANIFEST_POSITION].split(":"))
    assert kind == 1
    assert layer.annotations[MANIFEST_CHECKSUM] == sha256(blob[at : at + size])
    table = inflated(blob[at : at + size])
    assert len(table) == plain
    split_at, split_size, split_plain = map(int, layer.annotations[TARSPLIT_POSITION].split(":"))
    assert read_footer(blob[-64:]) == (at, size, split_at, split_size)
    split = inflated(blob[split_at : split_at + split_size])
    assert len(split) == split_plain
    document: dict[str, Any] = json.loads(table)
    assert document["version"] == 1
    assert document["tarSplitDigest"] == sha256(blob[split_at : split_at + split_size])
    lines = [json.loads(line) for line in split.splitlines()]
    assert [line["position"] for line in lines] == list(range(len(lines)))
    return document, lines


def files_of(blob: bytes, document: dict[str, Any]) -> dict[str, bytes]:
    """Every file's data, fetched by the byte ranges that the table gives."""
    found: dict[str, bytes] = {}
    entries = document["entries"]
    starts = sorted({e["offset"] for e in entries if "offset" in e})
    ends = {e["name"]: e["endOffset"] for e in entries if "endOffset" in e}
    for entry in (e for e in entries if "offset" in e):
        name = entry["name"]
        end = min([ends[name], *(s for s in starts if s > entry["offset"])])
        data = inflated(blob[entry["offset"] : end])
        assert entry.get("chunkOffset", 0) == len(found.get(name, b""))
        if "chunkSize" in entry:
            assert len(data) == entry["chunkSize"]
            assert entry["chunkDigest"] == sha256(data)
        found[name] = found.get(name, b"") + data
    for entry in (e for e in entries if "digest" in e):
        assert len(found[entry["name"]]) == entry["size"]
        assert entry["digest"] == sha256(found[entry["name"]])
    return found


def put_together(lines: list[dict[str, Any]], files: dict[str, bytes]) -> bytes:
    """The tar that a tar-split and single files make."""
    out = b""
    for line in lines:
        if line["type"] == 2:
            out += base64.b64decode(line["payload"])
        elif line.get("size"):
            data = files[line["name"]]
            crc = Crc64()
            crc.update(data)
            assert base64.b64decode(line["payload"]) == crc.digest()
            out += data
    return out


def test_each_file_can_be_read_alone(tmp_path: Path) -> None:
    root = tree(tmp_path / "root")
    blob, layer = written(root)
    assert layer.size_bytes == len(blob)
    assert layer.digest == sha256(blob)
    document, lines = parts(blob, layer)
    entries = {e["name"]: e for e in document["entries"] if e["type"] != "chunk"}
    assert {n.rstrip("/"): e["type"] for n, e in entries.items()} == {
        "d": "dir", "d/e": "dir", "d/empty": "reg", "d/exact": "reg", "d/large": "reg", "d/link": "symlink",
        "d/small": "reg", "d/z-hard": "hardlink", "fifo": "fifo", "n" * 200: "reg",
    }  # fmt: skip
    assert entries["d/link"]["linkName"] == "small"
    assert entries["d/z-hard"]["linkName"] == "d/small"
    assert base64.b64decode(entries["d/small"]["xattrs"]["user.note"]) == b"\x00\xff"
    assert [e["chunkOffset"] for e in document["entries"] if e["type"] == "chunk"] == [4 << 20, 4 << 20, 8 << 20]
    found = files_of(blob, document)
    assert found == {n: (root / n).read_bytes() for n in ("d/large", "d/exact", "d/small", "n" * 200)}
    # The tar-split and the files alone make the layer of the DiffID: what podman checks.
    assert sha256(put_together(lines, found)) == layer.diff_id


def test_the_tar_is_that_of_the_plain_layer(tmp_path: Path) -> None:
    root = tree(tmp_path / "root")
    blob, layer = written(root)
    plain = io.BytesIO()
    result = write_layer(diff_trees(None, root), root, plain, compression="none")
    assert inflated(blob) == plain.getvalue()
    assert layer.diff_id == result.diff_id
    assert layer.uncompressed_bytes == result.uncompressed_bytes
    assert written(root)[0] == blob
    assert written(root, level=10)[1].size_bytes <= layer.size_bytes
    with tarfile.open(fileobj=io.BytesIO(inflated(blob))) as tar:
        assert posixpath.join("d", "large") in tar.getnames()
    target = tmp_path / "target"
    target.mkdir()
    assert apply_layer(io.BytesIO(blob), target).diff_id == layer.diff_id
    assert (target / "d/large").read_bytes() == (root / "d/large").read_bytes()
    (tmp_path / "nothing").mkdir()
    empty_blob, empty = written(tmp_path / "nothing")
    document, lines = parts(empty_blob, empty)
    assert document["entries"] == []
    assert put_together(lines, {}) == bytes(1024)


def archive(*members: tarfile.TarInfo) -> io.BytesIO:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    out.seek(0)
    return out


def test_other_tools_archives_are_converted_as_they_are() -> None:
    member = tarfile.TarInfo("./a")
    member.size, member.mtime = 700, 1700000000.25
    plain = archive(member, tarfile.TarInfo("b"))
    plain = io.BytesIO(plain.getvalue() + bytes(600 << 10))
    out = io.BytesIO()
    layer = convert_to_lazy("zstd:chunked", plain, out)
    document, lines = parts(out.getvalue(), layer)
    assert document["entries"][0]["modtime"] == "2023-11-14T22:13:20.25Z"
    assert put_together(lines, files_of(out.getvalue(), document)) == plain.getvalue()


@pytest.mark.parametrize("case", ["twice", "not UTF-8", "year 20000", "unknown type", "level"])
def test_what_it_cannot_express_is_refused(case: str) -> None:
    member = tarfile.TarInfo("a")
    level = None
    if case == "unknown type":
        member.type = b"Z"
    if case == "not UTF-8":
        member.name = "\udcff"
    if case == "year 20000":
        member.mtime = 600000000000
    if case == "level":
        level = 99
    members = [member, tarfile.TarInfo("./a")] if case == "twice" else [member]
    with pytest.raises(LayerError, match="cannot express" if case != "level" else "no compression level 99"):
        convert_to_lazy("zstd:chunked", archive(*members), io.BytesIO(), level=level)


def test_crc64_is_that_of_iso_3309() -> None:
    crc = Crc64()
    assert crc.digest() == bytes(8)
    crc.update(b"123456789")
    assert crc.digest().hex() == "b90956c775a41001"
    data = os.urandom(300_000)
    whole, pieces = Crc64(), Crc64()
    whole.update(data)
    for at in range(0, len(data), 7919):
        pieces.update(data[at : at + 7919])
    assert whole.digest() == pieces.digest()
    table = [0] * 256
    for n in range(256):
        c = n
        for _ in range(8):
            c = c >> 1 ^ 0xD800000000000000 if c & 1 else c >> 1
        table[n] = c
    c = (1 << 64) - 1
    for byte in data:
        c = table[(c ^ byte) & 255] ^ c >> 8
    assert whole.digest() == (c ^ (1 << 64) - 1).to_bytes(8, "big")
