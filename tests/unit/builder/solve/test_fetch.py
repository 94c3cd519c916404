"""Downloads of ADD: names, digests, credentials, what is asked again, and servers that misbehave."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from builder.errors import ContextError
from builder.solve.fetch import HttpFile, fetch_http, file_name, parse_checksum
from builder.solve.remotecontext import is_remote_context, open_remote_context
from layers.errors import Cancelled


class Seen(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]


class Answer(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


class Server:
    """Answers by a function, and remembers what it was asked."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.answer: Callable[[Seen], Answer] = lambda _seen: Answer(404)
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                seen = Seen("GET", self.path, dict(self.headers))
                outer.seen.append(seen)
                answer = outer.answer(seen)
                self.send_response(answer.status)
                headers = {"Content-Length": str(len(answer.body)), **answer.headers}
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(answer.body)
                if int(headers["Content-Length"]) != len(answer.body):
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "http"


def digest(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://e.com/a/b.txt", "b.txt"),
        ("https://e.com/a/b.txt?x=/c", "b.txt"),
        ("https://e.com/a/b%20c", "b c"),
        ("https://e.com/a/", "a"),
        ("https://e.com/", "__unnamed__"),
        ("https://e.com", "__unnamed__"),
        ("https://e.com/a/..", "__unnamed__"),
        ("https://e.com/%2e%2e", "__unnamed__"),
        ("https://e.com/a%2f..%2fb", "b"),
        ("https://[e.com/a", "__unnamed__"),
    ],
)
def test_names(url: str, name: str) -> None:
    assert file_name(url) == name


def test_a_download(server: Server, cache: Path) -> None:
    server.answer = lambda _: Answer(body=b"data", headers={"Last-Modified": "Mon, 02 Jan 2006 15:04:05 GMT"})
    file = fetch_http(server.url("/a/f.txt"), cache)
    assert file[1:] == (digest(b"data"), "f.txt", 1136214245, 4)
    assert file.path.read_bytes() == b"data"
    status = file.path.stat()
    assert (status.st_mode & 0o7777, int(status.st_mtime)) == (0o600, 1136214245)
    assert file.cache_key == f"{digest(b'data')} f.txt 1136214245"


@pytest.mark.parametrize("value", ["", "yesterday", "Mon, 99 Foo 2006 15:04:05 GMT", "Thu, 01 Jan 1960 00:00:00 GMT"])
def test_without_a_date_it_is_of_1970(server: Server, cache: Path, value: str) -> None:
    server.answer = lambda _: Answer(body=b"data", headers={"Last-Modified": value})
    file = fetch_http(server.url("/f"), cache)
    assert (file.last_modified_s, int(file.path.stat().st_mtime)) == (None, 0)


def test_asked_again_by_its_etag(server: Server, cache: Path) -> None:
    def answer(seen: Seen) -> Answer:
        if seen.headers.get("If-None-Match") == '"one"':
            return Answer(304)
        return Answer(body=b"data", headers={"ETag": 'W/"one"', "Last-Modified": "Mon, 02 Jan 2006 15:04:05 GMT"})

    server.answer = answer
    first = fetch_http(server.url("/f"), cache)
    assert fetch_http(server.url("/f"), cache) == first
    assert [s.headers.get("If-None-Match") for s in server.seen] == [None, '"one"']


def test_what_changed_is_fetched_anew(server: Server, cache: Path) -> None:
    bodies = iter([b"one", b"two"])
    server.answer = lambda _: Answer(body=next(bodies), headers={"ETag": '"x"'})
    assert fetch_http(server.url("/f"), cache).path.read_bytes() == b"one"
    assert fetch_http(server.url("/f"), cache).path.read_bytes() == b"two"


@pytest.mark.parametrize("damage", [b"", b"dat", b"DATA", None])
def test_a_damaged_cache_is_not_believed(server: Server, cache: Path, damage: bytes | None) -> None:
    server.answer = lambda seen: Answer(body=b"data", headers={"ETag": '"one"'})
    first = fetch_http(server.url("/f"), cache)
    if damage is None:
        first.path.unlink()
        for record in cache.glob("*.json"):
            record.write_text("{nonsense")
    else:
        first.path.write_bytes(damage)
    again = fetch_http(server.url("/f"), cache, checksum=digest(b"data"))
    assert again.path.read_bytes() == b"data"


