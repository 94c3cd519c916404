"""Git sources, with the real program and a real server of git's own on the loopback."""

from __future__ import annotations

import base64
import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.errors import ContextError
from builder.frontend.gitref import parse_git_ref
from builder.solve.gitfetch import GitSource, fetch_git, git_cache_key, resolve_git
from builder.solve.remotecontext import open_remote_context
from layers.errors import Cancelled
from tests.support.machine import need_tool

ENVIRON = {
    "PATH": os.environ.get("PATH", os.defpath),
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.com",
    "LC_ALL": "C",
}


def git(directory: Path, *arguments: str) -> str:
    command = ["git", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always", *arguments]
    return subprocess.run(
        command, cwd=directory, env=ENVIRON, check=True, capture_output=True, text=True
    ).stdout.strip()


class GitServer:
    """Serves the repositories beneath `root`: by git's smart protocol under /smart/, as plain files under /dumb/."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.authorizations: list[str | None] = []
        self.require = ""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(b"")

            def do_POST(self) -> None:
                self._answer(self.rfile.read(int(self.headers["Content-Length"])))

            def _answer(self, body: bytes) -> None:
                authorization = self.headers.get("Authorization")
                outer.authorizations.append(authorization)
                if outer.require and authorization != outer.require:
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", "Basic realm=x")
                    self.end_headers()
                elif self.path.startswith("/dumb/"):
                    self._file(outer.root / self.path.removeprefix("/dumb/").partition("?")[0])
                else:
                    self._backend(body)

            def _file(self, path: Path) -> None:
                found = path.is_file()
                self.send_response(200 if found else 404)
                self.end_headers()
                if found:
                    self.wfile.write(path.read_bytes())

            def _backend(self, body: bytes) -> None:
                path, _, query = self.path.removeprefix("/smart").partition("?")
                environ = ENVIRON | {
                    "GIT_PROJECT_ROOT": str(outer.root),
                    "GIT_HTTP_EXPORT_ALL": "1",
                    "PATH_INFO": path,
                    "QUERY_STRING": query,
                    "REQUEST_METHOD": self.command,
                    "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                    "CONTENT_LENGTH": str(len(body)),
                    "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                    "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                    "GIT_CONFIG_COUNT": "1",
                    "GIT_CONFIG_KEY_0": "safe.directory",
                    "GIT_CONFIG_VALUE_0": "*",
                }
                done = subprocess.run(["git", "http-backend"], env=environ, input=body, capture_output=True, check=True)
                head, _, rest = done.stdout.partition(b"\r\n\r\n")
                fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
                self.send_response(int(fields.pop("Status", "200 OK").split()[0]))
                for key, value in fields.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(rest)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def url(self, name: str = "repo.git", kind: str = "smart") -> str:
        return f"http://{self.host}/{kind}/{name}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def commits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A repository with two commits on main, a branch, a tag of each kind, and a subdirectory; by name, its commits."""
    need_tool("git")
    top = tmp_path_factory.mktemp("git")
    work = top / "work"
    work.mkdir()
    git(work, "init", "--quiet")
    (work / "file").write_text("one\n")
    (work / "sub/dir").mkdir(parents=True)
    (work / "sub/dir/inner").write_text("inner\n")
    (work / "run.sh").write_text("#!/bin/sh\n")
    (work / "run.sh").chmod(0o755)
    (work / "abs").symlink_to("/sub")
    git(work, "add", ".")
    git(work, "commit", "--quiet", "-m", "one")
    names = {"one": git(work, "rev-parse", "HEAD"), "top": str(top)}
    git(work, "tag", "light")
    git(work, "tag", "-a", "-m", "annotated", "heavy")
    names["heavy"] = git(work, "rev-parse", "heavy")
    git(work, "checkout", "--quiet", "-b", "side")
    (work / "file").write_text("side\n")
    git(work, "commit", "--quiet", "-am", "side")
    names["side"] = git(work, "rev-parse", "HEAD")
    git(work, "tag", "main")  # a tag of a branch's name: the branch wins
    git(work, "checkout", "--quiet", "refs/heads/main", "-B", "main")
    (work / "file").write_text("two\n")
    git(work, "commit", "--quiet", "-am", "two")
    names["two"] = git(work, "rev-parse", "HEAD")
    git(top, "clone", "--quiet", "--bare", str(work), "repo.git")
    git(top / "repo.git", "symbolic-ref", "HEAD", "refs/heads/main")
    git(top / "repo.git", "update-server-info")
    return names


@pytest.fixture
def server(commits: dict[str, str]) -> Iterator[GitServer]:
    made = GitServer(Path(commits["top"]))
    yield made
    made.close()


def access(**fields: object) -> GitSource:
    return GitSource(environ=ENVIRON, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["smart", "dumb"])
@pytest.mark.parametrize(
    ("ref", "commit", "text"),
    [
        ("", "two", "two"),
        ("#main", "two", "two"),
        ("#side", "side", "side"),
        ("#light", "one", "one"),
        ("#heavy", "one", "one"),
        ("#refs/tags/heavy", "one", "one"),
        ("#refs/heads/side", "side", "side"),
        ("?branch=side", "side", "side"),
        ("?tag=main", "side", "side"),
        ("#{one}", "one", "one"),
        ("?checksum={side}", "side", "side"),
    ],
)
def test_references(
    server: GitServer, commits: dict[str, str], tmp_path: Path, kind: str, ref: str, commit: str, text: str
) -> None:
    source = server.url(kind=kind) + ref.format(**commits)
    tree = fetch_git(source, tmp_path, access=access())
    assert tree.commit == commits[commit]
    assert (tree.path / "file").read_text() == f"{text}\n"
    assert sorted(p.name for p in tree.path.iterdir()) == ["abs", "file", "run.sh", "sub"]
    if kind == "smart":
        assert resolve_git(source, tmp_path, access()) == commits[commit]
    assert [p.name for p in tree.path.parent.iterdir()] == ["tree"], "its private files are gone"


def test_modes_are_gits(server: GitServer, tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        tree = fetch_git(server.url(), tmp_path, access=access())
    finally:
        os.umask(old)
    modes = {p: oct((tree.path / p).stat().st_mode & 0o7777) for p in ("file", "run.sh", "sub/dir")}
    assert modes == {"file": "0o644", "run.sh": "0o755", "sub/dir": "0o755"}


@pytest.mark.parametrize("subdir", ["sub/dir", "/sub/dir/", "abs/dir", "sub/../abs/dir"])
def test_subdirectories(server: GitServer, tmp_path: Path, subdir: str) -> None:
    tree = fetch_git(f"{server.url()}#main:{subdir}", tmp_path, access=access(), keep_git_dir=True)
    assert [p.name for p in tree.path.iterdir()] == ["inner"]
    assert tree.cache_key == f"{tree.commit}:{subdir}"


@pytest.mark.parametrize("subdir", ["none", "file", "../../../../../../../../../../../../none"])
def test_subdirectories_that_are_none(server: GitServer, tmp_path: Path, subdir: str) -> None:
    with pytest.raises(ContextError, match="subdirectory"):
        fetch_git(f"{server.url()}#main:{subdir}", tmp_path, access=access())


def test_the_git_directory_is_kept_on_demand(server: GitServer, commits: dict[str, str], tmp_path: Path) -> None:
    remote = server.url().replace("http://", "http://user:hunter2@")
    tree = fetch_git(f"{remote}#side", tmp_path, access=access(), keep_git_dir=True)
    assert git(tree.path, "rev-parse", "HEAD") == commits["side"]
    assert git(tree.path, "status", "--porcelain") == ""
    assert "hunter2" not in "".join(
        p.read_text(errors="replace") for p in (tree.path / ".git").rglob("*") if p.is_file()
    )
    assert not (tree.path / ".git/hooks").exists()
    assert tree.cache_key == f"{commits['side']}.git"
    contrary = fetch_git(f"{server.url()}?keep-git-dir=false", tmp_path, access=access(), keep_git_dir=True)
    assert not (contrary.path / ".git").exists()


def test_checksums(server: GitServer, commits: dict[str, str], tmp_path: Path) -> None:
    for checksum in (commits["one"], commits["one"][:12], commits["heavy"]):
        assert resolve_git(f"{server.url()}#heavy", tmp_path, access(), checksum=checksum) == commits["one"]
    for source in (f"{server.url()}#main", f"{server.url()}#{commits['two']}"):
        with pytest.raises(ContextError, match="expected checksum to match"):
            fetch_git(source, tmp_path, access=access(), checksum=commits["one"])
    with pytest.raises(ContextError, match="checksum mismatch"):
        resolve_git(f"{server.url()}?checksum={commits['one']}", tmp_path, access(), checksum=commits["two"])
    with pytest.raises(ContextError, match="is not a commit"):
        resolve_git(server.url(), tmp_path, access(), checksum="sha256:abc")


def test_a_commit_is_not_asked_about(server: GitServer, commits: dict[str, str], tmp_path: Path) -> None:
    assert resolve_git(f"{server.url()}#{commits['one']}", tmp_path, access()) == commits["one"]
    assert server.authorizations == []


def test_cache_keys(commits: dict[str, str]) -> None:
    ref = parse_git_ref("https://e.com/f.git#main:sub")
    assert ref is not None
    keys = {
        git_cache_key("c", ref, keep_git_dir=False),
        git_cache_key("c", ref, keep_git_dir=True),
        git_cache_key("c", ref._replace(subdir=""), keep_git_dir=False),
        git_cache_key("c", ref._replace(subdir=""), keep_git_dir=True),
        git_cache_key("c", ref._replace(submodules=False), keep_git_dir=True),
    }
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{url}#none", "does not contain ref none"),
        ("{url}#--upload-pack=id", "is not a git reference"),
        ("{url}#" + "0" * 40, "failed"),
        ("http://{host}/smart/none.git", "ls-remote of .* failed"),
        ("file.txt", "not a reference to a git repository"),
        ("{url}?bad=1", "unexpected query"),
    ],
)
def test_refused(server: GitServer, tmp_path: Path, source: str, complaint: str) -> None:
    with pytest.raises(ContextError, match=complaint):
        fetch_git(source.format(url=server.url(), host=server.host), tmp_path, access=access())


