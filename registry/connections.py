"""The seam to requests and urllib3: adapters with our own TLS contexts, and connections that can be broken.

requests would replace the system's certificates by a configured CA and read `.netrc` and the process
environment; containers tools *add* certs.d's authorities to the system's. Only `registry.http`
imports this module, and only when the first request is sent.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from http.cookiejar import DefaultCookiePolicy
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from registry.errors import ConfigError
from registry.hosts import TlsConfig
from registry.retry import Pacer

_SEND_BYTES = 1 << 18
_WATCH_S = 0.2
_T = TypeVar("_T")


class Connections:
    """Makes sessions, and watches over their connections.

    A thread runs while requests are under way. Once the caller wants to stop, it breaks every
    connection, so that no blocked read or write outlives that wish; and it breaks one whose answer's
    headers trickle in under every socket timeout.
    """

    def __init__(self, pacer: Pacer, answer_s: float) -> None:
        self._pacer = pacer
        self._answer_s = answer_s
        self._changed = threading.Condition()
        self._live: weakref.WeakSet[HTTPConnection] = weakref.WeakSet()
        self._waiting: dict[HTTPConnection, float] = {}
        self._expired: weakref.WeakSet[HTTPConnection] = weakref.WeakSet()
        self._under_way = 0
        self._watcher: threading.Thread | None = None
        self._closed = False

    def enter(self) -> None:
        """A request begins."""
        with self._changed:
            self._under_way += 1
            self._closed = False
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="registry-watch", daemon=True)
                self._watcher.start()
            elif self._under_way == 1:
                self._changed.notify()

    def leave(self) -> None:
        """A request's answer has been read, or the request failed."""
        with self._changed:
            self._under_way -= 1

    def close(self) -> None:
        """End the watching thread."""
        with self._changed:
            watcher, self._watcher, self._closed = self._watcher, None, True
            self._changed.notify()
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join()

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._closed or self._watcher is not threading.current_thread():
                    return
                self._changed.wait(_WATCH_S if self._under_way else None)
                now = time.monotonic()
                late = [c for c, deadline in self._waiting.items() if now > deadline]
                self._expired.update(late)
            if self._under_way and self._pacer.cancelled():
                self.abort()
            for connection in late:
                _break(connection)

    def answer(self, connection: HTTPConnection, read: Callable[[], _T]) -> _T:
        """Read an answer's headers under the deadline. Raises: TimeoutError, and what `read` raises."""
        with self._changed:
            # urllib3 connects the same object anew after a failure.
            self._expired.discard(connection)
            self._waiting[connection] = time.monotonic() + self._answer_s
        try:
            answer = read()
        except Exception:
            if connection in self._expired:
                raise TimeoutError("the answer's headers take too long") from None
            raise
        finally:
            with self._changed:
                self._waiting.pop(connection, None)
        if connection in self._expired:
            # http.client takes the end of a connection for the end of the headers.
            close = getattr(answer, "close", None)
            if close is not None:
                close()
            connection.close()
            raise TimeoutError("the answer's headers take too long")
        return answer

    def session(self, tls: TlsConfig, environ: Mapping[str, str], pool_size: int) -> requests.Session:
        """A session with its own pool and TLS context.

        Raises: ConfigError if a certificate or key cannot be read.
        """
        session = requests.Session()
        session.trust_env = False
        session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        adapter = _Adapter(self, tls, environ, pool_size)
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        return session

    def register(self, connection: HTTPConnection) -> None:
        with self._changed:
            self._live.add(connection)

    def abort(self) -> None:
        """Shut every live socket down; blocked reads and writes return at once."""
        with self._changed:
            live = list(self._live)
        for connection in live:
            _break(connection)


def _break(connection: HTTPConnection) -> None:
    sock = getattr(connection, "sock", None)
    if isinstance(sock, socket.socket):
        try:
            # Not SSLSocket.shutdown: that would take the TLS state from the thread that reads.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
        except OSError:
            pass


class _Adapter(HTTPAdapter):
    def __init__(self, owner: Connections, tls: TlsConfig, environ: Mapping[str, str], pool_size: int) -> None:
        self._owner = owner
        self._tls = tls
        self._environ = environ
        self._context: ssl.SSLContext | None = None
        self._context_lock = threading.Lock()
        super().__init__(pool_connections=32, pool_maxsize=pool_size, max_retries=0)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **kwargs: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, blocksize=_SEND_BYTES, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pool_classes()

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not known:
            manager.pool_classes_by_scheme = self._pool_classes()
        return manager

    def _pool_classes(self) -> dict[str, Any]:
        owner, adapter = self._owner, self

        class Plain(HTTPConnection):
            def connect(self) -> None:
                owner.register(self)
                super().connect()

            def getresponse(self, *args: Any, **kwargs: Any) -> Any:
                return owner.answer(self, lambda: super(Plain, self).getresponse(*args, **kwargs))

        class Secure(HTTPSConnection):
            def connect(self) -> None:
                owner.register(self)
                # The context is made here, once: a plain-http registry never pays for loading the CAs.
                self.ssl_context = adapter.context()
                self.cert_reqs = self.ssl_context.verify_mode
                self.ca_certs = self.ca_cert_dir = None
                self.cert_file = self.key_file = None
                super().connect()
                # Whoever turned verification off knows it: no warning per request.
                self.is_verified = True

            def getresponse(self, *args: Any, **kwargs: Any) -> Any:
                return owner.answer(self, lambda: super(Secure, self).getresponse(*args, **kwargs))

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(HTTPSConnectionPool):
            ConnectionCls = Secure

        return {"http": PlainPool, "https": SecurePool}

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Nothing to do: the connection's own context says what is trusted."""

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        """requests 2.32 and later choose the pool by these: by the host alone, since TLS is the context's."""
        host_params, _ = super().build_connection_pool_key_attributes(request, verify, cert)
        return host_params, {}

    def context(self) -> ssl.SSLContext:
        with self._context_lock:
            if self._context is None:
                self._context = make_context(self._tls, self._environ)
            return self._context


def make_context(tls: TlsConfig, environ: Mapping[str, str]) -> ssl.SSLContext:
    """A client context: the system's authorities (or SSL_CERT_FILE's), those of certs.d, the client's pair.

    Raises: ConfigError if a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        _load_authorities(context, tls, environ)
    if tls.client_cert:
        try:
            # A password prompt would hang a build: an encrypted key is an error.
            context.load_cert_chain(tls.client_cert, tls.client_key, password=_no_password)
        except (OSError, ValueError) as e:
            raise ConfigError(f"cannot use the client certificate {tls.client_cert}: {_why(e)}") from e
    return context


def _load_authorities(context: ssl.SSLContext, tls: TlsConfig, environ: Mapping[str, str]) -> None:
    named = environ.get("SSL_CERT_FILE") or environ.get("REQUESTS_CA_BUNDLE") or environ.get("CURL_CA_BUNDLE")
    directory = environ.get("SSL_CERT_DIR")
    if named:
        _load(context, named)
    if directory:
        context.load_verify_locations(capath=directory)
    if not named and not directory:
        context.set_default_verify_paths()
        paths = ssl.get_default_verify_paths()
        if not context.cert_store_stats()["x509_ca"] and not paths.capath:
            _load(context, DEFAULT_CA_BUNDLE_PATH)
    for path in tls.ca_files:
        _load(context, path)


def _load(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot use the CA certificates of {path}: {_why(e)}") from e


def _no_password() -> bytes:
    raise ValueError("the key is encrypted")


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return str(error.reason or "not PEM")
    return str(getattr(error, "strerror", None) or error)
