"""Namespaces that are not a container's own: the host's, and those of another container."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.integration.containers.boxes import IMAGE, box, pid_of, root_box, start, status_of
from tests.support.cli import Pybuild
from tests.support.waiting import until

__all__ = ["box", "root_box"]

KINDS = ("pid", "ipc", "uts", "cgroup")
READ_ALL = "cd /proc/self/ns; " + "".join(f"readlink {kind};" for kind in KINDS)
OF_HOST = ("--pid", "host", "--ipc", "host", "--uts", "host", "--cgroupns", "host")


def alive(marker: str) -> list[int]:
    """The processes that `sleep MARKER`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().split(b"\0")[:2] == [b"sleep", marker.encode()]:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def await_none(marker: str) -> None:
    until(lambda: not alive(marker), lambda: f"sleep {marker} lives")


def test_those_of_the_host(box: Pybuild) -> None:
    ours = [os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS]
    assert not {*box.run("run", "--rm", IMAGE, "sh", "-c", READ_ALL).text.split()} & {*ours}
    assert box.run("run", "--rm", *OF_HOST, IMAGE, "sh", "-c", READ_ALL).text.split() == ours
    assert box.run("run", "--rm", "--uts", "host", IMAGE, "hostname").text.strip() == os.uname().nodename


def test_what_it_leaves_in_the_hosts_pid_namespace_is_ended(box: Pybuild) -> None:
    marker = f"31{os.getpid()}"
    script = f"setsid sleep {marker} & (setsid sleep {marker} &); exit 7"
    assert box.run("run", "--rm", "--pid", "host", IMAGE, "sh", "-c", script, check=False).status == 7
    assert alive(marker) == []
    killed = box.run("run", "--rm", "--pid", "host", IMAGE, "sh", "-c", "kill -9 $$", check=False)
    assert killed.status == 137
    start(box, "--pid", "host", "--name", "a", IMAGE, "sh", "-c", f"sleep {marker} & exec sleep {marker}")
    box.run("exec", "-d", "a", "sleep", marker)
    until(lambda: len(alive(marker)) == 3)
    top = box.run("top", "a", "args").text.splitlines()
    assert top.count(f"sleep {marker}") == 3 and len(top) < 8
    box.run("kill", "a")
    assert status_of(box, "a") == "exited 137"
    await_none(marker)


def test_the_end_of_its_monitor_is_that_of_all(root_box: Pybuild) -> None:
    marker = f"32{os.getpid()}"
    start(root_box, "--pid", "host", "--name", "a", IMAGE, "sh", "-c", f"sleep {marker} & exec sleep {marker}")
    status = Path(f"/proc/{pid_of(root_box, 'a')}/status").read_text()
    guard = next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1]
    assert Path(f"/proc/{guard}/cmdline").read_bytes().rstrip(b"\0") == b"pybuild-guard"
    os.kill(int(guard), signal.SIGKILL)
    await_none(marker)
    assert root_box.run("wait", "a").text.strip() == "137"


def test_those_of_another_container(box: Pybuild) -> None:
    box.run("run", "-d", "--name", "a", IMAGE, "sh", "-c", "echo shared > /dev/shm/word; exec sleep 300")
    join = [word for kind in ("network", "pid", "ipc", "uts") for word in (f"--{kind}", "container:a")]
    read = "cd /proc/self/ns; for i in net pid ipc uts; do readlink $i; done; hostname; cat /dev/shm/word /etc/hosts"
    until(lambda: box.run("exec", "a", "test", "-s", "/dev/shm/word", check=False).status == 0)
    theirs = box.run("exec", "a", "sh", "-c", read)
    assert box.run("run", "--rm", *join, IMAGE, "sh", "-c", read).text == theirs.text
    marker = f"33{os.getpid()}"
    script = f"setsid sleep {marker} & exec sleep {marker}"
    box.run("run", "-d", "--name", "b", "--pid", "container:a", IMAGE, "sh", "-c", script)
    assert f"sleep {marker}" in box.run("exec", "a", "ps").text
    assert "pybuild run" not in box.run("exec", "a", "ps").text
    box.run("stop", "-t", "0", "b")
    await_none(marker)
    assert status_of(box, "a").startswith("running")
    box.run("kill", "a")
    refused = box.run("start", "b", check=False)
    assert refused.status != 0 and "container a is not running" in refused.stderr


def test_what_contradicts_itself_is_refused(root_box: Pybuild) -> None:
    start(root_box, "--name", "a", IMAGE, "sleep", "300")
    for words, told in (
        (("--uts", "host", "--hostname", "x"), "--hostname means nothing"),
        (("--network", "container:a", "-p", "80:80"), "-p means nothing"),
        (("--ipc", "host", "--shm-size", "1m"), "--shm-size means nothing"),
        (("--cgroupns", "container:a"), "there are private and host"),
        (("--userns", "auto"), "--userns auto: not possible"),
        (("--pid", "container:nobody"), "nobody"),
        (("--network", "bogus"), "--network bogus"),
        (("--isolation", "oci", "--pid", "container:a"), "cannot be had with isolation oci"),
    ):
        refused = root_box.run("run", "--rm", *words, IMAGE, "true", check=False)
        assert refused.status == 125 and told in refused.stderr, refused.stderr
