"""Limits by cgroup: what happens at them, and that a limit is never dropped in silence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from builder.errors import SandboxError
from builder.sandbox import cgroup
from builder.sandbox.spec import Resources, SandboxSpec
from tests.integration.sandbox.boxes import RootBox, UserBox
from tests.integration.sandbox.test_lifecycle import KILLED, assert_appears
from tests.support.leaks import populated
from tests.support.machine import CHECKOUT
from tests.support.waiting import until

HOG = "a=x; while true; do a=$a$a; done"
MIB = 1 << 20


def need(*controllers: str) -> None:
    found = {name for hierarchy in cgroup.detect() for name in hierarchy.controllers}
    if absent := set(controllers) - found:
        pytest.skip(f"no cgroup controller {', '.join(sorted(absent))} is mounted here")


def test_a_memory_hog_is_killed_and_told_so(root_box: RootBox) -> None:
    need("memory")
    outcome = root_box.sh(HOG, resources=Resources(memory_bytes=32 * MIB, memory_swap_bytes=32 * MIB))
    assert outcome.status is not None
    code, number, oom_killed, timed_out, usage = outcome.status
    assert (code, number, oom_killed, timed_out) == (137, 9, True, False)
    assert 16 * MIB < usage.max_rss_bytes <= 32 * MIB


def test_a_shell_that_outlives_its_hog_tells_too(root_box: RootBox) -> None:
    need("memory")
    outcome = root_box.sh(f"sh -c '{HOG}'; exit 5", resources=Resources(memory_bytes=32 * MIB))
    assert outcome.status is not None
    assert outcome.status[:3] == (5, None, True)


def test_a_fork_bomb_is_contained(root_box: RootBox) -> None:
    need("pids")
    outcome = root_box.sh(
        "for i in 1 2 3 4 5 6 7 8 9; do sleep 100 & done; echo all", resources=Resources(pids=6), timeout_s=300
    )
    assert outcome.code != 0
    assert "all" not in outcome.out
    assert "fork" in outcome.err


def test_limits_hold_for_the_second_sandbox_too(root_box: RootBox) -> None:
    """The zygote's spare child, in no group of its own, must not take it."""
    need("pids")
    script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 100 & done; echo all"
    for _ in range(3):
        outcome = root_box.sh(script, resources=Resources(pids=6), timeout_s=300)
        assert "all" not in outcome.out


def test_a_quota_slows_down(root_box: RootBox) -> None:
    need("cpu")
    spin = "while :; do :; done"  # without an end: on a busy machine it has less than its quota for a while
    spec = SandboxSpec(
        args=("sh", "-c", spin),
        root=root_box.overlay(),
        env={"PATH": "/bin"},
        resources=Resources(cpu_quota_us=5_000, cpu_period_us=100_000),  # less than it gets on the busiest machine
    )
    with (
        open("/dev/null", "wb") as null,
        root_box.launcher.run(spec, stdout_fd=null.fileno(), stderr_fd=null.fileno()) as running,
    ):

        def throttled() -> bool:
            group = group_of(running.pid, "cpu")  # at first it is the one that everybody is in
            rows = (group / "cpu.stat").read_text() if group.name.startswith(cgroup.PREFIX) else ""
            return any(row.startswith("nr_throttled ") and row.split()[1] != "0" for row in rows.splitlines())

        until(throttled)
        running.kill()


def test_a_cpu_set(root_box: RootBox) -> None:
    need("cpuset")
    outcome = root_box.sh("grep Cpus_allowed_list /proc/self/status", resources=Resources(cpuset_cpus="0"))
    assert outcome.out.split() == ["Cpus_allowed_list:", "0"]


def test_the_group_is_the_root_of_the_cgroup_namespace(root_box: RootBox) -> None:
    need("pids")
    outcome = root_box.sh("cat /proc/self/cgroup", resources=Resources(pids=50))
    line = next(row for row in outcome.out.splitlines() if ":pids:" in row or row.startswith("0::"))
    assert line.endswith(":/")


@pytest.mark.parametrize(
    "resources",
    [Resources(cpuset_cpus="4095"), Resources(memory_bytes=64 * MIB, memory_swap_bytes=MIB), Resources(cpu_quota_us=1)],
)
def test_an_impossible_limit_is_an_error(root_box: RootBox, resources: Resources) -> None:
    need("cpuset", "memory", "cpu")
    outcome = root_box.run("true", resources=resources)
    assert outcome.error is not None
    assert outcome.error[1] == "cgroup"


