"""HTTP for registries on requests: pooled connections, TLS, proxies, redirects, bounded bodies.

One attempt at a time: retries, authentication and what an answer means belong to `registry.wire`.
Every failure leaves here as a `NetworkError` without secrets: no signed URL, no header. Importing
this module is cheap; requests is imported when the first client is made.

Thread-safe: connections are pooled by urllib3; sessions are only ever read after they are made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from layers.errors import PybuildError, SizeMismatch
from layers.values import NamedTuple
from registry.errors import ConfigError, NetworkError, ServerError, printable, redact_url
from registry.hosts import TlsConfig
from registry.proxies import choose_proxy
from registry.retry import Pacer

if TYPE_CHECKING:
    import requests

    from registry.connections import Connections

MAX_REDIRECTS = 10
USER_AGENT = "pybuild/0.1"
_READ_BYTES = 1 << 18
_DRAIN_BYTES = 1 << 16


class Timeouts(NamedTuple):
    """Seconds: to connect; between two received pieces; from a request's end to its answer's headers, all
    told; and the window in which a body must bring `stall_bytes`.

    A registry may be silent for long while it assembles a pushed blob: only `answer_s` bounds that.
    """

    connect_s: float = 15.0
    read_s: float = 60.0
    answer_s: float = 300.0
    stall_s: float = 60.0
    stall_bytes: int = 1024


class Request(NamedTuple):
    """One request. `body` makes a fresh iterator at each call; `length` is its exact size in bytes."""

    method: str
    url: str
    headers: Mapping[str, str] = {}
    body: Callable[[], Iterable[bytes]] | None = None
    length: int | None = None
    tls: TlsConfig = TlsConfig()
    follow: bool = True


class HttpResponse:
    """An answer whose body has not been read. Close it, or use it in a `with`."""

    def __init__(
        self,
        response: requests.Response,
        url: str,
        pacer: Pacer,
        timeouts: Timeouts,
        ended: Callable[[], None],
    ) -> None:
        self._response = response
        self._ended: Callable[[], None] | None = ended
        self._raw: Any = response.raw
        self._pacer = pacer
        self._timeouts = timeouts
        self._window_start = pacer.clock()
        self._window_bytes = 0
        self._finished = False
        self.url = url
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self._received = 0

    def header(self, name: str, default: str = "") -> str:
        return self.headers.get(name, default)

    def header_values(self, name: str) -> list[str]:
        """Every occurrence of a header, not joined."""
        getlist = getattr(self._raw.headers, "getlist", None)
        values = list(getlist(name)) if getlist else []
        return values or ([self.headers[name]] if name in self.headers else [])

    @property
    def content_length(self) -> int | None:
        text = self.header("Content-Length").strip()
        return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None

    def read(self, size: int = _READ_BYTES) -> bytes:
        """Up to `size` bytes of the body as sent; b"" at its end.

        Raises: NetworkError on a broken, truncated or stalled connection; Cancelled.
        """
        if self._finished:
            return b""
        self._pacer.check()
        try:
            data = self._read_some(min(size, _READ_BYTES))
        except Exception as e:  # noqa: BLE001  urllib3, http.client, ssl and socket share no root
            self.close()
            self._pacer.check()
            raise network_error(e, self.url) from innermost(e)
        self._received += len(data)
        if not data:
            self._finished = True
            expected = self.content_length
            if expected is not None and self._received < expected and self._response.request.method != "HEAD":
                self.close()
                raise NetworkError(
                    f"{redact_url(self.url)}: the connection ended after {self._received} of {expected} bytes",
                    url=self.url,
                    retryable=True,
                )
            self.close()
            return b""
        self._check_rate(len(data))
        return data

    def _read_some(self, size: int) -> bytes:
        # read() would wait until `size` bytes are there: a trickle could not be told from a stall.
        read1 = getattr(self._raw, "read1", None)
        data = read1(size, decode_content=False) if read1 else self._raw.read(min(size, 1024), decode_content=False)
        return data or b""

    def _check_rate(self, count: int) -> None:
        self._window_bytes += count
        now = self._pacer.clock()
        if self._window_bytes >= self._timeouts.stall_bytes:
            self._window_start, self._window_bytes = now, 0
        elif now - self._window_start > self._timeouts.stall_s:
            self.close()
            raise NetworkError(
                f"{redact_url(self.url)}: stalled: {self._window_bytes} bytes in {self._timeouts.stall_s:g} s",
                url=self.url,
                retryable=True,
            )

    def read_all(self, limit: int, what: str) -> bytes:
        """The whole body, at most `limit` bytes.

        Raises: SizeMismatch if it is larger; NetworkError, Cancelled.
        """
        expected = self.content_length
        if expected is not None and expected > limit and self._response.request.method != "HEAD":
            self.close()
            raise SizeMismatch(f"{what} of {expected} bytes is larger than the {limit} allowed")
        parts, total = [], 0
        while data := self.read(min(_READ_BYTES, limit + 1 - total)):
            parts.append(data)
            total += len(data)
            if total > limit:
                self.close()
                raise SizeMismatch(f"{what} is larger than the {limit} bytes allowed")
        return b"".join(parts)

    def discard(self) -> None:
        """Close, reading a short rest first so that the connection can be used again."""
        if not self._finished:
            try:
                self.read_all(_DRAIN_BYTES, "rest")
            except PybuildError:
                pass
        self.close()

    def close(self) -> None:
        self._finished = True
        self._response.close()
        ended, self._ended = self._ended, None
        if ended is not None:
            ended()

    def __enter__(self) -> HttpResponse:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class HttpClient:
    """Sends requests over pooled connections."""

    def __init__(
        self,
        environ: Mapping[str, str],
        pacer: Pacer,
        *,
        timeouts: Timeouts | None = None,
        tls_for: Callable[[str], TlsConfig] | None = None,
        pool_size: int = 16,
    ) -> None:
        self._environ = environ
        self._pacer = pacer
        self._timeouts = timeouts or Timeouts()
        self._tls_for = tls_for or (lambda host: TlsConfig())
        self._pool_size = pool_size
        self._lock = threading.Lock()
        self._sessions: dict[TlsConfig, requests.Session] = {}
        self._connections: Connections | None = None

    def send(self, request: Request) -> HttpResponse:
        """Send once; follow redirects without carrying Authorization to another origin.

        Any status is an answer. The caller closes the response.
        Raises: NetworkError, ServerError for a redirect that must not be followed, Cancelled, and
        whatever the request's body raises.
        """
        first = origin_of(request.url)
        seen = 0
        while True:
            self._pacer.check()
            response = self._send_one(request)
            location = response.header("Location")
            if not request.follow or response.status not in {301, 302, 303, 307, 308} or not location:
                return response
            if request.body is not None and response.status not in {307, 308}:
                return response
            response.discard()
            seen += 1
            if seen > MAX_REDIRECTS:
                raise ServerError(
                    f"{redact_url(request.url)}: more than {MAX_REDIRECTS} redirects",
                    status=response.status,
                    url=request.url,
                    hint="the registry, or a proxy before it, redirects in a loop",
                )
            request = self._redirected(request, location, first)

    def _redirected(self, request: Request, location: str, first: str) -> Request:
        target = join_url(request.url, location)
        parts = urlsplit(target)
        if parts.scheme == "http" and request.url.startswith("https://") and request.tls.verify:
            raise ServerError(
                f"{redact_url(request.url)} redirects from https to http: refused",
                url=request.url,
                hint="--tls-verify=false allows it",
            )
        headers = dict(request.headers)
        tls = request.tls
        if origin_of(target) != first:
            headers = {k: v for k, v in headers.items() if k.lower() not in {"authorization", "cookie"}}
            tls = self._tls_for(parts.netloc.rpartition("@")[2])
            if not request.tls.verify:
                tls = tls._replace(verify=False, ca_files=())
        return request._replace(url=target, headers=headers, tls=tls)

    def _send_one(self, request: Request) -> HttpResponse:
        import requests

        prepared, body = self._prepare(request)
        session, connections = self._session(request.tls)
        parts = urlsplit(request.url)
        proxy = choose_proxy(parts.scheme, parts.netloc.rpartition("@")[2], self._environ)
        connections.enter()
        try:
            response = session.send(
                prepared,
                stream=True,
                allow_redirects=False,
                verify=request.tls.verify,
                timeout=(self._timeouts.connect_s, self._read_timeout_s(request)),
                proxies={parts.scheme: proxy} if proxy else {},
            )
        except BaseException as e:
            connections.leave()
            if body is not None and body.failure is not None:
                raise body.failure from None
            self._pacer.check()
            if isinstance(e, requests.RequestException | OSError | ValueError) or _is_http_error(e):
                raise network_error(e, request.url, proxy=proxy) from innermost(e)
            raise
        return HttpResponse(response, request.url, self._pacer, self._timeouts, connections.leave)

    def _read_timeout_s(self, request: Request) -> float:
        return self._timeouts.read_s if request.method in {"GET", "HEAD"} else self._timeouts.answer_s

    def _prepare(self, request: Request) -> tuple[requests.PreparedRequest, _Body | None]:
        import requests

        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **request.headers}
        body = None if request.body is None else _Body(request.body(), self._pacer)
        prepared = requests.PreparedRequest()
        try:
            prepared.prepare(method=request.method, url=request.url, headers=headers)
        except (requests.RequestException, ValueError, UnicodeError):
            raise ServerError(f"unusable address {redact_url(request.url)}", url=request.url) from None
        if body is not None:
            prepared.body = body  # type: ignore[assignment]  # any iterable of bytes will do
            if request.length is None:
                prepared.headers.pop("Content-Length", None)
                prepared.headers["Transfer-Encoding"] = "chunked"
            else:
                prepared.headers["Content-Length"] = str(request.length)
        return prepared, body

    def _session(self, tls: TlsConfig) -> tuple[requests.Session, Connections]:
        with self._lock:
            if self._connections is None:
                from registry.connections import Connections

                self._connections = Connections(self._pacer, self._timeouts.answer_s)
            session = self._sessions.get(tls)
            if session is None:
                session = self._connections.session(tls, self._environ, self._pool_size)
                self._sessions[tls] = session
            return session, self._connections

    def abort(self) -> None:
        """Break every connection, so that calls blocked in other threads end with an error at once."""
        if self._connections is not None:
            self._connections.abort()

    def close(self) -> None:
        """Close the pooled connections."""
        with self._lock:
            sessions = list(self._sessions.values())
            self._sessions.clear()
        for session in sessions:
            session.close()
        if self._connections is not None:
            self._connections.close()


class _Body:
    """A request's body: checks for cancellation, and remembers an error of its source."""

    def __init__(self, source: Iterable[bytes], pacer: Pacer) -> None:
        self._source = source
        self._pacer = pacer
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[bytes]:
        source = iter(self._source)
        while True:
            try:
                self._pacer.check()
                chunk = next(source, b"")
            except BaseException as e:
                self.failure = e
                raise
            if not chunk:
                return
            yield chunk


