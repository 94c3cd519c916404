"""From a `SandboxSpec` to the list of setup operations that `setup` executes.

Nothing is changed here; all that is looked at is whether the sources of optional mounts exist.

A debug print of a sandbox is this list, one `describe` a line.
"""

from __future__ import annotations

import binascii
import os
from pathlib import Path

from builder.sandbox.spec import DEFAULT_HOSTNAME, SandboxMount, SandboxSpec
from layers import linux
from layers.sha import sha256
from layers.snapshot import Mount
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Operation = list[Any]
    """`[name, arguments]`, ready for JSON."""


class Host(NamedTuple):
    """What the operations depend on besides the spec."""

    cgroup2: bool = False
    tty_gid: int | None = 5
    setgroups: bool = True
    rootless: bool = False
    seccomp: int | None = None
    """The number under which the zygote knows the filter; None for none."""
    single: bool = False
    """One id is all there is: the others are a supervisor's to tell."""
    supervised: int | None = None
    """The number of the filter that has the supervisor asked."""
    nodes: int | None = None
    """The number of the filter that has somebody asked for devices (`builder.sandbox.nodes`)."""


def operations(spec: SandboxSpec, host: Host | None = None) -> list[Operation]:
    """The whole setup, from the keyring to the working directory; it begins with the `prelude`."""
    host = host or Host()
    mounts = mounts_of(spec, host)
    steps = prelude(spec, host)
    if spec.sysctls:
        # Before /proc/sys is read-only.
        steps.insert(0, ["sysctl", {"values": [list(pair) for pair in spec.sysctls]}])
    if joined := [kind for kind, where in spec.shared if where == "joined" and kind != "pid"]:
        steps.insert(0, ["join", {"kinds": joined}])
    if spec.own("uts"):
        steps.append(["hostname", {"name": spec.hostname, "asked": spec.hostname != DEFAULT_HOSTNAME}])
    if spec.network != "host":
        steps.append(["loopback", {}])
    steps += [["root", _root(spec, mounts)], ["place", {}]]
    steps.extend(["mount", _mount(mount)] for mount in mounts)
    if not spec.privileged:
        for name, paths in (("mask", spec.masked_paths), ("readonly", spec.readonly_paths)):
            if of_image := [path for path in paths if not _is_staged(path)]:
                steps.append([name, {"paths": of_image}])
    if spec.readonly_root or spec.root.readonly:
        steps.append(["readonly_root", {}])
    steps.append(["enter", {"isolation": spec.isolation}])
    limits = [[name, soft, hard] for name, soft, hard in spec.rlimits]
    steps.append(["limits", {"umask": spec.umask, "rlimits": limits, "oom_score_adj": spec.oom_score_adj}])
    if spec.network == "private":
        steps.append(["network", {}])
    if host.supervised is not None:
        who = {"uid": spec.uid, "gid": spec.gid, "groups": list(spec.groups), "capabilities": _capabilities(spec)}
        steps.append(["supervise", {"program": host.supervised, **who}])
    if host.nodes is not None and _capabilities(spec) & capability_mask(frozenset({"MKNOD"})):
        steps.append(["nodes", {"program": host.nodes}])
    return [*steps, *_start(spec, host)]


def _start(spec: SandboxSpec, host: Host) -> list[Operation]:
    """Who and where the command is. A working directory that is missing is made: by root, for its user.

    With a single id the user makes it: the supervisor lets him, and records that it is his.
    """
    identity: Operation = ["identity", _identity(spec, host)]
    owner = None if host.single else [spec.uid, spec.gid]
    workdir: Operation = ["workdir", {"path": spec.cwd, "owner": owner}]
    return [*([identity, workdir] if host.single else [workdir, identity]), ["cwd", {"path": spec.cwd}]]


def prelude(spec: SandboxSpec, host: Host) -> list[Operation]:
    """What does not depend on the image, and is the same for most specs: the zygote does it ahead."""
    steps: list[Operation] = [["keyring", {}], ["stage", {"cgroup2": host.cgroup2}]]
    dev: dict[str, Any] = {"shm_size_bytes": spec.shm_size_bytes, "tty_gid": host.tty_gid}
    steps.append(["dev", {**dev, "devices": list(spec.devices), "ipc": dict(spec.shared).get("ipc")}])
    if not spec.privileged:
        for name, paths in (("mask", spec.masked_paths), ("readonly", spec.readonly_paths)):
            if staged := [path for path in paths if _is_staged(path)]:
                steps.append([name, {"paths": staged}])
    return steps


def _is_staged(path: str) -> bool:
    return path.startswith(("/proc/", "/sys/"))


