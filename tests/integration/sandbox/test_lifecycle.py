"""How sandboxes start and end: statuses, output, timeouts, what is left behind, the death of the launcher."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from builder.errors import SandboxError
from builder.sandbox.launcher import Launcher
from builder.sandbox.spec import SandboxSpec
from layers.snapshot import Mount
from tests.integration.sandbox.boxes import Box, RootBox
from tests.support.machine import CHECKOUT
from tests.support.waiting import until


def spec_of(box: Box, *args: str) -> SandboxSpec:
    return SandboxSpec(args=args, root=box.overlay(), env={"PATH": "/bin"})


def alive(marker: str) -> bool:
    """Whether a process with this argument lives anywhere."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def assert_appears(marker: str) -> None:
    until(lambda: alive(marker), lambda: f"no process {marker} appeared")


def assert_gone(marker: str) -> None:
    until(lambda: not alive(marker), lambda: f"a process {marker} lives on")


def test_statuses_are_the_commands(box: Box) -> None:
    assert box.run("true").code == 0
    assert box.sh("exit 7").code == 7
    assert box.sh("kill -9 $$; exit 8").code == 8  # PID 1 is immune to its own signals
    assert box.sh("echo out; echo err >&2; exit 3")[1:3] == ("out\n", "err\n")


def test_a_command_that_is_not_there(box: Box) -> None:
    outcome = box.run("nope")
    assert (outcome.code, outcome.err) == (127, "nope: not found\n")
    outcome = box.run("/no/where")
    assert (outcome.code, outcome.err) == (127, "/no/where: not found\n")


def test_a_command_that_cannot_be_run(box: Box) -> None:
    assert box.run("/bin").code == 126
    script = "echo x > /bin/plain; chmod 755 /bin/plain; echo '#!/no/shell' > /bin/lost; chmod 755 /bin/lost"
    root = box.overlay()
    assert box.sh(script, root=root).code == 0
    outcome = box.run("plain", root=root)
    assert outcome.code == 126
    assert "Exec format error" in outcome.err
    outcome = box.run("/bin/lost", root=root)
    assert outcome.code == 127
    assert "interpreter" in outcome.err


def test_the_path_of_the_environment_is_searched(box: Box) -> None:
    assert box.run("true", env={"PATH": "/nowhere:/bin"}).code == 0
    assert box.run("true", env={"PATH": "/nowhere"}).code == 127


def test_a_working_directory_is_made_or_a_clear_error(box: Box) -> None:
    outcome = box.sh("pwd; stat -c %a:%u . /not", cwd="/not/there", umask=0o077)
    assert outcome.out.split() == ["/not/there", "755:0", "755:0"], outcome
    outcome = box.run("true", cwd="/bin/busybox/there")
    assert outcome.error is not None
    assert outcome.error[1:] == ("workdir", 20, "/bin/busybox/there")
    assert box.sh("pwd", cwd="/bin").out == "/bin\n"


def test_limits_of_the_process(box: Box) -> None:
    outcome = box.sh("ulimit -n; ulimit -c; umask; cat /proc/self/oom_score_adj",
                     rlimits=(("nofile", 99, 100), ("core", 0, 0)), umask=0o027, oom_score_adj=500)  # fmt: skip
    assert outcome.out == "99\n0\n0027\n500\n"


def test_a_limit_that_the_kernel_refuses_is_an_error(box: Box) -> None:
    outcome = box.run("true", rlimits=(("nofile", 10, 1 << 40),))
    assert outcome.error is not None
    assert outcome.error[1] == "limits"
    assert "nofile" in outcome.error[0]


def test_large_requests_and_large_output(box: Box) -> None:
    value = "x" * 100_000
    env = {"PATH": "/bin", **{f"V{number}": value for number in range(10)}}
    outcome = box.sh('echo "$V9" | wc -c; dd if=/dev/zero bs=1024 count=1000 2>/dev/null', env=env)
    assert outcome.out.startswith("100001\n")
    assert len(outcome.out) == 7 + 1_024_000


