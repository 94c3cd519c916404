"""Registries for the tests: docker-registry in every mood, a token server, and a proxy that injects faults.

Everything listens on a free loopback port, keeps its files under a directory of the caller's, and
ends with its `with`. Nothing here is pybuild's: other test files import it freely.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support.ports import free_port
from tests.support.waiting import PATIENCE_S

REGISTRY = shutil.which("docker-registry")
HTPASSWD = shutil.which("htpasswd")
SETPRIV = shutil.which("setpriv")

needs_registry = pytest.mark.skipif(REGISTRY is None, reason="docker-registry is not installed")
needs_htpasswd = pytest.mark.skipif(HTPASSWD is None, reason="htpasswd (apache2-utils) is not installed")


@dataclass
class RunningRegistry:
    """A docker-registry; `host` is `127.0.0.1:PORT` (or `localhost:PORT` under TLS)."""

    host: str
    storage: Path
    log: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def docker_registry(
    directory: Path,
    *,
    htpasswd: dict[str, str] | None = None,
    token: TokenServer | None = None,
    tls: tuple[Path, Path] | None = None,
    client_ca: Path | None = None,
    delete: bool = True,
    proxy_of: str | None = None,
) -> Iterator[RunningRegistry]:
    """Run a docker-registry until the `with` ends. `tls` is (certificate chain, key); `proxy_of` a URL to mirror."""
    assert REGISTRY is not None
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    host = f"localhost:{port}" if tls else f"127.0.0.1:{port}"
    listen: dict[str, Any] = {"addr": f"127.0.0.1:{port}", "secret": "for-tests", "relativeurls": False}
    if tls:
        listen["tls"] = {"certificate": str(tls[0]), "key": str(tls[1])}
        if client_ca:
            listen["tls"]["clientcas"] = [str(client_ca)]
    config: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(directory / "data")},
            "delete": {"enabled": delete},
            "maintenance": {"uploadpurging": {"enabled": False}},
        },
        "http": listen,
    }
    if htpasswd:
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(write_htpasswd(directory, htpasswd))}}
    if token:
        config["auth"] = {
            "token": {
                "realm": token.url + "/token",
                "service": token.service,
                "issuer": token.issuer,
                "rootcertbundle": str(token.write_bundle(directory)),
            }
        }
    if proxy_of:
        config["proxy"] = {"remoteurl": proxy_of}
    # JSON is YAML: no YAML library is needed.
    path = directory / "config.yml"
    path.write_text(json.dumps(config))
    log = directory / "log"
    with log.open("wb") as out:
        # A worker that is killed takes its registries along.
        command = [*([SETPRIV, "--pdeathsig", "KILL"] if SETPRIV else []), REGISTRY, "serve", str(path)]
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        wait_for_port(port, process, log)
        yield RunningRegistry(host, directory / "data", log, process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"the server does not listen: {log.read_text()[-2000:]}")


def write_htpasswd(directory: Path, users: dict[str, str]) -> Path:
    """docker-registry takes bcrypt only."""
    assert HTPASSWD is not None
    path = directory / "htpasswd"
    lines = [
        subprocess.run([HTPASSWD, "-niB", "-C", "4", user], input=secret.encode(), capture_output=True, check=True)
        for user, secret in users.items()
    ]
    path.write_bytes(b"".join(done.stdout.strip() + b"\n" for done in lines))
    return path


class _Server:
    """An HTTP server on a thread; closed by the `with`."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.socket.listen(128)  # with the five that it has room for, connections of a busy machine wait
        self._http.daemon_threads = True
        self.host = f"127.0.0.1:{self._http.server_address[1]}"
        self.url = f"http://{self.host}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)


