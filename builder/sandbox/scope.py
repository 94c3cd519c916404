"""Control groups by way of systemd: a scope of one's own, delegated, that limits can be set beneath.

Where systemd runs, the groups above a session are its to write to, not ours, and an ordinary user has none
at all. `systemd-run --scope` gives the calling process one (`Delegate=yes`) and becomes the command again;
`cgroup` then finds it as its own. Only `builder.cli` calls this, before anything else is begun.
https://systemd.io/CGROUP_DELEGATION
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Literal

from builder.errors import SandboxError
from builder.sandbox import cgroup, userns

Manager = Literal["auto", "cgroupfs", "systemd"]
_MARK = "PYBUILD_SCOPE"
_LEAF = "main"
_WORDS = "PYBUILD_SCOPE_WORDS"
_CARRIED = f"import json, os; words = json.loads(os.environ.pop({_WORDS!r})); os.execv(words[0], words)"


def enter(manager: Manager, argv: list[str], environ: Mapping[str, str], *, slice: str | None = None) -> None:
    """Be in a scope where `manager` wants one: this process is executed anew, with `argv`, inside it.

    `slice` is the unit that the scope is a part of (default: systemd's own choice). "auto" wants a scope for an
    ordinary user who has no group to write to. Raises: SandboxError where "systemd" is not to be had.
    """
    if _MARK in environ:
        _make_room()
        return
    root = os.geteuid() == 0
    if manager == "cgroupfs" or (manager == "auto" and (root or _owns_group())):
        return
    program = userns.find_program("systemd-run")
    if program is None or not _answers(root, environ):
        if manager == "auto":
            return  # the limit that cannot be applied will tell
        raise SandboxError(
            "cgroup manager systemd: it does not run here"
            if program
            else "cgroup manager systemd: systemd-run is not installed",
            operation="cgroup",
            hint="leave --cgroup-manager away, or use cgroupfs",
        )
    kind = [] if root else ["--user"]
    beneath = [f"--slice={slice}"] if slice else []
    options = [*kind, "--scope", "--quiet", "--collect", "--property=Delegate=yes", *beneath, "--"]
    environment = {**environ, _MARK: "1"}
    if not root:
        environment["XDG_RUNTIME_DIR"] = _runtime_dir(environ)
    if any("$" in word for word in argv):
        # systemd-run puts variables in their place, of late by default (254 to 257), and older ones know no option
        # that forbids it: such words go by the environment.
        environment[_WORDS] = json.dumps(argv)
        argv = [sys.executable, "-I", "-S", "-c", _CARRIED]
    try:
        os.execve(program, ["systemd-run", *options, *argv], environment)  # noqa: S606 - systemd's own
    except OSError as e:
        raise SandboxError(f"systemd-run: {e.strerror}", operation="cgroup", errno=e.errno) from e


def _answers(root: bool, environ: Mapping[str, str]) -> bool:
    """Whether there is a manager to ask: the machine's, or the user's own."""
    if root:
        return os.path.isdir("/run/systemd/system")
    return os.path.exists(f"{_runtime_dir(environ)}/systemd/private")


def _runtime_dir(environ: Mapping[str, str]) -> str:
    """Where the user's own manager listens: of cron's jobs and su's shells nobody is told."""
    return environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"


def _owns_group() -> bool:
    return any(cgroup.writable(hierarchy) for hierarchy in cgroup.detect() if hierarchy.version == 2)


def _make_room() -> None:
    """Out of the scope's own directory: in cgroup v2 a group with limits beneath it holds no processes."""
    for hierarchy in cgroup.detect():
        if hierarchy.version != 2:
            continue
        leaf = f"{hierarchy.own}/{_LEAF}"
        try:
            os.makedirs(leaf, exist_ok=True)
            with open(f"{leaf}/cgroup.procs", "w", encoding="ascii") as stream:
                stream.write("0")
        except OSError as e:
            raise SandboxError(
                f"the scope that systemd made is not ours: {e.strerror}", operation="cgroup", errno=e.errno, path=leaf
            ) from e