def test_a_user_can_reopen_its_output(box: Box) -> None:
    outcome = box.sh("echo a > /dev/stdout; echo b > /dev/stderr; id -u", uid=33, gid=33)
    assert (outcome.out, outcome.err) == ("a\n33\n", "b\n")


def test_a_daemon_left_behind_dies_with_the_step(box: Box) -> None:
    marker = f"7{os.getpid()}31"
    outcome = box.sh(
        f"setsid sleep {marker} </dev/null >/dev/null 2>&1 & (nohup sleep {marker} &) >/dev/null 2>&1; true"
    )
    assert outcome.code == 0
    assert not alive(marker)


def test_a_daemon_that_holds_the_output_does_not_hold_the_step(box: Box) -> None:
    assert box.sh("sleep 100000 & echo done").out == "done\n"


def test_a_timeout_kills_everything(box: Box) -> None:
    marker = f"7{os.getpid()}32"
    outcome = box.sh(f"sleep {marker} & sleep {marker}", timeout_s=0.5)
    assert outcome.status is not None
    assert outcome.status[:4] == (137, 9, False, True)
    assert not alive(marker)


def test_usage_is_counted(box: Box) -> None:
    outcome = box.sh("i=0; while test $i -lt 20000; do i=$((i+1)); done")
    assert outcome.status is not None
    usage = outcome.status[4]
    assert usage.user_s + usage.system_s > 0.005
    assert usage.max_rss_bytes > 100_000


def test_many_at_once(root_box: RootBox) -> None:
    results: list[str] = []

    def one(number: int) -> None:
        results.append(root_box.sh(f"sleep 0.05; echo {number}").out)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(result) for result in results) == list(range(12))


def test_kill_from_another_thread(root_box: RootBox) -> None:
    with open("/dev/null", "wb") as null:
        running = root_box.launcher.run(
            spec_of(root_box, "sleep", "60"), stdout_fd=null.fileno(), stderr_fd=null.fileno()
        )
    assert running.pid > 0
    assert Path(f"/proc/{running.pid}/root").exists()
    threading.Timer(0.2, running.kill).start()
    status = running.wait()
    assert (status.code, status.signal) == (137, 9)
    assert running.poll() == status
    running.close()


def test_more_descriptors_than_select_takes(root_box: RootBox) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("the hard limit of open files is below 2048")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        assert root_box.run("true").code == 0
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_dropping_a_running_sandbox_kills_it(root_box: RootBox) -> None:
    marker = f"7{os.getpid()}33"
    with open("/dev/null", "wb") as null:
        running = root_box.launcher.run(
            spec_of(root_box, "sleep", marker), stdout_fd=null.fileno(), stderr_fd=null.fileno()
        )
    assert_appears(marker)
    running.close()
    assert_gone(marker)


def test_closing_the_launcher_kills_its_sandboxes(root_box: RootBox) -> None:
    marker = f"7{os.getpid()}34"
    launcher = Launcher.start()
    with open("/dev/null", "wb") as null:
        running = launcher.run(spec_of(root_box, "sleep", marker), stdout_fd=null.fileno(), stderr_fd=null.fileno())
    assert_appears(marker)
    launcher.close()
    assert not alive(marker)
    assert running.wait().signal == 9
    with pytest.raises(SandboxError, match="died"):
        launcher.run(spec_of(root_box, "true"), stdout_fd=1, stderr_fd=2)
    launcher.close()


def test_the_callers_umask_changes_nothing(root_box: RootBox) -> None:
    before = os.umask(0o077)
    try:
        with Launcher.start() as launcher:
            box = RootBox(root_box.base, launcher)
            box.base = root_box.directory("other")[0]
            spec = {"files": {"/etc/hosts": b"x"}, "stubs": box.base / "stubs"}
            outcome = box.sh("stat -c %a /etc /dev /dev/pts /dev/shm; umask; cat /etc/hosts", **spec)
    finally:
        os.umask(before)
    assert outcome.out.split() == ["755", "755", "755", "1777", "0022", "x"]


def test_a_caller_with_threads_gets_a_zygote_too(root_box: RootBox) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with Launcher.start() as launcher:
            box = RootBox(root_box.base, launcher)
            box.base = root_box.directory("other")[0]
            assert box.sh("echo from a thread").out == "from a thread\n"
    finally:
        stop.set()
        thread.join()


