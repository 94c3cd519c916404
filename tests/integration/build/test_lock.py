"""Lock files: names move, what was locked does not."""

from __future__ import annotations

import functools
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_tool
from tests.support.registries import RegistryServer

GIT_ENVIRON = {
    "PATH": os.environ.get("PATH", os.defpath),
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.com",
}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A directory and the URL at which it is served."""
    place = tmp_path / "site"
    place.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(place)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", place
    server.shutdown()
    server.server_close()
    thread.join()


def commit(repository: Path, text: str) -> str:
    """Commit a file and have the bare copy beside the work tree know it."""

    def git(*arguments: str, cwd: Path = repository) -> str:
        command = ["git", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always", *arguments]
        return subprocess.run(command, cwd=cwd, env=GIT_ENVIRON, check=True, capture_output=True, text=True).stdout

    bare = repository.with_suffix(".git")
    if not repository.exists():
        repository.mkdir()
        git("init", "-q")
        git("init", "-q", "--bare", str(bare))
    (repository / "file").write_text(text)
    git("add", "file")
    git("commit", "-qm", text)
    git("push", "-q", str(bare), "HEAD:main")
    git("update-server-info", cwd=bare)
    return git("rev-parse", "HEAD").strip()


@pytest.fixture
def base(pybuild: Pybuild, registry: RegistryServer, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A moving tag, with what stands behind it now: `move` gives it another image."""
    name = f"{registry.host}/lock/{tmp_path.name.lower()}:1"
    yield name, push_base(pybuild, tmp_path, name, "old")


def push_base(pybuild: Pybuild, tmp_path: Path, name: str, text: str) -> str:
    context = write_context(tmp_path / f"base-{text}", "FROM scratch\nCOPY which /\n", {"which": text})
    other = Pybuild(tmp_path / "other-store")
    other.build(context, "-t", name, "--push")
    return str(other.run("digest", name).text.strip())


@pytest.mark.registry
def test_what_is_locked_stays(pybuild: Pybuild, base: tuple[str, str], site: tuple[str, Path], tmp_path: Path) -> None:
    need_tool("git")
    name, digest = base
    url, place = site
    (place / "data").write_text("first")
    first = commit(tmp_path / "site" / "repo", "one")
    context = write_context(
        tmp_path / "context",
        f"FROM {name} AS unused\nFROM scratch\nCOPY --from={name} /which /\n"
        f"ADD {url}/data /\nADD {url}/repo.git#main /repo/\n",
    )
    refused = pybuild.build(context, "--locked", "-t", "app:1", check=False)
    assert refused.status == 2
    assert "there is no lock file" in refused.stderr

    assert pybuild.run("lock", context).text.count("+ ") == 3
    text = (context / "Containerfile.lock").read_text()
    assert digest in text
    assert first in text
    assert {rule["action"] for rule in json.loads(text)["rules"]} == {"CONVERT"}

    # Everything moves on.
    push_base(pybuild, tmp_path, name, "new")
    commit(tmp_path / "site" / "repo", "two")
    pybuild.build(context, "--locked", "-t", "app:1")
    tree = pybuild.unpack("app:1", tmp_path / "locked")
    assert (tree / "which").read_text() == "old"
    assert (tree / "repo" / "file").read_text() == "one"
    pybuild.build(context, "--pull", "-t", "app:2")
    tree = pybuild.unpack("app:2", tmp_path / "moved")
    assert (tree / "which").read_text() == "new"
    assert (tree / "repo" / "file").read_text() == "two"

    # What a server no longer has cannot be had: the build stops.
    (place / "data").write_text("second")
    elsewhere = Pybuild(tmp_path / "third-store")
    stopped = elsewhere.build(context, "--locked", "-t", "app:3", check=False)
    assert stopped.status == 1
    assert "digest mismatch" in stopped.stderr

    # A lock changes where it is told to, and only there.
    assert pybuild.run("lock", context).text == ""
    assert pybuild.run("lock", "--update", f"{url}/data", context).text == f"~ {url}/data\n"
    assert pybuild.run("lock", "--dry-run", "--update-all", context, check=False).status == 1
    unknown = pybuild.run("lock", "--update", "no/such", context, check=False)
    assert (unknown.status, f"{url}/data" in unknown.stderr) == (2, True)
    pybuild.run("lock", "--update-all", context)
    elsewhere.build(context, "--locked", "-t", "app:4")
    assert (elsewhere.unpack("app:4", tmp_path / "updated") / "which").read_text() == "new"


@pytest.mark.registry
def test_what_is_not_locked_is_refused(pybuild: Pybuild, base: tuple[str, str], tmp_path: Path) -> None:
    name, _ = base
    context = write_context(tmp_path / "context", f"FROM {name}\n")
    pybuild.run("lock", context)
    (context / "Containerfile").write_text(f"FROM {name}\nADD http://127.0.0.1:9/x /\n")
    result = pybuild.build(context, "--locked", check=False)
    assert result.status == 1
    assert "Containerfile:2" in result.stderr
    assert "is not in the lock file" in result.stderr
    # What is no longer asked for leaves the lock.
    (context / "Containerfile").write_text("FROM scratch\n")
    assert pybuild.run("lock", context).text.startswith("- docker-image://")
    assert json.loads((context / "Containerfile.lock").read_bytes())["rules"] == []


@pytest.mark.registry
def test_a_source_policy(pybuild: Pybuild, base: tuple[str, str], tmp_path: Path) -> None:
    name, digest = base
    policy = tmp_path / "policy.json"
    rules = [
        {"action": "CONVERT", "selector": {"identifier": "docker-image://docker.io/library/app:*"},
         "updates": {"identifier": f"docker-image://{name}"}},
        {"action": "DENY", "selector": {"identifier": "http://*"}},
    ]  # fmt: skip
    policy.write_text(json.dumps({"rules": rules}))
    context = write_context(tmp_path / "context", "FROM app:7\n")
    pybuild.build(context, "--source-policy-file", policy, "-t", "out:1")
    assert (pybuild.unpack("out:1", tmp_path / "tree") / "which").read_text() == "old"
    (context / "Containerfile").write_text("FROM app:7\nADD http://127.0.0.1:9/x /\n")
    denied = pybuild.build(
        context, "-t", "out:2", check=False, env={"EXPERIMENTAL_BUILDKIT_SOURCE_POLICY": str(policy)}
    )
    assert denied.status == 1
    assert 'source "http://127.0.0.1:9/x" denied by policy' in denied.stderr
    assert digest.startswith("sha256:")