class TokenServer(_Server):
    """Signs ES256 tokens as distribution verifies them: the certificate goes in the x5c header.

    `users` maps names to passwords; anonymous callers get `pull` if `anonymous_pull`. An identity
    token is `identity-USER`. `seen` records each request: (method, user, scopes).
    """

    service = "tests.registry"
    issuer = "tests.issuer"

    def __init__(
        self,
        users: dict[str, str],
        *,
        anonymous_pull: bool = False,
        lifetime_s: int = 300,
        allow_get: bool = True,
    ) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        self.users = users
        self.anonymous_pull = anonymous_pull
        self.lifetime_s = lifetime_s
        self.allow_get = allow_get
        self.seen: list[tuple[str, str, tuple[str, ...]]] = []
        self._key = ec.generate_private_key(ec.SECP256R1())
        import datetime

        now = datetime.datetime.now(datetime.UTC)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.issuer)])
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .sign(self._key, hashes.SHA256())
        )
        self._der = self._certificate.public_bytes(serialization.Encoding.DER)
        self._pem = self._certificate.public_bytes(serialization.Encoding.PEM)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                user = server.basic_user(self.headers.get("Authorization"))
                server.answer(self, "GET", user, query.get("scope", []))

            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                grant = form.get("grant_type", [""])[0]
                user: str | None = None
                if grant == "refresh_token":
                    user = form["refresh_token"][0].removeprefix("identity-")
                    user = user if user in server.users else None
                elif grant == "password":
                    name, secret = form["username"][0], form["password"][0]
                    user = name if server.users.get(name) == secret else None
                server.answer(self, "POST", user, form.get("scope", [""])[0].split())

            def log_message(self, format: str, *args: Any) -> None:
                return

        super().__init__(Handler)

    def write_bundle(self, directory: Path) -> Path:
        path = directory / "token.pem"
        path.write_bytes(self._pem)
        return path

    def basic_user(self, header: str | None) -> str | None:
        """The user of a Basic header; "" for none, None for a wrong one."""
        if not header:
            return ""
        name, _, secret = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
        return name if self.users.get(name) == secret else None

    def answer(self, handler: BaseHTTPRequestHandler, method: str, user: str | None, scopes: list[str]) -> None:
        self.seen.append((method, user or "", tuple(scopes)))
        doc: dict[str, Any] = {}
        status = 200
        if method == "GET" and not self.allow_get:
            status, doc = 405, {"details": "use POST"}
        elif user is None:
            status, doc = 401, {"details": "incorrect username or password"}
        else:
            token = self.sign(user, scopes)
            doc = {"token": token, "access_token": token, "expires_in": self.lifetime_s}
            if method == "POST":
                doc["refresh_token"] = f"identity-{user}"
        body = json.dumps(doc).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def sign(self, user: str, scopes: list[str]) -> str:
        import jwt

        access = []
        for scope in scopes:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            granted = actions.split(",") if user else [a for a in actions.split(",") if a == "pull"]
            if user or self.anonymous_pull:
                access.append({"type": kind, "name": name, "actions": granted})
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "sub": user,
            "aud": self.service,
            "exp": now + self.lifetime_s,
            "nbf": now - 10,
            "iat": now,
            "jti": os.urandom(8).hex(),
            "access": access,
        }
        headers = {"x5c": [base64.b64encode(self._der).decode()]}
        return jwt.encode(claims, self._key, algorithm="ES256", headers=headers)


@dataclass
class Exchange:
    """What a fault rule sees of a request on its way to the registry."""

    method: str
    path: str
    number: int
    """How many requests with this method and path came before."""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What the proxy does instead of passing an exchange on.

    `status` answers at once with `headers` and `body`. `cut_request_at` and `cut_response_at` reset the
    connection after that many body bytes; `end_response_at` closes it cleanly (truncation).
    `stall_request_at` passes that many body bytes on and swallows the rest, and never answers.
    `cut_answer` passes the request on, and resets the connection instead of answering.
    `corrupt_at` flips a byte of the response. `drip_s` and `drip_head_s` send the response's body or
    headers a byte at a time.
    `drop_headers` and `set_headers` change the answer's headers.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_request_at: int | None = None
    cut_response_at: int | None = None
    end_response_at: int | None = None
    corrupt_at: int | None = None
    drip_s: float | None = None
    drip_head_s: float | None = None
    stall_after: int | None = None
    stall_request_at: int | None = None
    cut_answer: bool = False
    drop_headers: tuple[str, ...] = ()
    set_headers: dict[str, str] = field(default_factory=dict)
    drop_request_headers: tuple[str, ...] = ()


Rule = Callable[[Exchange], Fault | None]


