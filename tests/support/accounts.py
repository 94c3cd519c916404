"""An ordinary user, made for the session: with subordinate ids, a home, and a Python that it can reach."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support.machine import CHECKOUT, need_root, need_tool, which
from tests.support.waiting import until

PREFIX = "pbtest"
NO_SUCH_USER = 6  # userdel(8)
RUNTIME = ("requests", "oras", "zstandard", "tqdm", "isal", "zlib_ng")


class Account(NamedTuple):
    """The user, and how to run things as it."""

    name: str
    uid: int
    gid: int
    home: Path
    python: Path
    pythonpath: str
    pyc: str
    """Where its Python keeps what it compiled: the packages are root's."""

    def environ(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """A login's environment, nothing inherited but the locale."""
        return {
            "HOME": str(self.home),
            "USER": self.name,
            "LOGNAME": self.name,
            "SHELL": "/bin/sh",
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LANG": os.environ.get("LANG", "C.UTF-8"),
            "PYTHONPATH": self.pythonpath,
            "PYTHONPYCACHEPREFIX": self.pyc,
            **(extra or {}),
        }

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` as this user, started by root."""
        return [
            *("setpriv", "--reuid", str(self.uid), "--regid", str(self.gid), "--init-groups", "--inh-caps=-all"),
            *("--pdeathsig", "KILL", "--", *argv),
        ]

    def run(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run to the end in the user's home."""
        options.setdefault("cwd", self.home)
        return subprocess.run(self.command(argv), env=self.environ(env), **options)


def processes_of(uid: int) -> list[int]:
    """The processes that run as this user; not those that have ended and are only to be reaped."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                state = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                found += [] if state == "Z" else [int(entry.name)]
    return found


def _remove(name: str) -> None:
    try:
        uid = pwd.getpwnam(name).pw_uid
    except KeyError:
        return

    def quiet() -> bool:
        running = processes_of(uid)
        for pid in running:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)  # orphans come to the worker that is their reaper
        return not running

    until(quiet, lambda: f"processes of {name} live on: {processes_of(uid)}", pause_s=0.1)
    with suppress(KeyError):  # another worker was quicker
        # First the home: of a session that is killed meanwhile, the next one finds the user.
        shutil.rmtree(pwd.getpwnam(name).pw_dir, ignore_errors=True)
        # By force: it would refuse for the sake of a zombie, too.
        _patiently(["userdel", "--force", name])


def _patiently(command: list[str]) -> None:
    """Run useradd or userdel: they lock the tables, and give up where another worker's holds them."""
    done = None

    def succeeds() -> bool:
        nonlocal done
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        return done.returncode in {0, NO_SUCH_USER}

    until(succeeds, lambda: f"{command[0]}: {done.stderr if done else ''}", pause_s=0.1)


def _remove_stale() -> None:
    """Users of sessions that were killed; the name carries the pid."""
    for entry in pwd.getpwall():
        pid = entry.pw_name.removeprefix(PREFIX)
        if pid != entry.pw_name and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _remove(entry.pw_name)


def _reaches(uid: int, gid: int, path: Path) -> bool:
    argv = ["setpriv", "--reuid", str(uid), "--regid", str(gid), "--clear-groups", "--", "test", "-r", str(path)]
    return subprocess.run(argv, check=False, capture_output=True).returncode == 0


def _python(uid: int, gid: int) -> Path | None:
    """An interpreter of this one's minor version that the user can run: the C extensions must fit."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (Path(sys.executable), Path(sys.base_prefix) / "bin" / version, Path("/usr/bin") / version):
        if candidate.exists() and _reaches(uid, gid, candidate) and _reaches(uid, gid, candidate.resolve()):
            return candidate
    return None


def _copy_runtime(target: Path) -> None:
    """The packages under test and what they need, where any user can read them."""
    for package in ("layers", "registry", "builder"):
        shutil.copytree(CHECKOUT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    wanted, seen = list(RUNTIME), set[str]()
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an optional dependency; what is really missing fails at its import
        for requirement in found.requires or ():
            if "extra ==" not in requirement:
                bare = requirement.replace(";", " ").replace("(", " ").split()[0]
                wanted.append(bare.split("[")[0].split("<")[0].split(">")[0].split("=")[0].split("!")[0].split("~")[0])
        for file in found.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                source, copy = Path(str(file.locate())), target / file
                if source.is_file():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, copy)


@pytest.fixture(scope="session")
def ordinary_user() -> Iterator[Account]:
    """An ordinary user with 65,536 subordinate ids; removed with all it owns at the session's end."""
    need_root()
    need_tool("useradd", "newuidmap", "setpriv")
    _remove_stale()
    name = f"{PREFIX}{os.getpid()}"
    _remove(name)  # of a session that was killed, one of whose workers had our number
    _patiently([which("useradd") or "useradd", "--create-home", "--shell", "/bin/sh", name])
    try:
        entry = pwd.getpwnam(name)
        for table in ("/etc/subuid", "/etc/subgid"):
            if not any(line.startswith(f"{name}:") for line in Path(table).read_text().splitlines()):
                pytest.skip(f"useradd gave no subordinate ids in {table}")
        home = Path(entry.pw_dir)
        python = _python(entry.pw_uid, entry.pw_gid)
        if python is None:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            pytest.skip(f"no Python {version} that an ordinary user can run (this one lies in a private directory)")
        runtime = home / "runtime"
        runtime.mkdir()
        _copy_runtime(runtime)
        home.chmod(0o755)
        yield Account(name, entry.pw_uid, entry.pw_gid, home, python, str(runtime), str(home / "pyc"))
    finally:
        _remove(name)


@pytest.fixture
def rootless_user(ordinary_user: Account) -> Iterator[Account]:
    """The session's user with a home of this test's own: what one leaves is in nobody's way."""
    home = Path(tempfile.mkdtemp(prefix="t", dir=ordinary_user.home))
    home.chmod(0o755)
    os.chown(home, ordinary_user.uid, ordinary_user.gid)
    yield ordinary_user._replace(home=home)
    shutil.rmtree(home, ignore_errors=True)
