"""`--on-error=shell`: a shell where the step failed, on a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.cli import Pybuild, write_context
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.registry


@pytest.fixture
def context(tmp_path: Path, busybox_base: str) -> Path:
    text = (
        f"FROM {busybox_base}\nENV NAME=value\nWORKDIR /place\nUSER 7:8\n"
        "RUN --mount=type=secret,id=s,uid=7 --mount=type=tmpfs,target=/t echo partly > /tmp/made; exit 3\n"
    )
    (tmp_path / "secret").write_text("hidden-value")
    return write_context(tmp_path / "context", text)


def test_a_shell_on_a_pipe(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    script = b"echo [$NAME] [$PWD] [$(id -u):$(id -g)] [$(cat /tmp/made)] [$(wc -c < /run/secrets/s)]; exit 0\n"
    flags = ("--on-error=shell", "--secret", f"id=s,src={tmp_path}/secret")
    result = pybuild.build(context, *flags, stdin=script, check=False)
    assert result.status == 3, "the build fails with the step's status all the same"
    assert "[value] [/place] [7:8] [partly] [12]" in result.text


def test_a_shell_on_a_terminal(pybuild: Pybuild, context: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        pybuild.argv("build", "--on-error=shell", "--secret", f"id=s,src={tmp_path}/secret", context),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=pybuild.environ(),
        start_new_session=True,
    )
    os.close(slave)
    seen = b""
    asked = False
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if not select.select([master], [], [], 1)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        seen += data
        if not asked and b"$ " in seen[-12:]:  # busybox asks for the cursor's place after its prompt
            os.write(master, b"tty && cat /tmp/made && echo un''til && exit\n")
            asked = True
    os.close(master)
    if process.poll() is None and not asked:
        process.kill()
    assert process.wait(PATIENCE_S) == 3, seen
    assert b"/dev/pts" in seen or b"/dev/console" in seen, seen
    assert b"partly" in seen
    assert b"until" in seen


def test_a_build_that_succeeds_opens_none(pybuild: Pybuild, tmp_path: Path) -> None:
    context = write_context(tmp_path / "context", "FROM scratch\nWORKDIR /x\n")
    assert pybuild.build(context, "--on-error=shell").status == 0
