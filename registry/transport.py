"""Where an image lives: the protocols of sources and destinations, and the grammar that names them.

A transport reads and writes images in one kind of place: a registry, an OCI layout, an archive, a
directory, the local store. `parse_location` turns `oci:layout:tag` into an `ImageLocation`; that
opens as an `ImageSource` or an `ImageDestination`; `registry.copy` moves images between the two.
HTTP is never called "transport" here. Transports are imported when they are named, so that `oci:`
loads no HTTP.

Grammar, as containers-transports(5) has it:

    docker://HOST/REPO[:TAG][@DIGEST]     a registry
    oci:DIR[:TAG|@DIGEST]                 an OCI image layout
    oci-archive:FILE[:TAG|@DIGEST]        the same as a tar file; FILE may be -
    docker-archive:FILE[:REF]             what `docker save` writes; FILE may be -
    dir:DIR                               manifest and blobs as plain files
    storage:NAME                          pybuild's own store
    containers-storage:…, docker-daemon:… other tools' stores, through those tools
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from layers.errors import Cancelled, ContentError, DigestMismatch, ImageError, PybuildError, SizeMismatch
from layers.oci import MAX_MANIFEST_BYTES, Descriptor, Digest, Index, parse_manifest
from layers.values import NamedTuple, Protocol
from registry.errors import InvalidReference

TYPE_CHECKING = False
if TYPE_CHECKING:
    import hashlib
    from typing import Literal, Self

    from layers.store import Store
    from registry.client import RegistryClient
    from registry.wire import RateLimit

    Reuse = Literal["mounted", "linked"]

CHUNK_BYTES = 1 << 20
"""How much is read, hashed and written at once."""


class RawManifest(NamedTuple):
    """A manifest or index as its bytes, which have `digest`."""

    raw: bytes
    media_type: str
    digest: Digest

    @property
    def descriptor(self) -> Descriptor:
        return Descriptor(media_type=self.media_type, digest=self.digest, size_bytes=len(self.raw))


class ByteStream(Protocol):
    """What blobs are read from: a file, a response, a part of an archive."""

    def read(self, size: int = -1, /) -> bytes: ...

    def close(self) -> None: ...


class ImageSource(Protocol):
    """An image to read. Thread-safe: blobs are opened from several threads."""

    name: str
    """What people call it, transport included."""
    host: str
    """The registry's host, whose slots a transfer takes; empty for local places."""
    synthetic: bool
    """Whether the manifest is made up by the transport, so that nobody knows its digest."""

    def get_manifest(self, digest: Digest | None = None) -> RawManifest:
        """The top-level manifest or index, or the instance of that digest.

        Raises: ImageError, NameNotFound, RegistryError.
        """

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> ByteStream:
        """The blob's bytes from `offset` on, not yet verified. Raises: BlobNotFound."""

    def blob_path(self, digest: Digest) -> Path | None:
        """A plain file with the blob's *verified* bytes, if there is one, for zero-copy."""

    def mount_candidates(self, digest: Digest, host: str) -> Sequence[str]:
        """Repositories on registry `host` that are thought to hold the blob, best first."""

    def close(self) -> None: ...


class ImageDestination(Protocol):
    """A place for one image. Thread-safe as to blobs; manifests come after all of them, one by one.

    Until `commit`, no reader may see the image under its name. Closing without it leaves what was
    there before.
    """

    name: str
    host: str
    room: str
    """What shares its blobs with other destinations at work: a repository, a layout, the store."""
    single_platform: bool
    """Whether an index is narrowed to one platform unless all are asked for."""
    holds_indexes: bool
    """Whether an index can be kept at all."""
    manifest_types: frozenset[str] | None
    """The media types of manifests that may be written; None for any."""
    compresses: bool
    """Whether uncompressed layers of synthetic sources are to be compressed on the way."""

    def head_manifest(self, digest: Digest | None = None) -> Digest | None:
        """The digest of what is there, whole, by the image's name or of the instance; None if that is not known."""

    def has_blob(self, descriptor: Descriptor) -> bool: ...

    def reuse_blob(self, descriptor: Descriptor, source: ImageSource) -> Reuse | None:
        """Get the blob without moving its bytes: a mount, a link. None if that is not possible."""

    def put_blob(self, blob: BlobInput) -> None:
        """Write the blob, checked against its descriptor before it counts. Idempotent.

        Raises: DigestMismatch, SizeMismatch, StoreError, RegistryError.
        """

    def put_manifest(self, manifest: RawManifest, *, top: bool) -> None:
        """Write a manifest or index; `top` for the one that the image's name will mean."""

    def commit(self) -> None:
        """Publish the image under its name."""

    def close(self) -> None: ...


class ImageLocation(Protocol):
    """A parsed name of a place; printing it gives the text form back."""

    @property
    def transport(self) -> str: ...

    def source(self, context: TransportContext) -> ImageSource: ...

    def destination(self, context: TransportContext) -> ImageDestination: ...


