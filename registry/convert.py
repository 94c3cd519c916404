"""OCI manifests to Docker schema 2 and back: which media type stands for which.

Pure. Configs and layers keep their bytes, and so their digests: a Docker config is an OCI one with
some fields more. What changes is the manifest, and with it the digest of the image.

Spec: image-spec media-types.md, Compatibility Matrix; distribution's manifest-v2-2.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from layers.errors import ImageError
from layers.oci import (
    MEDIA_DOCKER_CONFIG,
    MEDIA_DOCKER_FOREIGN_GZIP,
    MEDIA_DOCKER_INDEX,
    MEDIA_DOCKER_LAYER,
    MEDIA_DOCKER_LAYER_GZIP,
    MEDIA_DOCKER_LAYER_ZSTD,
    MEDIA_DOCKER_MANIFEST,
    MEDIA_OCI_CONFIG,
    MEDIA_OCI_INDEX,
    MEDIA_OCI_LAYER,
    MEDIA_OCI_LAYER_GZIP,
    MEDIA_OCI_LAYER_ZSTD,
    MEDIA_OCI_MANIFEST,
    Descriptor,
    Index,
    Manifest,
)
from layers.values import replace

Format = Literal["oci", "docker"]
Compression = Literal["gzip", "zstd", "none"]
LayerFormat = Literal["gzip", "zstd", "none", "estargz", "zstd:chunked"]
"""What a layer can be made: the last two are gzip and zstd with a table of contents (`layers.lazylayer`)."""

_ESTARGZ = "containerd.io/snapshot/stargz/toc.digest"
_ZSTD_CHUNKED = "io.github.containers.zstd-chunked.manifest-checksum"
_OCI_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"

_PAIRS = (
    (MEDIA_OCI_CONFIG, MEDIA_DOCKER_CONFIG),
    (MEDIA_OCI_LAYER, MEDIA_DOCKER_LAYER),
    (MEDIA_OCI_LAYER_GZIP, MEDIA_DOCKER_LAYER_GZIP),
    (MEDIA_OCI_LAYER_ZSTD, MEDIA_DOCKER_LAYER_ZSTD),
    (_OCI_FOREIGN, _DOCKER_FOREIGN),
    (_OCI_FOREIGN + "+gzip", MEDIA_DOCKER_FOREIGN_GZIP),
    (MEDIA_OCI_MANIFEST, MEDIA_DOCKER_MANIFEST),
    (MEDIA_OCI_INDEX, MEDIA_DOCKER_INDEX),
)
_TO_DOCKER = dict(_PAIRS)
_TO_OCI = {docker: oci for oci, docker in _PAIRS} | {
    # Old Docker daemons wrote this for uncompressed layers.
    "application/vnd.docker.image.rootfs.diff": MEDIA_OCI_LAYER,
}
_LAYERS: dict[str, tuple[Format, Compression]] = {
    MEDIA_OCI_LAYER: ("oci", "none"),
    MEDIA_OCI_LAYER_GZIP: ("oci", "gzip"),
    MEDIA_OCI_LAYER_ZSTD: ("oci", "zstd"),
    MEDIA_DOCKER_LAYER: ("docker", "none"),
    MEDIA_DOCKER_LAYER_GZIP: ("docker", "gzip"),
    MEDIA_DOCKER_LAYER_ZSTD: ("docker", "zstd"),
}
_LAYER_TYPES = {wanted: media_type for media_type, wanted in _LAYERS.items()}


def format_of(media_type: str) -> Format:
    """Which of the two families a manifest's or index's media type is of."""
    return "docker" if media_type in {MEDIA_DOCKER_MANIFEST, MEDIA_DOCKER_INDEX} else "oci"


def layer_compression(descriptor: Descriptor) -> Compression | None:
    """How a layer is compressed, by its media type; None if it is no layer that we could compress anew."""
    known = _LAYERS.get(descriptor.media_type)
    return known[1] if known else None


def layer_format(descriptor: Descriptor) -> LayerFormat | None:
    """As `layer_compression`, but tells layers with a table of contents apart."""
    compression = layer_compression(descriptor)
    if compression == "gzip" and _ESTARGZ in descriptor.annotations:
        return "estargz"
    if compression == "zstd" and _ZSTD_CHUNKED in descriptor.annotations:
        return "zstd:chunked"
    return compression


def is_foreign(descriptor: Descriptor) -> bool:
    """Whether a layer is one that registries need not hold (image-spec layer.md, Non-Distributable Layers)."""
    return descriptor.media_type.startswith((_OCI_FOREIGN, _DOCKER_FOREIGN))


def layer_media_type(original: str, compression: Compression) -> str:
    """The media type of a layer of the same family in another compression."""
    return _LAYER_TYPES[_LAYERS[original][0], compression]


def convert_descriptor(descriptor: Descriptor, target: Format) -> Descriptor:
    """The descriptor of the same bytes in the other family.

    Raises: ImageError for what the other family has no word for.
    """
    table, other = (_TO_DOCKER, _TO_OCI) if target == "docker" else (_TO_OCI, _TO_DOCKER)
    media_type = table.get(descriptor.media_type)
    if media_type is None:
        if descriptor.media_type not in other and target == "docker":
            raise ImageError(f"{descriptor.media_type!r} cannot be expressed in Docker's image format")
        media_type = descriptor.media_type
    annotations = {} if target == "docker" else descriptor.annotations
    return replace(descriptor, media_type=media_type, annotations=annotations, data=None)


def convert_manifest(manifest: Manifest, layers: Sequence[Descriptor], target: Format) -> Manifest:
    """`manifest` with `layers` in place of its own, in `target`'s media types.

    Raises: ImageError for an artifact, which Docker's format cannot express.
    """
    if target == "docker" and (manifest.subject is not None or manifest.artifact_type):
        raise ImageError("an artifact cannot be expressed in Docker's image format")
    return Manifest.build(
        config=convert_descriptor(manifest.config, target),
        layers=[convert_descriptor(d, target) for d in layers],
        annotations=manifest.annotations if target == "oci" else None,
        media_type=MEDIA_OCI_MANIFEST if target == "oci" else MEDIA_DOCKER_MANIFEST,
        subject=manifest.subject,
        artifact_type=manifest.artifact_type,
    )


def convert_index(index: Index, manifests: Sequence[Descriptor], target: Format) -> Index:
    """`index` with `manifests` in place of its own, in `target`'s media types."""
    return Index.build(
        manifests,
        annotations=index.annotations if target == "oci" else None,
        media_type=MEDIA_OCI_INDEX if target == "oci" else MEDIA_DOCKER_INDEX,
    )
