"""`docker://HOST/REPO[:TAG][@DIGEST]`: images in registries, through `registry.client`.

Uploads of large blobs leave their session in the context's `uploads_dir`, so that the next process
goes on where a dead one stopped; what a session's URL holds is secret, so the files are private.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from layers.errors import ImageError, PybuildError
from layers.oci import INDEX_MEDIA_TYPES, Descriptor, Digest, Manifest
from layers.values import NamedTuple
from registry.errors import InvalidReference, NotFoundError
from registry.reference import Reference
from registry.transport import BlobInput, ByteStream, ImageSource, RawManifest, TransportContext

if TYPE_CHECKING:
    from registry.client import RegistryClient
    from registry.transport import Reuse
    from registry.uploads import UploadSession

_SESSION_BYTES = 64 << 20
"""Smaller blobs are sent whole: to keep a session costs more than to send them again."""
_MAX_SESSION_BYTES = 64 << 10
_SESSION_DAYS = 7
"""Registries purge uploads after a week at most (distribution's default)."""


class DockerLocation(NamedTuple):
    """A name in a registry."""

    ref: Reference
    transport: str = "docker"

    def __str__(self) -> str:
        return f"docker://{self.ref.canonical()}"

    def source(self, context: TransportContext) -> DockerSource:
        return DockerSource(self.ref, context.client)

    def destination(self, context: TransportContext) -> DockerDestination:
        """Raises: InvalidReference for a name with both tag and digest."""
        if self.ref.tag is not None and self.ref.digest is not None:
            raise InvalidReference(f"cannot write to {self}: give a tag or a digest, not both")
        return DockerDestination(self.ref, context.client, partial(_uploads_dir, context))


def parse(transport: str, rest: str) -> DockerLocation:
    """Raises: InvalidReference."""
    return DockerLocation(Reference.parse(rest).with_default_tag())


def _uploads_dir(context: TransportContext) -> Path | None:
    """Where sessions are kept; the store that they lie in is made first, since it takes no strange directory over."""
    directory = context.uploads_dir
    if directory is None or directory.is_dir() or not context.has_store:
        return directory
    try:
        context.store  # noqa: B018  # opened, and made if it is missing
    except PybuildError:
        return None
    return directory


class _Unhashed:
    """Stands in for the hash of a reader whose bytes the destination hashes: once is enough."""

    __slots__ = ("_digest",)

    def __init__(self, digest: Digest) -> None:
        self._digest = digest

    @property
    def name(self) -> str:
        return self._digest.algorithm

    def update(self, data: bytes) -> None:
        return

    def hexdigest(self) -> str:
        return self._digest.encoded


class DockerSource:
    """An image in a registry."""

    synthetic = False

    def __init__(self, ref: Reference, client: RegistryClient) -> None:
        self.name = f"docker://{ref.familiar()}"
        self.host = ref.domain
        self._ref = ref
        self._client = client

    def get_manifest(self, digest: Digest | None = None) -> RawManifest:
        self._client.hosts.policy.check_docker(self._ref)
        ref = self._ref if digest is None else self._ref.with_digest(digest)
        return self._client.get_manifest(ref)

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> ByteStream:
        unhashed = cast("hashlib._Hash", _Unhashed(descriptor.digest))
        return self._client.open_blob(self._ref, descriptor, offset, hasher=unhashed)

    def read_range(self, descriptor: Descriptor, offset: int, size_bytes: int) -> bytes | None:
        """A part of a blob, not verified; None if the registry knows no ranges. Raises: RegistryError."""
        return self._client.read_range(self._ref, descriptor, offset, size_bytes)

    def blob_path(self, digest: Digest) -> Path | None:
        return None

    def mount_candidates(self, digest: Digest, host: str) -> Sequence[str]:
        return (self._ref.path,) if host == self.host else ()

    def close(self) -> None:
        return


class DockerDestination:
    """A tag or digest to be in a registry."""

    single_platform = False
    holds_indexes = True
    manifest_types: frozenset[str] | None = None
    compresses = True

    def __init__(self, ref: Reference, client: RegistryClient, uploads_dir: Callable[[], Path | None]) -> None:
        self.name = f"docker://{ref.familiar()}"
        self.host = ref.domain
        self.room = ref.repository
        self._ref = ref
        self._client = client
        self._uploads_dir = uploads_dir
        self._top: RawManifest | None = None

    def head_manifest(self, digest: Digest | None = None) -> Digest | None:
        ref = self._ref if digest is None else self._ref.with_digest(digest)
        found = self._client.head_manifest(ref, for_push=True)
        return found.digest if found is not None else None

    def has_blob(self, descriptor: Descriptor) -> bool:
        return self._client.has_blob(self._ref, descriptor.digest, for_push=True)

    def reuse_blob(self, descriptor: Descriptor, source: ImageSource) -> Reuse | None:
        # A guess that fails costs two requests: only the best one is tried.
        for repository in source.mount_candidates(descriptor.digest, self.host)[:1]:
            if repository != self._ref.path and self._client.mount_blob(self._ref, descriptor.digest, repository):
                return "mounted"
        return None

    def put_blob(self, blob: BlobInput) -> None:
        descriptor = blob.descriptor

        def opened(offset: int) -> BinaryIO:
            # The registry checks the digest too; a broken upload that goes on is checked there alone.
            return cast(BinaryIO, blob.open(offset) if offset else blob.open_verified())

        directory = self._uploads_dir() if descriptor.size_bytes >= _SESSION_BYTES else None
        if directory is None:
            self._client.upload_blob(self._ref, opened, descriptor)
            return
        kept = _SessionFile(directory, self._ref, descriptor.digest)
        try:
            self._client.upload_blob(self._ref, opened, descriptor, session=kept.load(), save=kept.save)
        except NotFoundError:
            kept.save(None)
            raise

    def put_manifest(self, manifest: RawManifest, *, top: bool) -> None:
        if top:
            self._top = manifest
        else:
            self._put(self._ref.with_digest(manifest.digest), manifest)

    def _put(self, ref: Reference, manifest: RawManifest) -> None:
        put = self._client.put_manifest(ref, manifest.raw, manifest.media_type)
        if put.subject_handled or manifest.media_type in INDEX_MEDIA_TYPES or b'"subject"' not in manifest.raw:
            return
        document = Manifest.parse(manifest.raw, manifest.media_type)
        if document.subject is not None:
            self._client.add_referrer(self._ref, document.subject.digest, _referrer(document))

    def commit(self) -> None:
        if self._top is not None:
            if self._ref.digest is not None and self._ref.digest != self._top.digest:
                raise ImageError(f"cannot write to {self.name}: the image is {self._top.digest}")
            self._put(self._ref, self._top)

    def close(self) -> None:
        return


def _referrer(manifest: Manifest) -> Descriptor:
    """The descriptor under which an artifact is listed as a referrer (distribution-spec, Referrers Tag Schema)."""
    return Descriptor(
        media_type=manifest.media_type,
        digest=manifest.descriptor.digest,
        size_bytes=len(manifest.raw),
        annotations=manifest.annotations,
        artifact_type=manifest.artifact_type or manifest.config.media_type,
    )


class _SessionFile:
    """Where the state of one upload outlives its process. What cannot be kept is no error: it is sent again."""

    def __init__(self, directory: Path, ref: Reference, digest: Digest) -> None:
        key = hashlib.sha256(f"{ref.repository} {digest}".encode()).hexdigest()[:40]
        self._path = directory / f"{key}.json"

    def load(self) -> UploadSession | None:
        from registry.uploads import UploadSession

        self._sweep()
        try:
            with open(self._path, "rb") as f:
                return UploadSession.from_json(f.read(_MAX_SESSION_BYTES).decode("utf-8", "replace"))
        except (OSError, ImageError):
            return None

    def _sweep(self) -> None:
        """Drop the sessions that nobody went on with."""
        oldest = time.time() - _SESSION_DAYS * 86400
        try:
            for path in self._path.parent.iterdir():
                if path.stat().st_mtime < oldest:
                    path.unlink()
        except OSError:
            return

    def save(self, session: UploadSession | None) -> None:
        try:
            if session is None:
                os.unlink(self._path)
                return
            os.makedirs(self._path.parent, mode=0o700, exist_ok=True)
            temporary = self._path.with_suffix(f".{os.getpid()}.{id(self):x}")
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as f:
                f.write(session.to_json().encode())
            os.rename(temporary, self._path)
        except OSError:
            return
