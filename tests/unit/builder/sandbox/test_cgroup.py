"""Limits as files and values, and where groups are made: v1, v2, hybrid, on trees that only look like cgroups."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from builder.sandbox import cgroup
from builder.sandbox.cgroup import CgroupError, Hierarchy, Setting, plan

MIB = 1 << 20


def pairs(settings: list[Setting]) -> list[tuple[str, str]]:
    return [(setting.file, setting.value) for setting in settings]


@pytest.mark.parametrize(
    ("version", "controller", "resources", "expected"),
    [
        (2, "memory", {"memory_bytes": MIB}, [("memory.max", "1048576"), ("memory.swap.max", "1048576")]),
        (
            2,
            "memory",
            {"memory_bytes": MIB, "memory_swap_bytes": 3 * MIB},
            [("memory.max", "1048576"), ("memory.swap.max", "2097152")],
        ),
        (
            2,
            "memory",
            {"memory_bytes": MIB, "memory_swap_bytes": -1},
            [("memory.max", "1048576"), ("memory.swap.max", "max")],
        ),
        (
            1,
            "memory",
            {"memory_bytes": MIB},
            [("memory.limit_in_bytes", "1048576"), ("memory.memsw.limit_in_bytes", "2097152")],
        ),
        (2, "cpu", {"cpu_shares": 1024}, [("cpu.weight", "39")]),
        (2, "cpu", {"cpu_shares": 2}, [("cpu.weight", "1")]),
        (2, "cpu", {"cpu_shares": 262144}, [("cpu.weight", "10000")]),
        (2, "cpu", {"cpu_quota_us": 50000}, [("cpu.max", "50000 100000")]),
        (2, "cpu", {"cpu_period_us": 20000}, [("cpu.max", "max 20000")]),
        (1, "cpu", {"cpu_quota_us": 5000, "cpu_period_us": 10000, "cpu_shares": 7},
         [("cpu.shares", "7"), ("cpu.cfs_period_us", "10000"), ("cpu.cfs_quota_us", "5000")]),
        (1, "cpuset", {"cpuset_cpus": "0-1", "cpuset_mems": "0"}, [("cpuset.cpus", "0-1"), ("cpuset.mems", "0")]),
        (2, "pids", {"pids": 5}, [("pids.max", "5")]),
        (1, "pids", {"pids": -1}, [("pids.max", "max")]),
        (2, "hugetlb", {"hugetlb": [["2MB", 4]]}, [("hugetlb.2MB.max", "4")]),
        (1, "hugetlb", {"hugetlb": [["1GB", 0]]}, [("hugetlb.1GB.limit_in_bytes", "0")]),
    ],
)  # fmt: skip
def test_plans(version: int, controller: str, resources: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert pairs(plan(version, controller, resources)) == expected


def test_swap_below_memory_is_refused() -> None:
    for resources in ({"memory_bytes": 2 * MIB, "memory_swap_bytes": MIB}, {"memory_swap_bytes": MIB}):
        with pytest.raises(CgroupError, match="must not be below"):
            plan(2, "memory", resources)


MOUNTS = """
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
32 31 0:29 / {0}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /outer {0}/memory rw - cgroup cgroup rw,memory
41 31 0:38 / {0}/unified rw - cgroup2 cgroup2 rw
"""


def test_detection_of_a_hybrid(tmp_path: Path) -> None:
    for name in ("cpu,cpuacct/a/b", "memory/inner", "unified/u"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "unified/cgroup.controllers").write_text("hugetlb\n")
    own = "9:name=systemd:/x\n4:memory:/outer/inner\n1:cpu,cpuacct:/a/b\n0::/u\n"
    assert cgroup.detect(MOUNTS.format(tmp_path), own) == [
        Hierarchy(1, ("cpu", "cpuacct"), f"{tmp_path}/cpu,cpuacct", f"{tmp_path}/cpu,cpuacct/a/b"),
        Hierarchy(1, ("memory",), f"{tmp_path}/memory", f"{tmp_path}/memory/inner"),
        Hierarchy(2, ("hugetlb",), f"{tmp_path}/unified", f"{tmp_path}/unified/u"),
    ]


def test_a_place_outside_what_is_mounted_is_taken_for_its_root(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (found,) = cgroup.detect(f"1 0 0:1 / {tmp_path}/memory rw - cgroup cgroup rw,memory", "4:memory:/../../etc")
    assert found.own == f"{tmp_path}/memory"


def tree(tmp_path: Path, *groups: tuple[str, str, str], controllers: str = "cpu memory pids") -> None:
    """v2 groups as directories: (path, cgroup.procs, cgroup.subtree_control)."""
    for name, procs, enabled in groups:
        path = tmp_path / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "cgroup.procs").write_text(procs)
        (path / "cgroup.subtree_control").write_text(enabled)
        (path / "cgroup.controllers").write_text(controllers)
        if path != tmp_path:
            (path / "cgroup.type").write_text("domain")


def test_a_v2_group_is_made_beside_ours_not_beneath(tmp_path: Path) -> None:
    tree(tmp_path, ("", "1\n", "memory pids"), ("user", "", "pids"), ("user/session", "42\n", ""))
    hierarchy = Hierarchy(2, ("cpu", "memory", "pids"), str(tmp_path), str(tmp_path / "user/session"))
    # The files of a new group do not appear in a plain directory: that is the error here.
    with pytest.raises(CgroupError, match=r"no pids\.max"):
        cgroup.create({"pids": 5}, "x", [hierarchy])
    assert not (tmp_path / "user/pybuild-x").exists()
    assert (tmp_path / "user/cgroup.subtree_control").read_text() == "pids"
    with pytest.raises(CgroupError, match=r"no memory\.max"):
        cgroup.create({"memory_bytes": MIB}, "x", [hierarchy])
    assert (tmp_path / "user/cgroup.subtree_control").read_text() == "+memory"


def test_no_delegated_group_is_an_error_with_a_hint(tmp_path: Path) -> None:
    tree(tmp_path, ("", "1\n", ""), ("session", "42\n", ""))
    (tmp_path / "cgroup.type").write_text("domain")
    hierarchy = Hierarchy(2, ("pids",), str(tmp_path), str(tmp_path / "session"))
    with pytest.raises(CgroupError, match="delegated") as caught:
        cgroup.create({"pids": 5}, "x", [hierarchy])
    assert caught.value.hint and "Delegate" in caught.value.hint


@pytest.mark.parametrize(
    ("place", "words"), [("user@7.service", "systemctl edit user@.service"), ("x", "Delegate=yes")]
)
def test_a_controller_that_was_not_delegated(tmp_path: Path, place: str, words: str) -> None:
    """systemd gives an ordinary user cpu, memory and pids; cpuset and io are the machine's to give."""
    tree(tmp_path, (place, "", ""), (f"{place}/session", "42\n", ""))
    hierarchy = Hierarchy(2, ("cpu", "cpuset", "memory", "pids"), str(tmp_path), str(tmp_path / place / "session"))
    with pytest.raises(CgroupError, match="lack cpuset") as caught:
        cgroup.create({"pids": 5, "cpuset_cpus": "0"}, "x", [hierarchy])
    assert caught.value.hint and words in caught.value.hint
    assert cgroup.undelegated(hierarchy, "cpuset") == caught.value.hint
    assert cgroup.undelegated(hierarchy, "memory") is None
    assert not (tmp_path / place / "cgroup.subtree_control").read_text()


