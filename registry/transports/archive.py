"""`oci-archive:FILE[:TAG|@DIGEST]`: an OCI image layout in a tar archive; see `registry.transports.tarball`."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from layers.errors import BlobNotFound, ImageError, SizeMismatch, StoreError
from layers.oci import (
    MAX_MANIFEST_BYTES,
    MEDIA_OCI_INDEX,
    MEDIA_OCI_MANIFEST,
    Descriptor,
    Digest,
    Index,
    encode_json,
    parse_manifest,
)
from layers.values import NamedTuple
from registry.errors import InvalidReference
from registry.recompress import FileSpan
from registry.transport import CHUNK_BYTES, BlobInput, RawManifest, TransportContext, check_manifest
from registry.transports.local import LocalDestination, LocalSource
from registry.transports.oci import LAYOUT_FILE, find_entry, format_location, renamed, split_path
from registry.transports.tarball import TarReader, TarWriter


class OciArchiveLocation(NamedTuple):
    """An OCI archive and, if any, the name or digest within."""

    path: Path
    ref: str | None = None
    digest: Digest | None = None
    transport: str = "oci-archive"

    def __str__(self) -> str:
        return format_location(self.transport, str(self.path), self.ref, self.digest)

    def source(self, context: TransportContext) -> OciArchiveSource:
        context.check_policy(self.transport, [os.path.realpath(self.path)])
        return OciArchiveSource(self, context.scratch_dir)

    def destination(self, context: TransportContext) -> OciArchiveDestination:
        """Raises: InvalidReference for a location with a digest; StoreError."""
        if self.digest is not None:
            raise InvalidReference(f"cannot write to {self}: a digest names what is there already, not a tag")
        return OciArchiveDestination(self, context.scratch_dir)


def parse(transport: str, rest: str) -> OciArchiveLocation:
    """Raises: InvalidReference."""
    path, ref, digest = split_path(transport, rest)
    return OciArchiveLocation(Path(path), ref, digest, transport)


class OciArchiveSource(LocalSource):
    """An image in an OCI archive, read in place."""

    def __init__(self, location: OciArchiveLocation, scratch_dir: Path) -> None:
        self.name = str(location)
        self._tar = TarReader(location.path, scratch_dir)
        try:
            raw = self._tar.read("index.json", MAX_MANIFEST_BYTES)
            if raw is None:
                raise ImageError(f"{location.path} is not an OCI archive: it has no index.json")
            index = Index.parse(raw, MEDIA_OCI_INDEX)
            self._entry = find_entry(index.manifests, location.ref, location.digest, self.name)
        except BaseException:
            self._tar.close()
            raise

    def get_manifest(self, digest: Digest | None = None) -> RawManifest:
        wanted = digest or self._entry.digest
        raw = self._tar.read(_blob_name(wanted), MAX_MANIFEST_BYTES)
        if raw is None:
            raise BlobNotFound(f"{self.name} has no blob {wanted}")
        media_type = self._entry.media_type if wanted == self._entry.digest else ""
        return check_manifest(RawManifest(raw, media_type or parse_manifest(raw).media_type, wanted), wanted)

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> FileSpan:
        member = self._tar.find(_blob_name(descriptor.digest))
        if member is None:
            raise BlobNotFound(f"{self.name} has no blob {descriptor.digest}")
        if member.size_bytes != descriptor.size_bytes:
            raise SizeMismatch(
                f"blob {descriptor.digest} in {self.name} has {member.size_bytes} bytes, not {descriptor.size_bytes}"
            )
        return self._tar.open(member, offset)

    def close(self) -> None:
        self._tar.close()


class OciArchiveDestination(LocalDestination):
    """A new OCI archive. It takes several images: `rename` between them, and one commit at the end."""

    manifest_types: frozenset[str] | None = frozenset({MEDIA_OCI_MANIFEST, MEDIA_OCI_INDEX})

    def __init__(self, location: OciArchiveLocation, scratch_dir: Path) -> None:
        self.name = self.room = str(location)
        self._ref = location.ref
        self._tar = TarWriter(location.path, scratch_dir)
        self._lock = threading.Lock()
        self._written: set[Digest] = set()
        self._entries: list[dict[str, Any]] = []
        for directory in ("blobs/", "blobs/sha256/"):
            self._tar.append(directory, b"")
        self._tar.append("oci-layout", LAYOUT_FILE)

    def has_blob(self, descriptor: Descriptor) -> bool:
        with self._lock:
            return descriptor.digest in self._written

    def put_blob(self, blob: BlobInput) -> None:
        with self._lock:
            if blob.descriptor.digest in self._written:
                return
            self._written.add(blob.descriptor.digest)
        offset = self._tar.reserve(_blob_name(blob.descriptor.digest), blob.descriptor.size_bytes)
        with blob.open_verified() as stream:
            while data := stream.read(CHUNK_BYTES):
                self._tar.write_at(offset, data)
                offset += len(data)

    def put_manifest(self, manifest: RawManifest, *, top: bool) -> None:
        check_manifest(manifest, manifest.digest)
        if manifest.digest not in self._written:
            self._written.add(manifest.digest)
            self._tar.append(_blob_name(manifest.digest), manifest.raw)
        if top:
            self._entries = renamed(self._entries, manifest.descriptor, self._ref)

    def rename(self, ref: str | None) -> None:
        """Let the next image of this archive be named `ref`."""
        self._ref = ref

    def commit(self) -> None:
        if not self._entries:
            raise StoreError(f"nothing was written to {self.name}")
        index = {"schemaVersion": 2, "mediaType": MEDIA_OCI_INDEX, "manifests": self._entries}
        self._tar.append("index.json", encode_json(index))
        self._tar.commit()

    def close(self) -> None:
        self._tar.close()


def _blob_name(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.encoded}"
