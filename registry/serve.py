"""A small registry over the local store: the distribution-spec over HTTP/1.1, for tests and one machine.

Plain http without credentials, so it listens on loopback unless told otherwise. Real registries are
for everything else. What it answers is decided in `registry.servedstore`.

Spec: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

from layers.errors import PybuildError, SizeMismatch
from layers.oci import MAX_MANIFEST_BYTES, MEDIA_OCI_INDEX, encode_json
from registry.servedstore import Refusal, ServedStore, error_body, paged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from layers.store import Store

_CHUNK = 1 << 20
_TIMEOUT_S = 120
_MAX_PAGE = 1000
_DRAIN_BYTES = 16 << 20
_MAX_CONNECTIONS = 256
"""At once; each has a thread. What comes besides is closed, and clients try again."""
_ROUTES = (
    ("manifest", re.compile(r"/v2/(?P<path>.+)/manifests/(?P<reference>[^/]+)\Z")),
    ("blob", re.compile(r"/v2/(?P<path>.+)/blobs/(?P<digest>[^/]+:[^/]+)\Z")),
    ("uploads", re.compile(r"/v2/(?P<path>.+)/blobs/uploads/?\Z")),
    ("upload", re.compile(r"/v2/(?P<path>.+)/blobs/uploads/(?P<key>[0-9a-f]{32})\Z")),
    ("tags", re.compile(r"/v2/(?P<path>.+)/tags/list\Z")),
    ("referrers", re.compile(r"/v2/(?P<path>.+)/referrers/(?P<digest>[^/]+)\Z")),
    ("catalog", re.compile(r"/v2/_catalog\Z")),
    ("root", re.compile(r"/v2/?\Z")),
)
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})\Z")
_CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}\Z")
_CONTENT_RANGE = re.compile(r"(?:bytes )?(\d{1,18})-(\d{1,18})(?:/.*)?\Z")


class RegistryServer:
    """A registry that serves a store until it is closed. `host` is what goes before a repository's name."""

    def __init__(self, store: Store, address: str = "127.0.0.1", port: int = 0, *, read_only: bool = False) -> None:
        """Raises: OSError if the address cannot be listened on."""
        self.served = ServedStore(store, read_only=read_only)
        handler = type("Handler", (_Handler,), {"served": self.served})
        kind = type("Server", (_Server,), {"address_family": socket.AF_INET6}) if ":" in address else _Server
        self._server: ThreadingHTTPServer = kind((address, port), handler)
        bound = self._server.server_address
        self.port = int(bound[1])
        shown = f"[{address}]" if ":" in address else ("localhost" if address == "127.0.0.1" else address)
        self.host = f"{shown}:{self.port}"

    def serve(self) -> None:
        """Answer requests until `stop`, in threads of their own."""
        self._server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """End `serve`; from another thread only."""
        self._server.shutdown()

    def close(self) -> None:
        """Stop listening, and drop what was half received."""
        self._server.server_close()
        self.served.close()


