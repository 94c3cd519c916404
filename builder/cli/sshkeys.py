"""`--ssh ID=KEY[,KEY...]`: an ssh agent of the command's own, for keys that are files.

OpenSSH's programs do it: no key is read here. The agent lives as long as the command, or less.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from builder.errors import UsageError

_TIMEOUT_S = 10.0
_POLL_S = 0.01


def agent_with(keys: Sequence[Path], stack: ExitStack) -> Path:
    """The socket of a new agent that has these keys; closing `stack` ends it.

    Raises: UsageError if there is no OpenSSH, or a key is none, is encrypted or may be read by others.
    """
    import subprocess
    import tempfile

    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pybuild-ssh-")))
    socket = place / "agent"
    try:
        # In the foreground, where it dies with nobody left to ask; a terminal's Ctrl-C is the command's alone.
        agent = subprocess.Popen(
            ["ssh-agent", "-D", "-a", str(socket)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as e:
        raise UsageError(
            f"--ssh with a key needs ssh-agent: {e.strerror}", hint="install OpenSSH's client, or give an agent"
        ) from e
    stack.callback(agent.wait)
    stack.callback(agent.terminate)
    deadline = time.monotonic() + _TIMEOUT_S
    while not socket.is_socket():
        if agent.poll() is not None or time.monotonic() > deadline:
            raise UsageError("--ssh with a key: ssh-agent does not start")
        time.sleep(_POLL_S)
    # Without an askpass program and a terminal an encrypted key is an error, not a question.
    environ = {**os.environ, "SSH_AUTH_SOCK": str(socket), "SSH_ASKPASS_REQUIRE": "force", "SSH_ASKPASS": "/bin/false"}
    for key in keys:
        try:
            done = subprocess.run(
                ["ssh-add", "-q", str(key)],
                env=environ,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
                start_new_session=True,
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise UsageError(f"--ssh: ssh-add does not take {key}: {e}") from e
        if done.returncode:
            said = " ".join(done.stderr.decode("utf-8", "replace").split()) or "it is encrypted, or no private key"
            raise UsageError(
                f"--ssh: ssh-add does not take {key}: {said}", hint="give an encrypted key to an agent of your own"
            )
    return socket
