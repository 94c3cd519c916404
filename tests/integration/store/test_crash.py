"""The store's law under fire: SIGKILL at every named point and at random moments, a full disk, a power cut.

What is checked each time: no published name is lost or points at missing or torn bytes, no repair
is needed, and the same work then succeeds.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layers.fsck import fsck
from layers.store import Store
from tests.integration.store.worker import FILES, PACKED_KEY
from tests.support.machine import CHECKOUT, need_mounts, need_root, need_tool

KILLS = int(os.environ.get("PYBUILD_TEST_KILLS", "12"))
"""Random kills in the campaign; hundreds when somebody looks for trouble."""

POINTS = sorted(
    {
        match
        for path in (CHECKOUT / "layers").rglob("*.py")
        if path.name != "faults.py"
        for match in re.findall(r'faults\.reach\("([a-z.-]+)"\)', path.read_text())
    }
)


def start(root: Path, seed: int, rounds: int, *actions: str, fault: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.store.worker", str(root), str(seed), str(rounds), *actions],
        cwd=CHECKOUT,
        env={**os.environ, "PYBUILD_FAULT": fault},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def promised(output: str) -> set[str]:
    """The names that a worker had published, and not begun to remove, when it ended."""
    names: set[str] = set()
    for line in output.splitlines():
        names.discard(line.removeprefix("-")) if line.startswith("-") else names.add(line)
    return names


def verify(root: Path, names: set[str]) -> None:
    """The store opens, keeps its promises, is sound apart from debris, and clean after a gc."""
    with Store.open(root) as store:
        known = {named.name: named.descriptor for named in store.names.list()}
        assert names <= known.keys()
        for descriptor in known.values():
            for digest in store.closure(descriptor):
                with store.open(digest) as f:
                    while f.read(1 << 16):
                        pass
        for record in store.cache.list():
            if record.key.startswith(PACKED_KEY):
                tree = store.snapshots.view(record.snapshot_id).lower[0]
                assert len(os.listdir(tree)) == FILES, "half a packed layer was unpacked"
            if record.snapshot_id is not None:
                assert all(s.path.is_dir() for s in store.snapshots.chain(record.snapshot_id))
        for (id,) in store.database.rows("SELECT id FROM snapshots WHERE owner IS NULL AND id LIKE 'sha256:%'"):
            unpacked = store.snapshots.get(str(id))
            assert unpacked is not None
            assert len(os.listdir(unpacked.path)) == FILES, "half a layer counts as a whole one"
        store.gc()
    report = fsck(root)
    assert report.problems == ()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_the_points_are_all_there() -> None:
    assert len(POINTS) >= 12, POINTS


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("turn", [1, 3])
def test_killed_at(point: str, turn: int, tmp_path: Path) -> None:
    root = tmp_path / "store"
    actions = ("build", "build", "pull", "unpack", "pack", "gc", "untag", "prune")
    code, before, err = finish(start(root, 1, 4, "build"))
    assert code == 0, err
    code, during, err = finish(start(root, 2, 25, *actions, fault=f"{point}@{turn}"))
    assert code == -signal.SIGKILL, f"{point} was not passed {turn} times: {err}"
    verify(root, promised(before) | promised(during))
    code, after, err = finish(start(root, 3, 3, "build", "pull"))
    assert code == 0, err
    verify(root, promised(before) | promised(during) | promised(after))


def test_killed_at_random_moments(tmp_path: Path) -> None:
    root = tmp_path / "store"
    rng = random.Random(7)
    names: set[str] = set()
    for number in range(KILLS):
        workers = [
            start(root, 100 + 2 * number + i, 1000, "build", "unpack", "pack", "pull", "gc", "prune") for i in range(2)
        ]
        # Once they are at it: how long a start takes says nothing about the store.
        assert workers[0].stdout is not None
        first = workers[0].stdout.readline()
        time.sleep(rng.uniform(0, 0.5))
        for process in workers:
            process.kill()
        names |= promised(first)
        for process in workers:
            code, out, err = finish(process)
            assert code == -signal.SIGKILL, err
            names |= promised(out)
        verify(root, names)
    assert names


def test_several_at_once(tmp_path: Path) -> None:
    root = tmp_path / "store"
    workers = [start(root, seed, 12, "build", "unpack", "pull", "untag") for seed in range(3)]
    workers += [start(root, 50 + seed, 12, "gc", "prune", "build") for seed in range(2)]
    names: set[str] = set()
    for process in workers:
        code, out, err = finish(process)
        assert code == 0, err
        names |= promised(out)
    assert names
    verify(root, names)


def test_created_by_several_at_once(tmp_path: Path) -> None:
    for number in range(3):
        root = tmp_path / f"store{number}"
        workers = [start(root, seed, 1, "build") for seed in range(4)]
        for process in workers:
            code, _, err = finish(process)
            assert code == 0, err
        verify(root, {f"registry.example/w{seed}:0" for seed in range(4)})


@pytest.mark.parametrize("point", ["store.ingest.write=ENOSPC", "store.ingest.write@2=EIO"])
def test_a_failing_disk_is_one_clear_error(point: str, tmp_path: Path) -> None:
    root = tmp_path / "store"
    code, _, err = finish(start(root, 1, 1, "build", fault=point))
    assert code == 1
    assert "StoreError" in err.splitlines()[-1]
    assert ("the disk is full" in err) == point.endswith("ENOSPC")
    verify(root, set())


@pytest.mark.root
@pytest.mark.parametrize("scenario", ["full_disk", "full_disk_while_copying", "power_cut"])
def test_disk(scenario: str, tmp_path: Path) -> None:
    """Small disks of the test's own, in a mount namespace of its own: see `disks`."""
    need_root()
    need_mounts()
    need_tool("mkfs.ext4")
    ran = subprocess.run(
        ["unshare", "-m", "--", sys.executable, "-m", "tests.integration.store.disks", scenario, str(tmp_path)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if ran.returncode == 77:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stderr
