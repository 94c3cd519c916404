"""Containers of Debian: bash at a terminal, a user made there, and the image made of what was done."""

from __future__ import annotations

from pathlib import Path

from tests.integration.containers.boxes import status_of
from tests.integration.containers.terminals import Terminal
from tests.support.cli import Pybuild


def test_bash_at_a_terminal_and_the_image_made_of_it(pybuild: Pybuild, debian_layout: Path) -> None:
    pybuild.run("copy", f"oci:{debian_layout}:debian", "storage:debian:1")
    with Terminal(pybuild, "run", "-it", "--name", "deb", "--network", "host", "debian:1", "bash") as terminal:
        terminal.expect("# ")
        terminal.type("stty size; id -un; dpkg --audit; echo audited $?\r")
        terminal.expect("33 99")
        terminal.expect("root")
        terminal.expect("audited 0")
        terminal.resize(50, 140)
        terminal.type("stty size\r")
        terminal.expect("50 140")
        terminal.type("useradd -m -s /bin/bash someone && su - someone -c 'touch made; id -un'\r")
        terminal.expect("someone\r\n")
        terminal.expect("# ")
        terminal.type("printf 'now %s\\n' cat; cat\r")
        terminal.expect("now cat\r\n")  # bash gave the line editor's terminal back: what comes now is echoed
        terminal.type("there\r")
        terminal.expect("there\r\nthere\r\n")  # said again by cat: it runs, and ^C will be its
        terminal.type("\x03")
        terminal.expect("# ")
        terminal.type("exit 11\r")
        assert terminal.ended() == 11
        assert terminal.is_as_before()
    assert status_of(pybuild, "deb") == "exited 11"
    assert "A /home/someone/made" in pybuild.run("diff", "deb").text.splitlines()
    pybuild.run("commit", "-c", "USER someone", "-c", "WORKDIR /home/someone", "deb", "deb:2")
    run = ("run", "--rm", "--network", "host", "deb:2")
    assert pybuild.run(*run, "sh", "-c", "id -un; pwd; stat -c %U made").text == "someone\n/home/someone\nsomeone\n"
    pybuild.run("rm", "deb")
