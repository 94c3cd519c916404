"""Real registries: docker-registry on a free loopback port, plain, with passwords or with TLS.

Each xdist worker runs a process of its own over storage that the session shares, so base images are
pushed once and no process outlives its worker (the kernel kills it with its parent).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest

from tests.support.machine import need_tool, which
from tests.support.ports import free_port
from tests.support.waiting import until

MANIFEST_TYPES = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)


class RegistryServer:
    """A docker-registry process. `host` is what goes before the repository in a reference."""

    def __init__(self, storage: Path, *, extra: dict[str, Any] | None = None, http_extra: dict[str, Any] | None = None):
        self.storage = storage
        self.port = free_port()
        self.host = f"localhost:{self.port}"
        self.log = storage.with_name(f"{storage.name}-{self.port}.log")
        self._config = {
            "version": "0.1",
            "log": {"level": "info"},
            "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
            "http": {"addr": f"127.0.0.1:{self.port}", **(http_extra or {})},
            **(extra or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._markers = 0

    def start(self) -> RegistryServer:
        """Start and wait until it answers. Raises: RuntimeError with the end of its log."""
        config = self.log.with_suffix(".json")
        config.write_text(json.dumps(self._config))  # JSON is YAML, too
        command = [which("docker-registry") or "docker-registry", "serve", str(config)]
        setpriv = shutil.which("setpriv")
        if setpriv:
            command = [setpriv, "--pdeathsig", "KILL", *command]
        with self.log.open("wb") as log:
            # docker-registry takes REGISTRY_AUTH_FILE and its like for configuration.
            environ = {k: v for k, v in os.environ.items() if not k.startswith("REGISTRY_")}
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ)
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return self
            except OSError:
                time.sleep(0.05)
        self.stop()
        raise RuntimeError("docker-registry did not start:\n" + self.log.read_text(errors="replace")[-2000:])

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> RegistryServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def request(
        self, method: str, path: str, body: bytes | BufferedReader | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One plain-HTTP request: status, headers (lower-case names) and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def requests_seen(self) -> list[str]:
        """`METHOD /path` of every request answered so far, from the access log."""
        # A request is logged after its answer, perhaps long after. What came later is there: so is what came before.
        self._markers += 1
        mark = f"/v2/?mark={os.getpid()}-{self._markers}-"  # the workers of a session may share a registry
        self.request("GET", mark)
        until(lambda: mark in self.log.read_text(errors="replace"))
        seen = []
        for line in self.log.read_text(errors="replace").splitlines():
            parts = line.split('"')
            if len(parts) > 2 and parts[1].endswith(("HTTP/1.1", "HTTP/2.0")):
                seen.append(parts[1].rsplit(" ", 1)[0])
        return [request for request in seen if not request.startswith("GET /v2/?mark=")]

    def manifest(self, repository: str, reference: str) -> dict[str, Any]:
        """The manifest or index of that tag or digest, parsed. Raises: KeyError if there is none."""
        status, _, body = self.request(
            "GET", f"/v2/{repository}/manifests/{reference}", headers={"Accept": MANIFEST_TYPES}
        )
        if status != 200:
            raise KeyError(f"{repository}:{reference}: {status} {body[:200]!r}")
        document: dict[str, Any] = json.loads(body)
        return document

    def blob(self, repository: str, digest: str) -> bytes:
        """A blob, checked against its digest. Raises: KeyError if there is none."""
        status, _, body = self.request("GET", f"/v2/{repository}/blobs/{digest}")
        if status != 200:
            raise KeyError(f"{repository}@{digest}: {status}")
        assert f"sha256:{hashlib.sha256(body).hexdigest()}" == digest
        return body

    def config(self, repository: str, reference: str) -> dict[str, Any]:
        """The image config of that tag."""
        document: dict[str, Any] = json.loads(
            self.blob(repository, self.manifest(repository, reference)["config"]["digest"])
        )
        return document

    def push_blob(self, repository: str, data: bytes | BufferedReader) -> str:
        """Push bytes or a file; its digest."""
        if isinstance(data, bytes):
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            size = len(data)
        else:
            digest = f"sha256:{hashlib.file_digest(data, 'sha256').hexdigest()}"
            size = data.tell()
            data.seek(0)
        status, headers, body = self.request("POST", f"/v2/{repository}/blobs/uploads/")
        assert status == 202, body
        location = headers["location"].split("/v2/", 1)[1]
        path = f"/v2/{location}{'&' if '?' in location else '?'}digest={digest}"
        sent = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        status, _, body = self.request("PUT", path, data, sent)
        assert status == 201, body
        return digest

    def push_layout(self, layout: Path, repository: str, tag: str) -> str:
        """Push the only image of an OCI layout, without any tool under test; its reference."""
        entry = json.loads((layout / "index.json").read_bytes())["manifests"][0]
        raw = (layout / "blobs" / entry["digest"].replace(":", "/")).read_bytes()
        document = json.loads(raw)
        for blob in (document["config"], *document["layers"]):
            with (layout / "blobs" / blob["digest"].replace(":", "/")).open("rb") as file:
                self.push_blob(repository, file)
        headers = {"Content-Type": entry["mediaType"]}
        status, _, body = self.request("PUT", f"/v2/{repository}/manifests/{tag}", raw, headers)
        assert status == 201, body
        return f"{self.host}/{repository}:{tag}"


@pytest.fixture(scope="session")
def registry(session_dir: Path) -> Iterator[RegistryServer]:
    """A registry over plain HTTP that forgets everything at the session's end.

    Tests push to repositories named after themselves: the storage is shared.
    """
    need_tool("docker-registry")
    with RegistryServer(session_dir / "registry") as server:
        yield server


@pytest.fixture
def fresh_registry(tmp_path: Path) -> Iterator[RegistryServer]:
    """An empty registry for this test alone."""
    need_tool("docker-registry")
    with RegistryServer(tmp_path / "registry") as server:
        yield server


@pytest.fixture
def password_registry(tmp_path: Path) -> Iterator[RegistryServer]:
    """A registry that asks for user `tester`, password `s3cret` by basic auth."""
    need_tool("docker-registry", "htpasswd")
    htpasswd = tmp_path / "htpasswd"
    command = [which("htpasswd") or "htpasswd", "-Bbn", "tester", "s3cret"]
    htpasswd.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    auth = {"auth": {"htpasswd": {"realm": "tests", "path": str(htpasswd)}}}
    with RegistryServer(tmp_path / "registry", extra=auth) as server:
        yield server


@pytest.fixture
def tls_registry(tmp_path: Path) -> Iterator[tuple[RegistryServer, Path]]:
    """A registry over HTTPS, and the certificate of the private CA that signed it."""
    need_tool("docker-registry")
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    server_cert = authority.issue_cert("localhost", "127.0.0.1")
    cert, key, ca = tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "ca.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in server_cert.cert_chain_pems))
    server_cert.private_key_pem.write_to_path(str(key))
    authority.cert_pem.write_to_path(str(ca))
    tls = {"tls": {"certificate": str(cert), "key": str(key)}}
    with RegistryServer(tmp_path / "registry", http_extra=tls) as server:
        yield server, ca
