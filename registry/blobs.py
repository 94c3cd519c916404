"""Reading a blob from a registry: verified, resumed, and moved to the next endpoint when one fails.

Spec: distribution-spec, Pulling blobs; RFC 9110 section 14 (Range)
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from layers.errors import ContentError, DigestMismatch, PybuildError, SizeMismatch
from layers.oci import Descriptor
from registry.errors import NetworkError, NotFoundError, RegistryError, ServerError, redact_url
from registry.hosts import Endpoint
from registry.http import HttpResponse
from registry.wire import Call, Wire

if TYPE_CHECKING:
    import hashlib

_PROGRESS_BYTES = 1 << 18
_SKIP_BYTES = 1 << 18
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\Z")


class BlobReader(io.RawIOBase):
    """The bytes of a blob from `offset` on.

    Reads resume at the byte where a connection broke, by Range, or by skipping where Range is
    ignored. `served_by` is told who is read from, and whether the endpoints before it lacked no more
    than this blob. The read that brings the last byte verifies size and digest before it returns. For an
    `offset` above 0 the digest is verified only with a `hasher` that has seen what lies before it.
    Not thread-safe.
    """

    def __init__(
        self,
        wire: Wire,
        endpoints: Sequence[tuple[Endpoint, Call]],
        descriptor: Descriptor,
        *,
        offset: int = 0,
        hasher: hashlib._Hash | None = None,
        served_by: Callable[[Endpoint, bool], None] | None = None,
    ) -> None:
        super().__init__()
        self._wire = wire
        self._endpoints = list(endpoints)
        self._descriptor = descriptor
        self._served_by = served_by
        self._response: HttpResponse | None = None
        self._hasher = hasher if hasher is not None or offset else descriptor.digest.hasher()
        self._failures = 0
        self._marked = offset
        self._done = False
        self.offset = offset
        if offset > descriptor.size_bytes:
            raise SizeMismatch(f"cannot read {descriptor.digest} from {offset}: it has {descriptor.size_bytes} bytes")
        if offset < descriptor.size_bytes or descriptor.size_bytes == 0:
            self._connect()

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that is being read from."""
        return self._endpoints[0][0]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, all that is left if negative; b"" at the verified end.

        Raises: DigestMismatch, SizeMismatch; NetworkError or another RegistryError once retries are used up; Cancelled.
        """
        if size < 0:
            return b"".join(iter(lambda: self.read(1 << 20), b""))
        if size == 0 or self._done:
            return b""
        left = self._descriptor.size_bytes - self.offset
        while left > 0:
            try:
                response = self._response or self._connect()
                data = response.read(min(size, left))
                if data:
                    break
                raise NetworkError(
                    f"{redact_url(response.url)}: the body ended {left} bytes early", url=response.url, retryable=True
                )
            except NetworkError as e:
                self._recover(e)
        else:
            self._finish()
            return b""
        self.offset += len(data)
        if self._hasher is not None:
            self._hasher.update(data)
        if self.offset - self._marked >= _PROGRESS_BYTES:
            # A connection that brought something new earns its retries back.
            self._marked, self._failures = self.offset, 0
        if self.offset == self._descriptor.size_bytes:
            self._finish()
        return data

    def _finish(self) -> None:
        self._done = True
        response, self._response = self._response, None
        if response is not None:
            try:
                extra = response.read(1)
            except NetworkError:
                extra = b""
            response.close()
            if extra:
                raise SizeMismatch(
                    f"blob {self._descriptor.digest} from {self.endpoint.host} is longer than the "
                    f"{self._descriptor.size_bytes} bytes promised"
                )
        if self._hasher is None:
            return
        actual = f"{self._hasher.name}:{self._hasher.hexdigest()}"
        if actual != self._descriptor.digest:
            raise DigestMismatch(
                f"blob {self._descriptor.digest} from {self.endpoint.host} has the wrong content: it is {actual}",
                hint="the registry, or something between, damaged it; pull again",
            )

    def _recover(self, error: NetworkError) -> None:
        """Decide whether to go on after a broken connection, and wait. Raises: `error` if not."""
        self._drop()
        self._failures += 1
        endpoint = self.endpoint
        allowed = 2 if endpoint.mirror else self._wire.policy.attempts
        if not error.retryable or self._failures >= allowed:
            if len(self._endpoints) == 1:
                raise error
            self._next_endpoint()
            return
        self._wire.pacer.wait(self._wire.policy.delay_s(self._failures, self._wire.pacer.jitter))

    def _next_endpoint(self) -> None:
        self._endpoints.pop(0)
        self._failures = 0

    def _connect(self) -> HttpResponse:
        useful = True
        while True:
            try:
                self._response = self._open()
                break
            except (RegistryError, ContentError) as e:
                if len(self._endpoints) == 1:
                    raise
                # A mirror that lacks one blob may have the others; one that is away has none.
                useful = useful and isinstance(e, NotFoundError)
                self._next_endpoint()
        if self._served_by is not None:
            self._served_by(self.endpoint, useful)
        return self._response

    def _open(self) -> HttpResponse:
        endpoint, call = self._endpoints[0]
        if self.offset:
            headers = {**call.headers, "Range": f"bytes={self.offset}-"}
            call = call._replace(headers=headers, ok=(200, 206))
        response = self._wire.open(endpoint, call)
        try:
            self._check(response)
        except BaseException:
            response.close()
            raise
        return response

    def _check(self, response: HttpResponse) -> None:
        size = self._descriptor.size_bytes
        if response.status == 206:
            match = _CONTENT_RANGE.match(response.header("Content-Range").strip())
            if match is None or int(match[1]) != self.offset or match[3] not in {"*", str(size)}:
                raise ServerError(
                    f"{redact_url(response.url)}: asked for bytes from {self.offset}, "
                    f"got {response.header('Content-Range')[:80]!r}",
                    url=response.url,
                )
            return
        length = response.content_length
        if length is not None and length != size:
            raise SizeMismatch(
                f"blob {self._descriptor.digest} from {self.endpoint.host} has {length} bytes, not the {size} promised"
            )
        left = self.offset
        while left:
            # Range was ignored: pass over what we have.
            data = response.read(min(_SKIP_BYTES, left))
            if not data:
                raise NetworkError(
                    f"{redact_url(response.url)}: the body ended early", url=response.url, retryable=True
                )
            left -= len(data)

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        if not self.closed:
            try:
                self._drop()
            except PybuildError:
                pass
        super().close()
