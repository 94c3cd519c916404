"""The setup operations: what the child of the zygote does between its clone and its exec.

A sandbox is a list of operations, `[name, arguments]` as JSON carries them; `execute` runs one after
another and says which failed. They run in a fresh single-threaded process that is PID 1 of its own
PID namespace and has a private mount namespace. Every path of the image is resolved with the image
as its root (openat2, RESOLVE_IN_ROOT): links and `..` in it lead nowhere else.

Only `layers.linux`, `rootfs` and cheap parts of the stdlib are imported: the zygote lives on this module.
"""

from __future__ import annotations

import _socket as socket  # all of `socket` that is needed: see `channel`
import binascii
import contextlib
import errno
import fcntl
import json
import os
import resource
import stat
import struct
import sys
import time
from collections.abc import Callable

from builder.sandbox import cgroup, channel, rootfs, springboard
from layers import linux, ownership

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MNT_PRIVATE_FLAGS = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOEXEC
_MS_PRIVATE_FLAGS = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_DEV_LINKS = (
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
    ("core", "/proc/kcore"),
)
_STAGED = ("proc", "sys", "dev")
# Where nothing is bound from; /proc/sys is not there where only processes are shown.
_STAGES = ("/proc/sys", "/sys")
_SHM = "/dev/shm"  # noqa: S108 - the host's own
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


class SetupError(Exception):
    """An operation failed: its name, the errno, the path and the system's words."""

    def __init__(self, operation: str, number: int | None, path: str | None, words: str) -> None:
        super().__init__(words)
        self.operation = operation
        self.errno = number
        self.path = path
        self.words = words


