"""The local store seen as a registry: what `registry.serve` answers, without HTTP.

A repository's path is a name of the store as people write it: `app` is the image `app`, `ghcr.io/o/app`
is that. Blobs have no repository here: whatever the store has is in each. Names whose host has a
port cannot be a repository's path, and are not served.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layers.errors import BlobNotFound, ContentError, ImageError
from layers.oci import (
    MANIFEST_MEDIA_TYPES,
    MAX_MANIFEST_BYTES,
    MEDIA_OCI_INDEX,
    Descriptor,
    Digest,
    Manifest,
    encode_json,
    parse_manifest,
)
from layers.values import NamedTuple
from registry.errors import InvalidReference
from registry.reference import Reference

if TYPE_CHECKING:
    from layers.blobs import BlobIngest
    from layers.store import Store

MAX_UPLOADS = 256
_IDLE_S = 3600.0
_UNTAGGED = "@"
"""With a digest, the store's name of a manifest without a tag: what keeps it from being collected."""
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")


class Refusal(Exception):
    """An answer that is an error: HTTP status, the distribution-spec's code, and words."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class Stored(NamedTuple):
    """A manifest as it is served."""

    raw: bytes
    media_type: str
    digest: Digest


class Upload:
    """A blob on its way in. One request at a time writes to it."""

    def __init__(self, ingest: BlobIngest) -> None:
        self.ingest = ingest
        self.lock = threading.Lock()
        self.used = time.monotonic()


class ServedStore:
    """The operations of a registry over one store. Thread-safe."""

    def __init__(self, store: Store, *, read_only: bool = False) -> None:
        self._store = store
        self._read_only = read_only
        self._lock = threading.Lock()
        self._uploads: dict[str, Upload] = {}
        self._subjects: dict[Digest, tuple[Digest, Descriptor] | None] = {}

    def close(self) -> None:
        """Drop the uploads that nobody finished."""
        with self._lock:
            left, self._uploads = list(self._uploads.values()), {}
        for upload in left:
            with upload.lock:
                upload.ingest.abort()

    # Names

    def _reference(self, path: str) -> Reference:
        if not _PATH.match(path) or len(path) > 255:
            raise Refusal(400, "NAME_INVALID", "invalid repository name")
        try:
            return Reference.parse(path)
        except InvalidReference as e:
            raise Refusal(400, "NAME_INVALID", str(e)) from e

    def _tagged(self, path: str, tag: str) -> str:
        try:
            return self._reference(path).with_tag(tag).canonical()
        except InvalidReference as e:
            raise Refusal(400, "TAG_INVALID", str(e)) from e

    def tags(self, path: str) -> list[str]:
        """The repository's tags, sorted. Raises: Refusal."""
        prefix = self._reference(path).repository + ":"
        found = [n.name[len(prefix) :] for n in self._store.names.list() if n.name.startswith(prefix)]
        found = sorted(tag for tag in found if "#" not in tag and "/" not in tag and "@" not in tag)
        if not found:
            raise Refusal(404, "NAME_UNKNOWN", "there is no such repository")
        return found

    def catalog(self) -> list[str]:
        """All repositories that can be named in a path, sorted."""
        found = set()
        for named in self._store.names.list():
            if named.name.startswith(_UNTAGGED) or "#" in named.name:
                continue
            path = Reference.parse(named.name).without_target().familiar()
            if _PATH.match(path):
                found.add(path)
        return sorted(found)

    # Manifests

    def manifest(self, path: str, reference: str) -> Stored:
        """The manifest of a tag or digest. Raises: Refusal."""
        if ":" in reference:
            self._reference(path)
            digest, media_type = _digest(reference), ""
        else:
            descriptor = self._store.names.get(self._tagged(path, reference))
            if descriptor is None:
                raise Refusal(404, "MANIFEST_UNKNOWN", "there is no such manifest")
            digest, media_type = descriptor.digest, descriptor.media_type
        info = self._store.stat(digest)
        if info is None or info.size_bytes > MAX_MANIFEST_BYTES:
            raise Refusal(404, "MANIFEST_UNKNOWN", "there is no such manifest")
        try:
            raw = self._store.read(digest, MAX_MANIFEST_BYTES)
            document = parse_manifest(raw, media_type)
        except BlobNotFound as e:
            raise Refusal(404, "MANIFEST_UNKNOWN", "there is no such manifest") from e
        except ImageError as e:
            # A layer or config, asked for as a manifest.
            raise Refusal(404, "MANIFEST_UNKNOWN", "that is no manifest") from e
        return Stored(raw, document.media_type, digest)

    def put_manifest(self, path: str, reference: str, raw: bytes, media_type: str) -> tuple[Digest, Digest | None]:
        """Keep a manifest; its digest, and that of its subject. Raises: Refusal, StoreError."""
        self._check_writable()
        by_digest = ":" in reference
        if by_digest:
            self._reference(path)
        name = _UNTAGGED + reference if by_digest else self._tagged(path, reference)
        digest = Digest.of(raw)
        if by_digest and _digest(reference) != digest:
            raise Refusal(400, "DIGEST_INVALID", f"the manifest's digest is {digest}")
        try:
            document = parse_manifest(raw, media_type)
        except ImageError as e:
            raise Refusal(400, "MANIFEST_INVALID", str(e)) from e
        subject: Digest | None = None
        if isinstance(document, Manifest):
            subject = document.subject.digest if document.subject is not None else None
            parts = [d for d in (document.config, *document.layers) if not d.urls]
        else:
            parts = list(document.manifests)
        for part in parts:
            if self._store.stat(part.digest) is None:
                raise Refusal(400, "MANIFEST_BLOB_UNKNOWN", f"{part.digest} is not here")
        self._store.claim(blobs=[part.digest for part in parts])
        self._store.put(raw, document.media_type)
        try:
            described = Descriptor(media_type=document.media_type, digest=digest, size_bytes=len(raw))
            self._store.names.set(name, described)
        except BlobNotFound as e:
            raise Refusal(400, "MANIFEST_BLOB_UNKNOWN", str(e)) from e
        return digest, subject

    def delete_manifest(self, path: str, reference: str) -> None:
        """Remove a tag; or by digest the manifest with all its tags in this repository. Raises: Refusal."""
        self._check_writable()
        if ":" not in reference:
            if not self._store.names.delete(self._tagged(path, reference)):
                raise Refusal(404, "MANIFEST_UNKNOWN", "there is no such tag")
            return
        digest = _digest(reference)
        prefix = self._reference(path).repository + ":"
        names = [n for n in self._store.names.of(digest) if n.startswith(prefix) or n == _UNTAGGED + digest]
        if not names:
            raise Refusal(404, "MANIFEST_UNKNOWN", "there is no such manifest")
        for name in names:
            self._store.names.delete(name)

    def referrers(self, path: str, subject: str, artifact_type: str | None) -> bytes:
        """The index of the manifests with that subject. Raises: Refusal."""
        self._reference(path)
        wanted = _digest(subject)
        found: dict[Digest, Descriptor] = {}
        for named in self._store.names.list():
            entry = self._subject_of(named.descriptor)
            if entry is not None and entry[0] == wanted and artifact_type in {None, entry[1].artifact_type}:
                found[entry[1].digest] = entry[1]
        document: dict[str, Any] = {"schemaVersion": 2, "mediaType": MEDIA_OCI_INDEX}
        document["manifests"] = [found[digest].to_json() for digest in sorted(found)]
        return encode_json(document)

    def _subject_of(self, descriptor: Descriptor) -> tuple[Digest, Descriptor] | None:
        """The subject of a named manifest and how it is listed as a referrer; remembered, as digests are for ever."""
        if descriptor.digest in self._subjects:
            return self._subjects[descriptor.digest]
        entry = None
        if descriptor.media_type in MANIFEST_MEDIA_TYPES:
            try:
                document = parse_manifest(self._store.read(descriptor.digest, MAX_MANIFEST_BYTES))
            except (ContentError, ImageError):
                return None
            if isinstance(document, Manifest) and document.subject is not None:
                listed = Descriptor(
                    media_type=document.media_type,
                    digest=descriptor.digest,
                    size_bytes=len(document.raw),
                    annotations=document.annotations,
                    artifact_type=document.artifact_type or document.config.media_type,
                )
                entry = (document.subject.digest, listed)
        self._subjects[descriptor.digest] = entry
        return entry

    # Blobs

    def blob(self, path: str, digest: str) -> tuple[Path, int]:
        """Where a blob lies, and its size. Raises: Refusal."""
        self._reference(path)
        info = self._store.stat(_digest(digest))
        file = self._store.path(_digest(digest)) if info is not None else None
        if info is None or file is None:
            raise Refusal(404, "BLOB_UNKNOWN", "there is no such blob")
        return file, info.size_bytes

    def has_blob(self, digest: str) -> bool:
        """Whether the blob is here, and if so stays while this process runs."""
        return _digest(digest) in self._store.claim(blobs=[_digest(digest)])

    def begin(self, path: str) -> tuple[str, Upload]:
        """Begin an upload. Raises: Refusal."""
        self._check_writable()
        self._reference(path)
        with self._lock:
            now = time.monotonic()
            idle = [k for k, u in self._uploads.items() if now - u.used > _IDLE_S and not u.lock.locked()]
            dropped = [self._uploads.pop(key) for key in idle]
            if len(self._uploads) >= MAX_UPLOADS:
                raise Refusal(429, "TOOMANYREQUESTS", f"{MAX_UPLOADS} uploads are under way")
            key = os.urandom(16).hex()
            upload = self._uploads[key] = Upload(self._store.ingest())
        for old in dropped:
            old.ingest.abort()
        return key, upload

    def upload(self, key: str) -> Upload:
        """An upload under way. Raises: Refusal."""
        with self._lock:
            upload = self._uploads.get(key)
        if upload is None:
            raise Refusal(404, "BLOB_UPLOAD_UNKNOWN", "there is no such upload")
        upload.used = time.monotonic()
        return upload

    def finish(self, key: str, digest: str) -> Digest:
        """Make a whole upload a blob; the caller holds its lock. Raises: Refusal if it has another digest."""
        upload = self.upload(key)
        wanted = _digest(digest)
        with self._lock:
            self._uploads.pop(key, None)
        if wanted.algorithm != "sha256":
            upload.ingest.abort()
            raise Refusal(400, "UNSUPPORTED", "blobs are kept by their sha256 digest")
        found = upload.ingest.commit().digest
        if found != wanted:
            # It stays under its true name until the next gc, which is no harm.
            raise Refusal(400, "DIGEST_INVALID", f"the blob's digest is {found}")
        return found

    def cancel(self, key: str) -> None:
        """Forget an upload. Raises: Refusal."""
        upload = self.upload(key)
        with self._lock:
            self._uploads.pop(key, None)
        with upload.lock:
            upload.ingest.abort()

    def _check_writable(self) -> None:
        if self._read_only:
            raise Refusal(405, "UNSUPPORTED", "this registry is read-only")


def _digest(text: str) -> Digest:
    try:
        return Digest(text)
    except ImageError as e:
        raise Refusal(400, "DIGEST_INVALID", "invalid digest") from e


def paged(names: list[str], last: str, size: int | None) -> tuple[list[str], bool]:
    """The names after `last`, at most `size`; whether there are more."""
    rest = [name for name in names if name > last] if last else names
    return (rest, False) if size is None else (rest[:size], len(rest) > size)


def error_body(refusal: Refusal) -> bytes:
    """The distribution-spec's document of an error."""
    return json.dumps({"errors": [{"code": refusal.code, "message": refusal.message, "detail": None}]}).encode()
