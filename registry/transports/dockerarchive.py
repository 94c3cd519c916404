"""`docker-archive:FILE[:REF|:@INDEX]`: what `docker save` writes and `docker load` reads.

Reading makes up a Docker schema 2 manifest, since the archive has none: layers have their DiffID as
digest where they are plain tar, as they mostly are. Both the old layout (`<id>/layer.tar`, links
among them) and the one of Docker 25 (`blobs/sha256/…`) are understood. Writing decompresses layers
and names them by their DiffIDs, which are checked against the config.

    manifest.json       [{"Config": "HEX.json", "RepoTags": ["name:tag"], "Layers": ["HEX.tar", …]}]
    repositories        {"name": {"tag": "HEX of the last layer"}}, for readers of before 2016
    HEX.json, HEX.tar   configs and layers

Spec: moby's image/spec/spec.md ("Combined Image JSON + Filesystem Changeset Format")
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from pathlib import Path
from typing import Any, BinaryIO, cast

from layers.compression import decompressor, detect
from layers.errors import BlobNotFound, ImageError, SizeMismatch, StoreError
from layers.oci import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    MEDIA_DOCKER_CONFIG,
    MEDIA_DOCKER_LAYER,
    MEDIA_DOCKER_LAYER_GZIP,
    MEDIA_DOCKER_LAYER_ZSTD,
    MEDIA_DOCKER_MANIFEST,
    Descriptor,
    Digest,
    ImageConfig,
    Manifest,
    encode_json,
)
from layers.values import NamedTuple
from registry.convert import layer_compression
from registry.errors import InvalidReference
from registry.recompress import FileSpan
from registry.reference import Reference
from registry.transport import (
    CHUNK_BYTES,
    BlobInput,
    ByteStream,
    RawManifest,
    TransportContext,
    check_manifest,
)
from registry.transports.local import LocalDestination, LocalSource
from registry.transports.tarball import Member, TarReader, TarWriter

_DIGEST_NAME = re.compile(r"blobs/(sha256)/([0-9a-f]{64})\Z")
_LAYER_TYPES = {None: MEDIA_DOCKER_LAYER, "gzip": MEDIA_DOCKER_LAYER_GZIP, "zstd": MEDIA_DOCKER_LAYER_ZSTD}


class DockerArchiveLocation(NamedTuple):
    """A docker-archive and, if any, the tagged name or the index of an image within."""

    path: Path
    ref: Reference | None = None
    position: int | None = None
    transport: str = "docker-archive"

    def __str__(self) -> str:
        which = f":{self.ref.familiar()}" if self.ref else f":@{self.position}" if self.position is not None else ""
        return f"{self.transport}:{self.path}{which}"

    def source(self, context: TransportContext) -> DockerArchiveSource:
        context.check_policy(self.transport, [os.path.realpath(self.path)])
        return DockerArchiveSource(self, context.scratch_dir)

    def destination(self, context: TransportContext) -> DockerArchiveDestination:
        """Raises: InvalidReference for a location with an index; StoreError."""
        if self.position is not None:
            raise InvalidReference(f"cannot write to {self}: name the image instead")
        return DockerArchiveDestination(self, context.scratch_dir)


def parse(transport: str, rest: str) -> DockerArchiveLocation:
    """Raises: InvalidReference."""
    path, colon, which = rest.partition(":")
    if not path or (colon and not which) or "\0" in rest:
        raise InvalidReference(f"invalid image name {transport}:{rest}: expected {transport}:FILE[:NAME:TAG]")
    if which.startswith("@"):
        if not which[1:].isdigit() or len(which) > 7:
            raise InvalidReference(f"invalid image name {transport}:{rest}: {which!r} is not an image's index")
        return DockerArchiveLocation(Path(path), None, int(which[1:]))
    ref = Reference.parse(which).with_default_tag() if which else None
    if ref is not None and ref.digest is not None:
        raise InvalidReference(f"invalid image name {transport}:{rest}: a docker-archive knows no digests")
    return DockerArchiveLocation(Path(path), ref)


class DockerArchiveSource(LocalSource):
    """An image in a docker-archive."""

    synthetic = True

    def __init__(self, location: DockerArchiveLocation, scratch_dir: Path) -> None:
        self.name = str(location)
        self._tar = TarReader(location.path, scratch_dir)
        self._blobs: dict[Digest, Member] = {}
        try:
            self._manifest = self._make_manifest(self._choose(location))
        except BaseException:
            self._tar.close()
            raise

    def _choose(self, location: DockerArchiveLocation) -> dict[str, Any]:
        raw = self._tar.read("manifest.json", MAX_MANIFEST_BYTES)
        if raw is None:
            raise ImageError(f"{location.path} is not a docker-archive: it has no manifest.json")
        try:
            images = json.loads(raw)
        except (ValueError, RecursionError) as e:
            raise ImageError(f"manifest.json in {location.path} is not valid JSON") from e
        if not isinstance(images, list) or not all(isinstance(i, dict) for i in images):
            raise ImageError(f"manifest.json in {location.path} is not a list of images")
        tags = [(_tags_of(image), image) for image in images]
        if location.ref is not None:
            found = [image for names, image in tags if location.ref in names]
        elif location.position is not None:
            found = images[location.position : location.position + 1]
        else:
            found = images
        if len(found) == 1:
            chosen: dict[str, Any] = found[0]
            return chosen
        there = ", ".join(sorted(str(name) for names, _ in tags for name in names)[:20]) or "untagged images only"
        if not found:
            raise ImageError(f"{self.name}: no such image", hint=f"there is: {there}")
        raise ImageError(f"{self.name} is ambiguous: {len(found)} images fit", hint=f"there is: {there}")

    def _make_manifest(self, image: dict[str, Any]) -> RawManifest:
        config_name, layer_names = image.get("Config"), image.get("Layers") or []
        if not isinstance(config_name, str) or not isinstance(layer_names, list):
            raise ImageError(f"{self.name}: manifest.json lacks the config or the layers")
        raw_config = self._tar.read(config_name, MAX_CONFIG_BYTES)
        if raw_config is None:
            raise BlobNotFound(f"{self.name} has no config {config_name!r}")
        config = ImageConfig.parse(raw_config)
        if len(config.diff_ids) != len(layer_names):
            raise ImageError(
                f"{self.name}: {len(layer_names)} layers, but the config has {len(config.diff_ids)} DiffIDs"
            )
        member = self._tar.find(config_name)
        config_descriptor = Descriptor.of(raw_config, MEDIA_DOCKER_CONFIG)
        if member is not None:
            self._blobs[config_descriptor.digest] = member
        layers = [self._layer(name, diff_id) for name, diff_id in zip(layer_names, config.diff_ids, strict=True)]
        manifest = Manifest.build(config=config_descriptor, layers=layers, media_type=MEDIA_DOCKER_MANIFEST)
        return RawManifest(manifest.raw, manifest.media_type, manifest.descriptor.digest)

    def _layer(self, name: Any, diff_id: Digest) -> Descriptor:
        member = self._tar.find(name) if isinstance(name, str) else None
        if member is None:
            raise BlobNotFound(f"{self.name} has no layer {name!r}")
        kind = detect(self._tar.open(member).read(16))
        if kind not in _LAYER_TYPES:
            raise ImageError(f"{self.name}: layer {name!r} is compressed with {kind}, which images do not use")
        digest = diff_id
        if kind is not None:
            named = _DIGEST_NAME.match(name)
            digest = Digest(":".join(named.groups())) if named else self._hash(member)
        self._blobs[digest] = member
        return Descriptor(media_type=_LAYER_TYPES[kind], digest=digest, size_bytes=member.size_bytes)

    def _hash(self, member: Member) -> Digest:
        hasher = hashlib.sha256()
        stream = self._tar.open(member)
        while data := stream.read(CHUNK_BYTES):
            hasher.update(data)
        return Digest.from_hasher(hasher)

    def get_manifest(self, digest: Digest | None = None) -> RawManifest:
        if digest is not None and digest != self._manifest.digest:
            raise BlobNotFound(f"{self.name} has no manifest {digest}")
        return self._manifest

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> FileSpan:
        member = self._blobs.get(descriptor.digest)
        if member is None:
            raise BlobNotFound(f"{self.name} has no blob {descriptor.digest}")
        return self._tar.open(member, offset)

    def close(self) -> None:
        self._tar.close()


def _tags_of(image: dict[str, Any]) -> list[Reference]:
    tags = image.get("RepoTags") or []
    found: list[Reference] = []
    for tag in tags if isinstance(tags, list) else []:
        try:
            found.append(Reference.parse(tag).with_default_tag())
        except (InvalidReference, TypeError, AttributeError):
            continue
    return found


class DockerArchiveDestination(LocalDestination):
    """A new docker-archive. It takes several images: `rename` between them, and one commit at the end.

    Layers are written one at a time: their sizes and names are known only once they are decompressed.
    """

    single_platform = True
    holds_indexes = False
    compresses = False

    def __init__(self, location: DockerArchiveLocation, scratch_dir: Path) -> None:
        self.name = self.room = str(location)
        self._ref = location.ref
        self._tar = TarWriter(location.path, scratch_dir)
        self._lock = threading.Lock()
        self._diff_ids: dict[Digest, Digest] = {}
        self._configs: dict[Digest, bytes] = {}
        self._members: set[str] = set()
        self._images: list[dict[str, Any]] = []

    def has_blob(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self._diff_ids or descriptor.digest in self._configs

    def put_blob(self, blob: BlobInput) -> None:
        kind = layer_compression(blob.descriptor)
        with self._lock:
            if self.has_blob(blob.descriptor):
                return
            if kind is None:
                self._put_config(blob)
                return
            with blob.open_verified() as stream:
                plain: ByteStream = stream if kind == "none" else decompressor(cast(BinaryIO, stream), kind=kind)
                diff_id = self._put_layer(plain)
                # What the decompressor had no need of must be right, too.
                while stream.read(CHUNK_BYTES):
                    pass
            self._diff_ids[blob.descriptor.digest] = diff_id

    def _put_config(self, blob: BlobInput) -> None:
        if blob.descriptor.size_bytes > MAX_CONFIG_BYTES:
            raise SizeMismatch(f"config {blob.descriptor.digest} is larger than the {MAX_CONFIG_BYTES} bytes allowed")
        with blob.open_verified() as stream:
            parts = []
            while data := stream.read(CHUNK_BYTES):
                parts.append(data)
        self._configs[blob.descriptor.digest] = b"".join(parts)

    def _put_layer(self, plain: ByteStream) -> Digest:
        hasher = hashlib.sha256()
        start = self._tar.begin()
        size = 0
        try:
            while data := plain.read(CHUNK_BYTES):
                hasher.update(data)
                self._tar.write_at(start + size, data)
                size += len(data)
        except BaseException:
            self._tar.abandon()
            raise
        diff_id = Digest.from_hasher(hasher)
        name = f"{diff_id.encoded}.tar"
        if name in self._members:
            self._tar.abandon()
        else:
            self._members.add(name)
            self._tar.end(name, size)
        return diff_id

    def put_manifest(self, manifest: RawManifest, *, top: bool) -> None:
        """Note the image. Raises: ImageError if its layers are not those that its config names."""
        check_manifest(manifest, manifest.digest)
        document = Manifest.parse(manifest.raw, manifest.media_type)
        raw_config = self._configs.get(document.config.digest)
        try:
            diff_ids = [self._diff_ids[d.digest] for d in document.layers]
        except KeyError as e:
            raise ImageError(f"{self.name}: a layer of another kind than docker-archives can hold: {e}") from e
        if raw_config is None:
            raise ImageError(f"{self.name}: the image's config was not copied")
        config = ImageConfig.parse(raw_config)
        if list(config.diff_ids) != diff_ids:
            raise ImageError(f"{self.name}: the layers do not unpack to the DiffIDs in the image's config")
        config_name = f"{document.config.digest.encoded}.json"
        if config_name not in self._members:
            self._members.add(config_name)
            self._tar.append(config_name, raw_config)
        image = next((i for i in self._images if i["Config"] == config_name), None)
        if image is None:
            image = {"Config": config_name, "RepoTags": None, "Layers": [f"{d.encoded}.tar" for d in diff_ids]}
            self._images.append(image)
        if self._ref is not None:
            tag = self._ref.familiar()
            for other in self._images:
                if tag in (other["RepoTags"] or []):
                    other["RepoTags"].remove(tag)
            image["RepoTags"] = [*(image["RepoTags"] or []), tag]

    def rename(self, ref: Reference | None) -> None:
        """Let the next image of this archive be named `ref`."""
        self._ref = ref.with_default_tag() if ref is not None else None

    def commit(self) -> None:
        if not self._images:
            raise StoreError(f"nothing was written to {self.name}")
        repositories: dict[str, dict[str, str]] = {}
        for image in self._images:
            for tag in image["RepoTags"] or []:
                name, _, version = tag.rpartition(":")
                if image["Layers"]:
                    repositories.setdefault(name, {})[version] = image["Layers"][-1].removesuffix(".tar")
        self._tar.append("repositories", encode_json(repositories))
        self._tar.append("manifest.json", encode_json(self._images))
        self._tar.commit()

    def close(self) -> None:
        self._tar.close()
