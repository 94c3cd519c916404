"""`--ssh ID=KEY`: an agent of the command's own, for as long as it runs."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from builder.cli.sshkeys import agent_with
from builder.errors import UsageError
from tests.support.cli import Pybuild, write_context
from tests.support.machine import need_tool


def make_key(path: Path, passphrase: str = "") -> Path:
    need_tool("ssh-keygen", "ssh-agent", "ssh-add")
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", "made-for-a-test", "-f", str(path)]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    return path


def test_the_agent_has_the_key_and_ends(tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    with ExitStack() as stack:
        socket = agent_with([key], stack)
        environ = {**os.environ, "SSH_AUTH_SOCK": str(socket)}
        listed = subprocess.run(["ssh-add", "-l"], env=environ, capture_output=True, text=True, check=True).stdout
        assert "made-for-a-test" in listed
    assert not socket.exists()


def test_a_key_that_nobody_can_read_is_one_error(tmp_path: Path) -> None:
    locked = make_key(tmp_path / "locked", "secret words")
    text = tmp_path / "text"
    text.write_text("no key\n")
    text.chmod(0o600)
    for path in (locked, text):
        with ExitStack() as stack, pytest.raises(UsageError, match="ssh-add does not take"):
            agent_with([path], stack)


def test_a_run_sees_the_agent(pybuild: Pybuild, busybox_base: str, tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    text = f'FROM {busybox_base}\nRUN --mount=type=ssh,id=mine,required test -S "$SSH_AUTH_SOCK"\n'
    context = write_context(tmp_path / "context", text)
    pybuild.build(context, "--ssh", f"mine={key}")
    refused = pybuild.build(context, "--ssh", f"mine={tmp_path / 'nothing'}", check=False)
    assert refused.status == 2
    assert "neither an agent's socket nor a key" in refused.stderr
