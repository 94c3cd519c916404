"""The life of containers, as root and as an ordinary user: started, looked at, entered, stopped, committed, removed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.integration.containers.boxes import IMAGE, box, parent, pid_of, start, status_of
from tests.support.cli import Pybuild
from tests.support.waiting import until

__all__ = ["box"]

TICKER = 'trap "echo bye; exit 3" TERM; echo start; echo complaint >&2; while :; do sleep 0.1; done'


def test_a_command_gives_its_status_and_its_output(box: Pybuild) -> None:
    script = "echo $GREETING $A $(pwd) $(id -u) $HOME; echo err >&2; exit 7"
    flags = ("--rm", "--network", "host", "-u", "web", "-e", "A=b", "-w", "/tmp/deep")
    result = box.run("run", *flags, IMAGE, "sh", "-c", script, check=False)
    assert result.status == 7
    assert result.text == "hello b /tmp/deep 33 /srv\n"
    assert "err\n" in result.stderr
    assert box.run("ps", "-aq").text == ""


def test_a_stop_gives_it_no_more_time_than_it_had(box: Pybuild) -> None:
    start(box, "--timeout=1", "--name=a", IMAGE, "sleep", "300")
    began = time.monotonic()
    box.run("stop", "--time=90", "a")  # a first process that handles no signal takes no notice of it
    assert time.monotonic() - began < 60
    assert status_of(box, "a") == "exited 137"


def test_statuses_of_what_cannot_be_run(box: Pybuild) -> None:
    for words, status in ((["nosuch"], 127), (["/etc"], 126)):
        assert box.run("run", "--rm", "--network", "host", IMAGE, *words, check=False).status == status
    assert box.run("run", "--pull", "never", "absent:1", check=False).status == 125
    assert box.run("run", "--no-such-flag", IMAGE, check=False).status == 125


def test_a_detached_container_is_logged_entered_stopped_and_removed(box: Pybuild) -> None:
    id = start(box, "--name", "ticker", IMAGE, "sh", "-c", TICKER)
    assert len(id) == 64
    until(lambda: "start" in box.run("logs", "ticker").text)
    assert status_of(box, "ticker") == "running 0"
    assert box.run("exec", "-e", "A=b", "-w", "/bin", "ticker", "sh", "-c", "echo $A; pwd").text == "b\n/bin\n"
    assert box.run("exec", "-u", "web", "ticker", "id", "-u").text == "33\n"
    assert box.run("exec", "-i", "ticker", "cat", stdin=b"typed").text == "typed"
    assert box.run("exec", "ticker", "nosuch", check=False).status == 127
    assert "sleep 0.1" in box.run("exec", "ticker", "ps").text
    box.run("stop", "ticker")
    assert status_of(box, "ticker") == "exited 3"
    said = box.run("logs", "ticker")
    assert said.text == "start\nbye\n"
    assert said.stderr == "complaint\n"
    assert box.run("logs", "--tail", "1", "ticker").text == "bye\n"
    assert box.run("exec", "ticker", "true", check=False).status == 125
    box.run("start", "ticker")
    assert status_of(box, "ticker") == "running 0"
    assert box.run("rm", "ticker", check=False).status == 1
    box.run("rm", "-f", "ticker")
    assert box.run("ps", "-aq").text == ""


def test_a_name_is_taken_once(box: Pybuild) -> None:
    start(box, "--name", "one", IMAGE, "sleep", "100")
    result = box.run("run", "-d", "--name", "one", IMAGE, "true", check=False)
    assert result.status == 125
    assert "in use" in result.stderr
    box.run("rename", "one", "two")
    assert status_of(box, "two") == "running 0"


def test_what_was_killed_is_told_truly(box: Pybuild) -> None:
    start(box, "--name", "gone", IMAGE, "sleep", "100")
    pid = pid_of(box, "gone")
    os.kill(parent(parent(pid)), signal.SIGKILL)  # the monitor
    until(lambda: not Path(f"/proc/{pid}").exists())
    assert status_of(box, "gone") == "exited 137"
    box.run("start", "gone")
    assert status_of(box, "gone") == "running 0"


def test_restart_on_failure_ends(box: Pybuild) -> None:
    start(box, "--name", "again", "--restart", "on-failure:2", IMAGE, "sh", "-c", "echo try; exit 4")
    assert box.run("wait", "again").text == "4\n"
    assert box.run("logs", "again").text == "try\n" * 3


def test_volumes_are_filled_and_shared(box: Pybuild) -> None:
    run = ("run", "--rm", "--network", "host", "-v", "data:/etc", IMAGE)
    assert "web:x:33" in box.run(*run, "cat", "/etc/passwd").text
    box.run(*run, "sh", "-c", "echo kept > /etc/kept")
    assert box.run(*run, "cat", "/etc/kept").text == "kept\n"
    read_only = box.run("run", "--rm", "--network", "host", "-v", "data:/x:ro", IMAGE, "touch", "/x/y", check=False)
    assert read_only.status != 0


def test_a_volume_of_the_image_is_filled_and_its_workdir_made(box: Pybuild) -> None:
    """Both look into the container's tree before it is started."""
    changes = ("-c", "VOLUME /etc", "-c", "WORKDIR /deep/down", "-c", "USER web")
    start(box, "--name", "plain", IMAGE, "true")
    box.run("wait", "plain")
    box.run("commit", *changes, "plain", "volumes:1")
    result = box.run("run", "--rm", "--network", "host", "volumes:1", "sh", "-c", "pwd; id -u; head -c4 /etc/passwd")
    assert result.text == "/deep/down\n33\nroot"


