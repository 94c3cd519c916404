"""RUN by an OCI runtime: `--isolation oci --runtime runc|crun|…`. A `SandboxSpec` as a runtime-spec bundle.

The root is mounted by us, in a mount namespace of the runtime's own, as in the other tiers; namespaces,
capabilities, filter and limits are the runtime's work. As root, or as the root of a user namespace (an
ordinary user's), where the container needs none of its own. What a bundle cannot say is refused. https://github.com/opencontainers/runtime-spec/blob/main/config.md
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import select
import signal
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.errors import SandboxError
from builder.sandbox import seccomp, userns
from builder.sandbox.bare import BareLauncher, BareRunning
from builder.sandbox.channel import Socket
from builder.sandbox.launcher import Running, host_now
from builder.sandbox.operations import Host, capability_mask, mounts_of, operations, tree_of
from builder.sandbox.spec import Resources, SandboxMount, SandboxSpec
from layers import linux
from layers.snapshot import Mount

RUNTIMES = ("runc", "crun", "youki", "runsc", "kata-runtime")
_ACTIONS = {
    seccomp.ALLOW: "SCMP_ACT_ALLOW",
    seccomp.LOG: "SCMP_ACT_LOG",
    seccomp.TRAP: "SCMP_ACT_TRAP",
    seccomp.KILL_THREAD: "SCMP_ACT_KILL_THREAD",
    seccomp.KILL_PROCESS: "SCMP_ACT_KILL_PROCESS",
}
_ARCHITECTURES = {
    "x86_64": "SCMP_ARCH_X86_64",
    "i386": "SCMP_ARCH_X86",
    "x32": "SCMP_ARCH_X32",
    "aarch64": "SCMP_ARCH_AARCH64",
    "arm": "SCMP_ARCH_ARM",
}
_THROTTLES = {
    "rbps": "throttleReadBpsDevice",
    "wbps": "throttleWriteBpsDevice",
    "riops": "throttleReadIOPSDevice",
    "wiops": "throttleWriteIOPSDevice",
}
_SHM = "/dev/shm"  # noqa: S108 - a mount point
_SystemMount = tuple[str, str, str, tuple[str, ...]]
"""Destination, type, source, options."""
_SYSTEM_MOUNTS: tuple[_SystemMount, ...] = (
    ("/proc", "proc", "proc", ("nosuid", "nodev", "noexec")),
    ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    ("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "nodev", "noexec")),
)


def find_runtime(name: str | None) -> str:
    """The runtime's path: the named one, else the first that is installed. Raises: SandboxError."""
    if name and "/" in name:
        found = name if os.access(name, os.X_OK) else None
    else:
        found = next(filter(None, map(userns.find_program, (name,) if name else RUNTIMES)), None)
    if found is None:
        wanted = name or "none of " + ", ".join(RUNTIMES)
        raise SandboxError(
            f"isolation oci: the runtime {wanted} is not installed"
            if name
            else f"isolation oci: {wanted} is installed",
            operation="runtime",
            hint="install runc or crun, or name another with --runtime",
        )
    return os.path.abspath(found)


