"""Sending a blob to a registry: mount, monolithic, chunked, and resumed after a break or a death.

A known digest goes in one PUT. Blobs larger than `CHUNK_BYTES` whose caller keeps sessions, blobs of
unknown digest, and what is too large for a proxy on the way go in PATCHes. After a break the registry
is asked how much it has; one that forgot (distribution before 3.0 refuses an upload that broke within
a request) gets the blob anew.

Spec: distribution-spec, Pushing blobs (POST then PUT; chunked; cancel; get upload status)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from layers.errors import DigestMismatch, ImageError, SizeMismatch
from layers.oci import Descriptor, Digest
from layers.values import NamedTuple
from registry.auth import Scope
from registry.errors import AuthError, NetworkError, NotFoundError, RateLimitError, RegistryError, ServerError
from registry.hosts import Endpoint
from registry.wire import Call, Reply, Wire, location_of

CHUNK_BYTES = 64 << 20
"""The size of one PATCH where a session is kept: what a killed upload loses at most."""
MAX_HELD_BYTES = 32 << 20
"""The largest piece of a blob of unknown digest: it is held in memory, to be sent with its length."""
_HELD_BYTES = 8 << 20
_PROGRESS_BYTES = 1 << 20
_READ_BYTES = 1 << 18
_RANGE = re.compile(r"(?:bytes=)?(\d{1,18})-(\d{1,18})\Z")
_LOST_SESSION = frozenset({400, 404, 416})
_TOO_LARGE = 413
_NO_CHUNKS = frozenset({400, 404, 405, 411, 415, 416, 501})
_SMALLER = (16 << 20, 4 << 20, 1 << 20)
"""Sizes of PATCHes to fall back to where larger bodies do not get through: nginx takes 1 MiB unless told otherwise."""
_BREAKS_WHOLE = 2
"""Connections that may break under one large PUT before it is sent in pieces."""

Source = Callable[[int], "BinaryIO | Iterable[bytes]"]
"""Opens the blob's bytes at an offset: a binary file, which is closed after use, or an iterable of chunks."""
Progress = Callable[[int], None]
"""Told the offset reached; it may go back when a registry has lost what it was sent."""


class UploadSession(NamedTuple):
    """An upload that another process can go on with. `location` may hold what the registry trusts: keep it private."""

    registry: str
    repository: str
    location: str
    offset: int
    digest: str = ""
    chunk_bytes: int = CHUNK_BYTES

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> UploadSession:
        """Raises: ImageError if the text is no session."""
        try:
            doc = json.loads(text)
            session = cls(**doc)
        except (ValueError, TypeError, RecursionError) as e:
            raise ImageError("the saved upload session is damaged") from e
        kinds = (str, str, str, int, str, int)
        if not all(type(v) is k for v, k in zip(session, kinds, strict=True)) or session.offset < 0:
            raise ImageError("the saved upload session is damaged")
        return session

    def __repr__(self) -> str:
        return f"UploadSession({self.registry}/{self.repository}, offset={self.offset}, digest={self.digest!r})"


