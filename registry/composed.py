"""An image put together from parts of others: the source that edits and indexes are copied from.

What is new (manifests, configs, layers) is held here; everything else stays where it is, and is
read, mounted or linked from there when `registry.copy` moves the image to its destination. So an
edit of a remote image moves only what changed. Callers: `registry.edit`, `registry.index`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layers.errors import BlobNotFound
from layers.oci import Descriptor, Digest, Index, Manifest, parse_manifest
from registry.transport import ImageSource, RawManifest, check_manifest

if TYPE_CHECKING:
    from registry.recompress import SpooledBlob
    from registry.transport import ByteStream

_MAX_INDEX_DEPTH = 4


class ComposedSource:
    """An image source made of parts. `finish` names its top; it does not own the sources it reads from.

    Thread-safe once finished.
    """

    synthetic = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.host = ""
        self._top: RawManifest | None = None
        self._manifests: dict[Digest, RawManifest] = {}
        self._homes: dict[Digest, ImageSource] = {}
        self._blobs: dict[Digest, bytes] = {}
        self._spools: dict[Digest, SpooledBlob] = {}

    # Making

    def add_manifest(self, document: Manifest | Index) -> Descriptor:
        """Hold a new manifest or index; its descriptor."""
        descriptor = document.descriptor
        self._manifests[descriptor.digest] = RawManifest(document.raw, document.media_type, descriptor.digest)
        return descriptor

    def add_bytes(self, data: bytes, media_type: str) -> Descriptor:
        """Hold a small new blob, such as a config; its descriptor."""
        descriptor = Descriptor.of(data, media_type)
        self._blobs[descriptor.digest] = data
        return descriptor

    def add_spool(self, spool: SpooledBlob) -> Descriptor:
        """Take over a new blob that lies in an anonymous file; it is closed with this source."""
        old = self._spools.get(spool.descriptor.digest)
        if old is not None:
            spool.close()
        else:
            self._spools[spool.descriptor.digest] = spool
        return spool.descriptor

    def refer(self, source: ImageSource, digests: Sequence[Digest]) -> None:
        """Read these blobs from `source`, unless they are known already."""
        for digest in digests:
            self._homes.setdefault(digest, source)
        self.host = self.host or source.host

    def add_tree(self, source: ImageSource, raw: RawManifest, depth: int = 0) -> None:
        """Take a manifest or index of `source` as it is, with everything beneath.

        Raises: ImageError, DigestMismatch, RegistryError.
        """
        document = parse_manifest(raw.raw, raw.media_type)
        self._manifests[raw.digest] = raw._replace(media_type=document.media_type)
        if isinstance(document, Manifest):
            self.refer(source, [document.config.digest, *(d.digest for d in document.layers)])
            return
        for entry in document.manifests if depth < _MAX_INDEX_DEPTH else ():
            child = check_manifest(source.get_manifest(entry.digest), entry.digest)
            self.add_tree(source, child._replace(media_type=entry.media_type or child.media_type), depth + 1)

    def finish(self, top: Digest) -> None:
        """Make the manifest or index of that digest the image."""
        self._top = self._manifests[top]

    # ImageSource

    def get_manifest(self, digest: Digest | None = None) -> RawManifest:
        found = self._top if digest is None else self._manifests.get(digest)
        if found is None:
            raise BlobNotFound(f"{self.name} has no manifest {digest or ''}")
        return found

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> ByteStream:
        data = self._blobs.get(descriptor.digest)
        if data is not None:
            stream = io.BytesIO(data)
            stream.seek(offset)
            return stream
        spool = self._spools.get(descriptor.digest)
        if spool is not None:
            return spool.open_blob(descriptor, offset)
        home = self._homes.get(descriptor.digest)
        if home is None:
            raise BlobNotFound(f"{self.name} has no blob {descriptor.digest}")
        return home.open_blob(descriptor, offset)

    def blob_path(self, digest: Digest) -> Path | None:
        home = None if digest in self._blobs or digest in self._spools else self._homes.get(digest)
        return home.blob_path(digest) if home is not None else None

    def mount_candidates(self, digest: Digest, host: str) -> Sequence[str]:
        home = self._homes.get(digest)
        return home.mount_candidates(digest, host) if home is not None else ()

    def close(self) -> None:
        for spool in self._spools.values():
            spool.close()
        self._spools.clear()
