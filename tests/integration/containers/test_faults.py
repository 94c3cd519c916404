"""What goes wrong around a container: killed processes, a full disk. `ps` tells the truth, and `rm` leaves nothing.

That no process, mount or control group is left is looked at after every test (`tests.support.leaks`).
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.integration.containers.boxes import (
    IMAGE,
    box,
    network_of,
    parent,
    pid_of,
    root_box,
    start,
    status_of,
)
from tests.support.cli import Pybuild
from tests.support.machine import need_tool
from tests.support.networks import assert_taken_down, left_behind, traces
from tests.support.waiting import until

__all__ = ["box", "root_box"]


def snapshots(box: Pybuild) -> int:
    """How many there are in the store, those of containers included; the image is unpacked."""
    if not (box.root / "containers").exists():
        box.run("run", "--rm", "--network", "host", IMAGE, "true")
    return len(os.listdir(box.root / "snapshots"))


@pytest.mark.parametrize("victim", ["monitor", "zygote", "container"])
def test_a_killed_process_ends_the_container(box: Pybuild, victim: str) -> None:
    before = snapshots(box)
    limits = [] if box.account else ["-m", "64m"]
    start(box, "--name", "gone", *limits, IMAGE, "sleep", "1000")
    pid = pid_of(box, "gone")
    zygote = parent(pid)
    os.kill({"monitor": parent(zygote), "zygote": zygote, "container": pid}[victim], signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists())
    until(lambda: status_of(box, "gone").startswith("exited"))
    expected = {"monitor": "exited 137", "zygote": "exited 125", "container": "exited 137"}[victim]
    assert status_of(box, "gone") == expected
    words = ("--since", "1h", "--until", "0s", "-f", "event=die", "-f", "container=gone", "--format", "json")
    told = box.run("events", *words).text
    assert told.count('"exitCode":') == (0 if victim == "monitor" else 1), told
    assert box.run("exec", "gone", "true", check=False).status == 125
    assert box.run("ps", "-q").text == ""
    box.run("start", "gone")
    assert status_of(box, "gone") == "running 0"
    box.run("rm", "-f", "gone")
    assert box.run("ps", "-aq").text == ""
    assert snapshots(box) == before
    assert os.listdir(box.root / "containers") == ["names"]
    assert os.listdir(box.root / "containers" / "names") == []


@pytest.mark.parametrize("victim", ["monitor", "zygote"])
def test_a_network_is_taken_down_when_its_processes_are_killed(root_box: Pybuild, victim: str) -> None:
    need_tool("ip")
    root_box.run("run", "-d", "--name", "net", "--network", "private", IMAGE, "sleep", "1000")
    before = left_behind()
    network = network_of(root_box, "net")
    assert network in traces().values()
    pid = pid_of(root_box, "net")
    zygote = parent(pid)
    os.kill(zygote if victim == "zygote" else parent(zygote), signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists())
    root_box.run("rm", "-f", "net")
    assert_taken_down({line: number for line, number in before.items() if number != network})


def test_a_killed_foreground_run_is_seen_and_removed(box: Pybuild) -> None:
    before = snapshots(box)
    process = box.start("run", "--name", "fore", "--network", "host", IMAGE, "sleep", "1000")
    until(lambda: status_of(box, "fore") == "running 0")
    pid = pid_of(box, "fore")
    os.kill(parent(parent(pid)), signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists())
    process.communicate()
    assert status_of(box, "fore") == "exited 137"
    box.run("rm", "fore")
    assert snapshots(box) == before


def test_a_run_that_was_killed_while_it_began_leaves_nothing(root_box: Pybuild) -> None:
    before = snapshots(root_box)
    top = root_box.root / "containers"
    for delay in (0.05, 0.1, 0.15, 0.2, 0.3):
        process = root_box.start("run", "--name", "half", "--network", "none", IMAGE, "sleep", "1000")
        with suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        process.communicate()
        root_box.run("rm", "-f", "half")
        # A minute must pass before what has no settings counts as abandoned.
        for entry in top.iterdir():
            if entry.name != "names":
                os.utime(entry, (0, 0))
    assert root_box.run("container", "prune", "-f").status == 0
    assert os.listdir(top / "names") == []
    assert os.listdir(top) == ["names"]
    # What was prepared for a container that never came to be goes with the next collection.
    root_box.run("prune", "-f")
    assert snapshots(root_box) <= before


@contextmanager
def full_disk(room: Path) -> Iterator[None]:
    """Leave no byte free on the file system of `room`."""
    filler = room / "filler"
    with filler.open("wb") as stream:
        try:
            while True:
                stream.write(bytes(1 << 16))
                stream.flush()
        except OSError:
            with suppress(OSError):
                while True:
                    os.write(stream.fileno(), b"x")
    try:
        yield
    finally:
        filler.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system for the store."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "small", str(place)], check=True)
    yield place
    # The monitor of a container that was removed may have a moment to live.
    until(lambda: subprocess.run(["umount", str(place)], check=False).returncode == 0)


def test_a_full_disk_loses_the_log_alone(root_box: Pybuild, small_disk: Path) -> None:
    small = Pybuild(small_disk / "store")
    root_box.run("save", "-o", str(small_disk / "image"), IMAGE)
    small.run("load", "-i", str(small_disk / "image"))
    (small_disk / "image").unlink()
    script = "trap 'echo bye; exit 7' TERM; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.02; done"
    start(small, "--name", "talks", IMAGE, "sh", "-c", script)
    until(lambda: "line 5" in small.run("logs", "talks").text)
    with full_disk(small_disk):
        assert status_of(small, "talks") == "running 0"
        assert small.run("exec", "talks", "echo", "alive").text == "alive\n"
        small.run("stop", "talks")
        assert status_of(small, "talks") == "exited 7"
        small.run("logs", "talks")
        small.run("rm", "talks")
    assert small.run("ps", "-aq").text == ""
    start(small, "--name", "talks", IMAGE, "sleep", "100")
    assert status_of(small, "talks") == "running 0"
    small.run("rm", "-f", "-a")