@pytest.mark.parametrize(
    ("secrets", "header"),
    [
        ({"GIT_AUTH_TOKEN": b"sesame\n"}, "basic " + base64.b64encode(b"x-access-token:sesame").decode()),
        ({"GIT_AUTH_HEADER": b"Bearer x"}, "Bearer x"),
        ({"GIT_AUTH_HEADER.{host}": b"Bearer y", "GIT_AUTH_TOKEN": b"z"}, "Bearer y"),
    ],
)
def test_credentials(server: GitServer, tmp_path: Path, secrets: dict[str, bytes], header: str) -> None:
    server.require = header
    named = {key.format(host=server.host): value for key, value in secrets.items()}
    tree = fetch_git(server.url(), tmp_path, access=access(secrets=named.get), keep_git_dir=True)
    assert header.encode() not in (tree.path / ".git/config").read_bytes()
    assert set(server.authorizations) == {header}
    with pytest.raises(ContextError) as error:
        fetch_git(server.url(), tmp_path, access=access(secrets=lambda _: b"wrong"))
    assert "wrong" not in str(error.value)


def test_passwords_in_addresses_stay_out_of_errors(server: GitServer, tmp_path: Path) -> None:
    server.require = "nothing will do"
    with pytest.raises(ContextError) as error:
        fetch_git(server.url().replace("http://", "http://user:hunter2@"), tmp_path, access=access())
    assert "hunter2" not in f"{error.value}"