KILLED = """
import sys, os
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from builder.sandbox.launcher import Launcher
from builder.sandbox.spec import SandboxSpec
from layers.snapshot import Mount
launcher = Launcher.start()
lower, upper, work, marker = sys.argv[2:]
root = Mount("overlay", (Path(lower),), Path(upper), Path(work))
script = f"sleep {marker} & setsid sleep {marker} & echo started; sleep {marker}"
spec = SandboxSpec(args=("sh", "-c", script), root=root, env={"PATH": "/bin"})
launcher.run(spec, stdout_fd=1, stderr_fd=2).wait()
"""


@pytest.mark.parametrize("target", ["launcher", "zygote"])
def test_sigkill_leaves_nothing(root_box: RootBox, target: str) -> None:
    """Mounts, processes and cgroups are compared by the suite's own fixture."""
    marker = f"7{os.getpid()}35"
    root = root_box.overlay()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(CHECKOUT), str(root_box.lower), str(root.upper), str(root.work), marker],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    assert process.stdout.readline() == b"started\n"
    assert_appears(marker)
    if target == "launcher":
        process.kill()
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
    assert_gone(marker)
    process.wait(60)
    errors = process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    assert (b"died" in errors) == (target == "zygote")
    # The same upper serves again.
    assert root_box.sh("true", root=root).code == 0


def test_init_reaps_and_holds_nothing(box: Box) -> None:
    script = (
        "(true & true & sleep 0.2) & wait; i=0; while ps -o stat | grep -q Z && [ $i -lt 500 ]; "
        "do i=$((i+1)); sleep 0.1; done; ps -o pid,stat,comm; exit 9"
    )
    outcome = box.sh(script, init=True)
    assert outcome.code == 9
    assert " Z" not in outcome.out
    assert "sh" in outcome.out
    assert box.sh("kill -9 $$", init=True).code == 137
    assert box.sh("echo $$", init=True).out == "2\n"
    # Nothing of the interpreter: no environment, no files, a few pages of memory.
    outcome = box.sh("wc -c < /proc/1/environ; cat /proc/1/maps; ls /proc/1/fd", init=True)
    lines = outcome.out.splitlines()
    assert lines[0] == "0" and "python" not in outcome.out
    assert len([line for line in lines if "pybuild-init" in line]) == 1 and len(lines) < 10, lines


def test_init_passes_signals_on(root_box: RootBox) -> None:
    spec = spec_of(root_box, "sh", "-c", "trap 'exit 42' TERM; echo ready; while true; do sleep 0.1; done")
    read, write = os.pipe()
    with open(read) as out:
        running = root_box.launcher.run(replace(spec, init=True), stdout_fd=write, stderr_fd=write)
        os.close(write)
        assert out.readline() == "ready\n"
        running.signal(signal.SIGTERM)
        assert running.wait().code == 42
        running.close()


def test_forced_chroot(root_box: RootBox) -> None:
    script = "cat /proc/self/mountinfo | wc -l; ls /; cat /etc/hosts; grep CapEff /proc/self/status"
    outcome = root_box.sh(script, isolation="chroot", files={"/etc/hosts": b"mine\n"})
    assert outcome.code == 0, outcome
    assert "bin\n" in outcome.out and "mine\n" in outcome.out
    # Whoever may chroot(2) can leave a chroot: the capability goes.
    effective = int(outcome.out.rsplit("CapEff:", 1)[1], 16)
    assert not effective >> 18 & 1


def test_an_unmounted_root_of_another_kind(box: Box) -> None:
    """A read-only view of an image, with one layer and with two."""
    empty = box.directory("empty")[0]
    for lowers in ((box.lower,), (empty, box.lower)):
        root = Mount("overlay", lowers, None, None, True, box.dialect)
        outcome = box.sh("echo > /x || echo refused; ls /proc/1 > /dev/null && echo ok", root=root, scratch=box.base)
        assert outcome.out == "refused\nok\n", outcome
    assert not [path for path in box.base.iterdir() if path.name.startswith("stubs")]