def _root(spec: SandboxSpec, mounts: list[SandboxMount]) -> dict[str, Any]:
    root = tree_of(spec.root)
    scratch = spec.scratch or (spec.root.upper.parent if spec.root.upper else None)
    targets = [["/proc", False], ["/sys", False], ["/dev", False]]
    targets += [[mount.target, mount.is_file or mount.kind == "file"] for mount in mounts]
    kept = _kept_stubs(targets) if spec.stubs and spec.root.type == "overlay" else []
    root["stubs"] = f"{spec.stubs}/{_digest(kept)}" if kept else None
    root["kept"] = kept
    return {**root, "targets": targets, "scratch": None if scratch is None else str(scratch)}


def describe(operation: Operation) -> str:
    """One line for people; contents of files and programs are left out."""
    name, arguments = operation
    shown = {key: value for key, value in arguments.items() if value not in (None, [], False)}
    if name == "mount" and arguments["kind"] == "file":
        shown["source"] = f"<{len(arguments['source'])} bytes>"
    return " ".join([name, *(f"{key}={value}" for key, value in shown.items())])


def capability_mask(names: frozenset[str]) -> int:
    """The bit mask of capabilities named `CAP_X` or `X`. Raises: KeyError for an unknown name."""
    numbers = {name: number for number, name in enumerate(linux.CAPABILITIES)}
    mask = 0
    for name in names:
        mask |= 1 << numbers[name.upper().removeprefix("CAP_")]
    return mask


def _capabilities(spec: SandboxSpec) -> int:
    return (1 << len(linux.CAPABILITIES)) - 1 if spec.privileged else capability_mask(spec.capabilities)


def _identity(spec: SandboxSpec, host: Host) -> dict[str, Any]:
    return {
        "uid": 0 if host.single else spec.uid,
        "gid": 0 if host.single else spec.gid,
        "groups": list(spec.groups) if host.setgroups else None,
        "capabilities": _capabilities(spec),
        "no_new_privs": spec.no_new_privs,
        "seccomp": host.seccomp,
    }


def mounts_of(spec: SandboxSpec, host: Host) -> list[SandboxMount]:
    """The spec's mounts, and its files as mounts."""
    mounts = list(spec.mounts)
    hosts = "".join(f"{address}\t{name}\n" for name, address in spec.add_hosts).encode()
    for target, source in spec.files.items():
        if hosts and target == "/etc/hosts":
            source = (source.read_bytes() if isinstance(source, Path) else source).rstrip(b"\n") + b"\n" + hosts
        if spec.network == "private" and target == "/etc/resolv.conf":
            from builder.sandbox import network

            text = source.read_bytes() if isinstance(source, Path) else source
            source = network.resolv_conf(text, rootless=host.rootless)
        if isinstance(source, bytes):
            mounts.append(SandboxMount("file", target, source, readonly=spec.files_readonly, mode=0o644))
        else:
            mounts.append(
                SandboxMount("bind", target, source, readonly=spec.files_readonly, is_file=True, optional=True)
            )
    return [mount for mount in mounts if not mount.optional or os.path.lexists(str(mount.source))]


def _kept_stubs(targets: list[list[Any]]) -> list[list[Any]]:
    """The targets whose stubs do not depend on the image: plain paths, none beneath another."""
    kept: list[list[Any]] = []
    for path, is_file in sorted(targets):
        parts = [part for part in path.split("/") if part not in {"", "."}]
        plain = "/".join(parts)
        if parts and ".." not in parts and not any(f"{plain}/".startswith(f"{other}/") for other, _ in kept):
            kept.append([plain, is_file])
    return kept


def _digest(kept: list[list[Any]]) -> str:
    return sha256(repr(kept).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _mount(mount: SandboxMount) -> dict[str, Any]:
    source = mount.source
    arguments = mount._asdict()
    del arguments["optional"], arguments["movable"]
    if isinstance(source, Mount):
        arguments["source"] = tree_of(source)
    elif isinstance(source, bytes):
        arguments["source"] = binascii.b2a_base64(source).decode()
    elif source is not None:
        arguments["source"] = str(source)
    return arguments


def tree_of(mount: Mount) -> dict[str, Any]:
    """A mount as the arguments of `rootfs.detached`."""
    return {
        "type": mount.type,
        "lower": [str(path) for path in mount.lower],
        "upper": None if mount.upper is None else str(mount.upper),
        "work": None if mount.work is None else str(mount.work),
        "userxattr": mount.dialect == "user",
        "program": mount.program if mount.type == "overlay" else None,
    }


def mount_outside(steps: list[Operation]) -> list[int]:
    """Mount the trees that a program serves (fuse-overlayfs): it would run in the sandbox otherwise.

    The operations are changed to say which of the returned descriptors is theirs. Raises: OSError.
    """
    trees: list[int] = []
    for name, arguments in steps:
        tree = arguments if name == "root" else arguments.get("source") if name == "mount" else None
        if not isinstance(tree, dict) or not tree.get("program"):
            continue
        from builder.sandbox import rootfs

        if name == "root":
            fd, arguments["undo"] = rootfs.grow(**arguments)
        else:
            fd = rootfs.detached(**tree)
        tree["tree"] = len(trees)
        trees.append(fd)
    return trees
