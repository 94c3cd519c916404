"""eStargz layers as a lazy snapshotter reads them: by the footer, the table, and single gzip members."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layers.changeset import LayerResult, Sink, write_layer
from layers.errors import Cancelled, LayerError
from layers.estargz import NO_PREFETCH, TOC_DIGEST, TOC_NAME, footer, read_footer
from layers.layerdiff import diff_trees
from layers.lazylayer import LazyLayer, write_lazy


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


def produce_from(root: Path) -> Callable[[Sink], LayerResult]:
    return lambda sink: write_layer(diff_trees(None, root), root, sink, compression="none")


def written(root: Path, **options: Any) -> tuple[bytes, LazyLayer]:
    out = io.BytesIO()
    layer = write_lazy("estargz", produce_from(root), out, **options)
    return out.getvalue(), layer


def table(blob: bytes) -> dict[str, Any]:
    offset = read_footer(blob[-51:])
    assert offset is not None
    with tarfile.open(fileobj=io.BytesIO(zlib.decompress(blob[offset:], 31))) as tar:
        member = tar.next()
        assert member is not None
        assert member.name == TOC_NAME
        stream = tar.extractfile(member)
        assert stream is not None
        raw = stream.read()
    document: dict[str, Any] = json.loads(raw)
    document["digest"] = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    return document


def member_at(blob: bytes, offset: int) -> bytes:
    return zlib.decompressobj(31).decompress(blob[offset:])


def test_each_file_can_be_read_alone(tmp_path: Path) -> None:
    root = tree(tmp_path / "root")
    blob, layer = written(root)
    toc = table(blob)
    assert toc["version"] == 1
    assert layer.annotations[TOC_DIGEST] == toc["digest"]
    assert layer.size_bytes == len(blob)
    assert layer.digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"
    entries = {e["name"]: e for e in toc["entries"] if e["type"] != "chunk"}
    assert {n.rstrip("/"): e["type"] for n, e in entries.items()} == {
        NO_PREFETCH: "reg", "d": "dir", "d/e": "dir", "d/empty": "reg", "d/exact": "reg", "d/large": "reg",
        "d/link": "symlink", "d/small": "reg", "d/z-hard": "hardlink", "fifo": "fifo", "n" * 200: "reg",
    }  # fmt: skip
    assert entries["d/z-hard"]["linkName"] == "d/small"
    assert entries["d/link"]["linkName"] == "small"
    assert base64.b64decode(entries["d/small"]["xattrs"]["user.note"]) == b"\x00\xff"
    assert "offset" not in entries["d/empty"]
    found: dict[str, bytes] = {}
    for entry in (e for e in toc["entries"] if "offset" in e):
        name = entry["name"]
        size = entry.get("chunkSize") or entries[name]["size"] - entry.get("chunkOffset", 0)
        data = member_at(blob, entry["offset"])[:size]
        assert entry["chunkDigest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert entry.get("chunkOffset", 0) == len(found.get(name, b""))
        found[name] = found.get(name, b"") + data
    assert found.pop(NO_PREFETCH) == b"\x0f"
    assert found == {n: (root / n).read_bytes() for n in ("d/large", "d/exact", "d/small", "n" * 200)}
    for name, data in found.items():
        assert entries[name]["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert entries[name]["size"] == len(data)


def test_it_is_a_tar_gz_for_everybody_else(tmp_path: Path) -> None:
    root = tree(tmp_path / "root")
    blob, layer = written(root, reproducible=True)
    plain = gzip.decompress(blob)
    assert layer.diff_id == f"sha256:{hashlib.sha256(plain).hexdigest()}"
    assert layer.uncompressed_bytes == len(plain)
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        names = tar.getnames()
        assert names[0] == NO_PREFETCH
        assert names[-1] == TOC_NAME
        stream = tar.extractfile("d/large")
        assert stream is not None
        assert stream.read() == (root / "d/large").read_bytes()
    assert written(root, reproducible=True)[0] == blob
    (tmp_path / "nothing").mkdir()
    empty = table(written(tmp_path / "nothing")[0])
    assert [e["name"] for e in empty["entries"]] == [NO_PREFETCH]


def test_the_footer_is_an_empty_member() -> None:
    for offset in (0, 1 << 40):
        assert len(footer(offset)) == 51
        assert gzip.decompress(footer(offset)) == b""
        assert read_footer(footer(offset)) == offset
    assert read_footer(gzip.compress(b"")) is None
    assert read_footer(bytes(51)) is None
    assert read_footer(footer(1).replace(b"0", b"x")) is None


def test_failures_of_either_side_are_told(tmp_path: Path) -> None:
    root = tree(tmp_path / "root")

    class Full:
        def write(self, data: bytes | memoryview) -> int:
            raise LayerError("the disk is full")

    with pytest.raises(LayerError, match="the disk is full"):
        write_lazy("estargz", produce_from(root), Full())

    def cancelled(sink: Sink) -> LayerResult:
        sink.write(b"x" * 100)
        raise Cancelled

    with pytest.raises(Cancelled):
        write_lazy("estargz", cancelled, io.BytesIO())