class FaultProxy:
    """An HTTP/1.1 proxy in front of one registry, on plain sockets, that breaks what its rule says.

    `log` lists the exchanges; `up_bytes` and `down_bytes` count body bytes passed each way;
    `stalled_out` tells that a client waited for a stalled body longer than anybody should.
    """

    def __init__(self, upstream: str, rule: Rule | None = None) -> None:
        self.upstream = upstream
        self.rule: Rule = rule or (lambda exchange: None)
        self.log: list[Exchange] = []
        self.connections = 0
        self.stalled_out = False
        self.up_bytes = 0
        self.down_bytes = 0
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], int] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._stop = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(5)
        self._listener.close()
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def count(self, method: str, part: str = "") -> int:
        """How many requests of a method came whose path holds `part`."""
        return sum(1 for e in self.log if e.method == method and part in e.path)

    def _accept(self) -> None:
        self._listener.settimeout(0.02)
        while not self._stop.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            client.settimeout(PATIENCE_S)
            self.connections += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with self._lock:
            self._sockets.add(client)
        try:
            # A file left open keeps its socket's descriptor.
            with client.makefile("rb") as reader:
                while self._one(client, reader):
                    pass
        except (OSError, ValueError):
            pass
        finally:
            with self._lock:
                self._sockets.discard(client)
            client.close()

    def _one(self, client: socket.socket, reader: Any) -> bool:
        start = reader.readline()
        if not start:
            return False
        method, path, _ = start.decode("latin-1").split(" ", 2)
        headers = _read_headers(reader)
        key = (method, urlsplit(path).path)
        with self._lock:
            number = self._counts.get(key, 0)
            self._counts[key] = number + 1
            exchange = Exchange(method, path, number, {k.lower(): v for k, v in headers})
            self.log.append(exchange)
        fault = self.rule(exchange) or Fault()
        length = int(exchange.headers.get("content-length", "0"))
        if fault.status is not None:
            reader.read(length)
            answer = {"Content-Length": str(len(fault.body)), **fault.headers}
            lines = "".join(f"{k}: {v}\r\n" for k, v in answer.items())
            client.sendall(
                f"HTTP/1.1 {fault.status} X\r\n{lines}\r\n".encode() + (b"" if method == "HEAD" else fault.body)
            )
            return True
        return self._forward(client, reader, start, headers, fault, exchange, length)

    def _forward(
        self,
        client: socket.socket,
        reader: Any,
        start: bytes,
        headers: list[tuple[str, str]],
        fault: Fault,
        exchange: Exchange,
        length: int,
    ) -> bool:
        name, _, port = self.upstream.rpartition(":")
        with socket.create_connection((name, int(port)), timeout=PATIENCE_S) as server:
            kept = [(k, v) for k, v in headers if k.lower() not in {"connection", *fault.drop_request_headers}]
            head = start + "".join(f"{k}: {v}\r\n" for k, v in kept).encode("latin-1") + b"Connection: close\r\n\r\n"
            server.sendall(head)
            left = min(x for x in (length, fault.cut_request_at, fault.stall_request_at) if x is not None)
            while left:
                data = reader.read(min(left, 65536))
                if not data:
                    return False
                server.sendall(data)
                self.up_bytes += len(data)
                left -= len(data)
            if fault.stall_request_at is not None:
                while reader.read1(65536):  # until the client gives up
                    pass
                return False
            if fault.cut_request_at is not None:
                # A clean end towards the registry, a reset towards the client.
                server.shutdown(socket.SHUT_WR)
                time.sleep(0.05)
                _reset(client)
                return False
            if exchange.headers.get("transfer-encoding") == "chunked":
                _copy_chunked(reader, server)
            with server.makefile("rb") as answer:
                if fault.cut_answer:
                    answer.readline()
                    _reset(client)
                    return False
                return self._back(client, answer, fault, exchange.method)

    def _back(self, client: socket.socket, answer: Any, fault: Fault, method: str) -> bool:
        status = answer.readline()
        headers = [(k, v) for k, v in _read_headers(answer) if k.lower() not in {"connection", *fault.drop_headers}]
        headers = [(k, fault.set_headers.get(k.lower(), v)) for k, v in headers]
        known = {k.lower() for k, _ in headers}
        headers += [(k, v) for k, v in fault.set_headers.items() if k not in known]
        chunked = any(k.lower() == "transfer-encoding" for k, _ in headers)
        head = status + "".join(f"{k}: {v}\r\n" for k, v in headers).encode("latin-1") + b"\r\n"
        for piece in [head] if fault.drip_head_s is None else [bytes([b]) for b in head]:
            client.sendall(piece)
            if fault.drip_head_s is not None and self._stop.wait(fault.drip_head_s):
                return False
        if method == "HEAD" or status.split()[1] in {b"204", b"304"}:
            return True
        sent = 0
        limits = [x for x in (fault.cut_response_at, fault.end_response_at, fault.stall_after) if x is not None]
        while True:
            room = 65536 if not limits else min(65536, min(limits) - sent)
            if room <= 0:
                if fault.stall_after is not None:
                    self.stalled_out |= not self._stop.wait(PATIENCE_S)
                elif fault.cut_response_at is not None:
                    _reset(client)
                return False
            data = answer.read1(room)
            if not data:
                return not chunked
            if fault.corrupt_at is not None and sent <= fault.corrupt_at < sent + len(data):
                index = fault.corrupt_at - sent
                data = data[:index] + bytes([data[index] ^ 0xFF]) + data[index + 1 :]
            if fault.drip_s is not None:
                for byte in data:
                    client.sendall(bytes([byte]))
                    if self._stop.wait(fault.drip_s):
                        return False
            else:
                client.sendall(data)
            sent += len(data)
            self.down_bytes += len(data)


