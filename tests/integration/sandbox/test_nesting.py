"""A sandbox inside a sandbox: pybuild in a RUN, in a container, in a container that masks /proc."""

from __future__ import annotations

import os
from pathlib import Path

from layers.snapshot import Mount
from tests.integration.sandbox.boxes import RootBox, make_image
from tests.support.accounts import Account

INNER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from builder.sandbox import userns
identity = userns.enter()
from builder.sandbox.launcher import Launcher
from builder.sandbox.spec import SandboxSpec
from layers.snapshot import Mount
base = Path(sys.argv[2])
snapshot = Path("/dev/shm/snapshot")
(snapshot / "fs").mkdir(parents=True)
(snapshot / "work").mkdir()
root = Mount("overlay", (base,), snapshot / "fs", snapshot / "work", False, identity.dialect)
script = "echo inner > /file; cat /file; echo pid $$; cd -P /proc/self && pwd"
with Launcher.start() as launcher:
    spec = SandboxSpec(args=("sh", "-c", script), root=root, env={"PATH": "/bin"})
    status = launcher.run(spec, stdout_fd=1, stderr_fd=2).wait()
print(identity.tier, status.code, os.listdir(snapshot / "fs"))
"""
EXPECTED = "inner\npid 1\n/proc/1\n{} 0 ['file']\n"


def run_inner(box: RootBox, account: Account, **spec: object) -> str:
    """Start `INNER` in a sandbox on the machine's own root."""
    image = box.base / "image"
    make_image(image)
    # The packages lie in the user's home, where everyone can read them.
    args = (str(account.python), "-B", "-c", INNER, account.pythonpath, str(image))
    outcome = box.run(*args, root=Mount("bind", (Path("/"),)), env={"PATH": "/usr/bin:/bin"}, **spec)
    assert outcome.code == 0, outcome
    return outcome.out


def test_root_inside_a_privileged_sandbox(root_box: RootBox, rootless_user: Account) -> None:
    assert run_inner(root_box, rootless_user, privileged=True) == EXPECTED.format("root")


def test_a_user_inside_a_privileged_sandbox(root_box: RootBox, rootless_user: Account) -> None:
    ids = {"uid": rootless_user.uid, "gid": rootless_user.gid}
    assert run_inner(root_box, rootless_user, privileged=True, **ids) == EXPECTED.format("subordinate")


def test_a_user_where_proc_is_masked(root_box: RootBox, rootless_user: Account) -> None:
    """As in a container of Docker's that allows user namespaces: a new /proc is refused there."""
    ids = {"uid": rootless_user.uid, "gid": rootless_user.gid, "seccomp": "unconfined"}
    found = run_inner(root_box, rootless_user, **ids).splitlines()
    # What it sees instead is the outer sandbox's, where its own number is another.
    assert found[:2] == ["inner", "pid 1"]
    assert found[2].startswith("/proc/") and found[2] != "/proc/1"
    assert found[3].endswith(" 0 ['file']")


def test_without_leave_the_inner_one_says_what_is_missing(root_box: RootBox, rootless_user: Account) -> None:
    args = ("/usr/bin/python3", "-B", "-c", INNER, rootless_user.pythonpath, "/")
    args = (str(rootless_user.python), *args[1:])
    root = Mount("bind", (Path("/"),))
    outcome = root_box.run(
        *args, root=root, env={"PATH": "/usr/bin:/bin"}, uid=rootless_user.uid, gid=rootless_user.gid
    )
    assert outcome.code == 1
    assert "SandboxError: cannot make a user namespace" in outcome.err
    assert os.path.isdir("/dev/shm")
