"""What this machine allows: each tier of isolation tried for real, for `pybuild doctor`.

A tier is tried in a forked child, on throw-away mounts, so that nothing of the caller changes. What
fails is named with the command that would grant it. Nothing is decided here; `userns.enter` and the
launcher find out by doing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from builder.sandbox import cgroup, rootfs, userns
from layers import linux

TierName = Literal["root", "subordinate", "single", "chroot", "oci"]
RUNTIMES = ("runc", "crun", "runsc", "kata-runtime", "youki")


class TierReport(NamedTuple):
    """One tier: whether it works here, else what is missing and what would grant it."""

    tier: TierName
    title: str
    works: bool
    missing: str | None = None
    grant: str | None = None


class Fact(NamedTuple):
    """Something of the machine that an option depends on."""

    name: str
    works: bool
    detail: str
    grant: str | None = None


class Report(NamedTuple):
    """The whole ladder, best tier first, and `chosen`: the one that a build would take."""

    tiers: tuple[TierReport, ...]
    facts: tuple[Fact, ...]

    @property
    def chosen(self) -> TierReport | None:
        """The first tier that works of those that pybuild takes by itself."""
        return next((tier for tier in self.tiers if tier.works and tier.tier != "oci"), None)


def probe(directory: Path | None = None) -> Report:
    """Try every tier; `directory` is where the store is, whose file system must bear an overlay.

    Takes some 50 ms. Raises: nothing; what cannot be tried is reported as missing.
    """
    where = None if directory is None else str(directory)
    return Report(
        (_root(where), _subordinate(where), _single(where), _chroot(), _oci()),
        (_filters(), _security_module(), _storage(where), _nodes(), *_limits(), *_networks(), _kernel()),
    )


def _root(directory: str | None) -> TierReport:
    title = "root: all namespaces, kernel overlay"
    if os.geteuid() != 0:
        return TierReport("root", title, False, "pybuild does not run as root", "sudo pybuild …")
    if not userns.has_powers():
        return TierReport(
            "root",
            title,
            False,
            "root without CAP_SYS_ADMIN: a container's default",
            "docker run --cap-add SYS_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined …",
        )
    return _tried("root", title, lambda: _try_namespaces(directory))


def _subordinate(directory: str | None) -> TierReport:
    title = "rootless with subordinate ids: all namespaces, kernel overlay in a user namespace, devices recorded"
    if os.geteuid() == 0 and userns.has_powers():
        return TierReport("subordinate", title, False, "not needed: pybuild runs as root", None)
    uids, gids, note = userns.subordinate_ids(os.geteuid())
    if note or not uids or not gids:
        words, _, command = (note or "no subordinate ids").partition(" (")
        return TierReport("subordinate", title, False, words, command.removesuffix(")") or None)

    def attempt() -> str | None:
        identity = userns.enter()
        if identity.tier != "subordinate":
            grant = "run without no_new_privs (Kubernetes: allowPrivilegeEscalation: true)"
            return f"newuidmap failed: {identity.note}\n{grant}"
        return _try_namespaces(directory)

    return _tried("subordinate", title, attempt)


def _single(directory: str | None) -> TierReport:
    title = "rootless with a single id: all namespaces, kernel overlay, owners and devices recorded by a supervisor"
    if os.geteuid() == 0 and userns.has_powers():
        return TierReport("single", title, False, "not needed: pybuild runs as root", None)

    if userns.chroot_only():
        return TierReport("single", title, False, "not needed: a chroot keeps true owners", None)

    def attempt() -> str | None:
        userns.enter(subordinate=False)
        return _try_namespaces(directory) or _try_listener("supervised_program")

    return _tried("single", title, attempt)


def _chroot() -> TierReport:
    title = "chroot: root of an unprivileged container; no namespaces, no mounts, no filter but the container's"
    needed = ("SYS_CHROOT", "CHOWN", "SETUID", "SETGID", "MKNOD")
    held = linux.capget()[0]
    absent = [name for name in needed if not held >> linux.CAPABILITIES.index(name) & 1]
    if os.geteuid() != 0 or absent:
        missing = f"capabilities {', '.join(absent)}" if absent else "root"
        return TierReport("chroot", title, False, missing, "docker run --user 0 (with Docker's default capabilities)")
    return _tried("chroot", title, lambda: os.chroot("/"))


def _oci() -> TierReport:
    title = "oci: the sandbox handed to an OCI runtime"
    found = [name for name in RUNTIMES if userns.find_program(name)]
    if not found:
        return TierReport("oci", title, False, f"none of {', '.join(RUNTIMES)} is installed", "apt install runc")
    title = f"{title} ({', '.join(found)})"
    if userns.has_powers():
        return TierReport("oci", title, True)

    def attempt() -> str | None:
        return None if userns.enter().tier == "subordinate" else "as an ordinary user it needs subordinate ids"

    return _tried("oci", title, attempt)


def _tried(tier: TierName, title: str, function: Callable[[], str | None]) -> TierReport:
    words = userns.in_child(function)
    if words is None:
        return TierReport(tier, title, True)
    missing, _, grant = words.partition("\n")
    return TierReport(tier, title, False, missing, grant or None)


def _try_namespaces(directory: str | None) -> str | None:
    """Clone into all namespaces, and mount and pivot there. Returns what failed first. Raises: OSError."""
    return _in_directory(directory, _try_clone)


def _in_directory(directory: str | None, function: Callable[[str], str | None]) -> str | None:
    """Call it with a directory that holds what an overlay needs, and is removed again. Raises: OSError."""
    usable = directory is not None and os.access(directory, os.W_OK)
    base = f"{directory if usable else '/dev/shm'}/.probe-{os.urandom(6).hex()}"  # noqa: S108 - random and exclusive
    os.mkdir(base, 0o700)
    try:
        for name in ("lower", "lower/proc", "upper", "work"):
            os.mkdir(f"{base}/{name}")
        return function(base)
    finally:
        import shutil

        shutil.rmtree(base, ignore_errors=True)


def _try_listener(filter: Literal["supervised_program", "nodes_program"]) -> str | None:
    """Install the filter. To be called last, and in a child: nobody answers what it asks. Raises: SandboxError."""
    from builder.sandbox import seccomp

    try:
        linux.seccomp_listener(getattr(seccomp, filter)(linux.machine()))
    except OSError as e:
        grant = "start pybuild under no filter that has a supervisor, and on Linux 5.0 or newer"
        return f"seccomp's user notification: {e.strerror}\n{grant}"
    return None


def _try_clone(base: str) -> str | None:
    flags = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS | linux.CLONE_NEWCGROUP
    read, write = os.pipe()
    try:
        pid, pidfd = linux.clone(flags | linux.CLONE_NEWNET)
    except OSError as e:
        os.close(read)
        os.close(write)
        return f"{e.strerror}\na seccomp filter or security module refuses clone with namespace flags"
    if pid == 0:
        try:
            _try_mounts(base)
        except BaseException as e:  # noqa: BLE001 - the process boundary
            os.write(write, f"{e}".encode(errors="replace"))
        finally:
            os._exit(0)
    os.close(pidfd)
    os.close(write)
    with open(read, "rb") as stream:
        words = stream.read().decode(errors="replace")
    os.waitpid(pid, 0)
    return words or None


def _try_mounts(base: str) -> None:
    """A root, /proc and pivot_root, in a mount namespace of our own. Raises: OSError."""
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
    tree = linux.open_tree(linux.AT_FDCWD, f"{base}/lower", linux.OPEN_TREE_CLONE | linux.OPEN_TREE_CLOEXEC)
    linux.move_mount(tree, "", linux.AT_FDCWD, base, linux.MOVE_MOUNT_F_EMPTY_PATH)
    with contextlib.suppress(PermissionError):  # where the caller's is masked, that one is shown again
        linux.mount("proc", f"/proc/self/fd/{tree}/proc", "proc")
    os.fchdir(tree)
    linux.pivot_root(".", ".")
    linux.umount2(".", linux.MNT_DETACH)


def _filters() -> Fact:
    status = _read("/proc/self/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    filtered = fields.get("Seccomp", "0").strip() == "2"
    locked = fields.get("NoNewPrivs", "0").strip() == "1"
    words = [text for text, holds in (("a seccomp filter", filtered), ("no_new_privs", locked)) if holds]
    if not words:
        return Fact("restrictions", True, "this process has no seccomp filter and no no_new_privs")
    return Fact("restrictions", False, f"this process has {' and '.join(words)}", "--security-opt seccomp=unconfined")


def _security_module() -> Fact:
    modules = _read("/sys/kernel/security/lsm").strip()
    if _read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").strip() == "1":
        return Fact(
            "user namespaces",
            False,
            "AppArmor restricts those of ordinary users",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        )
    return Fact("security modules", True, modules or "none known")


def _storage(directory: str | None) -> Fact:
    """How layers are stacked where the store is."""

    def attempt() -> str | None:
        if not userns.has_powers():
            userns.enter()
        return _in_directory(directory, _stack)

    words = userns.in_child(attempt) if not userns.chroot_only() else "nothing can be mounted here"
    driver = {None: "overlay, by the kernel", rootfs.FUSE: "overlay, by fuse-overlayfs"}.get(words)
    if driver is not None:
        return Fact("storage", True, driver)
    grant = "a store on ext4, xfs or btrfs (--root DIR; in a container, a volume), or apt install fuse-overlayfs"
    return Fact("storage", False, f"each step copies its tree, as no overlay can be had: {words}", grant)


def _stack(base: str) -> str | None:
    """Mount an overlay as the store would. Returns None, or `rootfs.FUSE`. Raises: OSError."""
    userxattr = userns.current().dialect == "user"
    arguments: dict[str, Any] = {"lower": [f"{base}/lower"], "upper": f"{base}/upper", "work": f"{base}/work"}
    try:
        os.close(rootfs.detached(type="overlay", userxattr=userxattr, **arguments))
    except OSError:
        program = rootfs.fuse_program()
        if program is None:
            raise
        os.close(rootfs.detached(type="overlay", userxattr=userxattr, program=program, **arguments))
        return rootfs.FUSE
    return None


def _nodes() -> Fact:
    """What RUN mknod of a device comes to."""
    outermost = userns.current().tier == "root"
    if outermost and (userns.has_powers() or userns.chroot_only()):
        return Fact("device nodes", True, "RUN makes them")
    if userns.chroot_only():
        return Fact("device nodes", False, "no user namespace makes any, and in a chroot nobody records them")

    def attempt() -> str | None:
        userns.enter()
        return _try_listener("nodes_program")

    words = userns.in_child(attempt)
    if words is None:
        return Fact("device nodes", True, "RUN mknod makes an empty file, for which a layer has the device")
    missing, _, grant = words.partition("\n")
    return Fact("device nodes", False, f"RUN mknod of them is refused: {missing}", grant or None)


def _limits() -> list[Fact]:
    found = cgroup.detect()
    facts = []
    for controller in ("memory", "cpu", "pids", "cpuset"):
        hierarchy = next((h for h in sorted(found, key=lambda h: h.version) if controller in h.controllers), None)
        if hierarchy is None:
            facts.append(Fact(f"limit {controller}", False, "no cgroup hierarchy has this controller"))
        elif not cgroup.writable(hierarchy):
            grant = "systemd-run --user --scope -p Delegate=yes pybuild …" if hierarchy.version == 2 else "run as root"
            facts.append(Fact(f"limit {controller}", False, f"{hierarchy.own} is not ours to write", grant))
        elif mend := cgroup.undelegated(hierarchy, controller):
            facts.append(Fact(f"limit {controller}", False, "this controller is not delegated to us", mend))
        else:
            facts.append(Fact(f"limit {controller}", True, f"cgroup v{hierarchy.version}"))
    return facts


def _networks() -> list[Fact]:
    facts = [Fact("network host, none", True, "always")]
    if os.geteuid() == 0 and userns.has_powers():
        tool = next((name for name in ("nft", "iptables") if userns.find_program(name)), None)
        detail = f"veth and NAT by {tool}" if tool else "neither nft nor iptables is installed"
        facts.append(Fact("network private", tool is not None, detail, None if tool else "apt install nftables"))
        return facts
    if userns.chroot_only():
        words = "isolation chroot has no namespaces"
        return [Fact("network host", True, "always"), Fact("network none, private", False, words)]
    tool = next((name for name in ("pasta", "slirp4netns") if userns.find_program(name)), None)
    if tool is None:
        facts.append(Fact("network private", False, "neither pasta nor slirp4netns is installed", "apt install passt"))
    elif not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        facts.append(Fact("network private", False, "/dev/net/tun cannot be opened", "chmod 666 /dev/net/tun"))
    else:
        facts.append(Fact("network private", True, tool))
    return facts


def _kernel() -> Fact:
    release = os.uname().release
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in release.split(".")[:2])
    return Fact(
        "kernel", (major, minor) >= (5, 12), f"Linux {release}", None if (major, minor) >= (5, 12) else "5.12 or newer"
    )


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""
