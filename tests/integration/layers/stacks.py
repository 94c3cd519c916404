"""Real overlays for tests, and images of the layers that were made from them, for other tools to judge."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from layers import linux
from layers.changeset import LayerResult, write_layer
from layers.layerdiff import Change
from layers.oci import Descriptor, ImageConfig, Manifest


class Made(NamedTuple):
    """A layer in memory."""

    blob: bytes
    result: LayerResult


def make_layer(changes: Iterator[Change], root: Path, **options: object) -> Made:
    """Write a layer and keep its bytes."""
    out = io.BytesIO()
    result = write_layer(changes, root, out, **options)  # type: ignore[arg-type]
    return Made(out.getvalue(), result)


@contextmanager
def overlay(at: Path, lower: Sequence[Path], upper: Path | None = None, *, userxattr: bool = False) -> Iterator[Path]:
    """Mount an overlay at `at` (made if it is not there); `lower` is topmost first."""
    at.mkdir(exist_ok=True)
    options = "lowerdir=" + ":".join(map(str, lower))
    if upper is not None:
        work = upper.with_name(upper.name + ".work")
        work.mkdir(exist_ok=True)
        options += f",upperdir={upper},workdir={work}"
    elif len(lower) == 1:
        # Without an upper the kernel wants two lowers.
        empty = at.with_name("empty")
        empty.mkdir(exist_ok=True)
        options += f":{empty}"
    if userxattr:
        options += ",userxattr"
    linux.mount("overlay", str(at), "overlay", 0, options)
    try:
        yield at
    finally:
        linux.umount2(str(at), linux.MNT_DETACH)


def write_image(path: Path, layers: Sequence[Made]) -> Path:
    """An OCI layout with one image of these layers, tag `t`."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)
    (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    for made in layers:
        (blobs / made.result.digest.encoded).write_bytes(made.blob)
    config = ImageConfig.build(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/true"]},
            "rootfs": {"type": "layers", "diff_ids": [str(made.result.diff_id) for made in layers]},
        }
    )
    manifest = Manifest.build(
        config=config.descriptor,
        layers=[
            Descriptor(media_type=made.result.media_type, digest=made.result.digest, size_bytes=made.result.size_bytes)
            for made in layers
        ],
    )
    for raw, descriptor in ((config.raw, config.descriptor), (manifest.raw, manifest.descriptor)):
        (blobs / descriptor.digest.encoded).write_bytes(raw)
    entry = manifest.descriptor.to_json() | {"annotations": {"org.opencontainers.image.ref.name": "t"}}
    import json

    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return path