class TransportContext:
    """What transports need from the outside, opened when first used. Thread-safe.

    `store` and `client` give the local store and the registry client; `scratch_dir` is for spools
    (an archive from a pipe, a layer being recompressed), which are unlinked while in use;
    `uploads_dir`, if given, keeps the sessions of large uploads, so that another process can go on.
    `signature_policy` names a file that stands in for policy.json.
    """

    def __init__(
        self,
        *,
        store: Callable[[], Store] | None = None,
        client: Callable[[], RegistryClient] | None = None,
        scratch_dir: Path = Path("/var/tmp"),  # noqa: S108  # spools are anonymous files
        uploads_dir: Path | None = None,
        signature_policy: str | None = None,
    ) -> None:
        self.uploads_dir = uploads_dir
        self._signature_policy = signature_policy
        self._lock = threading.Lock()
        self._open_store = store
        self._open_client = client
        self._store: Store | None = None
        self._client: RegistryClient | None = None
        self.scratch_dir = scratch_dir

    @property
    def store(self) -> Store:
        """Raises: PybuildError if this context was made without one."""
        with self._lock:
            if self._store is None:
                if self._open_store is None:
                    raise PybuildError("the local store is not available here")
                self._store = self._open_store()
            return self._store

    def check_policy(self, transport: str, scopes: Sequence[str]) -> None:
        """Raise ConfigError unless policy.json lets images of this place be used; scopes run from exact to general.

        Not for registries, which their client's own policy is about, nor for pybuild's store.
        """
        from registry.policy import load_policy

        load_policy(os.environ, self._signature_policy).check(transport, list(scopes))

    def known_ratelimits(self) -> Mapping[str, RateLimit]:
        """The pulls left by registry, as far as registries told; asks nobody, opens nothing."""
        client = self._client
        return {} if client is None else client.known_ratelimits()

    @property
    def has_store(self) -> bool:
        return self._open_store is not None

    @property
    def client(self) -> RegistryClient:
        """Raises: PybuildError if this context was made without one."""
        with self._lock:
            if self._client is None:
                if self._open_client is None:
                    raise PybuildError("registries are not available here")
                self._client = self._open_client()
            return self._client