def join_url(base: str, location: str) -> str:
    """Resolve a Location header. Raises: ServerError if it is no URL."""
    try:
        joined = urljoin(base, location.strip())
        parts = urlsplit(joined)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0 and joined.isprintable()
    except ValueError:
        usable = False
    if not usable:
        raise ServerError(f"{redact_url(base)} answered with an unusable Location", url=base)
    return joined


def origin_of(url: str) -> str:
    """`scheme://host:port` with the default port filled in: what Authorization is bound to."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}"


def _is_http_error(error: BaseException) -> bool:
    from http.client import HTTPException

    from urllib3.exceptions import HTTPError

    return isinstance(error, HTTPException | HTTPError)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and everything it wraps, outermost first."""
    seen: set[int] = set()
    queue: list[object] = [error]
    while queue:
        item = queue.pop(0)
        if not isinstance(item, BaseException) or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        queue += [*item.args, getattr(item, "reason", None), item.__cause__, item.__context__]


def innermost(error: BaseException) -> OSError | None:
    """The operating system's error beneath, whose text names no URL; None if there is none."""
    import requests

    found = [e for e in _chain(error) if isinstance(e, OSError) and not isinstance(e, requests.RequestException)]
    return found[-1] if found else None


def network_error(error: BaseException, url: str, *, proxy: str | None = None) -> PybuildError:
    """Say what broke, by the cause beneath all wrappers, without the wrappers' text: it quotes signed URLs."""
    import http.client
    import socket
    import ssl

    import requests
    import urllib3.exceptions as u3

    place = urlsplit(url).netloc.rpartition("@")[2]
    by = f" by the proxy {redact_url(proxy)}" if proxy else ""
    causes = list(_chain(error))

    def first(*kinds: type[BaseException]) -> Any:
        return next((c for c in causes if isinstance(c, kinds)), None)

    def make(what: str, *, retryable: bool = True, hint: str | None = None) -> NetworkError:
        return NetworkError(f"{place}: {what}{by}", url=url, retryable=retryable, hint=hint)

    if bad := first(ssl.SSLCertVerificationError):
        return make(
            f"its certificate is not trusted: {printable(bad.verify_message or str(bad.reason), 120)}",
            retryable=False,
            hint="put the registry's CA into certs.d, or use --tls-verify=false",
        )
    if bad := first(ssl.SSLError):
        reason = bad.reason or ""
        if reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"}:
            return make("it does not speak TLS", retryable=False, hint="--tls-verify=false allows plain http")
        return make(f"TLS failed: {printable(reason or str(bad), 120)}", retryable="EOF" in reason)
    if bad := first(socket.gaierror):
        return make("its name has no address", retryable=bad.errno == socket.EAI_AGAIN)
    if first(ConnectionRefusedError):
        return make("connection refused", hint="is the registry running, and the port right?")
    if first(requests.exceptions.ConnectTimeout, u3.ConnectTimeoutError):
        return make("no connection within the time allowed")
    if first(TimeoutError, u3.ReadTimeoutError, requests.exceptions.ReadTimeout):
        return make("no answer within the time allowed")
    if first(u3.IncompleteRead, http.client.IncompleteRead):
        return make("the connection ended in the middle of an answer")
    if bad := first(ConnectionError, http.client.RemoteDisconnected, BrokenPipeError):
        return make("the connection was closed" if not bad.errno else printable(str(bad.strerror).lower(), 120))
    if bad := first(u3.ProxyError, requests.exceptions.ProxyError):
        return make("the proxy refused the connection", retryable=False)
    if first(requests.exceptions.InvalidSchema, requests.exceptions.InvalidProxyURL):
        raise ConfigError(f"unusable proxy {redact_url(proxy or '')} for {place}")
    plain = next((c for c in causes if isinstance(c, OSError) and c.strerror), None)
    if plain is not None:
        return make(printable(str(plain.strerror).lower(), 120))
    if first(http.client.HTTPException, u3.ProtocolError, u3.HTTPError):
        return make("its answer is not HTTP")
    return make(f"the request failed ({type(error).__name__})", retryable=False)