class Sandbox:
    """What the operations share: the root's descriptor, compiled filters by number, where the zygote
    reads what it must undo, the gate that opens when the network is up, where a listener is handed over to who
    answers, and the springboard into the image."""

    def __init__(
        self, undo_fd: int = -1, programs: dict[int, bytes] | None = None, gate_fd: int = -1, handover_fd: int = -1
    ) -> None:
        self.root_fd = -1
        self.stage_fd = -1
        self.undo_fd = undo_fd
        self.gate_fd = gate_fd
        self.handover_fd = handover_fd
        self.supervised = False
        self.programs = programs or {}
        self.trees: list[int] = []
        self.joined: dict[str, int] = {}
        """Descriptors of the namespaces to join, and "shm" of what is mounted at /dev/shm there."""
        self.board: springboard.Springboard | None = None
        self.chrooted = False
        self.undo: list[dict[str, Any]] = []

    def with_tree(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a mount, with the descriptor where it was mounted outside."""
        number = arguments.get("tree")
        return arguments if number is None else {**arguments, "tree": self.trees[number]}

    def open(self, path: str, flags: int = os.O_PATH) -> int:
        """Open a path of the image. Raises: OSError."""
        return rootfs.open_in(self.root_fd, path, flags)

    def open_target(self, path: str, *, is_file: bool) -> int:
        """Open a mount point; one that is missing lies in a mount of ours and is made. Raises: OSError."""
        try:
            return self.open(path)
        except FileNotFoundError:
            parts, exists = rootfs.walk(self.root_fd, path)
            if not exists:
                rootfs.make_in(self.root_fd, parts, is_file=is_file)
            # Not by `path` again: a `..` in it may follow what does not exist.
            return self.open("/".join(parts))


def execute(sandbox: Sandbox, operations: list[list[Any]]) -> None:
    """Run the operations in order. Raises: SetupError naming the one that failed."""
    for name, arguments in operations:
        try:
            OPERATIONS[name](sandbox, **arguments)
        except OSError as e:
            path = e.filename if isinstance(e.filename, str) else None
            raise SetupError(name, e.errno, path, e.strerror or str(e)) from e


def _fd_path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _mount_fs(fstype: str, target_fd: int, flags: int, data: str = "") -> None:
    linux.mount(fstype, _fd_path(target_fd), fstype, flags, data or None)


def _attach(mount_fd: int, target_fd: int) -> None:
    linux.move_mount(mount_fd, "", target_fd, "", linux.MOVE_MOUNT_F_EMPTY_PATH | linux.MOVE_MOUNT_T_EMPTY_PATH)


def _bind(source: str, source_dirfd: int, target_fd: int, attributes: int, *, recursive: bool = False) -> None:
    """Bind `source` over the target, with mount attributes added. Raises: OSError."""
    deep = linux.AT_RECURSIVE if recursive else 0
    tree = linux.open_tree(
        source_dirfd,
        source,
        linux.OPEN_TREE_CLOEXEC | linux.OPEN_TREE_CLONE | deep | (0 if source else linux.AT_EMPTY_PATH),
    )
    try:
        if attributes:
            linux.mount_setattr(tree, "", linux.AT_EMPTY_PATH | deep, attr_set=attributes)
        _attach(tree, target_fd)
    finally:
        os.close(tree)


def trace(sandbox: Sandbox, operations: list[list[Any]]) -> list[tuple[str, float]]:
    """`execute` with a clock: (operation, seconds) for each, and the moment of the end as ("at", monotonic)."""
    spans = []
    for operation in operations:
        started = time.monotonic()
        execute(sandbox, [operation])
        spans.append((operation[0], time.monotonic() - started))
    return [*spans, ("at", time.monotonic())]


# ---- operations: namespaces -------------------------------------------------------------------


def op_cgroup(sandbox: Sandbox, directories: list[str], own: bool) -> None:
    """Enter the groups with the limits, and if `own` make them the roots of a cgroup namespace."""
    cgroup.join(directories)
    if own:
        linux.unshare(linux.CLONE_NEWCGROUP)


def op_join(sandbox: Sandbox, kinds: list[str]) -> None:
    """Enter namespaces of another container."""
    for kind in kinds:
        linux.setns(sandbox.joined[kind], linux.NAMESPACES[kind])


def op_sysctl(sandbox: Sandbox, values: list[list[str]]) -> None:
    """Set parameters of the namespaces, of which a process sees its own in every /proc."""
    for name, value in values:
        with open(f"/proc/sys/{name.replace('.', '/')}", "w", encoding="utf-8") as stream:
            stream.write(value)


def op_keyring(sandbox: Sandbox) -> None:
    """A session keyring of its own, so that the caller's keys are out of reach."""
    try:
        linux.join_session_keyring("_ses.pybuild")
    except OSError as e:
        # Without keys in the kernel there is none to hide; under a filter or a quota there is no
        # access to the caller's either, as Docker's profile refuses keyctl to the command.
        if e.errno not in {errno.ENOSYS, errno.EPERM, errno.EDQUOT}:
            raise


def op_hostname(sandbox: Sandbox, name: str, asked: bool) -> None:
    try:
        socket.sethostname(name)
    except PermissionError:
        # The filter of podman's containers, which allows all else in a user namespace, refuses this call.
        if asked:
            raise


def op_loopback(sandbox: Sandbox) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as s:
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def op_network(sandbox: Sandbox) -> None:
    """Wait until the helper outside has connected the private network."""
    from builder.sandbox import network

    network.pass_gate(sandbox.gate_fd)


# ---- operations: what does not depend on the image --------------------------------------------


def op_stage(sandbox: Sandbox, cgroup2: bool) -> None:
    """Mount /proc and /sys, and a place for /dev, out of everyone's way until there is a root to `place` them in."""
    # Both first: where they are the caller's own, the stage must not be seen in them.
    proc, sys = _proc(), _sys()
    fs = linux.fsopen("tmpfs")
    linux.fsconfig_set_string(fs, "mode", "755")
    linux.fsconfig_create(fs)
    stage = linux.fsmount(fs)
    os.close(fs)
    place = next(path for path in _STAGES if os.path.isdir(path))
    linux.move_mount(stage, "", linux.AT_FDCWD, place, linux.MOVE_MOUNT_F_EMPTY_PATH)
    sandbox.root_fd = sandbox.stage_fd = stage
    for name in _STAGED:
        os.mkdir(name, 0o755, dir_fd=stage)
    for name, tree in (("proc", proc), ("sys", sys)):
        target = sandbox.open(name)
        _attach(tree, target)
        os.close(target)
        os.close(tree)
    if cgroup2:
        with contextlib.suppress(PermissionError, FileNotFoundError):
            # Not by mount(2), which refuses it where the caller's /sys has the same there already.
            _attach(_fresh("cgroup2", _MNT_PRIVATE_FLAGS | linux.MOUNT_ATTR_RDONLY), sandbox.open("/sys/fs/cgroup"))


def _fresh(fstype: str, attributes: int) -> int:
    fs = linux.fsopen(fstype)
    try:
        linux.fsconfig_create(fs)
        return linux.fsmount(fs, attributes)
    finally:
        os.close(fs)


def _proc() -> int:
    """/proc of the sandbox's own PID namespace, else the caller's, as a detached mount."""
    try:
        return _fresh("proc", _MNT_PRIVATE_FLAGS)
    except PermissionError:
        # A user namespace inside a container whose own /proc is masked may not uncover it by a new one.
        return _clone_tree("/proc", _MNT_PRIVATE_FLAGS)


def _sys() -> int:
    """/sys, read-only: fresh where the network namespace is ours, else the caller's, as a detached mount."""
    attributes = _MNT_PRIVATE_FLAGS | linux.MOUNT_ATTR_RDONLY
    try:
        return _fresh("sysfs", attributes)
    except PermissionError:
        return _clone_tree("/sys", attributes)


def _clone_tree(path: str, attributes: int) -> int:
    flags = linux.OPEN_TREE_CLOEXEC | linux.OPEN_TREE_CLONE | linux.AT_RECURSIVE
    tree = linux.open_tree(linux.AT_FDCWD, path, flags)
    linux.mount_setattr(tree, "", linux.AT_EMPTY_PATH | linux.AT_RECURSIVE, attr_set=attributes)
    return tree


def op_dev(sandbox: Sandbox, shm_size_bytes: int, tty_gid: int | None, devices: list[str], ipc: str | None) -> None:
    """The runtime-spec's /dev. Nodes are binds of the host's on a nodev tmpfs: no other device opens.

    With the IPC namespace goes the memory that is shared by name: `ipc` "host" or "joined".
    """
    _mount_fs("tmpfs", sandbox.open("/dev"), linux.MS_NOSUID | linux.MS_NODEV, "mode=755,size=64k")
    dev = sandbox.open("/dev", os.O_RDONLY | os.O_DIRECTORY)
    place = _fd_path(dev)
    for name in _DEVICES:
        os.mknod(name, 0o644, dir_fd=dev)
        linux.mount(f"/dev/{name}", f"{place}/{name}", None, linux.MS_BIND)
    for path in devices:
        _device(dev, path)
    for link, destination in _DEV_LINKS:
        os.symlink(destination, link, dir_fd=dev)
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(name, 0o755, dir_fd=dev)
    gid = "" if tty_gid is None else f",gid={tty_gid}"
    linux.mount(
        "devpts",
        f"{place}/pts",
        "devpts",
        linux.MS_NOSUID | linux.MS_NOEXEC,
        f"newinstance,ptmxmode=0666,mode=0620{gid}",
    )
    if ipc is None:
        linux.mount("shm", f"{place}/shm", "tmpfs", _MS_PRIVATE_FLAGS, f"mode=1777,size={shm_size_bytes}")
    else:
        target = rootfs.open_in(dev, "shm")
        tree = _clone_tree(_SHM, _MNT_PRIVATE_FLAGS) if ipc == "host" else sandbox.joined["shm"]
        _attach(tree, target)
        os.close(tree)
        os.close(target)
    try:
        linux.mount("mqueue", f"{place}/mqueue", "mqueue", _MS_PRIVATE_FLAGS)
    except OSError:
        # Kernels without POSIX message queues; or they are those of the host's, which root in a user namespace
        # may not mount, but bind.
        if ipc == "host" and os.path.ismount("/dev/mqueue"):
            linux.mount("/dev/mqueue", f"{place}/mqueue", None, linux.MS_BIND)


def _device(dev: int, text: str) -> None:
    """One more of the host's nodes, or a directory of them; perhaps by another name. Raises: OSError."""
    path, _, other = text.partition(":")
    name = (other or path).removeprefix("/dev/")
    rootfs.make_in(
        dev, [part for part in name.split("/") if part not in {"", ".", ".."}], is_file=not os.path.isdir(path)
    )
    target = rootfs.open_in(dev, name)
    try:
        _bind(path, linux.AT_FDCWD, target, linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NOEXEC, recursive=True)
    finally:
        os.close(target)


def op_mask(sandbox: Sandbox, paths: list[str]) -> None:
    """Hide files behind /dev/null and directories behind an empty read-only tmpfs, as runc does."""
    null = _fd_path(sandbox.open("/dev/null"))
    for path in paths:
        try:
            fd = sandbox.open(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            _mount_fs("tmpfs", fd, _MS_PRIVATE_FLAGS | linux.MS_RDONLY, "size=0,mode=755")
        else:
            linux.mount(null, _fd_path(fd), None, linux.MS_BIND)
        os.close(fd)


def op_readonly(sandbox: Sandbox, paths: list[str]) -> None:
    for path in paths:
        try:
            fd = sandbox.open(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        _bind("", fd, fd, _MNT_PRIVATE_FLAGS | linux.MOUNT_ATTR_RDONLY)
        os.close(fd)


# ---- operations: the root and its mounts ------------------------------------------------------


def op_root(sandbox: Sandbox, **arguments: Any) -> None:
    """Mount the root file system privately, with every mount point that it lacks."""
    root = rootfs.mount_root(**sandbox.with_tree(arguments))
    sandbox.root_fd, sandbox.undo = root.fd, root.undo
    if root.undo and sandbox.undo_fd >= 0:
        os.write(sandbox.undo_fd, json.dumps(root.undo).encode())


def op_place(sandbox: Sandbox) -> None:
    """Move what was staged into the root."""
    for name in _STAGED:
        target = sandbox.open_target(f"/{name}", is_file=False)
        tree = rootfs.open_in(sandbox.stage_fd, name)
        _attach(tree, target)
        os.close(tree)
        os.close(target)


def op_readonly_root(sandbox: Sandbox) -> None:
    linux.mount_setattr(sandbox.root_fd, "", linux.AT_EMPTY_PATH, attr_set=linux.MOUNT_ATTR_RDONLY)


def op_mount(
    sandbox: Sandbox,
    kind: str,
    target: str,
    source: Any,
    readonly: bool,
    mode: int | None,
    uid: int,
    gid: int,
    size_bytes: int | None,
    is_file: bool,
    noexec: bool,
    recursive: bool,
    subpath: str,
) -> None:
    """One mount of the spec."""
    attributes = linux.MOUNT_ATTR_NODEV | (linux.MOUNT_ATTR_NOSUID if kind != "tree" else 0)
    attributes |= linux.MOUNT_ATTR_RDONLY if readonly else 0
    attributes |= linux.MOUNT_ATTR_NOEXEC if noexec else 0
    fd = sandbox.open_target(target, is_file=is_file or kind == "file")
    try:
        if kind == "bind":
            _bind(source, linux.AT_FDCWD, fd, attributes, recursive=recursive)
        elif kind == "tmpfs":
            _tmpfs(fd, attributes, 0o1777 if mode is None else mode, uid, gid, size_bytes)
        elif kind == "tree":
            _tree(sandbox, fd, source, subpath, attributes)
        else:
            _file(sandbox, fd, binascii.a2b_base64(source), attributes, 0o400 if mode is None else mode, uid, gid)
    except OSError as e:
        if not e.filename:
            e.filename = target
        raise
    finally:
        os.close(fd)


def _tree(sandbox: Sandbox, target_fd: int, source: dict[str, Any], subpath: str, attributes: int) -> None:
    """Bind a part of another tree over the target. Raises: OSError."""
    tree = rootfs.detached(**sandbox.with_tree(source))
    # Kernels before 6.15 bind no part of a mount that is attached nowhere: it gets a place for the while.
    dev = sandbox.open("/dev")
    place = f"{_fd_path(dev)}/.tree"
    os.mkdir(place, 0o700)
    try:
        linux.move_mount(tree, "", linux.AT_FDCWD, place, linux.MOVE_MOUNT_F_EMPTY_PATH)
        try:
            part = rootfs.open_in(tree, subpath)
            try:
                _bind("", part, target_fd, attributes)
            finally:
                os.close(part)
        finally:
            linux.umount2(place, linux.MNT_DETACH)
    finally:
        os.rmdir(place)
        os.close(dev)
        os.close(tree)


def _tmpfs(target_fd: int, attributes: int, mode: int, uid: int, gid: int, size_bytes: int | None) -> None:
    fs = linux.fsopen("tmpfs")
    linux.fsconfig_set_string(fs, "mode", f"{mode:o}")
    recorded = (uid or gid) and ownership.here().recording
    if (uid or gid) and not recorded:
        linux.fsconfig_set_string(fs, "uid", str(uid))
        linux.fsconfig_set_string(fs, "gid", str(gid))
    if size_bytes is not None:
        linux.fsconfig_set_string(fs, "size", str(size_bytes))
    linux.fsconfig_create(fs)
    tree = linux.fsmount(fs, attributes)
    if recorded:
        top = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=tree)
        _own(top, uid, gid)
        os.close(top)
    _attach(tree, target_fd)
    os.close(tree)
    os.close(fs)


def _own(fd: int, uid: int, gid: int) -> None:
    """Give something on a tmpfs an owner; before Linux 6.6 there is no place for the record of one."""
    try:
        ownership.here().fchown(fd, uid, gid)
    except OSError as e:
        if e.errno != errno.ENOTSUP:
            raise


def _file(sandbox: Sandbox, target_fd: int, content: bytes, attributes: int, mode: int, uid: int, gid: int) -> None:
    """Bind a file that exists in memory alone: made on the sandbox's own /dev, bound, unlinked."""
    dev = sandbox.open("/dev", os.O_RDONLY | os.O_DIRECTORY)
    name = ".pybuild"
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=dev)
    left = memoryview(content)
    while left:
        left = left[os.write(fd, left) :]
    if uid or gid:
        _own(fd, uid, gid)
    os.fchmod(fd, mode)
    os.close(fd)
    _bind(name, dev, target_fd, attributes)
    os.unlink(name, dir_fd=dev)
    os.close(dev)


def op_enter(sandbox: Sandbox, isolation: str) -> None:
    """Make the root the only file system in sight."""
    forget_modules()
    os.fchdir(sandbox.root_fd)
    if isolation != "chroot":
        try:
            linux.pivot_root(".", ".")
        except OSError as e:
            # EINVAL: the current root is the initramfs, which cannot be moved. EPERM: a filter.
            if isolation == "pivot" or e.errno not in {errno.EINVAL, errno.EPERM, errno.ENOSYS}:
                raise
        else:
            linux.umount2(".", linux.MNT_DETACH)
            os.chdir("/")
            return
        # Over the old root, so that there is nothing to come back to for whoever leaves a chroot.
        with contextlib.suppress(OSError):
            linux.move_mount(sandbox.root_fd, "", linux.AT_FDCWD, "/", linux.MOVE_MOUNT_F_EMPTY_PATH)
    sandbox.chrooted = True
    os.chroot(".")
    os.chdir("/")


def forget_modules() -> None:
    """From here on Python finds no module but those it has: what is in sight next are an image's, and we its root."""
    sys.meta_path.clear()
    sys.path.clear()


def op_chroot(sandbox: Sandbox) -> None:
    """Enter the root where nothing can be mounted."""
    forget_modules()
    sandbox.chrooted = True
    os.fchdir(sandbox.root_fd)
    os.chroot(".")
    os.chdir("/")


# ---- operations: the process ------------------------------------------------------------------


def op_limits(sandbox: Sandbox, umask: int, rlimits: list[list[Any]], oom_score_adj: int | None) -> None:
    os.umask(umask)
    for name, soft, hard in rlimits:
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (soft, hard))
        except (ValueError, OSError) as e:
            # Root in a container often lacks CAP_SYS_RESOURCE, and then no hard limit goes up.
            raise OSError(errno.EPERM, f"setrlimit: {e}", name) from e
    if oom_score_adj is not None:
        with open("/proc/self/oom_score_adj", "w") as stream:
            stream.write(str(oom_score_adj))