def _read_headers(reader: Any) -> list[tuple[str, str]]:
    headers = []
    while (line := reader.readline()) not in {b"\r\n", b"\n", b""}:
        key, _, value = line.decode("latin-1").partition(":")
        headers.append((key, value.strip()))
    return headers


def _copy_chunked(reader: Any, server: socket.socket) -> None:
    while True:
        line = reader.readline()
        server.sendall(line)
        size = int(line.split(b";")[0], 16)
        server.sendall(reader.read(size + 2))
        if size == 0:
            return


def _reset(sock: socket.socket) -> None:
    """Close with RST rather than FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


class ForwardProxy(_Server):
    """An HTTP proxy that takes every name for `127.0.0.1`; `seen` lists what it was asked for.

    `registry` maps `name:port` to the real `host:port`; `password` must come as Proxy-Authorization.
    """

    def __init__(self, registry: dict[str, str], *, password: str = "") -> None:
        self.seen: list[tuple[str, str]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def _allowed(self) -> bool:
                proxy.seen.append((self.command, self.path))
                wanted = "Basic " + base64.b64encode(password.encode()).decode()
                if password and self.headers.get("Proxy-Authorization") != wanted:
                    self.send_error(407)
                    return False
                return True

            def do_CONNECT(self) -> None:
                if not self._allowed():
                    return
                target = registry.get(self.path)
                if target is None:
                    self.send_error(502)
                    return
                host, _, port = target.rpartition(":")
                with socket.create_connection((host, int(port))) as upstream:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                    back = threading.Thread(target=_pump, args=(upstream, self.connection), daemon=True)
                    back.start()
                    _pump(self.connection, upstream)
                    back.join(5)

            def do_GET(self) -> None:
                if not self._allowed():
                    return
                parts = urlsplit(self.path)
                target = registry.get(parts.netloc)
                if target is None:
                    self.send_error(502)
                    return
                upstream = http.client.HTTPConnection(target, timeout=PATIENCE_S)
                upstream.request("GET", parts.path, headers={"Accept": self.headers.get("Accept", "*/*")})
                answer = upstream.getresponse()
                data = answer.read()
                upstream.close()
                self.send_response(answer.status)
                for key, value in answer.getheaders():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                return

        super().__init__(Handler)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class TlsFiles:
    """A private CA with a server certificate for localhost and a client's; written under `directory`."""

    def __init__(self, directory: Path) -> None:
        import trustme

        directory.mkdir(parents=True, exist_ok=True)
        authority = trustme.CA()
        self.ca = directory / "ca.crt"
        authority.cert_pem.write_to_path(str(self.ca))
        self.server = self._pair(directory / "server", authority.issue_cert("localhost", "127.0.0.1", "registry.test"))
        self.client = self._pair(directory / "client", authority.issue_cert("client@example.test"))

    @staticmethod
    def _pair(base: Path, issued: Any) -> tuple[Path, Path]:
        certificate, key = base.with_suffix(".cert"), base.with_suffix(".key")
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key


def get(url: str) -> bytes:
    """A plain GET, for asking a registry without our client."""
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
        data: bytes = response.read()
        return data