def zygote_of(box: RootBox) -> int:
    """The first of its PID namespace; the launcher's own child may be an interpreter that waits for it."""
    pid = box.launcher._pid
    if not re.search(r"^NSpid:\t\d+\t1$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
        (pid,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return pid


def test_requests_that_fail_cost_the_zygote_nothing(root_box: RootBox) -> None:
    """It serves a whole build, which may go on after a failure."""
    need("cpuset")
    assert root_box.sh("true").code == 0
    directory = f"/proc/{zygote_of(root_box)}/fd"
    before = len(os.listdir(directory))
    for _ in range(8):
        assert root_box.run("true", resources=Resources(cpuset_cpus="4095")).error is not None
    until(lambda: len(os.listdir(directory)) < before + 8)


def block_device() -> str:
    for entry in Path("/sys/block").iterdir():
        if Path("/dev", entry.name).is_block_device():
            return f"/dev/{entry.name}"
    pytest.skip("no block device here")


def group_of(pid: int, controller: str) -> Path:
    """The directory of a process's group, by the names that the host has for it."""
    found = cgroup.detect(own=Path(f"/proc/{pid}/cgroup").read_text())
    return Path(next(h.own for h in found if controller in h.controllers))


def test_io_limits_and_huge_pages(root_box: RootBox) -> None:
    if not {"io", "blkio"} & {name for hierarchy in cgroup.detect() for name in hierarchy.controllers}:
        pytest.skip("no cgroup controller io is mounted here")
    device = block_device()
    spec = SandboxSpec(
        args=("sleep", "60"),
        root=root_box.overlay(),
        env={"PATH": "/bin"},
        resources=Resources(io=(("rbps", device, 1 << 20), ("wiops", device, 50))),
    )
    with (
        open("/dev/null", "wb") as null,
        root_box.launcher.run(spec, stdout_fd=null.fileno(), stderr_fd=null.fileno()) as running,
    ):

        def limits() -> str:
            try:
                group = group_of(running.pid, "blkio")
                names = ("blkio.throttle.read_bps_device", "blkio.throttle.write_iops_device")
            except StopIteration:
                group, names = group_of(running.pid, "io"), ("io.max",)  # type: ignore[assignment]
            return "".join((group / name).read_text() for name in names)

        until(lambda: "1048576" in limits())
        text = limits()
        number = os.stat(device).st_rdev
        assert f"{os.major(number)}:{os.minor(number)}" in text
        assert "1048576" in text and "50" in text
        running.kill()
        assert running.wait().signal == 9


def test_an_io_limit_on_what_is_no_disk(root_box: RootBox) -> None:
    outcome = root_box.run("true", resources=Resources(io=(("rbps", "/dev/null", 1),)))
    assert outcome.error is not None
    assert outcome.error[1] == "cgroup"


def test_pause_and_resume(root_box: RootBox) -> None:
    need("freezer")
    script = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.02; done"
    spec = SandboxSpec(
        args=("sh", "-c", script), root=root_box.overlay(), env={"PATH": "/bin"}, resources=Resources(freezer=True)
    )
    read, write = os.pipe()
    os.set_blocking(read, False)

    def said() -> int:
        try:
            return len(os.read(read, 1 << 16))
        except BlockingIOError:
            return 0

    with root_box.launcher.run(spec, stdout_fd=write, stderr_fd=write) as running:
        os.close(write)
        until(said)
        running.pause()
        said()
        time.sleep(0.3)  # in which one that runs would have said some more
        assert said() == 0
        running.resume()
        until(said)
        running.pause()
        # Killed while frozen.
        running.kill()
        assert running.wait(60).signal == 9
    os.close(read)


def test_pausing_what_cannot_be_paused_is_an_error(root_box: RootBox) -> None:
    spec = SandboxSpec(args=("sleep", "60"), root=root_box.overlay(), env={"PATH": "/bin"})
    with (
        open("/dev/null", "wb") as null,
        root_box.launcher.run(spec, stdout_fd=null.fileno(), stderr_fd=null.fileno()) as running,
    ):
        with pytest.raises(SandboxError, match="freezer"):
            running.pause()
        running.kill()
        assert running.wait().signal == 9


def test_an_ordinary_user_without_delegation_is_told(user_box: UserBox) -> None:
    need("pids")
    outcome = user_box.run("true", resources=Resources(pids=10))
    if outcome.error is None:
        pytest.skip("a cgroup is delegated to the user here")
    assert outcome.error[1] == "cgroup"


def runs_in(group: Path, marker: str) -> bool:
    """Whether a process with this argument is in a group."""
    with suppress(OSError):  # one of another worker's goes at any time
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(OSError):
                if marker.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    return True
    return False


def test_the_groups_of_a_killed_zygote_are_cleared_by_the_next_run(root_box: RootBox) -> None:
    need("pids")
    script = KILLED.replace("root=root, env", "root=root, resources=Resources(pids=50), env").replace(
        "import SandboxSpec", "import Resources, SandboxSpec"
    )
    root = root_box.overlay()
    marker = f"7{os.getpid()}36"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(CHECKOUT), str(root_box.lower), str(root.upper), str(root.work), marker],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout
    assert process.stdout.readline() == b"started\n"
    base = next(h.own for h in cgroup.detect() if "pids" in h.controllers)
    assert_appears(marker)
    mine = {path for path in Path(base).glob("pybuild-*") if runs_in(path, marker)}
    assert mine
    zygote = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(zygote), 9)
    process.wait(60)
    process.stdout.close()
    until(lambda: not any(populated(path) for path in mine))  # any other run may sweep them
    assert root_box.run("true", resources=Resources(pids=50)).code == 0
    until(lambda: not [path for path in mine if path.exists()])
