"""From an image to its flattened root file system."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from layers.errors import Cancelled, DigestMismatch, ImageError, LayerError, StoreError
from layers.events import Event, Vertex, VertexStatus
from layers.oci import ImageConfig, Platform
from registry.transport import TransportContext, parse_location
from registry.unpack import unpack_location
from tests.support.images import Blob, Image, make_image, make_index, write_layout


def unpack(tmp_path: Path, image: Image, target: Path | None = None, **more: object) -> Path:
    write_layout(tmp_path / "layout", t=image)
    target = target or tmp_path / "root"
    config = unpack_location(
        parse_location(f"oci:{tmp_path}/layout:t"),
        TransportContext(),
        target,
        keep_owners=False,
        **more,  # type: ignore[arg-type]
    )
    assert isinstance(config, ImageConfig)
    return target


def tree(root: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() else None
        for p in sorted(root.rglob("*"))
        if not p.is_symlink()
    }


@pytest.mark.parametrize("compress", [True, False])
def test_layers_lie_over_each_other(tmp_path: Path, compress: bool) -> None:
    image = make_image(
        [
            {"etc/a": b"1", "etc/b": b"2", "var/x/y": b"3", "opt/deep/z": b"4"},
            {"etc/.wh.a": b"", "etc/b": b"new", "var/x/.wh..wh..opq": b"", "var/x/w": b"5"},
            {".wh.opt": b""},
        ],
        compress=compress,
    )
    assert tree(unpack(tmp_path, image)) == {
        "etc": None,
        "etc/b": b"new",
        "var": None,
        "var/x": None,
        "var/x/w": b"5",
    }


def test_an_index_is_narrowed(tmp_path: Path) -> None:
    index = make_index({"amd64": make_image([{"a": b"amd"}]), "s390x": make_image([{"a": b"s390"}])})
    root = unpack(tmp_path, index, platform=Platform.parse("linux/s390x"))
    assert tree(root) == {"a": b"s390"}
    with pytest.raises(ImageError, match="riscv64"):
        unpack(tmp_path, index, tmp_path / "other", platform=Platform.parse("linux/riscv64"))
    assert not (tmp_path / "other").exists()


def test_the_target_must_be_empty(tmp_path: Path) -> None:
    image = make_image([{"a": b"1"}])
    (tmp_path / "empty").mkdir()
    assert tree(unpack(tmp_path, image, tmp_path / "empty")) == {"a": b"1"}
    with pytest.raises(StoreError, match="not empty"):
        unpack(tmp_path, image, tmp_path / "empty")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StoreError, match="not a directory"):
        unpack(tmp_path, image, tmp_path / "file")
    assert tree(unpack(tmp_path, image, tmp_path / "new/deep/root")) == {"a": b"1"}


class Sink:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def test_progress(tmp_path: Path) -> None:
    image = make_image([{"a": b"1"}, {"b": b"2"}])
    sink = Sink()
    unpack(tmp_path, image, events=sink)
    ended = [e.id for e in sink.events if isinstance(e, VertexStatus) and e.completed_ns]
    assert ended == [b.digest for b in image.blobs[1:]]
    last = sink.events[-1]
    assert isinstance(last, Vertex)
    assert last.completed_ns is not None


def test_damage_is_told_as_damage_and_leaves_nothing(tmp_path: Path) -> None:
    image = make_image([{"a": b"1"}, {"b": b"2" * 5000}])
    layer = image.blobs[2]
    bad = bytearray(layer.data)
    bad[len(bad) // 2] ^= 0xFF
    broken = Image(image.top, (*image.blobs[:2],))
    write_layout(tmp_path / "layout", t=broken)
    (tmp_path / "layout/blobs" / layer.digest.replace(":", "/")).write_bytes(bytes(bad))
    (tmp_path / "mine").mkdir()
    for target in (tmp_path / "root", tmp_path / "mine"):
        with pytest.raises(DigestMismatch):
            unpack(tmp_path, broken, target)
    assert not (tmp_path / "root").exists()
    assert list((tmp_path / "mine").iterdir()) == []


def _with_config(image: Image, **changes: object) -> Image:
    config = json.loads(image.blobs[0].data) | changes
    blob = Blob(json.dumps(config).encode(), image.blobs[0].media_type)
    top = image.top._replace(data=json.dumps(image.document() | {"config": blob.descriptor()}).encode())
    return Image(top, (blob, *image.blobs[1:]))


def test_diff_ids_are_checked(tmp_path: Path) -> None:
    image = make_image([{"a": b"1"}])
    wrong = _with_config(image, rootfs={"type": "layers", "diff_ids": [f"sha256:{'1' * 64}"]})
    with pytest.raises(DigestMismatch, match="DiffID"):
        unpack(tmp_path, wrong)
    assert not (tmp_path / "root").exists()
    missing = _with_config(image, rootfs={"type": "layers", "diff_ids": []})
    with pytest.raises(ImageError, match="DiffIDs"):
        unpack(tmp_path, missing)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    image = make_image([{"a": b"1"}])
    document = image.document()
    document["layers"][0]["mediaType"] = "text/plain"
    with pytest.raises(ImageError, match="text/plain"):
        unpack(tmp_path, Image(image.top._replace(data=json.dumps(document).encode()), image.blobs))


def _hostile(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"owned") -> Blob:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        if link:
            first = tarfile.TarInfo("link")
            first.type, first.linkname = tarfile.SYMTYPE, link
            tar.addfile(first)
        member = tarfile.TarInfo(name)
        member.type, member.size = kind, len(data)
        tar.addfile(member, io.BytesIO(data))
    return Blob(out.getvalue(), "application/vnd.oci.image.layer.v1.tar")


@pytest.mark.parametrize("absolute", [True, False])
def test_nothing_reaches_outside(tmp_path: Path, absolute: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_bytes(b"precious")
    link = str(outside) if absolute else "../outside"
    for layer in (_hostile("link/victim", link=link), _hostile("../outside/victim"), _hostile(f"{outside}/victim")):
        image = make_image([{"a": b"1"}])
        config = json.loads(image.blobs[0].data)
        config["rootfs"]["diff_ids"] = [layer.digest]
        blob = Blob(json.dumps(config).encode(), image.blobs[0].media_type)
        document = image.document() | {"config": blob.descriptor(), "layers": [layer.descriptor()]}
        hostile = Image(image.top._replace(data=json.dumps(document).encode()), (blob, layer))
        try:
            unpack(tmp_path, hostile, tmp_path / f"root{layer.digest[-6:]}")
        except LayerError:
            pass
        assert (outside / "victim").read_bytes() == b"precious"
        assert os.listdir(outside) == ["victim"]


def test_cancelled(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        unpack(tmp_path, make_image([{"a": b"1"}]), cancelled=lambda: True)
    assert not (tmp_path / "root").exists()
