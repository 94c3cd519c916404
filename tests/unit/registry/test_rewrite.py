"""Layers written anew: times brought down, files taken out, the rest as it was."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from layers.errors import ImageError
from registry.copy import copy_image
from registry.edit import edit
from registry.rewrite import LayerChanges, rewriting
from tests.support.images import Blob, Image, make_image
from tests.unit.registry.test_copy import Destination, Source

EPOCH = 1_700_000_000


def layer(*members: tuple[str, dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, fields in members:
            member = tarfile.TarInfo(name)
            for key, value in fields.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(b"d" * member.size))
    return out.getvalue()


def image_of(*tars: bytes, created: str = "2024-01-01T00:00:00Z") -> Image:
    image = make_image([{} for _ in tars])
    blobs = [Blob(gzip.compress(t, mtime=0), image.document()["layers"][0]["mediaType"]) for t in tars]
    config = json.loads(image.blobs[0].data)
    config["rootfs"]["diff_ids"] = [f"sha256:{hashlib.sha256(t).hexdigest()}" for t in tars]
    config |= {"created": created, "history": [{"created": created}, {"created": "2001-01-01T00:00:00.5Z"}]}
    new = Blob(json.dumps(config).encode(), image.blobs[0].media_type)
    document = {**image.document(), "config": new.descriptor(), "layers": [b.descriptor() for b in blobs]}
    return Image(Blob(json.dumps(document).encode(), image.top.media_type), (new, *blobs))


def rewritten(
    image: Image, tmp_path: Path, **changes: Any
) -> tuple[dict[str, Any], list[dict[str, tarfile.TarInfo]], list[str]]:
    """The config, the entries of each layer, and the layers' digests."""
    destination = Destination()
    parts = edit(Source(image), rewriting(LayerChanges(**changes), tmp_path))
    try:
        copy_image(parts, destination)
    finally:
        parts.close()
    document = destination.document()
    config = json.loads(destination.blobs[document["config"]["digest"]])
    tars = [gzip.decompress(destination.blobs[entry["digest"]]) for entry in document["layers"]]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(t).hexdigest()}" for t in tars]
    found = []
    for data in tars:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            found.append({member.name: member for member in tar})
    return config, found, [entry["digest"] for entry in document["layers"]]


OLD = layer(("a", {"size": 700, "mtime": 5, "uid": 3_000_000}), ("d", {"type": tarfile.DIRTYPE, "mtime": 7}))
NEW = layer(
    ("d/f", {"size": 9, "mtime": EPOCH + 5, "mode": 0o4755}),
    ("d/l", {"type": tarfile.SYMTYPE, "linkname": "f", "mtime": 1.25}),
    ("d/h", {"type": tarfile.LNKTYPE, "linkname": "d/f", "mtime": 1}),
    ("d/.wh.gone", {}),
    ("log/x.log", {"size": 4, "pax_headers": {"SCHILY.xattr.user.a": "b"}}),
)


def test_times_are_brought_down(tmp_path: Path) -> None:
    image = image_of(OLD, NEW)
    config, (old, new), digests = rewritten(image, tmp_path, latest_s=EPOCH)
    assert digests[0] == image.document()["layers"][0]["digest"], "nothing in it is too new"
    assert old["a"].uid == 3_000_000
    assert {name: m.mtime for name, m in new.items()} == {
        "d/f": EPOCH, "d/l": 1.25, "d/h": 1, "d/.wh.gone": 0, "log/x.log": 0,
    }  # fmt: skip
    assert new["d/f"].mode == 0o4755
    assert new["d/l"].linkname == "f"
    assert new["log/x.log"].pax_headers["SCHILY.xattr.user.a"] == "b"
    assert [config["created"], *(h["created"] for h in config["history"])] == [
        "2023-11-14T22:13:20Z", "2023-11-14T22:13:20Z", "2001-01-01T00:00:00.5Z",
    ]  # fmt: skip
    again, _, same = rewritten(image, tmp_path, latest_s=EPOCH)
    assert (again, same) == (config, digests)


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("/log", ["d/f", "d/l", "d/h", "d/.wh.gone"]),
        ("log/*.log", ["d/f", "d/l", "d/h", "d/.wh.gone"]),
        ("*.log", ["d/f", "d/l", "d/h", "d/.wh.gone", "log/x.log"]),
        ("d/l", ["d/f", "d/h", "d/.wh.gone", "log/x.log"]),
        ("d", ["log/x.log"]),
    ],
)
def test_files_are_taken_out(tmp_path: Path, pattern: str, left: list[str]) -> None:
    image = image_of(OLD, NEW)
    _, (_, new), digests = rewritten(image, tmp_path, strip=[pattern])
    assert list(new) == left
    assert (digests[1] == image.document()["layers"][1]["digest"]) is (len(left) == 5)


def test_a_link_to_what_is_taken_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="'d/h' is a hard link to 'd/f'"):
        rewritten(image_of(OLD, NEW), tmp_path, strip=["d/f"])
    with pytest.raises(ImageError, match="whole root"):
        rewritten(image_of(OLD), tmp_path, strip=["/"])
