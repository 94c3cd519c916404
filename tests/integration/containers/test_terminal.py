"""Containers with a terminal, driven as a person does: keys, resizing, job control, attaching and leaving."""

from __future__ import annotations

import signal

from tests.integration.containers.boxes import IMAGE, box, start, status_of
from tests.integration.containers.terminals import Terminal
from tests.support.cli import Pybuild
from tests.support.waiting import until

__all__ = ["box"]

PROMPT = "# "


def test_an_interactive_shell(box: Pybuild) -> None:
    with Terminal(box, "run", "-it", "--name", "shell", "--network", "host", IMAGE, "sh") as terminal:
        terminal.expect(PROMPT)
        assert terminal.is_raw()
        terminal.type("stty size; tty; echo $TERM\r")
        seen = terminal.expect(PROMPT)
        assert "33 99" in seen
        assert "/dev/pts/0" in seen
        terminal.resize(40, 120)
        terminal.type_until("stty size\r", "40 120")
        # What says that it goes is in the foreground by then, and the shell is not.
        terminal.type("sh -c 'echo go; exec sleep 1000'\r")
        terminal.expect("go\r\n")
        terminal.type("\x03")
        terminal.expect(PROMPT)
        terminal.type("echo status $?\r")
        terminal.expect("status 130")
        terminal.type("sh -c 'echo go; exec sleep 1000'\r")
        terminal.expect("go\r\n")
        terminal.type("\x1a")
        terminal.expect("Stopped")
        terminal.expect(PROMPT)
        terminal.type("jobs; kill -9 %1\r")
        terminal.expect("sleep 1000")
        terminal.type_until("\r", "Killed")
        terminal.type("exit 9\r")
        assert terminal.ended() == 9
        assert terminal.is_as_before()
    assert status_of(box, "shell") == "exited 9"
    assert "status 130" in box.run("logs", "shell").text


def test_the_terminal_is_as_before_whatever_happens(box: Pybuild) -> None:
    script = "trap 'exit 143' TERM; trap 'exit 1' HUP; echo here; while :; do sleep 0.1; done"
    for number, status in ((signal.SIGTERM, 143), (signal.SIGHUP, 1), (signal.SIGKILL, 137)):
        with Terminal(box, "run", "-it", "--rm", "--network", "host", IMAGE, "sh", "-c", script) as terminal:
            terminal.expect("here")
            assert terminal.is_raw()
            box.run("kill", "-s", str(int(number)), box.run("ps", "-q", "-l").text.strip())
            assert terminal.ended() == status
            assert terminal.is_as_before()


def test_exec_has_a_terminal_of_its_own(box: Pybuild) -> None:
    start(box, "--name", "host", IMAGE, "sleep", "1000")
    with Terminal(box, "exec", "-it", "host", "sh") as terminal:
        terminal.expect(PROMPT)
        terminal.resize(20, 70)
        terminal.type_until("stty size\r", "20 70")
        terminal.type("exit 5\r")
        assert terminal.ended() == 5
        assert terminal.is_as_before()


def test_attaching_and_leaving(box: Pybuild) -> None:
    box.run("run", "-d", "-it", "--name", "talk", "--network", "host", IMAGE, "sh")
    with Terminal(box, "attach", "talk") as terminal:
        terminal.type("stty size\r")
        terminal.expect("33 99")
        terminal.expect(PROMPT)
        with Terminal(box, "attach", "--no-stdin", "talk") as other:

            def both_see() -> bool:
                terminal.type("echo both see this\r")
                terminal.expect("both see this\r")
                other.read(0.5)
                return "both see this\r" in other.screen

            until(both_see)  # it may take a while to attach
        terminal.type("\x10\x11")
        assert terminal.ended() == 0
        assert terminal.is_as_before()
    assert status_of(box, "talk") == "running 0"
    with Terminal(box, "attach", "--detach-keys", "ctrl-a,d", "talk") as terminal:
        terminal.type("echo again\r")
        terminal.expect("again\r")
        terminal.type("exit 4\r")
        assert terminal.ended() == 4
    assert status_of(box, "talk") == "exited 4"
    assert box.run("attach", "talk", check=False).status == 1


def test_a_container_without_a_terminal_is_attached_to(box: Pybuild) -> None:
    box.run("run", "-d", "-i", "--name", "pipe", "--network", "host", IMAGE, "sh", "-c",
            "read line; echo got $line; echo err >&2; exit 6")  # fmt: skip
    result = box.run("attach", "pipe", stdin=b"typed\n", check=False)
    assert result.status == 6
    assert result.text == "got typed\n"
    assert "err\n" in result.stderr


def test_a_foreground_container_is_left_running(box: Pybuild) -> None:
    with Terminal(box, "run", "-it", "--rm", "--name", "left", "--network", "host", IMAGE, "sh") as terminal:
        terminal.expect(PROMPT)
        terminal.type("\x10\x11")
        assert terminal.ended() == 0
        assert terminal.is_as_before()
    assert status_of(box, "left") == "running 0"
    assert box.run("exec", "left", "echo", "here").text == "here\n"
    with Terminal(box, "attach", "left") as terminal:
        terminal.type("exit 3\r")
        assert terminal.ended() == 3
    until(lambda: box.run("ps", "-aq").text == "")
