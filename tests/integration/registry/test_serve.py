"""`pybuild serve`: the distribution-spec over the store, for our client, skopeo, and whoever sends nonsense."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.images import list_images
from layers.store import Store
from registry.serve import RegistryServer, serving
from tests.integration.registry.commands import CommandLine, cli, put
from tests.support.images import OCI_MANIFEST, check_layout, layout_names, make_image, make_index
from tests.support.machine import CHECKOUT
from tests.support.waiting import PATIENCE_S, until

__all__ = ["cli"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[RegistryServer, Store]]:
    with Store.open(tmp_path / "served") as store, serving(store) as server:
        yield server, store


def ask(
    server: RegistryServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def test_images_come_and_go_unchanged(cli: CommandLine, tmp_path: Path, served: tuple[RegistryServer, Store]) -> None:
    server, store = served
    index = make_index({a: make_image(architecture=a) for a in ("amd64", "arm64")})
    put(cli, tmp_path, index, f"docker://{server.host}/team/all:1")
    assert store.names.get("docker.io/team/all:1") is not None
    # The index's images came by digest, one by one: they are listed as parts of it, not as images without a name.
    assert [(image.repository, image.tag) for image in list_images(store)] == [("team/all", "1")]
    cli("copy", "--all", f"docker://{server.host}/team/all:1", f"oci:{tmp_path}/back:t")
    check_layout(tmp_path / "back", index.digest)
    assert layout_names(tmp_path / "back")["t"] == index.digest
    assert cli("catalog", server.host).text == "team/all"
    assert cli("tags", "ls", f"{server.host}/team/all").text == "1"
    assert cli("validate", f"docker://{server.host}/team/all:1").text.endswith("all is right")
    # Copying again, and under another name, sends nothing.
    assert cli("copy", "--all", f"oci:{tmp_path}/back:t", f"docker://{server.host}/other:2").text == index.digest
    (tmp_path / "f").write_bytes(b"x")
    attached = cli("artifact", "attach", f"{server.host}/team/all:1", tmp_path / "f", "--type", "a/b").text
    assert cli("artifact", "ls", f"{server.host}/team/all:1").text == f"{attached}  a/b"
    assert cli("artifact", "ls", f"{server.host}/team/all:1", "--type", "c/d").text == ""
    store.gc()
    assert cli("artifact", "ls", f"{server.host}/team/all:1").text == f"{attached}  a/b"
    cli("tags", "rm", f"{server.host}/team/all:1")
    cli("digest", f"{server.host}/team/all:1", status=4)
    assert cli("digest", f"{server.host}/other:2").text == index.digest
    cli("delete", f"{server.host}/other@{index.digest}")
    cli("digest", f"{server.host}/other:2", status=4)


@pytest.mark.parametrize("size", ["-1", "-ffff", "+5", "0x5", "1_0", "f" * 16, "", "z"])
def test_a_chunk_without_a_sound_size_is_refused(served: tuple[RegistryServer, Store], size: str) -> None:
    server, _ = served
    _, headers, _ = ask(server, "POST", "/v2/a/blobs/uploads/", Content_Length="0")
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as raw:
        head = f"PATCH {headers['location']} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(head.encode() + f"{size}\r\n".encode() + b"data and no end")
        # The connection stays open for writing: an answer comes though no end of the body does.
        assert raw.recv(4096).startswith(b"HTTP/1.1 400")


def test_pages_in_a_browser_cannot_write(served: tuple[RegistryServer, Store]) -> None:
    server, store = served
    for method, path in (
        ("POST", "/v2/a/blobs/uploads/"),
        ("PUT", "/v2/a/manifests/1"),
        ("DELETE", "/v2/a/manifests/1"),
    ):
        status, _, body = ask(server, method, path, b"{}", Origin="http://evil.example")
        assert (status, json.loads(body)["errors"][0]["code"]) == (403, "DENIED")
    assert ask(server, "GET", "/v2/", Origin="http://evil.example")[0] == 200
    assert not store.names.list()


def test_connections_have_a_bound(served: tuple[RegistryServer, Store]) -> None:
    server, _ = served
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) for _ in range(256)]
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as refused:
            assert refused.recv(1) == b""
    finally:
        for connection in held:
            connection.close()

    def serves() -> bool:
        try:
            return ask(server, "GET", "/v2/")[0] == 200
        except (OSError, http.client.HTTPException):  # the threads have not noticed yet
            return False

    until(serves)


def test_an_upload_goes_on_where_it_broke(served: tuple[RegistryServer, Store]) -> None:
    server, _ = served
    data = bytes(range(256)) * 4000
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    status, headers, _ = ask(server, "POST", "/v2/a/blobs/uploads/", Content_Length="0")
    place = headers["location"]
    assert status == 202
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = f"PATCH {place} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        raw.sendall(head.encode() + data[:100_000])
    until(lambda: ask(server, "GET", place)[1].get("range") == "0-99999")
    assert ask(server, "GET", place)[0] == 204
    assert ask(server, "PATCH", place, data[5:], Content_Range=f"5-{len(data) - 1}")[0] == 416
    rest = data[100_000:]
    status, headers, _ = ask(server, "PATCH", place, rest, Content_Range=f"100000-{len(data) - 1}")
    assert (status, headers["range"]) == (202, f"0-{len(data) - 1}")
    status, headers, _ = ask(server, "PUT", f"{place}?digest={digest}", b"")
    assert (status, headers["docker-content-digest"]) == (201, digest)
    status, headers, body = ask(server, "GET", f"/v2/a/blobs/{digest}", Range="bytes=10-19")
    assert (status, body, headers["content-range"]) == (206, data[10:20], f"bytes 10-19/{len(data)}")
    assert ask(server, "GET", f"/v2/a/blobs/{digest}", Range="bytes=2000000-")[0] == 416
    assert ask(server, "HEAD", f"/v2/a/blobs/{digest}")[1]["content-length"] == str(len(data))
    assert ask(server, "GET", place)[0] == 404


def test_nonsense_is_refused_in_the_specs_words(served: tuple[RegistryServer, Store]) -> None:
    server, store = served

    def refused(method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        status, _, answer = ask(server, method, path, body, **headers)
        return status, json.loads(answer)["errors"][0]["code"]

    nowhere = "sha256:" + "0" * 64
    assert refused("GET", "/v2/a/manifests/none") == (404, "MANIFEST_UNKNOWN")
    assert refused("GET", f"/v2/a/blobs/{nowhere}") == (404, "BLOB_UNKNOWN")
    assert refused("GET", "/v2/a/blobs/sha256:zz") == (400, "DIGEST_INVALID")
    assert refused("GET", "/v2/../../etc/passwd/manifests/x") == (400, "NAME_INVALID")
    assert refused("GET", "/v2/UP/tags/list") == (400, "NAME_INVALID")
    assert refused("GET", "/v2/a/tags/list") == (404, "NAME_UNKNOWN")
    assert refused("PUT", "/v2/a/manifests/t", b"{}") == (400, "MANIFEST_INVALID")
    assert refused("PUT", "/v2/a/manifests/bad%20tag", b"{}") == (400, "TAG_INVALID")
    assert refused("DELETE", f"/v2/a/blobs/{nowhere}") == (405, "UNSUPPORTED")
    assert refused("PUT", "/v2/a/manifests/t", b" " * (5 << 20)) == (413, "SIZE_INVALID")
    image = make_image()
    assert refused("PUT", "/v2/a/manifests/t", image.top.data, Content_Type=OCI_MANIFEST)[1] == "MANIFEST_BLOB_UNKNOWN"
    assert refused("PUT", f"/v2/a/manifests/{nowhere}", image.top.data) == (400, "DIGEST_INVALID")
    place = ask(server, "POST", "/v2/a/blobs/uploads/", b"")[1]["location"]
    assert refused("PUT", f"{place}?digest={nowhere}", b"data") == (400, "DIGEST_INVALID")
    assert ask(server, "DELETE", ask(server, "POST", "/v2/a/blobs/uploads/", b"")[1]["location"])[0] == 204
    assert store.names.list() == []
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"PUT /v2/a/manifests/t HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert b" 400 " in raw.recv(1000)


def test_pages_lead_on(cli: CommandLine, tmp_path: Path, served: tuple[RegistryServer, Store]) -> None:
    server, store = served
    put(cli, tmp_path, make_image(), f"docker://{server.host}/a:t0")
    found = store.names.get("docker.io/library/a:t0")
    assert found is not None
    store.publish({f"docker.io/library/a:t{n}": found for n in range(7)})
    path, seen = "/v2/a/tags/list?n=3", []
    while path:
        _, headers, body = ask(server, "GET", path)
        seen.append(json.loads(body)["tags"])
        path = headers.get("link", "").partition(">")[0].lstrip("<")
    assert [len(page) for page in seen] == [3, 3, 1]
    assert [t for page in seen for t in page] == [f"t{n}" for n in range(7)]


def test_read_only(tmp_path: Path, cli: CommandLine) -> None:
    put(cli, tmp_path, make_image(), "there:1")
    with Store.open(cli.root) as store, serving(store, read_only=True) as server:
        assert cli("digest", f"{server.host}/there:1").text
        assert "read-only" in cli("copy", "there:1", f"docker://{server.host}/new:1", status=None).err
        cli("tags", "rm", f"{server.host}/there:1", status=1)
        assert cli("tags", "ls", f"{server.host}/there").text == "1"


def test_the_command_serves_until_it_is_ended(cli: CommandLine, tmp_path: Path) -> None:
    image = make_image()
    put(cli, tmp_path, image, "app:1")
    file = tmp_path / "address"
    command = [sys.executable, "-m", "builder", "--root", str(cli.root), "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen([*command, "--address-file", str(file)], cwd=CHECKOUT, stderr=subprocess.PIPE) as process:
        for _ in range(200):
            if file.exists():
                break
            time.sleep(0.05)
        host = file.read_text()
        assert cli("digest", f"{host}/app:1").text == image.digest
        skopeo = shutil.which("skopeo")
        if skopeo is not None:
            for a, b in (
                (f"docker://{host}/app:1", f"docker://{host}/ghcr.io/o/app:2"),
                (f"docker://{host}/ghcr.io/o/app:2", f"dir:{tmp_path}/d"),
            ):
                subprocess.run(
                    [skopeo, "copy", "--src-tls-verify=false", "--dest-tls-verify=false", "--preserve-digests", a, b],
                    check=True, capture_output=True,
                )  # fmt: skip
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    if skopeo is not None:
        assert "ghcr.io/o/app" in cli("images").text
        assert (tmp_path / "d/manifest.json").read_bytes() == image.top.data
    assert "cannot listen" in cli("serve", "--listen", "192.0.2.1:1", status=2).err