def op_supervise(sandbox: Sandbox, program: int, uid: int, gid: int, groups: list[int], capabilities: int) -> None:
    """From here on the supervisor answers what a single id cannot; while there is CAP_SYS_ADMIN for it."""
    listener = linux.seccomp_listener(sandbox.programs[program])
    sandbox.supervised = True
    with contextlib.closing(socket.socket(fileno=sandbox.handover_fd)) as handover:
        channel.send(handover, json.dumps([uid, gid, groups, capabilities]).encode(), [listener])
        os.close(listener)  # before the answer: of a supervisor that has died nobody would wait for one
        number, _, words = handover.recv(1024).decode(errors="replace").partition(" ")
    if number != "ready":
        raise OSError(int(number or errno.ECHILD), words or "who answers for missing ids has died")


def op_nodes(sandbox: Sandbox, program: int) -> None:
    """From here on somebody is asked for devices; while there is CAP_SYS_ADMIN for it. Idempotent."""
    if sandbox.handover_fd < 0:
        return
    with contextlib.closing(socket.socket(fileno=sandbox.handover_fd)) as handover:
        sandbox.handover_fd = -1
        try:
            listener = linux.seccomp_listener(sandbox.programs[program])
        except OSError:
            return  # under a filter with a listener there is no other: that one answers, or the kernel refuses
        channel.send(handover, b"listener", [listener])
        os.close(listener)


