"""Flags of run and create that docker's and podman's users know besides."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.integration.containers.boxes import IMAGE, box, pid_of, root_box, start, status_of
from tests.support.cli import Pybuild
from tests.support.waiting import until

__all__ = ["box", "root_box"]


def test_parameters_of_its_own_namespaces(root_box: Pybuild) -> None:
    before = Path("/proc/sys/kernel/shmmax").read_text()
    flags = ["--network=none", "--sysctl=net.ipv4.ip_forward=1", "--sysctl", "kernel/shmmax=4096"]
    read = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax"
    assert root_box.run("run", "--rm", *flags, IMAGE, "sh", "-c", read).text.split() == ["1", "4096"]
    assert Path("/proc/sys/kernel/shmmax").read_text() == before


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--sysctl=kernel.panic=1"], "it is the whole machine's"),
        (["--sysctl=net.a=1", "--network=host"], "not the container's own"),
        (["--sysctl=kernel.shmmax=1", "--ipc=host"], "not the container's own"),
        (["--sysctl=net/../kernel/panic=1"], "expected NAME=VALUE"),
        (["--tz=../../etc/passwd"], "no such time zone"),
        (["--tz=/etc/localtime"], "no such time zone"),
        (["--umask=9"], "octal digits"),
        (["--read-only-tmpfs"], "goes with --read-only"),
        (["--replace"], "needs --name"),
        (["--expose=0x1"], "--expose"),
        (["--label-file=/no/such"], "--label-file /no/such"),
        (["--volumes-from=nobody"], "nobody"),
        (["--timeout=-1"], "expected seconds"),
    ],
)
def test_what_cannot_be_is_refused(pybuild: Pybuild, flags: list[str], told: str) -> None:
    refused = pybuild.run("run", *flags, "image:none", "true", check=False)
    assert refused.status == 125 and told in refused.stderr, refused.stderr


def test_time_zone_umask_and_environment(box: Pybuild) -> None:
    if not Path("/usr/share/zoneinfo/Asia/Tokyo").exists():
        pytest.skip("no time zones here")
    flags = ["--network=host", "--tz=Asia/Tokyo", "--umask=077", "--env-host", "--unsetenv=GREETING"]
    script = 'date +%Z; umask; echo "${GREETING-none} $CALLERS $EARLIER"'
    env = {"CALLERS": "here", "EARLIER": "host"}
    done = box.run("run", "--rm", *flags, "-e", "EARLIER=flag", IMAGE, "sh", "-c", script, env=env)
    assert done.text.split() == ["JST", "0077", "none", "here", "flag"]
    start(box, "--umask=027", "--name=a", IMAGE, "sleep", "300")
    assert box.run("exec", "a", "sh", "-c", "umask").text.strip() == "0027"


def test_it_is_killed_when_its_time_is_up(box: Pybuild) -> None:
    began = time.monotonic()
    assert box.run("run", "--rm", "--network=host", "--timeout=0.3", IMAGE, "sleep", "300", check=False).status == 137
    assert time.monotonic() - began < 60
    start(box, "--timeout=0.3", "--name=a", IMAGE, "sleep", "300")
    assert box.run("wait", "a").text.strip() == "137"


def test_labels_ports_and_its_process_in_files(root_box: Pybuild, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a=1\n# none\n\nb=2 3\n")
    pid_file = tmp_path / "pid"
    flags = [f"--label-file={tmp_path / 'labels'}", "--label=a=9", "--expose=80-81", "--expose=53/udp"]
    start(root_box, *flags, f"--pidfile={pid_file}", "--name=a", IMAGE, "sleep", "300")
    config = root_box.run("inspect", "a").json()[0]["Config"]
    assert config["Labels"] == {"a": "9", "b": "2 3"}
    assert sorted(config["ExposedPorts"]) == ["53/udp", "80/tcp", "81/tcp"]
    assert int(pid_file.read_text()) == pid_of(root_box, "a")
    refused = root_box.run("run", "--rm", f"--pidfile={tmp_path}", IMAGE, "sleep", "300", check=False)
    assert refused.status == 125 and "--pidfile" in refused.stderr


def test_what_another_container_has_mounted(box: Pybuild, tmp_path: Path) -> None:
    folder = (box.account.home if box.account else tmp_path) / f"shared-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text("of the host\n")
    start(
        box, "--name=a", f"-v={folder}:/of-host", "-v=kept:/kept", IMAGE, "sh", "-c", "echo of a > /kept/f; sleep 300"
    )
    flags = ["--rm", "--network=host", "--volumes-from=a:ro", "--read-only", "--read-only-tmpfs", "--tmpfs=/run"]
    script = "cat /of-host/file /kept/f; touch /tmp/a /run/b /var/tmp/c; touch /kept/g || echo closed"
    until(lambda: box.run("exec", "a", "test", "-s", "/kept/f", check=False).status == 0)
    told = box.run("run", *flags, IMAGE, "sh", "-c", script).text
    assert told == "of the host\nof a\nclosed\n"


def test_one_that_takes_the_place_of_another(box: Pybuild) -> None:
    first = start(box, "--name=a", IMAGE, "sleep", "300")
    second = start(box, "--replace", "--name=a", IMAGE, "sleep", "300")
    assert first != second and status_of(box, "a").startswith("running")
    assert len(box.run("ps", "-a", "-q").text.split()) == 1
