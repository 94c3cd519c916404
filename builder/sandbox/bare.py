"""RUN where there are no namespaces: the launcher of sandboxes that are a chroot and little else.

For root without CAP_SYS_ADMIN (Docker's and Kubernetes' default containers), chosen by itself there
and by `--isolation chroot`. Files, owners and modes come out as in the other tiers, with the native
snapshotter. What such a sandbox has not: namespaces (the command sees the container's processes, host
name and network), mounts (/proc holds copies of a few files, /sys is empty, "read-only" is not enforced,
a bind mount's source is copied in), and unless `no_new_privs` is set, a seccomp filter besides the
container's own. What would be dropped in silence is refused. `keeper` does the work.
"""

from __future__ import annotations

import binascii
import json
import os
import signal
from collections.abc import Mapping
from typing import Any

from builder.errors import SandboxError
from builder.sandbox import channel, keeper
from builder.sandbox.channel import Socket
from builder.sandbox.launcher import Launcher, Running, compiled_filter, spawn
from builder.sandbox.operations import Host, mounts_of, operations
from builder.sandbox.spec import SandboxMount, SandboxSpec
from builder.sandbox.userns import has_powers, threads
from layers.snapshot import Mount

_KEPT = ("limits", "workdir", "identity", "cwd")
"""The setup operations that mean the same in a chroot."""


class BareRunning(Running):
    """A sandbox that its keeper has to end, not the kernel."""

    def kill(self) -> None:
        self.signal(keeper.END)

    def signal(self, number: int) -> None:
        super().signal(keeper.END if number == signal.SIGKILL else number)


class BareLauncher(Launcher):
    """Owns the bare zygote. See `Launcher`."""

    bare = True

    @classmethod
    def start(cls, network: str = "host", *, own_pids: bool = True) -> BareLauncher:
        """Start the bare zygote; there are no PID namespaces anyway. Raises: SandboxError."""
        ours, theirs = channel.pair()
        try:
            pid = _fork(ours, theirs) if threads() == 1 else spawn(theirs, "keeper")
        except OSError as e:
            ours.close()
            raise SandboxError(f"cannot start a process: {e.strerror}", operation="fork", errno=e.errno) from e
        finally:
            theirs.close()
        return cls(ours, pid, Host())

    def run(
        self,
        spec: SandboxSpec,
        *,
        stdin_fd: int | None = None,
        stdout_fd: int,
        stderr_fd: int,
        joined: Mapping[str, int] | None = None,
        trace: bool = False,
    ) -> Running:
        """See `Launcher.run`; there is nothing to trace. Raises: SandboxError for what a chroot cannot do."""
        request = json.dumps(plan(spec)).encode()
        return BareRunning(spec, self._send(b"B", request, stdin_fd, stdout_fd, stderr_fd))


def _fork(ours: Socket, theirs: Socket) -> int:
    pid = keeper.fork()
    if pid == 0:
        ours.close()
        keeper.serve(theirs)
    return pid


def plan(spec: SandboxSpec) -> dict[str, Any]:
    """The keeper's request. Raises: SandboxError for what a chroot cannot do."""
    _refuse_impossible(spec)
    program = None
    if has_powers() or spec.no_new_privs:
        program = compiled_filter(spec)
    steps = operations(spec, Host(seccomp=None if program is None else 0))
    scratch = spec.scratch or spec.root.lower[0].parent
    return {
        "root": str(spec.root.lower[0]),
        "scratch": str(scratch),
        "places": [
            {"kind": "dev", "target": "/dev"},
            {"kind": "proc", "target": "/proc"},
            {"kind": "directory", "target": "/sys", "mode": 0o555},
            *_places(mounts_of(spec, Host())),
        ],
        "operations": [step for step in steps if step[0] in _KEPT],
        "programs": {} if program is None else {0: binascii.b2a_base64(program, newline=False).decode()},
        "limits": {key: value for key, value in spec.resources._asdict().items() if value is not None},
        "args": list(spec.args),
        "env": spec.environment(),
    }


def _refuse_impossible(spec: SandboxSpec) -> None:
    wishes = {
        f"network {spec.network!r}": spec.network != "host",
        "a seccomp profile": isinstance(spec.seccomp, os.PathLike) and not has_powers() and not spec.no_new_privs,
        "a read-only root": spec.readonly_root or spec.root.readonly,
        "a namespace of another container": any(where == "joined" for _kind, where in spec.shared),
        "an overlay": spec.root.type != "bind",
        "devices": bool(spec.devices),
        "a kernel parameter": bool(spec.sysctls),
        "pausing": bool(spec.resources.freezer),
        "a terminal": getattr(spec, "terminal", None) is not None,
        "--init": spec.init,
    }
    for wish, wished in wishes.items():
        if wished:
            raise SandboxError(
                f"{wish} cannot be had without namespaces and mounts (isolation chroot)",
                operation="chroot",
                hint="`pybuild doctor` tells what this machine forbids, and what would grant it",
            )


def _places(mounts: list[SandboxMount]) -> list[dict[str, Any]]:
    """What is put where. What was moved to one place is at another by a link."""
    places: list[dict[str, Any]] = []
    homes: dict[str, str] = {}
    for mount in mounts:
        place = _place(mount)
        if place["kind"] == "moved":
            home = homes.setdefault(place["source"], mount.target)
            if home != mount.target:
                place = {"kind": "link", "target": mount.target, "to": f"/{home.lstrip('/')}"}
        places.append(place)
    return places


def _place(mount: SandboxMount) -> dict[str, Any]:
    source = mount.source
    owner = {"uid": mount.uid, "gid": mount.gid}
    if isinstance(source, bytes):
        data = binascii.b2a_base64(source).decode()
        mode = 0o400 if mount.mode is None else mount.mode
        return {"kind": "file", "target": mount.target, "data": data, "mode": mode, **owner}
    if source is None:
        mode = 0o1777 if mount.mode is None else mount.mode
        return {"kind": "directory", "target": mount.target, "mode": mode, **owner}
    if isinstance(source, Mount):
        # Changes are thrown away with the copy, as they were with the upper directory.
        return {"kind": "copy", "target": mount.target, "source": str(source.lower[0]), "subpath": mount.subpath}
    if mount.movable:
        return {"kind": "moved", "target": mount.target, "source": str(source)}
    if not mount.readonly and source.is_dir():
        raise SandboxError(
            f"{source} cannot be made writable at {mount.target} without mounts (isolation chroot)",
            operation="chroot",
            path=mount.target,
            hint="mount it read-only (:ro), or use RUN --mount=type=cache",
        )
    return {"kind": "copy", "target": mount.target, "source": str(source), "subpath": None}