def op_identity(
    sandbox: Sandbox,
    uid: int,
    gid: int,
    groups: list[int] | None,
    capabilities: int,
    no_new_privs: bool,
    seccomp: int | None,
) -> None:
    """Filter, capabilities and ids, in runc's order. Where it is supervised all ids but 0 are the supervisor's.

    Without no_new_privs a filter needs CAP_SYS_ADMIN, and so it comes first; with it, last.
    """
    for fd in (0, 1, 2):
        # A pipe belongs to who made it: an unprivileged command could not reopen /dev/stdout.
        if uid and stat.S_ISFIFO(os.fstat(fd).st_mode):
            with contextlib.suppress(PermissionError):
                os.fchown(fd, uid, -1)
    if sandbox.chrooted:
        # Whoever may chroot(2) can leave a chroot.
        capabilities &= ~(1 << linux.CAPABILITIES.index("SYS_CHROOT"))
    program = None if seccomp is None else sandbox.programs[seccomp]
    if no_new_privs:
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    elif program is not None:
        linux.seccomp_filter(program)
    for number in range(len(linux.CAPABILITIES)):
        if not capabilities >> number & 1:
            try:
                linux.prctl(linux.PR_CAPBSET_DROP, number)
            except OSError as e:
                # Newer than the kernel; or root in a container that has not CAP_SETPCAP itself.
                if e.errno != errno.EINVAL and not (sandbox.chrooted and e.errno == errno.EPERM):
                    raise
    linux.prctl(linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_CLEAR_ALL)
    if groups is not None:
        os.setgroups(groups)
    if not sandbox.supervised:
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    kept = 0 if uid else capabilities & linux.capget()[1]
    linux.capset(kept, kept, 0)
    if no_new_privs and program is not None:
        linux.seccomp_filter(program)