@contextmanager
def serving(store: Store, *, read_only: bool = False) -> Iterator[RegistryServer]:
    """A registry on a free loopback port for as long as the block lasts."""
    server = RegistryServer(store, read_only=read_only)
    thread = threading.Thread(target=server.serve, name="registry", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
        server.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: Any, handler: Any) -> None:
        self._free = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no event."""


class _Handler(BaseHTTPRequestHandler):
    served: ServedStore
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_S
    server_version = "pybuild"
    sys_version = ""

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        self._answer("get")

    def do_HEAD(self) -> None:
        self._answer("get")

    def do_PUT(self) -> None:
        self._answer("put")

    def do_POST(self) -> None:
        self._answer("post")

    def do_PATCH(self) -> None:
        self._answer("patch")

    def do_DELETE(self) -> None:
        self._answer("delete")

    def _answer(self, verb: str) -> None:
        url = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(url.query).items()}
        self._left = self._body_length()
        self._answered = False
        try:
            if verb != "get" and "Origin" in self.headers:
                # There are no credentials here: any page in this machine's browser could write to the store.
                raise Refusal(403, "DENIED", "what a browser sends is not taken")
            for name, pattern in _ROUTES:
                match = pattern.match(url.path)
                if match is None:
                    continue
                action: Callable[..., None] | None = getattr(self, f"_{verb}_{name}", None)
                if action is None:
                    raise Refusal(405, "UNSUPPORTED", f"{self.command} does not go here")
                action(**match.groupdict())
                break
            else:
                raise Refusal(404, "NAME_UNKNOWN", "there is nothing here")
        except Refusal as e:
            self._refuse(e)
        except SizeMismatch as e:
            self._refuse(Refusal(413, "SIZE_INVALID", str(e)))
        except PybuildError as e:
            self._refuse(Refusal(500, "UNKNOWN", str(e)))
        if self._left != 0:
            # A body that nobody read would be taken for the next request; and closing upon unread bytes
            # resets the connection, which may take the answer with it.
            self.close_connection = True
            self._drain()

    def _drain(self) -> None:
        taken = 0
        try:
            for piece in self._pieces():
                taken += len(piece)
                if taken > _DRAIN_BYTES:
                    return
        except (Refusal, OSError):
            return

    def _refuse(self, refusal: Refusal) -> None:
        if self._answered:
            self.close_connection = True
            return
        self._send(refusal.status, error_body(refusal), "application/json")

    def _send(self, status: int, body: bytes = b"", kind: str = "", /, **headers: str) -> None:
        """Answer; in the headers' names `_` stands for `-`."""
        self._answered = True
        if self._left != 0:
            headers["Connection"] = "close"
        self.send_response(status)
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        if kind:
            self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Bodies

    def _body_length(self) -> int | None:
        """The length of the request's body; None for one in chunks."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return None
        text = self.headers.get("Content-Length", "0")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0

    def _pieces(self) -> Iterator[bytes]:
        """The request's body. Raises: Refusal if it ends early or is malformed."""
        if self._left is not None:
            while self._left:
                data = self.rfile.read(min(self._left, _CHUNK))
                if not data:
                    self.close_connection = True
                    raise Refusal(400, "SIZE_INVALID", "the body ended early")
                self._left -= len(data)
                yield data
            return
        while True:
            line = self.rfile.readline(1024).split(b";")[0].strip()
            if not _CHUNK_SIZE.match(line):  # int() would take a sign, and read() without end
                raise Refusal(400, "SIZE_INVALID", "malformed chunk")
            size = int(line, 16)
            while size:
                data = self.rfile.read(min(size, _CHUNK))
                if not data:
                    raise Refusal(400, "SIZE_INVALID", "the body ended early")
                size -= len(data)
                yield data
            if not self.rfile.readline(1024).strip() and line.strip(b"0") == b"":
                self._left = 0
                return

    def _small_body(self, limit: int) -> bytes:
        parts, size = [], 0
        for piece in self._pieces():
            size += len(piece)
            if size > limit:
                raise Refusal(413, "SIZE_INVALID", f"more than {limit} bytes")
            parts.append(piece)
        return b"".join(parts)

    # Lists

    def _get_root(self) -> None:
        self._send(200, b"{}", "application/json")

    def _get_catalog(self) -> None:
        self._list("repositories", self.served.catalog(), {})

    def _get_tags(self, path: str) -> None:
        self._list("tags", self.served.tags(path), {"name": path})

    def _list(self, key: str, names: list[str], document: dict[str, Any]) -> None:
        text = self.query.get("n", "")
        size = min(int(text), _MAX_PAGE) if text.isascii() and text.isdigit() and len(text) < 10 else None
        page, more = paged(names, self.query.get("last", ""), size)
        headers = {}
        if more and page:
            path = urlsplit(self.path).path
            headers["Link"] = f'<{path}?n={size}&last={quote(page[-1], safe="")}>; rel="next"'
        self._send(200, encode_json({**document, key: page}), "application/json", **headers)

    def _get_referrers(self, path: str, digest: str) -> None:
        kind = self.query.get("artifactType")
        headers = {"OCI_Filters_Applied": "artifactType"} if kind else {}
        self._send(200, self.served.referrers(path, digest, kind), MEDIA_OCI_INDEX, **headers)

    # Manifests

    def _get_manifest(self, path: str, reference: str) -> None:
        found = self.served.manifest(path, reference)
        self._send(200, found.raw, found.media_type, Docker_Content_Digest=found.digest)

    def _put_manifest(self, path: str, reference: str) -> None:
        raw = self._small_body(MAX_MANIFEST_BYTES)
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip()
        digest, subject = self.served.put_manifest(path, reference, raw, kind)
        more = {"OCI_Subject": str(subject)} if subject is not None else {}
        self._send(201, Location=f"/v2/{path}/manifests/{digest}", Docker_Content_Digest=digest, **more)

    def _delete_manifest(self, path: str, reference: str) -> None:
        self.served.delete_manifest(path, reference)
        self._send(202)

    # Blobs

    def _get_blob(self, path: str, digest: str) -> None:
        file, size = self.served.blob(path, digest)
        start, end, status = 0, size, 200
        match = _RANGE.match(self.headers.get("Range", ""))
        if match is not None:
            start, end = int(match[1]), min(int(match[2] or size) + 1, size) if match[2] else size
            if start >= end:
                self._send(416, b"", Content_Range=f"bytes */{size}")
                return
            status = 206
        with open(file, "rb") as stream:
            more = {"Content_Range": f"bytes {start}-{end - 1}/{size}"} if status == 206 else {}
            self._answered = True
            self.send_response(status)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(end - start))
            self.send_header("Docker-Content-Digest", digest)
            self.send_header("Accept-Ranges", "bytes")
            for name, value in more.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD" and end > start:
                self.wfile.flush()
                self.connection.sendfile(stream, start, end - start)

    def _post_uploads(self, path: str) -> None:
        mount = self.query.get("mount")
        if mount and self.served.has_blob(mount):
            self._created(path, mount)
            return
        key, upload = self.served.begin(path)
        if "digest" in self.query and not mount:
            with upload.lock:
                for piece in self._pieces():
                    upload.ingest.write(piece)
                self._created(path, self.served.finish(key, self.query["digest"]))
            return
        self._accepted(path, key, 0)

    def _accepted(self, path: str, key: str, offset: int, status: int = 202) -> None:
        place = f"/v2/{path}/blobs/uploads/{key}"
        self._send(status, Location=place, Range=f"0-{max(0, offset - 1)}", Docker_Upload_UUID=key)

    def _created(self, path: str, digest: str) -> None:
        self._send(201, Location=f"/v2/{path}/blobs/{digest}", Docker_Content_Digest=digest)

    def _get_upload(self, path: str, key: str) -> None:
        self._accepted(path, key, self.served.upload(key).ingest.offset, 204)

    def _patch_upload(self, path: str, key: str) -> None:
        upload = self.served.upload(key)
        with upload.lock:
            self._in_order(upload.ingest.offset)
            for piece in self._pieces():
                upload.ingest.write(piece)
            self._accepted(path, key, upload.ingest.offset)

    def _put_upload(self, path: str, key: str) -> None:
        upload = self.served.upload(key)
        if "digest" not in self.query:
            raise Refusal(400, "DIGEST_INVALID", "the digest is missing")
        with upload.lock:
            self._in_order(upload.ingest.offset)
            for piece in self._pieces():
                upload.ingest.write(piece)
            self._created(path, self.served.finish(key, self.query["digest"]))

    def _in_order(self, offset: int) -> None:
        match = _CONTENT_RANGE.match(self.headers.get("Content-Range", ""))
        if match is not None and int(match[1]) != offset:
            raise Refusal(416, "BLOB_UPLOAD_INVALID", f"the upload has {offset} bytes")

    def _delete_upload(self, path: str, key: str) -> None:
        self.served.cancel(key)
        self._send(204)
