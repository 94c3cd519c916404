"""Files from the network for ADD and for build contexts: downloaded once, kept by digest, asked for again by ETag.

A file is kept in a directory of the store under its sha256, next to what the server said of it
under a digest of its URL. Both appear there by renames, so that builds at the same time cannot
harm each other. Credentials come from the build's secrets, by host, and go to no other.
Repositories are `builder.solve.gitfetch`'s.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote, urlsplit

from builder.errors import ContextError
from builder.solve.sourcetree import never_cancelled
from layers.errors import PybuildError
from layers.values import NamedTuple

if TYPE_CHECKING:
    from registry.http import HttpClient, HttpResponse
    from registry.retry import Pacer

Secrets = Callable[[str], bytes | None]
"""Gives the value of a build's secret by its id; None if there is none."""

_ATTEMPTS = 4
_RECORD_MAX_BYTES = 64 * 1024
_ALGORITHMS = {"sha256": 64, "sha384": 96, "sha512": 128}


class HttpFile(NamedTuple):
    """A downloaded file, mode 0600, its time set from Last-Modified (else 1970). `digest` is `sha256:...`."""

    path: Path
    digest: str
    name: str
    last_modified_s: int | None
    size_bytes: int

    @property
    def cache_key(self) -> str:
        """What a step that takes this file depends on."""
        return f"{self.digest} {self.name} {self.last_modified_s}"


def no_secrets(_id: str) -> bytes | None:
    """The secrets of a build that has none."""
    return None


def file_name(url: str) -> str:
    """The name under which ADD stores what is at `url`: the last component of its path."""
    try:
        name = posixpath.basename(posixpath.normpath(unquote(urlsplit(url).path)))
    except ValueError:
        name = ""
    return name if name not in ("", ".", "..") and "\0" not in name else "__unnamed__"


def parse_checksum(text: str) -> tuple[str, str]:
    """Parse `--checksum=sha256:...` into algorithm and hexadecimal digest. Raises: ContextError."""
    algorithm, _, value = text.partition(":")
    if algorithm not in _ALGORITHMS:
        raise ContextError(
            f"--checksum={text}: unsupported digest algorithm", hint="write it as sha256:, and 64 hexadecimal digits"
        )
    if len(value) != _ALGORITHMS[algorithm] or value.strip("0123456789abcdef"):
        raise ContextError(f"--checksum={text}: not a {algorithm} digest in lower-case hexadecimal")
    return algorithm, value


def fetch_http(
    url: str,
    cache: Path,
    *,
    checksum: str | None = None,
    secrets: Secrets = no_secrets,
    environ: Mapping[str, str] | None = None,
    cancelled: Callable[[], bool] = never_cancelled,
    progress: Callable[[int, int | None], None] | None = None,
) -> HttpFile:
    """Download `url` into the directory `cache`, or find it there, unchanged according to the server.

    `checksum` is checked, and spares the network if a file of that digest is there. `environ` holds
    the proxy variables. `progress` is called with the bytes so far and in all. Idempotent and
    thread-safe, between processes too. Raises: ContextError; Cancelled.
    """
    wanted = parse_checksum(checksum) if checksum else None
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if wanted is not None and wanted[0] == "sha256":
            known = _stored(cache, url, wanted[1])
            if known is not None:
                return known
        return _Download(url, cache, wanted, secrets, environ or {}, cancelled, progress).run()
    except OSError as e:
        raise ContextError(f"cannot store what is at {_shown(url)} in {cache}: {e.strerror}") from e


class _Record(NamedTuple):
    """What is remembered of a URL."""

    digest: str
    etag: str
    last_modified: str
    size_bytes: int


def _record_path(cache: Path, url: str) -> Path:
    return cache / f"{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()}.json"


