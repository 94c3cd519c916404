"""Running the command line as a user would: a process of its own, a store of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.accounts import Account
from tests.support.cachedir import machine_cache_dir
from tests.support.machine import CHECKOUT, need_mounts

TIMEOUT_S = 300


class Result(NamedTuple):
    """How a command ended; `stderr` is text, whatever bytes came."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode()

    def json(self) -> Any:
        return json.loads(self.stdout)


class Pybuild:
    """`python -m builder --root ROOT …`, as this user or as another account.

    Whatever the outcome, a traceback or an internal error on stderr fails the test: nobody
    is ever to see one.
    """

    def __init__(self, root: Path, *, account: Account | None = None, env: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.account = account
        self.env = dict(env or {})

    def argv(self, *arguments: str | Path) -> list[str]:
        python = str(self.account.python) if self.account else sys.executable
        command = [python, "-m", "builder", "--root", str(self.root), *map(str, arguments)]
        return self.account.command(command) if self.account else command

    def environ(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        if self.account:
            return self.account.environ({**self.env, **(extra or {})})
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV_", "PYBUILD"))}
        # CI and a terminal's variables change what is drawn; the tests choose.
        for name in ("CI", "NO_COLOR", "SOURCE_DATE_EPOCH"):
            inherited.pop(name, None)
        # Compiling every module again would double the time of each of some hundred commands.
        if inherited.pop("PYTHONDONTWRITEBYTECODE", None):
            inherited.setdefault("PYTHONPYCACHEPREFIX", str(machine_cache_dir() / "pyc"))
        return {**inherited, "PYTHONPATH": str(CHECKOUT), "PYBUILD_CONFIG": "", **self.env, **(extra or {})}

    def run(
        self,
        *arguments: str | Path,
        check: bool = True,
        stdin: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Result:
        """Run to the end. With `check`, a failure fails the test with what the command said."""
        done = subprocess.run(
            self.argv(*arguments),
            input=stdin if stdin is not None else b"",
            capture_output=True,
            env=self.environ(env),
            cwd=cwd or (self.account.home if self.account else None),
            timeout=timeout_s,
            check=False,
        )
        result = Result(done.returncode, done.stdout, done.stderr.decode(errors="replace"))
        shown = f"$ pybuild {' '.join(map(str, arguments))}\nstatus {result.status}\n{result.stderr}"
        assert "Traceback (most recent call last)" not in result.stderr, shown
        assert "internal error" not in result.stderr, shown
        if check:
            assert result.status == 0, shown
        return result

    def start(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start and return at once, in a session of its own; stderr is a pipe."""
        return subprocess.Popen(
            self.argv(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environ(env),
            cwd=self.account.home if self.account else None,
            start_new_session=True,
        )

    def build(self, context: Path, *arguments: str | Path, check: bool = True, **options: Any) -> Result:
        return self.run("build", *arguments, context, check=check, **options)

    def unpack(self, image: str, target: Path) -> Path:
        """The flattened root file system of `image`."""
        self.run("unpack", image, target)
        return target


def write_context(folder: Path, containerfile: str, files: Mapping[str, str | bytes] | None = None) -> Path:
    """A build context: a Containerfile and files, folders made as needed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Containerfile").write_text(containerfile)
    for name, data in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


@pytest.fixture
def pybuild(tmp_path: Path) -> Iterator[Pybuild]:
    """The command line over an empty store."""
    need_mounts()
    root = tmp_path / "store"
    yield Pybuild(root)
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(params=["root", pytest.param("rootless", marks=pytest.mark.rootless)])
def pybuild_each(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pybuild]:
    """The command line as root, then as an ordinary user with subordinate ids."""
    need_mounts()
    if request.param == "root":
        root = tmp_path / "store"
        yield Pybuild(root)
        shutil.rmtree(root, ignore_errors=True)
        return
    account: Account = request.getfixturevalue("rootless_user")
    root = account.home / f"store-{request.node.name.partition('[')[0][:40]}"
    yield Pybuild(root, account=account)
    # Its snapshots belong to subordinate ids: root alone can remove them from here.
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def pybuild_rootless(rootless_user: Account, request: pytest.FixtureRequest) -> Iterator[Pybuild]:
    """The command line as an ordinary user with subordinate ids."""
    root = rootless_user.home / f"store-{request.node.name.partition('[')[0][:40]}"
    yield Pybuild(root, account=rootless_user)
    shutil.rmtree(root, ignore_errors=True)