def test_a_controller_that_is_nowhere_is_an_error() -> None:
    with pytest.raises(CgroupError, match="pids controller"):
        cgroup.create({"pids": 5}, "x", [])


def test_the_sweep_takes_only_what_nobody_holds(tmp_path: Path) -> None:
    group = cgroup.Group()
    group.add(Hierarchy(1, ("pids",), str(tmp_path), str(tmp_path)), str(tmp_path / "pybuild-held"))
    for name in ("pybuild-dead", "other"):
        (tmp_path / name).mkdir()
    cgroup.sweep(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "pybuild-held"]
    group.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_a_group_that_a_sweep_takes_before_it_is_locked_is_made_again(tmp_path: Path) -> None:
    hierarchy = Hierarchy(1, ("pids",), str(tmp_path), str(tmp_path))
    done = threading.Event()

    def sweep() -> None:
        while not done.is_set():
            cgroup.sweep(str(tmp_path))

    sweepers = [threading.Thread(target=sweep) for _ in range(2)]
    for sweeper in sweepers:
        sweeper.start()
    try:
        for number in range(200):
            group = cgroup.Group()
            group.add(hierarchy, str(tmp_path / f"pybuild-{number}"))
            assert (tmp_path / f"pybuild-{number}").exists()
            group.remove()
    finally:
        done.set()
        for sweeper in sweepers:
            sweeper.join()