class Uploader:
    """One blob on its way to one repository. Not thread-safe; make one for each blob."""

    def __init__(
        self,
        wire: Wire,
        endpoint: Endpoint,
        source: Source,
        descriptor: Descriptor | None,
        *,
        progress: Progress | None = None,
        save: Callable[[UploadSession | None], None] | None = None,
        chunk_bytes: int | None = None,
        from_repository: str | None = None,
    ) -> None:
        self._wire = wire
        self._endpoint = endpoint
        self._source = source
        self._descriptor = descriptor
        self._progress = progress or (lambda offset: None)
        self._save = save
        self._chunk_bytes = chunk_bytes
        self._from = from_repository
        self._minimum = 0
        self._what = f"cannot push blob {descriptor.digest.short if descriptor else ''} to {_name(endpoint)}"
        self._scopes = (Scope.repository(endpoint.repository, "pull", "push"),)

    def mount(self, digest: Digest, from_repository: str) -> str | None:
        """Ask to mount; None if it is done, else the location of the upload that the registry began instead."""
        scopes = (*self._scopes, Scope.repository(from_repository, "pull"))
        path = f"{self._endpoint.repository}/blobs/uploads/?mount={digest}&from={from_repository}"
        reply = self._fetch("POST", path, ok=(201, 202), scopes=scopes)
        return None if reply.status == 201 else location_of(reply, self._what)

    def run(self, session: UploadSession | None = None) -> Descriptor:
        """Send the blob, going on with `session` if the registry still knows it.

        Raises: RegistryError by class, DigestMismatch, SizeMismatch, Cancelled, and what the source raises.
        """
        failures, best = 0, 0
        while True:
            try:
                location, offset, session = self._begin(session)
                if self._descriptor is not None and offset == 0 and not self._wants_chunks():
                    return self._put_whole(location, self._descriptor)
                return self._patch(location, offset)
            except _Interrupted as interrupted:
                error, session = interrupted.error, interrupted.session
                # Only what no attempt before has reached earns the retries back: a registry that
                # forgets what it was sent must not be fed for ever.
                if session is not None and session.offset >= best + _PROGRESS_BYTES:
                    failures, best = 0, session.offset
                elif failures + 1 == _BREAKS_WHOLE and not self._wants_chunks():
                    self._smaller()
            except _Present as present:
                self._forget()
                return present.descriptor
            except RegistryError as e:
                # Errors of the location itself have been retried by the wire.
                if session is not None and e.status in _LOST_SESSION:
                    error, session = e, None
                elif e.status == _TOO_LARGE and self._smaller():
                    error, session, failures = e, None, 0
                elif self._chunk_bytes != 0 and self._chunked(e):
                    self._chunk_bytes, error, session = 0, e, None
                else:
                    raise
            failures += 1
            if failures >= self._wire.policy.attempts:
                raise error
            self._wire.pacer.wait(self._wire.policy.delay_s(failures, self._wire.pacer.jitter))

    def _wants_chunks(self) -> bool:
        if self._descriptor is None:
            return True
        if self._chunk_bytes is not None:
            return self._chunk_bytes > 0
        return self._save is not None and self._descriptor.size_bytes > CHUNK_BYTES

    def _smaller(self) -> bool:
        """Let smaller pieces be sent from now on; False if they are as small as can be, or chunks are ruled out."""
        if self._descriptor is None or self._chunk_bytes == 0:
            return False
        now = (self._chunk_bytes or CHUNK_BYTES) if self._wants_chunks() else self._descriptor.size_bytes
        following = next((size for size in _SMALLER if max(size, self._minimum) < now), None)
        if following is None:
            return False
        self._chunk_bytes = following
        return True

    def _chunked(self, error: RegistryError) -> bool:
        """Whether the registry dislikes chunks (GAR has none, GHCR small ones), so that one PUT is worth a try."""
        return error.status in _NO_CHUNKS and self._descriptor is not None and self._wants_chunks()

    def _begin(self, session: UploadSession | None) -> tuple[str, int, UploadSession | None]:
        """The location and offset to go on from; asks for a new upload where there is none to resume."""
        if session is not None:
            found = self._status(session)
            if found is not None:
                location, offset = found
                self._progress(offset)
                return location, offset, session
            if self._descriptor is not None and self._arrived(self._descriptor):
                # The closing PUT was carried out, only its answer did not reach us.
                raise _Present(self._descriptor)
        if self._from and self._descriptor is not None:
            begun = self._try_mount(self._descriptor, self._from)
            if begun is not None:
                return begun, 0, None
        reply = self._fetch("POST", f"{self._endpoint.repository}/blobs/uploads/", ok=(202,))
        minimum = reply.headers.get("OCI-Chunk-Min-Length", "")
        self._minimum = int(minimum[:18]) if minimum.isascii() and minimum.isdigit() else 0
        if self._minimum > MAX_HELD_BYTES and self._descriptor is None:
            raise ServerError(f"{self._what}: the registry wants pieces of {minimum[:20]} bytes", url=reply.url)
        self._progress(0)
        return location_of(reply, self._what), 0, None

    def _try_mount(self, descriptor: Descriptor, from_repository: str) -> str | None:
        """The location of the upload that the registry began instead of mounting; None if it refused both."""
        self._from = None
        try:
            location = self.mount(descriptor.digest, from_repository)
        except RegistryError as e:
            # The other repository may be closed to us, or the registry know no mounts.
            if e.status in {400, 401, 403, 404, 405}:
                return None
            raise
        if location is None:
            raise _Present(descriptor)
        return location

    def _arrived(self, descriptor: Descriptor) -> bool:
        try:
            reply = self._fetch("HEAD", f"{self._endpoint.repository}/blobs/{descriptor.digest}", ok=(200,))
        except RegistryError as e:
            if e.status is None or isinstance(e, AuthError | RateLimitError):
                raise
            return False
        return reply.headers.get("Content-Length", "") in {"", str(descriptor.size_bytes)}

    def _status(self, session: UploadSession) -> tuple[str, int] | None:
        """What the registry has of a session; None if it is lost."""
        try:
            reply = self._fetch("GET", session.location, ok=(204, 202, 200))
        except (NotFoundError, ServerError):
            return None
        except RegistryError as e:
            if isinstance(e, AuthError | NetworkError | RateLimitError):
                raise
            return None
        offset = _offset_of(reply, fallback=None)
        size = self._descriptor.size_bytes if self._descriptor else None
        if offset is None or (size is not None and offset > size):
            return None
        location = location_of(reply, self._what) if reply.headers.get("Location") else session.location
        return location, offset

    def _put_whole(self, location: str, descriptor: Descriptor) -> Descriptor:
        self._remember(location, 0, 0)
        body = _Counted(self._source, 0, descriptor.size_bytes, self._progress)
        try:
            reply = self._fetch(
                "PUT",
                with_query(location, f"digest={descriptor.digest}"),
                ok=(201, 204),
                headers={"Content-Type": "application/octet-stream"},
                body=body,
                length=descriptor.size_bytes,
                attempts=1,
            )
        except RegistryError as e:
            body.check_whole()
            raise self._interrupted(e, location, 0) from e
        self._check_digest(reply, descriptor.digest)
        self._forget()
        return descriptor

    def _patch(self, location: str, offset: int) -> Descriptor:
        """Send PATCHes from `offset` to the end, then the closing PUT."""
        size = self._descriptor.size_bytes if self._descriptor else None
        hasher = hashlib.sha256() if self._descriptor is None else None
        # Resuming to the end of a known blob needs one PATCH only if no session is kept.
        limit = (self._chunk_bytes or CHUNK_BYTES) if self._wants_chunks() else None
        limit = max(limit, self._minimum) if limit is not None else None
        if hasher is not None and offset:
            for chunk in _Counted(self._source, 0, offset, lambda _: None):
                hasher.update(chunk)
        stream = _Pushback(self._source, offset) if size is None else None
        while size is None or offset < size:
            if stream is not None:
                data = stream.take(max(self._minimum, min(limit or CHUNK_BYTES, _HELD_BYTES)))
                if not data:
                    break
                assert hasher is not None
                hasher.update(data)
                body: Callable[[], Iterable[bytes]] = _Fixed(data)
                length = len(data)
            else:
                assert size is not None
                length = size - offset if limit is None else min(limit, size - offset)
                body = _Counted(self._source, offset, length, self._progress)
            location, offset = self._patch_one(location, offset, length, body)
            self._progress(offset)
        digest = self._descriptor.digest if self._descriptor else Digest.from_hasher(hasher or hashlib.sha256())
        try:
            reply = self._fetch(
                "PUT",
                with_query(location, f"digest={digest}"),
                ok=(201, 204),
                headers={"Content-Length": "0"},
                attempts=1,
            )
        except RegistryError as e:
            raise self._interrupted(e, location, offset) from e
        self._check_digest(reply, digest)
        self._forget()
        return self._descriptor or Descriptor(media_type="application/octet-stream", digest=digest, size_bytes=offset)

    def _patch_one(
        self, location: str, offset: int, length: int, body: Callable[[], Iterable[bytes]]
    ) -> tuple[str, int]:
        self._remember(location, offset, self._chunk_bytes or CHUNK_BYTES)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"{offset}-{offset + length - 1}",
        }
        try:
            reply = self._fetch("PATCH", location, ok=(202,), headers=headers, body=body, length=length, attempts=1)
        except RegistryError as e:
            if isinstance(body, _Counted):
                body.check_whole()
            raise self._interrupted(e, location, offset) from e
        reached = _offset_of(reply, fallback=offset + length)
        if reached != offset + length:
            raise ServerError(
                f"{self._what}: the registry has {reached} bytes after {offset + length} were sent", url=reply.url
            )
        return location_of(reply, self._what), offset + length

    def _interrupted(self, error: RegistryError, location: str, offset: int) -> Exception:
        """What to raise for a failed request: an interruption if going on may help, else the error itself."""
        digest = self._descriptor.digest if self._descriptor else ""
        session = UploadSession(self._endpoint.registry, self._endpoint.repository, location, offset, digest)
        if error.retryable:
            if self._descriptor is None:
                # The bytes already sent are not at hand any more to be hashed: only the source can start over.
                return _Interrupted(error, None)
            return _Interrupted(error, session)
        if "DIGEST_INVALID" in error.codes:
            return DigestMismatch(f"{self._what}: the registry computed another digest", hint="the source changed")
        return error

    def _remember(self, location: str, offset: int, chunk_bytes: int) -> None:
        if self._save is not None:
            digest = self._descriptor.digest if self._descriptor else ""
            registry, repository = self._endpoint.registry, self._endpoint.repository
            self._save(UploadSession(registry, repository, location, offset, digest, chunk_bytes))

    def _forget(self) -> None:
        if self._save is not None:
            self._save(None)

    def _check_digest(self, reply: Reply, digest: Digest) -> None:
        said = reply.headers.get("Docker-Content-Digest", "")
        if said and said != digest and said.partition(":")[0] == digest.algorithm:
            raise DigestMismatch(f"{self._what}: the registry stored {said[:80]} instead of {digest}")

    def _fetch(
        self,
        method: str,
        path: str,
        *,
        ok: tuple[int, ...],
        headers: dict[str, str] | None = None,
        body: Callable[[], Iterable[bytes]] | None = None,
        length: int | None = None,
        attempts: int | None = None,
        scopes: tuple[Scope, ...] | None = None,
    ) -> Reply:
        all_headers = headers or {}
        if method == "POST":
            all_headers = {"Content-Length": "0", **all_headers}
        call = Call(method, path, self._what, scopes or self._scopes, ok, all_headers, body, length, attempts)
        return self._wire.fetch(self._endpoint, call)