def test_a_checksum_that_is_here_needs_no_network(server: Server, cache: Path) -> None:
    server.answer = lambda _: Answer(body=b"data")
    first = fetch_http(server.url("/f"), cache, checksum=digest(b"data"))
    again = fetch_http(server.url("/other/name"), cache, checksum=digest(b"data"))
    assert (len(server.seen), again.path, again.name) == (1, first.path, "name")


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_checksums(server: Server, cache: Path, algorithm: str) -> None:
    server.answer = lambda _: Answer(body=b"data")
    fetch_http(server.url("/f"), cache, checksum=digest(b"data", algorithm))
    with pytest.raises(ContextError, match="digest mismatch"):
        fetch_http(server.url("/f"), cache, checksum=digest(b"other", algorithm))
    assert [p.name for p in cache.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "text", ["", "sha256", "sha256:abc", "md5:" + "0" * 32, "sha256:" + "G" * 64, "sha256:" + "A" * 64]
)
def test_malformed_checksums(text: str) -> None:
    with pytest.raises(ContextError, match="--checksum"):
        parse_checksum(text)


def test_redirects(server: Server, cache: Path) -> None:
    def answer(seen: Seen) -> Answer:
        if seen.path == "/a/name":
            return Answer(302, headers={"Location": "/b/other"})
        return Answer(body=b"data") if seen.path == "/b/other" else Answer(302, headers={"Location": seen.path})

    server.answer = answer
    assert fetch_http(server.url("/a/name"), cache).name == "name"
    with pytest.raises(ContextError, match="redirects"):
        fetch_http(server.url("/loop"), cache)


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://e.com/x", "//"])
def test_redirects_to_what_is_no_url(server: Server, cache: Path, location: str) -> None:
    server.answer = lambda _: Answer(302, headers={"Location": location})
    with pytest.raises(ContextError):
        fetch_http(server.url("/f"), cache)


def test_credentials_by_host(server: Server, cache: Path) -> None:
    other = Server()
    try:
        other.answer = lambda _: Answer(body=b"data")
        server.answer = lambda _: Answer(302, headers={"Location": other.url("/f")})
        secrets = {f"HTTP_AUTH_TOKEN_{server.host}": b"sesame\n", "HTTP_AUTH_TOKEN_e.com": b"not this"}
        fetch_http(server.url("/f"), cache, secrets=secrets.get)
        assert server.seen[0].headers["Authorization"] == "Bearer sesame"
        assert "Authorization" not in other.seen[0].headers
        secrets[f"HTTP_AUTH_HEADER_{server.host}"] = b"Basic abc"
        fetch_http(server.url("/g"), cache, secrets=secrets.get)
        assert server.seen[1].headers["Authorization"] == "Basic abc"
    finally:
        other.close()


