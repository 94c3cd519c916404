"""Things that are made once: per test session between xdist's workers, or per machine between sessions."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, which is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(target)` if this is the first to ask; others wait, and a failed attempt is repeated."""
    done = target.with_name(f"{target.name}.done")
    with locked(target.with_name(f"{target.name}.lock")):
        if not done.exists():
            make(target)
            done.touch()
    return target


@pytest.fixture(scope="session")
def session_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for the whole session, whichever worker asks."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    return shared


def machine_cache_dir() -> Path:
    """What outlives a session: `$XDG_CACHE_HOME/pybuild-tests`."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = home / "pybuild-tests"
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def machine_cache() -> Path:
    """The directory of what outlives a session."""
    return machine_cache_dir()