def op_workdir(sandbox: Sandbox, path: str, owner: list[int] | None) -> None:
    """The working directory is there when the command starts, although a step before removed it."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(path)
        return
    root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    rootfs.make_workdir(root_fd, path, owner)
    os.close(root_fd)


def op_cwd(sandbox: Sandbox, path: str) -> None:
    os.chdir(path)


OPERATIONS: dict[str, Callable[..., None]] = {
    name.removeprefix("op_"): function for name, function in list(globals().items()) if name.startswith("op_")
}


def become(args: list[str], environment: dict[str, str], board: springboard.Springboard | None = None) -> int:
    """execve(2) the command, found on its own PATH; on failure say why on stderr as a shell does.

    Returns only on failure: 127 where nothing was found, 126 where it cannot be run. Raises: SetupError.
    """
    name = args[0]
    try:
        path = _find(name, environment)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.write(2, os.fsencode(f"{name}: {e.strerror}\n"))
        return 127 if e.errno in {errno.ENOENT, errno.ENOTDIR} else 126
    try:
        (board or springboard.prepare()).jump(path, args, environment)
    except OSError as e:
        raise SetupError("exec", e.errno, None, e.strerror or str(e)) from e
    return 126


def _find(name: str, environment: dict[str, str]) -> str:
    """Where a command is, as a shell looks for it. Raises: OSError with words for people."""
    failure = OSError(errno.ENOENT, "not found")
    directories = [""] if "/" in name else environment.get("PATH", "/usr/bin:/bin").split(":")
    for directory in directories:
        path = name if "/" in name else os.path.join(directory or ".", name)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as e:
            failure = e
            continue
        if stat.S_ISREG(status.st_mode) and os.access(path, os.X_OK):
            return path
        failure = OSError(errno.EACCES, os.strerror(errno.EACCES))
    raise failure