def _load_record(cache: Path, url: str) -> _Record | None:
    try:
        with _record_path(cache, url).open("rb") as file:
            data = json.loads(file.read(_RECORD_MAX_BYTES))
        return _Record(str(data["digest"]), str(data["etag"]), str(data["last_modified"]), int(data["size"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stored(cache: Path, url: str, digest: str) -> HttpFile | None:
    """The file of this digest, if it is here whole."""
    path = cache / digest
    try:
        hasher = hashlib.sha256()
        size = 0
        with path.open("rb", buffering=0) as file:
            while data := file.read(1 << 20):
                hasher.update(data)
                size += len(data)
    except OSError:
        return None
    if hasher.hexdigest() != digest:
        with suppress(OSError):
            path.unlink()
        return None
    record = _load_record(cache, url)
    modified = record.last_modified if record is not None and record.digest == digest else ""
    # Its own times stay; that of change tells `prune` of the use.
    for used in (path, _record_path(cache, url)):
        with suppress(OSError):
            os.utime(used, ns=(time.time_ns(), used.stat().st_mtime_ns))
    return HttpFile(path, f"sha256:{digest}", file_name(url), _seconds(modified), size)


def _seconds(http_date: str) -> int | None:
    """Seconds since 1970 of an HTTP date; None if it is none."""
    if not http_date:
        return None
    from email.utils import parsedate_to_datetime

    try:
        seconds = int(parsedate_to_datetime(http_date).timestamp())
    except (ValueError, TypeError, OverflowError):
        return None
    return seconds if 0 <= seconds < 1 << 40 else None


def _shown(url: str) -> str:
    from registry.errors import redact_url

    return redact_url(url)


def _etag(value: str) -> str:
    """An ETag without its mark of weakness, bounded."""
    value = value.strip().removeprefix("W/")
    return value if len(value) <= 1024 and value.isprintable() else ""


class _Download:
    """One download with its attempts."""

    def __init__(
        self,
        url: str,
        cache: Path,
        wanted: tuple[str, str] | None,
        secrets: Secrets,
        environ: Mapping[str, str],
        cancelled: Callable[[], bool],
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        from registry.retry import Pacer

        self.url = url
        self.cache = cache
        self.wanted = wanted
        self.secrets = secrets
        self.environ = environ
        self.progress = progress
        self.pacer: Pacer = Pacer(cancelled)

    def run(self) -> HttpFile:
        from registry.errors import RegistryError
        from registry.http import HttpClient
        from registry.retry import RETRYABLE_STATUSES, RetryPolicy, parse_retry_after

        policy = RetryPolicy(attempts=_ATTEMPTS)
        client = HttpClient(self.environ, self.pacer)
        try:
            for attempt in range(1, _ATTEMPTS + 1):
                delay_s = policy.delay_s(attempt)
                try:
                    with self._ask(client) as response:
                        if response.status not in RETRYABLE_STATUSES or attempt == _ATTEMPTS:
                            return self._take(response)
                        delay_s = min(parse_retry_after(response.header("Retry-After")) or delay_s, policy.cap_s)
                except ContextError:
                    raise
                except PybuildError as e:
                    if attempt == _ATTEMPTS or not getattr(e, "retryable", False):
                        if isinstance(e, RegistryError):
                            raise ContextError(f"ADD {e.message}", hint=e.hint) from e
                        raise
                self.pacer.wait(delay_s)
            raise AssertionError("unreachable")
        finally:
            client.close()

    def _ask(self, client: HttpClient) -> HttpResponse:
        from registry.http import Request

        headers = self._authorization()
        record = _load_record(self.cache, self.url)
        if record is not None and record.etag and (self.cache / record.digest).is_file():
            headers["If-None-Match"] = record.etag
        return client.send(Request("GET", self.url, headers))

    def _authorization(self) -> dict[str, str]:
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        for prefix, form in (("HTTP_AUTH_HEADER_", "{}"), ("HTTP_AUTH_TOKEN_", "Bearer {}")):
            value = self.secrets(prefix + host)
            if value is not None:
                text = value.decode("utf-8", "replace").strip()
                if not text.isprintable():
                    raise ContextError(f"the secret {prefix}{host} is not one line of text")
                return {"Authorization": form.format(text)}
        return {}

    def _take(self, response: HttpResponse) -> HttpFile:
        if response.status == 304:
            record = _load_record(self.cache, self.url)
            known = _stored(self.cache, self.url, record.digest) if record is not None else None
            if known is not None:
                self._check(known.digest.partition(":")[2], known.path)
                return known
            with suppress(OSError):
                _record_path(self.cache, self.url).unlink()
            raise ContextError(f"{_shown(self.url)}: the downloaded file is gone from the cache", hint="build again")
        if not 200 <= response.status < 300:
            hint = None
            if response.status in (401, 403):
                host = urlsplit(self.url).netloc.rpartition("@")[2]
                hint = f"a secret HTTP_AUTH_TOKEN_{host} or HTTP_AUTH_HEADER_{host} would be sent"
            raise ContextError(f"{_shown(self.url)}: invalid response status {response.status}", hint=hint)
        return self._store(response)

    def _store(self, response: HttpResponse) -> HttpFile:
        import tempfile

        expected = response.content_length
        free = os.statvfs(self.cache)
        if expected is not None and expected > free.f_bavail * free.f_frsize:
            raise ContextError(f"{_shown(self.url)}: {expected} bytes do not fit on the disk of {self.cache}")
        descriptor, temporary = tempfile.mkstemp(prefix=".download-", dir=self.cache)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                digest, size = self._receive(response, file, expected)
                modified = response.header("Last-Modified")
                stamp = _seconds(modified)
                os.utime(file.fileno(), (stamp or 0, stamp or 0))
                os.fsync(file.fileno())
            path = self.cache / digest
            self._check(digest, Path(temporary))
            Path(temporary).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(temporary).unlink()
            raise
        self._remember(_Record(digest, _etag(response.header("ETag")), modified if stamp is not None else "", size))
        return HttpFile(path, f"sha256:{digest}", file_name(self.url), stamp, size)

    def _receive(self, response: HttpResponse, file: BinaryIO, expected: int | None) -> tuple[str, int]:
        """Write the body, of which a gzip coding is undone, as clients do that never asked for it."""
        import zlib

        coded = response.header("Content-Encoding").strip().lower() in ("gzip", "x-gzip")
        inflater = zlib.decompressobj(31) if coded else None
        hasher = hashlib.sha256()
        received = size = 0
        while data := response.read():
            received += len(data)
            while data:
                if inflater is not None:
                    try:
                        piece = inflater.decompress(data, 1 << 20)
                    except zlib.error as e:
                        raise ContextError(f"{_shown(self.url)}: damaged gzip coding: {e}") from e
                    data = inflater.unconsumed_tail
                else:
                    piece, data = data, b""
                hasher.update(piece)
                size += len(piece)
                _write(file, piece)
            if self.progress is not None:
                self.progress(received, expected)
        if inflater is not None and not inflater.eof:
            raise ContextError(f"{_shown(self.url)}: the gzip coding is cut short")
        return hasher.hexdigest(), size

    def _check(self, sha256: str, path: Path) -> None:
        if self.wanted is None:
            return
        algorithm, value = self.wanted
        found = sha256
        if algorithm != "sha256":
            with path.open("rb") as file:
                found = hashlib.file_digest(file, algorithm).hexdigest()
        if found != value:
            raise ContextError(
                f"digest mismatch for {_shown(self.url)}: {algorithm}:{found} (expected: {algorithm}:{value})",
                hint="what is served has changed, or is not what it should be",
            )

    def _remember(self, record: _Record) -> None:
        fields = {
            "digest": record.digest,
            "etag": record.etag,
            "last_modified": record.last_modified,
            "size": record.size_bytes,
        }
        target = _record_path(self.cache, self.url)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{id(self)}")
        temporary.write_bytes(json.dumps(fields).encode())
        temporary.replace(target)


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            count = file.write(view)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise ContextError("no space left on the disk for a download", hint="`pybuild prune` frees some") from e
            raise
        view = view[count:]
