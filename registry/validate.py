"""Whether an image is whole and true: every byte against its digest, every layer against its DiffID.

Spec: image-spec descriptor.md (Digests), config.md (`rootfs.diff_ids`)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import BinaryIO, cast

from layers.compression import decompressor
from layers.errors import PybuildError
from layers.oci import (
    MAX_CONFIG_BYTES,
    MEDIA_DOCKER_CONFIG,
    MEDIA_OCI_CONFIG,
    Descriptor,
    Digest,
    ImageConfig,
    Manifest,
    parse_manifest,
)
from layers.values import NamedTuple
from registry.convert import is_foreign, layer_compression
from registry.transport import (
    CHUNK_BYTES,
    BlobInput,
    ImageSource,
    RawManifest,
    check_manifest,
    read_blob,
)

_MAX_INDEX_DEPTH = 4


class Problem(NamedTuple):
    """What is wrong, and with which manifest or blob."""

    where: str
    what: str


class ValidationReport(NamedTuple):
    """What was looked at and what is wrong with it."""

    manifests: int
    blobs: int
    checked_bytes: int
    problems: tuple[Problem, ...]


def validate(
    source: ImageSource,
    *,
    fast: bool = False,
    has_blob: Callable[[Descriptor], bool] | None = None,
) -> ValidationReport:
    """Check the image, of an index every one. `fast` reads no layers; `has_blob` then tells whether one is there.

    Goes on after a problem. Raises: RegistryError or NameNotFound if the image itself cannot be read.
    """
    work = _Validation(source, fast, has_blob)
    work.tree(check_manifest(source.get_manifest(), None), 0)
    return ValidationReport(work.manifests, len(work.seen), work.read_bytes, tuple(work.problems))


class _Validation:
    def __init__(self, source: ImageSource, fast: bool, has_blob: Callable[[Descriptor], bool] | None) -> None:
        self.source = source
        self.fast = fast
        self.has_blob = has_blob
        self.manifests = 0
        self.read_bytes = 0
        self.seen: dict[Digest, Digest | None] = {}
        self.problems: list[Problem] = []

    def tree(self, raw: RawManifest, depth: int) -> None:
        self.manifests += 1
        try:
            document = parse_manifest(raw.raw, raw.media_type)
        except PybuildError as e:
            self.problems.append(Problem(raw.digest, str(e)))
            return
        if isinstance(document, Manifest):
            self._image(raw.digest, document)
            return
        if depth >= _MAX_INDEX_DEPTH:
            self.problems.append(Problem(raw.digest, f"indexes are nested more than {_MAX_INDEX_DEPTH} deep"))
            return
        for entry in document.manifests:
            try:
                child = check_manifest(self.source.get_manifest(entry.digest), entry.digest)
            except PybuildError as e:
                self.problems.append(Problem(entry.digest, str(e)))
                continue
            if len(child.raw) != entry.size_bytes:
                self.problems.append(
                    Problem(entry.digest, f"has {len(child.raw)} bytes, the index says {entry.size_bytes}")
                )
            self.tree(child._replace(media_type=entry.media_type or child.media_type), depth + 1)

    def _image(self, digest: Digest, manifest: Manifest) -> None:
        if manifest.config.media_type not in {MEDIA_OCI_CONFIG, MEDIA_DOCKER_CONFIG}:
            for blob in (manifest.config, *manifest.layers):
                self._blob(blob, None)
            return
        try:
            config = ImageConfig.parse(read_blob(self.source, manifest.config, MAX_CONFIG_BYTES))
        except PybuildError as e:
            self.problems.append(Problem(manifest.config.digest, str(e)))
            return
        self.seen[manifest.config.digest] = None
        self.read_bytes += manifest.config.size_bytes
        if len(config.diff_ids) != len(manifest.layers):
            self.problems.append(
                Problem(digest, f"has {len(manifest.layers)} layers, its config {len(config.diff_ids)} DiffIDs")
            )
            return
        filled = sum(not h.get("empty_layer") for h in config.history)
        if config.history and filled != len(manifest.layers):
            self.problems.append(Problem(digest, f"has {len(manifest.layers)} layers, its history tells of {filled}"))
        for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
            if layer.urls and is_foreign(layer):
                continue
            self._blob(layer, diff_id)

    def _blob(self, blob: Descriptor, diff_id: Digest | None) -> None:
        if blob.digest in self.seen:
            found = self.seen[blob.digest]
        else:
            found = None
            try:
                if self.fast:
                    self._look(blob)
                else:
                    found = self._read(blob)
            except PybuildError as e:
                self.problems.append(Problem(blob.digest, str(e)))
            self.seen[blob.digest] = found
        if diff_id is not None and found is not None and found != diff_id:
            self.problems.append(Problem(blob.digest, f"unpacks to {found}, the config says {diff_id}"))

    def _look(self, blob: Descriptor) -> None:
        if self.has_blob is not None:
            there = self.has_blob(blob)
        else:
            self.source.open_blob(blob).close()
            there = True
        if not there:
            self.problems.append(Problem(blob.digest, "is missing, or has another size"))

    def _read(self, blob: Descriptor) -> Digest | None:
        """Read and check a blob; the DiffID of a layer."""
        kind = layer_compression(blob)
        with BlobInput(blob, self.source).open_verified() as stream:
            if kind is None:
                while stream.read(CHUNK_BYTES):
                    pass
                self.read_bytes += blob.size_bytes
                return None
            hasher = hashlib.sha256()
            plain = decompressor(cast(BinaryIO, stream), kind=kind)
            while data := plain.read(CHUNK_BYTES):
                hasher.update(data)
            while stream.read(CHUNK_BYTES):
                pass
        self.read_bytes += blob.size_bytes
        return Digest.from_hasher(hasher)
