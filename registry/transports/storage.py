"""`storage:NAME`, and names without a transport: images in pybuild's own store.

NAME is a reference, in full or in the short form that stands for Docker Hub, with `:latest` where
no tag is given; reading also takes an image's digest or ID, whole or its first hex digits. Pulls go
through ingests named by digest, so that the next process goes on where a dead one stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layers.errors import BlobNotFound, SizeMismatch, StoreError
from layers.oci import MAX_MANIFEST_BYTES, Descriptor, Digest, parse_manifest
from layers.values import NamedTuple
from registry.reference import Reference
from registry.stored import find_image, is_id, manifests, store_name
from registry.transport import (
    CHUNK_BYTES,
    BlobInput,
    RawManifest,
    TransportContext,
    check_manifest,
    is_whole,
)
from registry.transports.local import LocalDestination, LocalSource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from layers.store import Store

_MAX_CANDIDATE_NAMES = 500


class StorageLocation(NamedTuple):
    """A name in the store, or the beginning of an ID."""

    name: str
    transport: str = "storage"

    def __str__(self) -> str:
        return f"storage:{self.name}"

    def source(self, context: TransportContext) -> StorageSource:
        """Raises: NameNotFound."""
        return StorageSource(self.name, context.store)

    def destination(self, context: TransportContext) -> StorageDestination:
        """Raises: InvalidReference."""
        return StorageDestination(store_name(self.name), context.store)


def parse(transport: str, rest: str) -> StorageLocation:
    """Raises: InvalidReference."""
    if not is_id(rest):
        Reference.parse(rest)
    return StorageLocation(rest)


class StorageSource(LocalSource):
    """An image in the store."""

    def __init__(self, name: str, store: Store) -> None:
        self.name = f"storage:{name}"
        self._store = store
        self._top = find_image(store, name)
        self._homes: dict[str, dict[Digest, list[str]]] = {}

    def get_manifest(self, digest: Digest | None = None) -> RawManifest:
        wanted = digest or self._top.digest
        raw = self._store.blobs.read(wanted, MAX_MANIFEST_BYTES)
        media_type = self._top.media_type if wanted == self._top.digest else ""
        return RawManifest(raw, media_type or parse_manifest(raw).media_type, wanted)

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> BinaryIO:
        # Not `blobs.open`, which hashes: the destination does that.
        path = self._store.blobs.path(descriptor.digest)
        if path is None:
            raise BlobNotFound(
                f"blob {descriptor.digest} of {self.name} is not in the store", hint="pull or build the image again"
            )
        try:
            stream = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by the caller
            stream.seek(offset)
        except OSError as e:
            raise StoreError(f"cannot read {path}: {e.strerror}") from e
        return stream

    def blob_path(self, digest: Digest) -> Path | None:
        return self._store.blobs.path(digest)

    def mount_candidates(self, digest: Digest, host: str) -> Sequence[str]:
        """Repositories of `host` that images in the store came from or were pushed as, the base image's among them."""
        homes = self._homes.get(host)
        if homes is None:
            homes = self._homes[host] = {}
            for named in self._store.names.list()[:_MAX_CANDIDATE_NAMES]:
                if not named.name.startswith(host + "/"):
                    continue
                # The base for another platform is kept under its name, `#` and the platform.
                path = Reference.parse(named.name.partition("#")[0]).path
                for manifest in manifests(self._store, named.descriptor):
                    for blob in manifest.layers:
                        homes.setdefault(blob.digest, []).append(path)
        return homes.get(digest, ())

    def close(self) -> None:
        return


class StorageDestination(LocalDestination):
    """A name to be in the store."""

    single_platform = True

    def __init__(self, name: str, store: Store) -> None:
        self.name = f"storage:{name}"
        self.room = f"storage {store.root}"
        self._name = name
        self._store = store
        self._top: RawManifest | None = None

    def head_manifest(self, digest: Digest | None = None) -> Digest | None:
        if digest is None:
            named = self._store.names.get(self._name)
            digest = named.digest if named is not None else None
        return digest if digest is not None and is_whole(digest, self._read, self.has_blob) else None

    def _read(self, digest: Digest) -> RawManifest:
        raw = self._store.blobs.read(digest, MAX_MANIFEST_BYTES)
        return RawManifest(raw, parse_manifest(raw).media_type, digest)

    def has_blob(self, descriptor: Descriptor) -> bool:
        info = self._store.blobs.stat(descriptor.digest)
        return info is not None and info.size_bytes == descriptor.size_bytes

    def put_blob(self, blob: BlobInput) -> None:
        descriptor = blob.descriptor
        ref = f"blob {descriptor.digest}"
        # Another process may be pulling the same blob: wait for it, then there is nothing to do.
        with self._store.leases.flight(ref):
            if self.has_blob(descriptor):
                return
            with self._store.blobs.ingest(expected=descriptor, ref=ref) as ingest:
                if ingest.offset < descriptor.size_bytes or not descriptor.size_bytes:
                    with blob.open(ingest.offset) as stream:
                        while data := stream.read(CHUNK_BYTES):
                            ingest.write(data)
                if ingest.offset < descriptor.size_bytes:
                    # Not committed, so kept: the next try goes on from here.
                    raise SizeMismatch(
                        f"blob {descriptor.digest} ends after {ingest.offset} of {descriptor.size_bytes} bytes"
                    )
                ingest.commit()

    def put_manifest(self, manifest: RawManifest, *, top: bool) -> None:
        check_manifest(manifest, manifest.digest)
        if not self.has_blob(manifest.descriptor):
            with self._store.blobs.ingest(expected=manifest.descriptor) as ingest:
                ingest.write(manifest.raw)
                ingest.commit()
        if top:
            self._top = manifest

    def commit(self) -> None:
        if self._top is None:
            raise StoreError(f"nothing was written to {self.name}")
        self._store.names.set(self._name, self._top.descriptor)

    def close(self) -> None:
        return