def test_nothing_of_the_host_is_heeded(server: GitServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template with a hook, a rewriting of addresses: both would work if the user's configuration were read."""
    home = tmp_path / "home"
    (home / "template/hooks").mkdir(parents=True)
    hook = home / "template/hooks/post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {home}/hooked\n")
    hook.chmod(0o755)
    (home / ".gitconfig").write_text(
        f'[init]\ntemplateDir = {home}/template\n[url "http://127.0.0.1:9/"]\ninsteadOf = http://{server.host}/\n'
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_TEMPLATE_DIR", str(home / "template"))
    environ = {**ENVIRON, "HOME": str(home), "GIT_TEMPLATE_DIR": str(home / "template")}
    fetch_git(server.url(), tmp_path, access=GitSource(environ=environ))
    assert not (home / "hooked").exists()


def test_submodules(server: GitServer, commits: dict[str, str], tmp_path: Path) -> None:
    top = Path(commits["top"])
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "--quiet")
    git(outer, "submodule", "--quiet", "add", str(top / "repo.git"), "inner")
    modules = outer / ".gitmodules"
    modules.write_text(modules.read_text().replace(str(top / "repo.git"), "../repo.git"))
    git(outer, "add", ".")
    git(outer, "commit", "--quiet", "-m", "with a submodule")
    git(top, "clone", "--quiet", "--bare", str(outer), f"{tmp_path.name}.git")
    tree = fetch_git(server.url(f"{tmp_path.name}.git"), tmp_path, access=access())
    assert (tree.path / "inner/file").read_text() == "two\n"
    assert not (tree.path / "inner/.git").exists()
    bare = fetch_git(f"{server.url(f'{tmp_path.name}.git')}?submodules=false", tmp_path, access=access())
    assert list((bare.path / "inner").iterdir()) == []


def test_a_submodule_cannot_be_a_directory_of_the_host(
    server: GitServer, commits: dict[str, str], tmp_path: Path
) -> None:
    top = Path(commits["top"])
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "--quiet")
    git(outer, "submodule", "--quiet", "add", str(top / "repo.git"), "inner")
    git(outer, "commit", "--quiet", "-m", "with a submodule")
    git(top, "clone", "--quiet", "--bare", str(outer), f"{tmp_path.name}.git")
    with pytest.raises(ContextError, match="transport 'file' not allowed"):
        fetch_git(server.url(f"{tmp_path.name}.git"), tmp_path, access=access())


def test_without_the_program(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="needs the program git"):
        fetch_git("https://example.com/x.git", tmp_path, access=GitSource(environ={"PATH": str(tmp_path)}))


def test_cancelled(server: GitServer, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        fetch_git(server.url(), tmp_path, access=access(), cancelled=lambda: True)


def test_as_a_context(server: GitServer, commits: dict[str, str], tmp_path: Path) -> None:
    context = open_remote_context(f"{server.url()}#side:sub", tmp_path, tmp_path)
    assert ([p.name for p in context.path.iterdir()], context.commit) == (["dir"], commits["side"])
    committed = git(Path(commits["top"]) / "repo.git", "log", "-1", "--format=%ct", commits["side"])
    assert context.epoch() == int(committed)
