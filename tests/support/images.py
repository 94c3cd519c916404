"""Images made of bytes and JSON by hand: none of the code under test has a part in them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"


class Blob(NamedTuple):
    """Bytes and how they are referred to."""

    data: bytes
    media_type: str

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.data).hexdigest()}"

    def descriptor(self, **more: Any) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.data), **more}


class Image(NamedTuple):
    """A manifest or index, and every blob beneath it."""

    top: Blob
    blobs: tuple[Blob, ...]

    @property
    def digest(self) -> str:
        return self.top.digest

    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.top.data)
        return document


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """A tar stream of plain files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def random_layer(name: str, size: int = 2000) -> dict[str, bytes]:
    """A layer of one file that does not compress."""
    return {name: os.urandom(size)}


def make_image(
    layers: Sequence[Mapping[str, bytes] | bytes] | None = None,
    *,
    docker: bool = False,
    compress: bool = True,
    architecture: str = "amd64",
    annotations: Mapping[str, str] | None = None,
) -> Image:
    """An image of these layers (files, or tar streams), or of two random ones."""
    made = layers if layers is not None else [random_layer("a"), random_layer("b")]
    tars = [one if isinstance(one, bytes) else tar_of(one) for one in made]
    layer_type = DOCKER_LAYER_GZIP if docker else OCI_LAYER + ("+gzip" if compress else "")
    blobs = [Blob(gzip.compress(t, 1, mtime=0) if compress else t, layer_type) for t in tars]
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": ["/bin/sh"], "Env": ["A=b"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(t).hexdigest()}" for t in tars]},
        "history": [{"created_by": f"layer {i}"} for i in range(len(tars))],
    }
    config_blob = Blob(json.dumps(config).encode(), DOCKER_CONFIG if docker else OCI_CONFIG)
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST if docker else OCI_MANIFEST,
        "config": config_blob.descriptor(),
        "layers": [b.descriptor() for b in blobs],
    }
    if annotations:
        manifest["annotations"] = dict(annotations)
    return Image(Blob(json.dumps(manifest, indent=3).encode(), manifest["mediaType"]), (config_blob, *blobs))


def make_index(images: Mapping[str, Image], *, docker: bool = False) -> Image:
    """An index of images by their `architecture`; a key `arm/v7` names a variant, too."""
    entries = []
    for name, image in images.items():
        architecture, _, variant = name.partition("/")
        platform = {"os": "linux", "architecture": architecture} | ({"variant": variant} if variant else {})
        entries.append(image.top.descriptor(platform=platform))
    media_type = DOCKER_INDEX if docker else OCI_INDEX
    raw = json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}).encode()
    beneath = {b.digest: b for image in images.values() for b in (image.top, *image.blobs)}
    return Image(Blob(raw, media_type), tuple(beneath.values()))


def write_layout(path: Path, **tagged: Image) -> Path:
    """An OCI layout with these images under their tags."""
    (path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    entries = []
    for tag, image in tagged.items():
        for blob in (image.top, *image.blobs):
            (path / "blobs" / blob.digest.replace(":", "/")).write_bytes(blob.data)
        entries.append(image.top.descriptor(annotations={"org.opencontainers.image.ref.name": tag}))
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    return path


def layout_names(path: Path) -> dict[str | None, str]:
    """The digests in a layout's index.json by their names."""
    index = json.loads((path / "index.json").read_bytes())
    return {
        (e.get("annotations") or {}).get("org.opencontainers.image.ref.name"): e["digest"] for e in index["manifests"]
    }


def check_layout(path: Path, digest: str) -> None:
    """Whether everything beneath `digest` is in the layout, byte for byte."""
    raw = (path / "blobs" / digest.replace(":", "/")).read_bytes()
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == digest
    document = json.loads(raw)
    if "manifests" in document:
        for entry in document["manifests"]:
            check_layout(path, entry["digest"])
        return
    for blob in (document["config"], *document["layers"]):
        data = (path / "blobs" / blob["digest"].replace(":", "/")).read_bytes()
        assert len(data) == blob["size"]
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == blob["digest"]