def test_no_credentials_of_the_user_are_used(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = cache.parent / ".netrc"
    netrc.write_text(f"machine 127.0.0.1 login a password b\nmachine {server.host} login a password b\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(cache.parent))
    server.answer = lambda _: Answer(body=b"data")
    fetch_http(server.url("/f"), cache)
    assert "Authorization" not in server.seen[0].headers


def test_secrets_stay_out_of_errors(server: Server, cache: Path) -> None:
    server.answer = lambda _: Answer(403)
    with pytest.raises(ContextError) as error:
        fetch_http(f"http://user:hunter2@{server.host}/f?token=hunter2", cache)
    assert "invalid response status 403" in str(error.value)
    assert "hunter2" not in f"{error.value} {error.value.hint}"
    with pytest.raises(ContextError, match="not one line of text"):
        fetch_http(server.url("/f"), cache, secrets=lambda _: b"a\nX-Injected: 1")


@pytest.mark.parametrize("status", [400, 404, 410])
def test_refusals_are_final(server: Server, cache: Path, status: int) -> None:
    server.answer = lambda _: Answer(status)
    with pytest.raises(ContextError, match=f"invalid response status {status}"):
        fetch_http(server.url("/f"), cache)
    assert len(server.seen) == 1


@pytest.mark.parametrize("trouble", ["busy", "cut"])
def test_passing_troubles_are_waited_out(server: Server, cache: Path, trouble: str) -> None:
    def answer(_: Seen) -> Answer:
        if len(server.seen) > 1:
            return Answer(body=b"data")
        if trouble == "busy":
            return Answer(503, headers={"Retry-After": "0"})
        return Answer(body=b"da", headers={"Content-Length": "4"})

    server.answer = answer
    assert fetch_http(server.url("/f"), cache).path.read_bytes() == b"data"
    assert len(server.seen) == 2
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".json"]


def test_a_coding_that_nobody_asked_for_is_undone(server: Server, cache: Path) -> None:
    server.answer = lambda _: Answer(body=gzip.compress(b"data" * 1000), headers={"Content-Encoding": "gzip"})
    assert fetch_http(server.url("/f"), cache).digest == digest(b"data" * 1000)
    assert server.seen[0].headers["Accept-Encoding"] == "identity"
    server.answer = lambda _: Answer(body=b"junk", headers={"Content-Encoding": "gzip"})
    with pytest.raises(ContextError, match="gzip"):
        fetch_http(server.url("/g"), cache)
    server.answer = lambda _: Answer(body=gzip.compress(b"data")[:-4], headers={"Content-Encoding": "gzip"})
    with pytest.raises(ContextError, match="cut short"):
        fetch_http(server.url("/h"), cache)


def test_what_cannot_fit_on_the_disk_is_refused_at_once(server: Server, cache: Path) -> None:
    server.answer = lambda _: Answer(body=b"x", headers={"Content-Length": str(10**17)})
    with pytest.raises(ContextError, match="do not fit on the disk"):
        fetch_http(server.url("/f"), cache)


def test_nobody_there(cache: Path) -> None:
    with pytest.raises(ContextError, match=r"127\.0\.0\.1"):
        fetch_http("http://127.0.0.1:9/f", cache, cancelled=lambda: False)


def test_cancelled(server: Server, cache: Path) -> None:
    server.answer = lambda _: Answer(body=b"data")
    with pytest.raises(Cancelled):
        fetch_http(server.url("/f"), cache, cancelled=lambda: len(server.seen) > 0)
    assert [p for p in cache.iterdir() if p.name.startswith(".")] == []


def test_progress(server: Server, cache: Path) -> None:
    told: list[tuple[int, int | None]] = []
    server.answer = lambda _: Answer(body=b"data" * 100_000)
    fetch_http(server.url("/f"), cache, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (400_000, 400_000)


def test_at_the_same_time(server: Server, cache: Path) -> None:
    server.answer = lambda seen: Answer(body=b"data", headers={"ETag": '"1"'})
    found: list[HttpFile] = []
    threads = [threading.Thread(target=lambda: found.append(fetch_http(server.url("/f"), cache))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


# Contexts


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("-", True),
        ("https://e.com/x.tar", True),
        ("git@e.com:x", True),
        ("github.com/a/b", True),
        (".", False),
        ("/a", False),
    ],
)
def test_remote_contexts(text: str, wanted: bool) -> None:
    assert is_remote_context(text) is wanted


def tarball() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        info = tarfile.TarInfo("Containerfile")
        info.size = 13
        info.uid, info.gid = os.geteuid(), os.getegid()
        tar.addfile(info, io.BytesIO(b"FROM scratch\n"))
    return out.getvalue()


def test_a_context_on_stdin(tmp_path: Path) -> None:
    for name, data in (("archive", tarball()), ("text", b"FROM scratch\n"), ("empty", b"")):
        (tmp_path / name).mkdir()
        context = open_remote_context("-", tmp_path / name, tmp_path, stdin=io.BytesIO(data))
        if name == "archive":
            assert (context.path / "Containerfile").read_bytes() == b"FROM scratch\n"
            assert context.containerfile is None
        else:
            assert list(context.path.iterdir()) == []
            assert context.containerfile == data


def test_what_is_no_context(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="neither an archive nor a Containerfile"):
        open_remote_context("-", tmp_path, tmp_path, stdin=io.BytesIO(b"\0binary"))
    (tmp_path / "b").mkdir()
    with pytest.raises(ContextError, match="more than 16 MiB"):
        open_remote_context("-", tmp_path / "b", tmp_path, stdin=io.BytesIO(b"x" * (17 << 20)))
    with pytest.raises(ContextError, match="closed"):
        open_remote_context("-", tmp_path, tmp_path)
    with pytest.raises(ContextError, match="unexpected query"):
        is_remote_context("https://e.com/x.git?bad=1")


def test_a_context_behind_a_url(server: Server, cache: Path, tmp_path: Path) -> None:
    server.answer = lambda seen: Answer(body=tarball() if seen.path.endswith(".tgz") else b"FROM scratch\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    archive = open_remote_context(server.url("/x.tgz"), tmp_path / "a", cache)
    assert (archive.path / "Containerfile").exists()
    lone = open_remote_context(server.url("/Dockerfile"), tmp_path / "b", cache)
    assert lone.containerfile == b"FROM scratch\n"