def test_a_commit_is_an_image_that_runs(box: Pybuild) -> None:
    start(box, "--name", "made", IMAGE, "sh", "-c", "echo data > /made; rm /bin/vi; sleep 100")
    until(lambda: box.run("diff", "made").text == "C /bin\nD /bin/vi\nA /made\n")
    box.run("commit", "-c", 'CMD ["cat", "/made"]', "-c", "ENV MORE=1", "made", "made:1")
    assert status_of(box, "made") == "running 0"
    assert box.run("run", "--rm", "--network", "host", "made:1").text == "data\n"
    assert box.run("run", "--rm", "--network", "host", "made:1", "ls", "/bin/vi", check=False).status != 0
    box.run("commit", "--squash", "made", "made:2")
    assert box.run("run", "--rm", "--network", "host", "made:2", "cat", "/made").text == "data\n"


def test_a_health_check_is_run_and_shown(box: Pybuild) -> None:
    start(box, "--name", "ill", "--health-cmd", "echo sick; exit 1", "--health-interval", "100ms",
          "--health-retries", "2", IMAGE, "sleep", "100")  # fmt: skip
    until(lambda: "(unhealthy)" in box.run("ps").text)
    health = box.run("inspect", "--format", "{{json .State.Health}}", "ill").json()
    assert health["FailingStreak"] >= 2
    assert health["Log"][-1]["Output"] == "sick\n"
    assert health["Log"][-1]["ExitCode"] == 1


def test_labels_of_a_file_and_variables_that_are_taken_away(box: Pybuild, tmp_path: Path) -> None:
    file = (box.account.home if box.account else tmp_path) / "labels"
    file.write_text("# a comment\ntier=db\nformula=a=b\n\n")
    file.chmod(0o644)
    flags = ("-q", "--label-file", file, "--label", "tier=web", "--unsetenv", "GREETING", "-e", "X=1")
    result = box.run("run", "--name", "bare", *flags, IMAGE, "/bin/busybox", "env")
    assert "X=1" in result.text.splitlines() and "GREETING=" not in result.text
    assert box.run("inspect", "bare").json()[0]["Config"]["Labels"] == {"tier": "web", "formula": "a=b"}
    box.run("rm", "bare")
    assert "no-such" in box.run("run", "--label-file", tmp_path / "no-such", IMAGE, "true", check=False).stderr