class BlobInput:
    """One blob on its way to a destination: may be opened again, at any offset; counted and cancellable."""

    __slots__ = ("_cancelled", "_moved", "_progress", "descriptor", "source")

    def __init__(
        self,
        descriptor: Descriptor,
        source: ImageSource,
        *,
        progress: Callable[[int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self.descriptor = descriptor
        self.source = source
        self._progress = progress
        self._cancelled = cancelled
        self._moved = 0

    @property
    def moved_bytes(self) -> int:
        """How many bytes were read so far, over all openings."""
        return self._moved

    def open(self, offset: int = 0) -> CountingStream:
        """The bytes from `offset` on, unverified: for destinations that check them theirselves."""
        return CountingStream(self, self.source.open_blob(self.descriptor, offset), offset)

    def open_verified(self) -> VerifyingStream:
        """The whole blob; its last bytes come only after the digest was found right."""
        return VerifyingStream(self.open(), self.descriptor)

    def count(self, size: int, position: int) -> None:
        """Account for `size` bytes, which end at `position` of the blob. Raises: Cancelled."""
        self._moved += size
        if self._cancelled is not None and self._cancelled():
            raise Cancelled()
        if self._progress is not None:
            self._progress(position)


class _Wrapped:
    """A stream over another, which it closes."""

    __slots__ = ("_stream",)

    _stream: ByteStream

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CountingStream(_Wrapped):
    """A stream that tells its `BlobInput` of each read."""

    __slots__ = ("_blob", "_position")

    def __init__(self, blob: BlobInput, stream: ByteStream, offset: int) -> None:
        self._blob = blob
        self._stream = stream
        self._position = offset

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        self._blob.count(len(data), self._position)
        return data


class VerifyingStream(_Wrapped):
    """A stream that ends well only if its bytes are those that the descriptor promises.

    `hasher` has seen the blob's first `offset` bytes already. The check comes before the last bytes
    are handed out, so that a consumer who counts to the size cannot miss it.
    """

    __slots__ = ("_descriptor", "_hasher", "_left")

    def __init__(
        self,
        stream: ByteStream,
        descriptor: Descriptor,
        *,
        offset: int = 0,
        hasher: hashlib._Hash | None = None,
    ) -> None:
        self._stream = stream
        self._descriptor = descriptor
        self._hasher = descriptor.digest.hasher() if hasher is None else hasher
        self._left = descriptor.size_bytes - offset
        if self._left == 0:
            self._finish()

    def read(self, size: int = -1, /) -> bytes:
        """Raises: DigestMismatch, SizeMismatch."""
        if size < 0:
            return b"".join(iter(lambda: self.read(CHUNK_BYTES), b""))
        if self._left == 0 or size == 0:
            return b""
        data = self._stream.read(min(size, self._left))
        if not data:
            have = self._descriptor.size_bytes - self._left
            raise SizeMismatch(
                f"blob {self._descriptor.digest} ends after {have} of {self._descriptor.size_bytes} bytes"
            )
        self._hasher.update(data)
        self._left -= len(data)
        if self._left == 0:
            self._finish()
        return data

    def _finish(self) -> None:
        # Reading past the end also lets an HTTP connection go back to its pool.
        if self._stream.read(1):
            raise SizeMismatch(f"blob {self._descriptor.digest} has more than its {self._descriptor.size_bytes} bytes")
        found = Digest.from_hasher(self._hasher)
        if found != self._descriptor.digest:
            raise DigestMismatch(f"blob {self._descriptor.digest} has the wrong bytes: they hash to {found}")


def path_scopes(path: Path, ref: str | None = None) -> list[str]:
    """The scopes of a directory in policy.json: with its name in it, itself, and the directories above."""
    whole = os.path.realpath(path)
    named = [f"{whole}:{ref}"] if ref else []
    parents = [str(p) for p in Path(whole).parents]
    return [*named, whole, *parents]


def read_blob(source: ImageSource, descriptor: Descriptor, limit_bytes: int) -> bytes:
    """A small blob whole and verified, such as a config.

    Raises: SizeMismatch beyond `limit_bytes`, DigestMismatch, BlobNotFound.
    """
    if descriptor.size_bytes > limit_bytes:
        raise SizeMismatch(
            f"blob {descriptor.digest} of {descriptor.size_bytes} bytes is larger than the {limit_bytes} allowed"
        )
    parts: list[bytes] = []
    with VerifyingStream(source.open_blob(descriptor), descriptor) as stream:
        while data := stream.read(CHUNK_BYTES):
            parts.append(data)
    return b"".join(parts)


def check_manifest(manifest: RawManifest, expected: Digest | None) -> RawManifest:
    """`manifest`, if it is of `expected` and of a sane size.

    Raises: DigestMismatch; ImageError if it is larger than MAX_MANIFEST_BYTES.
    """
    if len(manifest.raw) > MAX_MANIFEST_BYTES:
        raise ImageError(f"manifest of {len(manifest.raw)} bytes is larger than the {MAX_MANIFEST_BYTES} allowed")
    wanted = expected or manifest.digest
    hasher = wanted.hasher()
    hasher.update(manifest.raw)
    found = Digest.from_hasher(hasher)
    if found != wanted:
        raise DigestMismatch(f"manifest {wanted} has the wrong bytes: they hash to {found}")
    return manifest if manifest.digest == wanted else manifest._replace(digest=wanted)


def is_whole(
    digest: Digest,
    read: Callable[[Digest], RawManifest | None],
    has_blob: Callable[[Descriptor], bool],
    depth: int = 4,
) -> bool:
    """Whether a local place has the manifest or index and everything beneath it, by looking at each part."""
    try:
        raw = read(digest)
        if raw is None or depth < 0:
            return False
        document = parse_manifest(check_manifest(raw, digest).raw, raw.media_type)
    except (ImageError, ContentError):
        return False
    if isinstance(document, Index):
        return all(is_whole(d.digest, read, has_blob, depth - 1) for d in document.manifests)
    return all(has_blob(d) for d in (document.config, *document.layers) if not d.urls)


# Transport name -> the module with its `parse(rest) -> ImageLocation`.
_MODULES = {
    "docker": "registry.transports.docker",
    "oci": "registry.transports.oci",
    "oci-archive": "registry.transports.archive",
    "docker-archive": "registry.transports.dockerarchive",
    "dir": "registry.transports.directory",
    "storage": "registry.transports.storage",
    "containers-storage": "registry.transports.foreign",
    "docker-daemon": "registry.transports.foreign",
}


def transport_names() -> tuple[str, ...]:
    """The known transports, as they are written."""
    return tuple(name + ("://" if name == "docker" else ":") for name in _MODULES)


def split_transport(text: str) -> tuple[str | None, str]:
    """Split `text` into a known transport's name, or None, and the rest.

    Raises: InvalidReference for `something://` that is no transport.
    """
    head, colon, rest = text.partition(":")
    if colon and head in _MODULES:
        if head == "docker":
            if not rest.startswith("//"):
                raise InvalidReference(f"invalid image name {text!r}", hint=f"write docker://{rest.lstrip('/')}")
            rest = rest[2:]
        return head, rest
    if rest.startswith("//"):
        raise InvalidReference(
            f"unknown transport {head!r} in {text!r}", hint="the transports are " + ", ".join(transport_names())
        )
    return None, text


def parse_location(text: str, default: Literal["storage", "docker"] = "storage") -> ImageLocation:
    """Parse `TRANSPORT:rest`; a name without a transport is of `default`'s. Nothing is opened.

    Raises: InvalidReference.
    """
    from importlib import import_module

    name, rest = split_transport(text)
    if not rest:
        raise InvalidReference(f"invalid image name {text!r}: nothing follows the transport")
    module = import_module(_MODULES[name or default])
    try:
        location: ImageLocation = module.parse(name or default, rest)
    except InvalidReference as e:
        if name is None and ":" in text and e.hint is None:
            e.hint = "the transports are " + ", ".join(transport_names())
        raise
    return location