class OciRunning(BareRunning):
    """A container of a runtime's. Its first process is known once the runtime has made it (`await_command`)."""

    def __init__(self, spec: SandboxSpec, control: Socket) -> None:
        self.place: dict[str, str] = {}
        """`path` of the runtime, `root` of its state, `id` of the container."""
        self._command = 0
        self._command_fd = -1
        super().__init__(spec, control)

    @property
    def pid(self) -> int:
        return self._command

    def await_command(self, timeout_s: float = 30.0) -> None:
        """Wait until the first process is there, or the end. Raises: SandboxError where it could not be made."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while not self._command and self._status is None:
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise SandboxError("the runtime does not make the container", operation="runtime")
            self._take(*self._receive())

    def _take(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        super()._take(message, fds)
        if "runtime" in message:
            self.place, self._command = message["runtime"], message["pid"]
            with contextlib.suppress(OSError):
                self._command_fd = linux.pidfd_open(self._command)
        if "exit" in message:
            self._command = 0

    def signal(self, number: int) -> None:
        if number == signal.SIGKILL or self._command_fd < 0:
            super().signal(number)
            return
        with self._lock, contextlib.suppress(OSError):
            linux.pidfd_send_signal(self._command_fd, number)

    def pause(self) -> None:
        self._ask("pause")

    def resume(self) -> None:
        self._ask("resume")

    def _ask(self, verb: str) -> None:
        argv = [self.place["path"], "--root", self.place["root"], verb, self.place["id"]]
        pid = os.posix_spawn(argv[0], argv, os.environ)
        if os.waitpid(pid, 0)[1]:
            raise SandboxError(f"the runtime cannot {verb} the container", operation="runtime")

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            if self._command_fd >= 0:
                linux.pidfd_send_signal(self._command_fd, signal.SIGKILL)
        super().kill()

    def close(self) -> None:
        super().close()
        with self._lock:
            if self._command_fd >= 0:
                os.close(self._command_fd)
                self._command_fd = -1


class OciLauncher(BareLauncher):
    """Owns the process that starts runtimes. See `Launcher`."""

    bare = False

    def __init__(self, server: Socket, pid: int, host: Host) -> None:
        super().__init__(server, pid, host)
        self.runtime = ""

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
        """See `Launcher.run`; there is nothing to trace. Raises: SandboxError for what a bundle cannot say."""
        request = {"runtime": self.runtime, **bundle(spec)}
        return OciRunning(spec, self._send(b"O", json.dumps(request).encode(), stdin_fd, stdout_fd, stderr_fd))


def start(runtime: str | None) -> OciLauncher:
    """Raises: SandboxError where the runtime is missing, or this is not the root of any namespace."""
    path = find_runtime(runtime)
    if not userns.has_powers():
        raise SandboxError("isolation oci needs CAP_SYS_ADMIN", operation="runtime", hint="leave --isolation away")
    if userns.current().tier == "single":
        raise SandboxError(
            "isolation oci needs subordinate ids: no runtime answers for those that are missing",
            operation="runtime",
            hint="leave --isolation away; `pybuild doctor` tells how to get them",
        )
    launcher = OciLauncher.start()
    assert isinstance(launcher, OciLauncher)
    launcher.runtime = path
    return launcher


def bundle(spec: SandboxSpec) -> dict[str, Any]:
    """The keeper's request: the root to mount, what to put where, and the bundle's config. Raises: SandboxError."""
    wishes = {
        "a private network": spec.network == "private",
        "pausing": bool(spec.resources.freezer),
        "a namespace of another container": any(where == "joined" for _kind, where in spec.shared),
        "a cgroup parent": spec.resources.cgroup_parent is not None,
        "--init": spec.init,
    }
    for wish, wished in wishes.items():
        if wished:
            raise SandboxError(f"{wish} cannot be had with isolation oci", operation="runtime")
    host = host_now()
    mounts = mounts_of(spec, host)
    arguments = next(step[1] for step in operations(spec, host) if step[0] == "root")
    scratch = spec.scratch or (spec.root.upper or spec.root.lower[0]).parent
    return {
        "root": arguments,
        "scratch": str(scratch),
        "sources": [_source(mount) for mount in mounts],
        "config": config(spec, mounts, host),
    }


def _source(mount: SandboxMount) -> dict[str, Any]:
    """What the keeper has to make before it can be bound."""
    source = mount.source
    if isinstance(source, bytes):
        mode = 0o400 if mount.mode is None else mount.mode
        return {"file": binascii.b2a_base64(source).decode(), "mode": mode, "uid": mount.uid, "gid": mount.gid}
    if isinstance(source, Mount):
        return {"tree": tree_of(source), "subpath": mount.subpath}
    return {} if source is None else {"path": str(source)}


def config(spec: SandboxSpec, mounts: list[SandboxMount], host: Host | None = None) -> dict[str, Any]:
    """The bundle's config.json. Sources of binds, and the root's path, are put in by the keeper."""
    mask = (1 << len(linux.CAPABILITIES)) - 1 if spec.privileged else capability_mask(spec.capabilities)
    names = [f"CAP_{name}" for number, name in enumerate(linux.CAPABILITIES) if mask >> number & 1]
    namespaces: list[str] = ["mount", *(["network"] if spec.network == "none" else [])]
    namespaces += [kind for kind in ("pid", "ipc", "uts", "cgroup") if spec.own(kind)]
    host = host or Host()
    process: dict[str, Any] = {
        "terminal": spec.terminal is not None,
        **(
            {} if spec.terminal is None else {"consoleSize": dict(zip(("height", "width"), spec.terminal, strict=True))}
        ),
        "user": {"uid": spec.uid, "gid": spec.gid, "additionalGids": list(spec.groups), "umask": spec.umask},
        "args": list(spec.args),
        "env": [f"{key}={value}" for key, value in spec.environment().items()],
        "cwd": spec.cwd,
        "capabilities": {
            "bounding": names,
            "permitted": [] if spec.uid else names,
            "effective": [] if spec.uid else names,
        },
        "rlimits": [{"type": f"RLIMIT_{n.upper()}", "soft": soft, "hard": hard} for n, soft, hard in spec.rlimits],
        "noNewPrivileges": spec.no_new_privs,
    }
    if spec.oom_score_adj is not None:
        process["oomScoreAdj"] = spec.oom_score_adj
    profile = _profile(spec)
    bound = [text for text in spec.devices if ":" in text and host.rootless]
    nodes = [_device(text) for text in spec.devices if text not in bound]
    allowed = [
        {"allow": True, "type": d["type"], "major": d["major"], "minor": d["minor"], "access": "rwm"} for d in nodes
    ]
    return {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": "", "readonly": spec.readonly_root or spec.root.readonly},
        **({"hostname": spec.hostname} if spec.own("uts") else {}),
        "mounts": [
            *(
                {"destination": d, "type": t, "source": s, "options": list(o)}
                for d, t, s, o in _system_mounts(spec, host)
            ),
            # In a user namespace runtimes bind nodes, under the host's name alone.
            *(_bound_device(text) for text in bound),
            *map(_mount, mounts),
        ],
        "linux": {
            "namespaces": [{"type": name} for name in namespaces],
            "devices": nodes,
            "resources": {**_resources(spec.resources), "devices": [{"allow": False, "access": "rwm"}, *allowed]},
            **({"sysctl": dict(spec.sysctls)} if spec.sysctls else {}),
            "maskedPaths": [] if spec.privileged else list(spec.masked_paths),
            "readonlyPaths": [] if spec.privileged else list(spec.readonly_paths),
            **({} if profile is None else {"seccomp": profile}),
        },
    }


def _system_mounts(spec: SandboxSpec, host: Host) -> tuple[_SystemMount, ...]:
    flags = ("nosuid", "nodev", "noexec", "ro")
    sys: _SystemMount = ("/sys", "sysfs", "sysfs", flags)
    if host.rootless and spec.network == "host":
        # The kernel makes a new one only for who owns the network namespace.
        sys = ("/sys", "none", "/sys", ("rbind", *flags))
    gid = () if host.tty_gid is None else (f"gid={host.tty_gid}",)
    pts = ("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *gid))
    bound = ("rbind", "nosuid", "nodev", "noexec")
    proc, dev, queues = _SYSTEM_MOUNTS
    size = f"size={spec.shm_size_bytes}"
    shm: _SystemMount = (_SHM, "tmpfs", "shm", ("nosuid", "nodev", "noexec", "mode=1777", size))
    if not spec.own("ipc"):
        shm = (_SHM, "none", _SHM, bound)
    # What belongs to a namespace of the host's, root in a user namespace may not mount, but bind.
    if host.rootless and not spec.own("ipc"):
        queues = ("/dev/mqueue", "none", "/dev/mqueue", bound)
    if host.rootless and not spec.own("pid"):
        proc = ("/proc", "none", "/proc", bound)
    return (proc, sys, dev, pts, *([queues] if queues[1] != "none" or os.path.isdir(queues[2]) else []), shm)


def _mount(mount: SandboxMount) -> dict[str, Any]:
    options = ["nosuid", "nodev", "ro" if mount.readonly else "rw", *(["noexec"] if mount.noexec else [])]
    target = "/" + mount.target.lstrip("/")
    if mount.kind == "tmpfs":
        options += [f"mode={0o1777 if mount.mode is None else mount.mode:o}", f"uid={mount.uid}", f"gid={mount.gid}"]
        options += [] if mount.size_bytes is None else [f"size={mount.size_bytes}"]
        return {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": options}
    bind = "rbind" if mount.recursive else "bind"
    return {"destination": target, "type": "bind", "source": "", "options": [bind, *options]}


def _device(text: str) -> dict[str, Any]:
    path, _, other = text.partition(":")
    status = os.stat(path)
    if not stat.S_ISCHR(status.st_mode) and not stat.S_ISBLK(status.st_mode):
        raise SandboxError(f"{path} is no device node", operation="runtime", path=path)
    kind = "b" if stat.S_ISBLK(status.st_mode) else "c"
    major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    mode = stat.S_IMODE(status.st_mode)
    return {"path": other or path, "type": kind, "major": major, "minor": minor, "fileMode": mode, "uid": 0, "gid": 0}


def _bound_device(text: str) -> dict[str, Any]:
    path, _, target = text.partition(":")
    return {"destination": target, "type": "none", "source": path, "options": ["bind", "nosuid", "noexec"]}


def _resources(limits: Resources) -> dict[str, Any]:
    memory = {"limit": limits.memory_bytes, "swap": limits.memory_swap_bytes}
    cpu = {
        "shares": limits.cpu_shares,
        "period": limits.cpu_period_us,
        "quota": limits.cpu_quota_us,
        "cpus": limits.cpuset_cpus,
        "mems": limits.cpuset_mems,
    }
    found: dict[str, dict[str, Any]] = {"memory": memory, "cpu": cpu, "pids": {"limit": limits.pids}}
    set_ = {key: {k: v for k, v in values.items() if v is not None} for key, values in found.items()}
    resources: dict[str, Any] = {key: values for key, values in set_.items() if values}
    for what, path, limit in limits.io or ():
        device = _device(path)
        row = {"major": device["major"], "minor": device["minor"], "rate": limit}
        resources.setdefault("blockIO", {}).setdefault(_THROTTLES[what], []).append(row)
    if limits.hugetlb:
        resources["hugepageLimits"] = [{"pageSize": size, "limit": limit} for size, limit in limits.hugetlb]
    return resources


def _profile(spec: SandboxSpec) -> dict[str, Any] | None:
    """The filter as the runtime-spec writes it. Raises: SandboxError."""
    if spec.privileged or spec.seccomp == "unconfined":
        return None
    machine = linux.machine()
    if spec.seccomp == "default":
        profile = seccomp.default_profile(spec.capabilities, machine)
    else:
        major, minor = os.uname().release.split(".")[:2]
        kernel = (int(major), int("".join(c for c in minor if c.isdigit())))
        profile = seccomp.load_profile(Path(spec.seccomp), spec.capabilities, machine, kernel)
    rows = []
    for rule in profile.rules:
        row = {"names": list(rule.names), **_action(rule.action, "action", "errnoRet")}
        if rule.comparisons:
            row["args"] = [
                {"index": c.argument, "value": c.value, "valueTwo": c.other, "op": f"SCMP_CMP_{c.op}"}
                for c in rule.comparisons
            ]
        rows.append(row)
    architectures = [_ARCHITECTURES[name] for name in profile.architectures]
    default = _action(profile.default, "defaultAction", "defaultErrnoRet")
    return {**default, "architectures": architectures, "syscalls": rows}


def _action(value: int, name: str, number: str) -> dict[str, Any]:
    if value in _ACTIONS:
        return {name: _ACTIONS[value]}
    return {name: "SCMP_ACT_ERRNO", number: value & 0xFFFF}
