"""What a test may not leave behind: mounts, processes, cgroups.

The test process makes itself the reaper of its orphans, so that whatever a killed pybuild leaves
running becomes its child and is seen. Mounts and cgroups are compared before and after; a cgroup
that still holds processes belongs to another worker's test.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from layers import linux
from tests.support.accounts import PREFIX

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 60.0


class Left(NamedTuple):
    """What lives at one moment."""

    mounts: frozenset[str]
    children: frozenset[int]
    cgroups: frozenset[str]


def mounts(places: tuple[str, ...] = ("/",)) -> frozenset[str]:
    """Mount points of this mount namespace under these places."""
    lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    return frozenset(point for point in (line.split()[4] for line in lines) if point.startswith(places))


def children() -> frozenset[int]:
    """Living children of this process, adopted orphans among them."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            found.update(map(int, (task / "children").read_text().split()))
    return frozenset(pid for pid in found if _state(pid) != "Z")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def cgroups() -> frozenset[str]:
    """Cgroups that pybuild made and that hold no process."""
    found: set[str] = set()
    for top, folders, _ in os.walk("/sys/fs/cgroup"):
        for folder in folders:
            if "pybuild" in folder and not populated(f"{top}/{folder}"):
                found.add(f"{top}/{folder}")
    return frozenset(found)


def populated(path: str | Path) -> bool:
    """Whether a group holds processes; not, if it is gone."""
    try:
        return bool(Path(path, "cgroup.procs").read_text().strip())
    except OSError:
        return False


def descriptors() -> frozenset[tuple[str, str]]:
    """What this process has open: numbers, and what they stand for.

    Compared as sets: what an earlier test of this process held may be let go of at any time.
    """
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the directory itself
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return frozenset(found)


def living(places: tuple[str, ...] = ("/",)) -> Left:
    """What lives now; of mounts, those under `places`."""
    return Left(mounts(places), children(), cgroups())


def leaked(before: Left, grace_s: float = GRACE_S, places: tuple[str, ...] = ("/",)) -> list[str]:
    """What is there now and was not before, in words; waits a little for things to go."""
    deadline = time.monotonic() + grace_s
    while True:
        now = living(places)
        left = [
            *(f"mount {m}" for m in sorted(now.mounts - before.mounts)),
            *(f"process {p}: {_cmdline(p)}" for p in sorted(now.children - before.children)),
            *(f"cgroup {c}" for c in sorted(now.cgroups - before.cgroups)),
        ]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def _cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "?"


def reap_orphans(before: Left) -> None:
    """Kill and reap what was adopted since, so that one test's leak is not the next one's."""
    for pid in children() - before.children:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture(scope="session")
def _subreaper() -> None:
    linux.prctl(PR_SET_CHILD_SUBREAPER, 1)


@pytest.fixture
def no_leaks(_subreaper: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the test if mounts, processes or cgroups outlive it.

    The machine has other users, and xdist other workers: only places of this worker's tests count for mounts.
    """
    places = (str(tmp_path_factory.getbasetemp()), f"/home/{PREFIX}{os.getpid()}", "/var/lib/pybuild", "/run/pybuild")
    before = living(places)
    yield
    left = leaked(before, places=places)
    reap_orphans(before)
    assert not left, "left behind: " + "; ".join(left)
