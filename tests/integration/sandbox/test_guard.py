"""The guard of a sandbox in somebody else's PID namespace, where that has ended before it came.

That nothing stays behind is what every test here is looked at for (`tests.support.leaks`).
"""

from __future__ import annotations

import os
import signal

import pytest

from builder.errors import SandboxError
from builder.sandbox.launcher import Launcher
from builder.sandbox.spec import SandboxSpec
from layers import linux
from tests.integration.sandbox.boxes import RootBox


def test_a_namespace_that_has_ended_is_told_and_nothing_stays(root_box: RootBox) -> None:
    pid, pidfd = linux.clone(linux.CLONE_NEWPID)
    if pid == 0:
        signal.pause()
        os._exit(0)
    namespace = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(pidfd)
    spec = SandboxSpec(args=("/bin/true",), root=root_box.overlay(), shared=(("pid", "joined"),))
    with Launcher.start(own_pids=False) as launcher:
        for _ in range(2):  # the zygote is well
            with pytest.raises(SandboxError, match="cannot set up the sandbox: clone"):
                launcher.run(spec, stdout_fd=1, stderr_fd=2, joined={"pid": namespace})
    os.close(namespace)