class _Interrupted(Exception):
    """A request broke; `session` is where to ask what arrived."""

    def __init__(self, error: RegistryError, session: UploadSession | None) -> None:
        super().__init__()
        self.error = error
        self.session = session


class _Present(Exception):
    """The registry has mounted the blob, or has it after all: nothing to send."""

    def __init__(self, descriptor: Descriptor) -> None:
        super().__init__()
        self.descriptor = descriptor


class _Fixed:
    """A body that is in memory; the same at each call."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __call__(self) -> Iterable[bytes]:
        return (self._data[i : i + _READ_BYTES] for i in range(0, len(self._data), _READ_BYTES))


class _Counted:
    """A part of the source as a body: exactly `length` bytes from `offset`, or an error.

    A source that is shorter or longer than its descriptor says must not reach the wire as a
    malformed request.
    """

    def __init__(self, source: Source, offset: int, length: int, progress: Progress) -> None:
        self._source = source
        self._offset = offset
        self._length = length
        self._progress = progress
        self._short: SizeMismatch | None = None

    def __call__(self) -> Iterable[bytes]:
        return iter(self)

    def __iter__(self) -> Iterator[bytes]:
        left = self._length
        for chunk in read_from(self._source, self._offset):
            piece = chunk if len(chunk) <= left else memoryview(chunk)[:left].tobytes()
            left -= len(piece)
            if piece:
                yield piece
                self._progress(self._offset + self._length - left)
            if left == 0:
                return
        if left:
            self._short = SizeMismatch(f"the source ended {left} bytes before its size")
            raise self._short

    def check_whole(self) -> None:
        """Raises: SizeMismatch if the source, not the connection, was at fault."""
        if self._short is not None:
            raise self._short


class _Pushback:
    """Cuts a source of unknown length into pieces of a given size."""

    def __init__(self, source: Source, offset: int) -> None:
        self._chunks = iter(read_from(source, offset))
        self._rest = b""

    def take(self, size: int) -> bytes:
        parts, total = [self._rest], len(self._rest)
        while total < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            parts.append(chunk)
            total += len(chunk)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]


def read_from(source: Source, offset: int) -> Iterator[bytes]:
    """The chunks of a source from `offset`; closes what it opened."""
    opened = source(offset)
    read = getattr(opened, "read", None)
    try:
        if read is None:
            assert not hasattr(opened, "readinto")
            yield from opened
        else:
            while chunk := read(_READ_BYTES):
                yield chunk
    finally:
        close = getattr(opened, "close", None)
        if close is not None:
            close()


def with_query(url: str, query: str) -> str:
    """Append to a URL's query: a location's own must survive (distribution-spec, closing PUT)."""
    return url + ("&" if "?" in url else "?") + query


def _offset_of(reply: Reply, *, fallback: int | None) -> int | None:
    """How many bytes the registry has, by the Range header: `0-N`, inclusive; `0-0` may mean one or none."""
    text = reply.headers.get("Range", "").strip()
    match = _RANGE.match(text)
    if match is None:
        # distribution answers `0--1`, and others nothing, for an upload that has no byte yet.
        return 0 if text.endswith("--1") else fallback
    return int(match[2]) + 1 if int(match[2]) else (fallback if fallback is not None else 0)


def _name(endpoint: Endpoint) -> str:
    return f"{endpoint.registry}/{endpoint.repository}"
