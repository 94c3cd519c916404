"""Containers by an OCI runtime, and bundles for one."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.integration.containers.boxes import IMAGE, box, root_box, start, status_of
from tests.integration.containers.terminals import Terminal
from tests.support.cli import Pybuild
from tests.support.machine import need_tool, which
from tests.support.waiting import until

__all__ = ["box", "root_box"]

OCI = ("--isolation", "oci", "--runtime", "runc")
TICKER = 'trap "echo bye; exit 3" TERM; echo start; while :; do sleep 0.1; done'


def test_a_container_by_runc(root_box: Pybuild) -> None:
    need_tool("runc")
    script = "echo $GREETING $(id -u) $(pwd); exit 7"
    flags = ("--rm", *OCI, "--network", "none", "-u", "web", "-w", "/srv")
    result = root_box.run("run", *flags, IMAGE, "sh", "-c", script, check=False)
    assert (result.status, result.text) == (7, "hello 33 /srv\n")
    assert root_box.run("run", "--rm", *OCI, "--network", "none", IMAGE, "nosuch", check=False).status == 127
    start(root_box, "--name", "rt", *OCI, "-m", "64m", IMAGE, "sh", "-c", TICKER)
    until(lambda: "start" in root_box.run("logs", "rt").text)
    assert root_box.run("exec", "-e", "A=b", "-w", "/bin", "rt", "sh", "-c", "echo $A $(pwd)").text == "b /bin\n"
    assert root_box.run("exec", "-u", "web", "rt", "id", "-u").text == "33\n"
    assert root_box.run("exec", "-i", "rt", "cat", stdin=b"typed").text == "typed"
    assert root_box.run("exec", "rt", "sh", "-c", "exit 9", check=False).status == 9
    assert root_box.run("exec", "rt", "nosuch", check=False).status == 127
    row = root_box.run("stats", "--no-stream", "--format", "json", "rt").json()
    assert row["memory_limit_bytes"] == 64 << 20
    root_box.run("pause", "rt")
    assert status_of(root_box, "rt") == "paused 0"
    root_box.run("unpause", "rt")
    root_box.run("exec", "rt", "touch", "/made")
    assert root_box.run("diff", "rt").text == "A /made\n"
    root_box.run("stop", "rt")
    assert status_of(root_box, "rt") == "exited 3"
    assert root_box.run("logs", "rt").text == "start\nbye\n"
    root_box.run("start", "rt")
    until(lambda: status_of(root_box, "rt") == "running 0")
    root_box.run("rm", "-f", "rt")


def test_a_terminal_by_runc(root_box: Pybuild) -> None:
    need_tool("runc")
    with Terminal(root_box, "run", "-it", "--rm", "--name", "rt", *OCI, "--network", "none", IMAGE, "sh") as terminal:
        terminal.expect("# ")
        terminal.type("stty size; tty\r")
        terminal.expect("33 99")
        with Terminal(root_box, "exec", "-it", "rt", "sh") as other:
            other.expect("# ")
            other.type("exit 4\r")
            assert other.ended() == 4
            assert other.is_as_before()
        terminal.type("exit 6\r")
        assert terminal.ended() == 6
        assert terminal.is_as_before()


def test_what_a_runtime_cannot_have_is_refused(root_box: Pybuild) -> None:
    need_tool("runc")
    for words in (("--network", "private"), ("--init", "--network", "none")):
        result = root_box.run("run", "--rm", *OCI, *words, IMAGE, "true", check=False)
        assert result.status == 125
        assert "isolation oci" in result.stderr
    assert root_box.run("run", "--isolation", "oci", "--runtime", "nosuch", IMAGE, check=False).status == 125
    assert root_box.run("run", "--runtime", "runc", IMAGE, check=False).status == 125
    assert root_box.run("ps", "-aq").text == ""


def test_a_bundle_that_fails_leaves_nothing(box: Pybuild, tmp_path: Path) -> None:
    home = box.account.home if box.account else tmp_path
    bundle = home / f"failed-{os.getpid()}"
    refused = box.run("bundle", "-u", "nobodyknows", IMAGE, bundle, check=False)
    assert refused.status == 1
    assert "nobodyknows" in refused.stderr
    assert not bundle.exists()
    bundle.mkdir()
    assert box.run("bundle", "-u", "nobodyknows", IMAGE, bundle, check=False).status == 1
    assert list(bundle.iterdir()) == []  # what was there before stays, as it was


def test_a_bundle_is_run_by_runc(box: Pybuild, tmp_path: Path) -> None:
    need_tool("runc")
    home = box.account.home if box.account else tmp_path
    bundle = home / f"bundle-{os.getpid()}"
    box.run(
        "bundle", "-u", "web", "-w", "/srv", "-e", "A=b", IMAGE, bundle, "sh", "-c", "echo $GREETING $A; id -u; pwd"
    )
    config = json.loads((bundle / "config.json").read_text())
    assert bundle.stat().st_mode & 0o777 == 0o700
    assert config["annotations"]["org.opencontainers.image.stopSignal"] == "TERM"
    argv = [which("runc") or "runc", "--root", f"{home}/state", "run", "--bundle", str(bundle), f"test-{os.getpid()}"]
    command = box.account.command(argv) if box.account else argv
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
                          cwd=home, env=box.environ())  # fmt: skip
    assert done.stdout == "hello b\n33\n/srv\n", done.stderr
    refused = box.run("bundle", IMAGE, bundle, check=False)
    assert refused.status == 1
    assert "not empty" in refused.stderr
    box.run("unshare", "rm", "-rf", bundle)
