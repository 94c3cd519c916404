"""The Linux system calls that the standard library lacks: the one room that imports ctypes.

Each wrapper is a few lines, keeps the kernel's spelling of flags, and raises an `OSError` that
names its call and path. Nothing here decides anything; policy lives with the callers
(`layers.apply`, `layers.snapshotters`, `builder.sandbox`). Only the stdlib is imported, cheaply:
the sandbox's zygote lives on this module.

Manual pages: mount_setattr(2), fsopen(2), openat2(2), pivot_root(2), prctl(2), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import errno as errno_
import os
import struct
from collections.abc import Callable, Iterable
from functools import cache

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

# mount(2)
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_NOATIME = 1024
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_RELATIME = 1 << 21
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# fsopen(2) family: the same numbers on every architecture, as all calls added after Linux 5.0
_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_PIDFD_SEND_SIGNAL = 424
_NR_PIDFD_OPEN = 434
_NR_CLONE3 = 435
_NR_CLOSE_RANGE = 436
_NR_OPENAT2 = 437
_NR_MOUNT_SETATTR = 442

# Older calls are numbered per architecture; libc has no wrapper for these
_NR_OF = {
    "x86_64": {"clone": 56, "capset": 126, "capget": 125, "keyctl": 250, "seccomp": 317, "statx": 332},
    "aarch64": {"clone": 220, "capset": 91, "capget": 90, "keyctl": 219, "seccomp": 277, "statx": 291},
}

FSOPEN_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
FSMOUNT_CLOEXEC = 1
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_NOSYMFOLLOW = 0x200000
MOUNT_ATTR_IDMAP = 0x100000
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100

# openat2(2)
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# renameat2(2)
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

# unshare(2), setns(2)
CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

CLONE_PIDFD = 0x00001000
_SIGCHLD = 17
CLONE_INTO_CGROUP = 0x200000000

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
PR_SET_KEEPCAPS = 8

# seccomp(2)
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_LOG = 2
SECCOMP_FILTER_FLAG_SPEC_ALLOW = 4
SECCOMP_FILTER_FLAG_NEW_LISTENER = 8
SECCOMP_FILTER_FLAG_WAIT_KILLABLE = 32

# keyctl(2)
KEYCTL_JOIN_SESSION_KEYRING = 1

FICLONE = 0x40049409

_CAPABILITY_NAMES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE "
    "NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT "
    "SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE "
    "AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ "
    "PERFMON BPF CHECKPOINT_RESTORE"
)
CAPABILITIES = tuple(_CAPABILITY_NAMES.split())
"""Capabilities by number, without their CAP_ prefix (capabilities(7))."""

Path = str | bytes


# A clone must keep the interpreter's lock, or its child would wait for a thread that it does not have.
_syscall_locked = ctypes.PyDLL(None, use_errno=True).syscall
_syscall_locked.restype = ctypes.c_long
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


def _fail(call: str, path: object = None) -> OSError:
    number = ctypes.get_errno()
    shown = os.fsdecode(path) if isinstance(path, (str, bytes)) else None
    return OSError(number, f"{call}: {os.strerror(number)}", shown)


def _bytes(path: Path | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def mount(source: Path | None, target: Path, fstype: str | None, flags: int = 0, data: Path | None = None) -> None:
    """mount(2). Raises: OSError naming `target`."""
    fs = None if fstype is None else fstype.encode()
    if _libc.mount(_bytes(source), _bytes(target), fs, ctypes.c_ulong(flags), _bytes(data)) != 0:
        raise _fail(f"mount({fstype or 'bind'})", target)


def umount2(target: Path, flags: int = 0) -> None:
    """umount2(2). Raises: OSError naming `target`."""
    if _libc.umount2(_bytes(target), flags) != 0:
        raise _fail("umount2", target)


def pivot_root(new_root: Path, put_old: Path) -> None:
    """pivot_root(2). Raises: OSError naming `new_root`."""
    if _libc.pivot_root(_bytes(new_root), _bytes(put_old)) != 0:
        raise _fail("pivot_root", new_root)


NAMESPACES = {
    "net": CLONE_NEWNET,
    "ipc": CLONE_NEWIPC,
    "uts": CLONE_NEWUTS,
    "cgroup": CLONE_NEWCGROUP,
    "pid": CLONE_NEWPID,
    "mnt": CLONE_NEWNS,
}
"""By their names in /proc/PID/ns, in the order in which they can be joined: with the mounts goes the root."""


def unshare(flags: int) -> None:
    """unshare(2). Raises: OSError; EINVAL for CLONE_NEWUSER in a process with threads."""
    if _libc.unshare(flags) != 0:
        raise _fail(f"unshare({flags:#x})")


def setns(fd: int, flags: int = 0) -> None:
    """setns(2). Raises: OSError."""
    if _libc.setns(fd, flags) != 0:
        raise _fail("setns")


def fsopen(fstype: str) -> int:
    """fsopen(2): a context for a new file system, as a descriptor. Raises: OSError."""
    fd = int(_syscall(_NR_FSOPEN, ctypes.c_char_p(fstype.encode()), FSOPEN_CLOEXEC))
    if fd < 0:
        raise _fail("fsopen", fstype)
    return fd


def fsconfig_set_string(fd: int, key: str, value: Path) -> None:
    """fsconfig(2), FSCONFIG_SET_STRING. `value` holds at most 255 bytes. Raises: OSError with the kernel's words."""
    if _syscall(_NR_FSCONFIG, fd, FSCONFIG_SET_STRING, key.encode(), _bytes(value), 0) != 0:
        raise _fs_fail(fd, f"fsconfig({key})", value)


def fsconfig_set_flag(fd: int, key: str) -> None:
    """fsconfig(2), FSCONFIG_SET_FLAG. Raises: OSError with the kernel's words."""
    if _syscall(_NR_FSCONFIG, fd, FSCONFIG_SET_FLAG, key.encode(), None, 0) != 0:
        raise _fs_fail(fd, f"fsconfig({key})", None)


def fsconfig_create(fd: int) -> None:
    """fsconfig(2), FSCONFIG_CMD_CREATE. Raises: OSError with the kernel's words."""
    if _syscall(_NR_FSCONFIG, fd, FSCONFIG_CMD_CREATE, None, None, 0) != 0:
        raise _fs_fail(fd, "fsconfig(create)", None)


def fsmount(fd: int, attributes: int = 0) -> int:
    """fsmount(2): a detached mount, usable as a dirfd; it goes with its last descriptor. Raises: OSError."""
    mnt = int(_syscall(_NR_FSMOUNT, fd, FSMOUNT_CLOEXEC, attributes))
    if mnt < 0:
        raise _fs_fail(fd, "fsmount", None)
    return mnt


def _fs_fail(fd: int, call: str, path: Path | None) -> OSError:
    """An OSError that carries what the kernel logged into the context."""
    error = _fail(call, path)
    try:
        words = os.read(fd, 4096).decode(errors="replace").strip()
    except OSError:
        return error
    return OSError(error.errno, f"{error.strerror} ({words})", error.filename)


def move_mount(from_fd: int, from_path: Path, to_fd: int, to_path: Path, flags: int = 0) -> None:
    """move_mount(2). Raises: OSError naming `to_path`."""
    if _syscall(_NR_MOVE_MOUNT, from_fd, _bytes(from_path), to_fd, _bytes(to_path), flags) != 0:
        raise _fail("move_mount", to_path)


def open_tree(dirfd: int, path: Path, flags: int = OPEN_TREE_CLOEXEC) -> int:
    """open_tree(2). With OPEN_TREE_CLONE, a detached bind mount. Raises: OSError naming `path`."""
    fd = int(_syscall(_NR_OPEN_TREE, dirfd, _bytes(path), ctypes.c_uint(flags)))
    if fd < 0:
        raise _fail("open_tree", path)
    return fd


def mount_setattr(
    dirfd: int,
    path: Path,
    flags: int = 0,
    *,
    attr_set: int = 0,
    attr_clr: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
) -> None:
    """mount_setattr(2). Raises: OSError naming `path`."""
    attr = struct.pack("=QQQQ", attr_set, attr_clr, propagation, userns_fd)
    if _syscall(_NR_MOUNT_SETATTR, dirfd, _bytes(path), flags, attr, ctypes.c_size_t(len(attr))) != 0:
        raise _fail("mount_setattr", path)


def openat2(dirfd: int, path: Path, flags: int, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """openat2(2), O_CLOEXEC always set; retried while a concurrent rename makes it EAGAIN.

    Raises: OSError naming `path`; ELOOP or EXDEV where `resolve` forbids what was met.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(128):
        fd = int(_syscall(_NR_OPENAT2, dirfd, _bytes(path), how, ctypes.c_size_t(len(how))))
        if fd >= 0:
            return fd
        if ctypes.get_errno() != errno_.EAGAIN:
            break
    raise _fail("openat2", path)


def renameat2(old_dirfd: int, old: Path, new_dirfd: int, new: Path, flags: int = 0) -> None:
    """renameat2(2). Raises: OSError naming `new`."""
    if _libc.renameat2(old_dirfd, _bytes(old), new_dirfd, _bytes(new), ctypes.c_uint(flags)) != 0:
        raise _fail("renameat2", new)


def syncfs(fd: int) -> None:
    """syncfs(2): the whole file system that holds `fd`. Raises: OSError."""
    if _libc.syncfs(fd) != 0:
        raise _fail("syncfs")


CLOSE_RANGE_CLOEXEC = 4


def close_range(first: int, last: int = 0xFFFFFFFF, flags: int = 0) -> None:
    """close_range(2). Raises: OSError (ENOSYS before Linux 5.9)."""
    if _syscall(_NR_CLOSE_RANGE, ctypes.c_uint(first), ctypes.c_uint(last), flags) != 0:
        raise _fail("close_range")


def close_all_but(keep: Iterable[int], first: int = 3) -> None:
    """Close the descriptors from `first` on, except these. Raises: OSError (ENOSYS before Linux 5.9)."""
    for fd in sorted(keep):
        if fd > first:
            close_range(first, fd - 1)
        first = max(first, fd + 1)
    close_range(first)


def fsmount_overlay(
    lower: list[Path],
    *,
    upper: Path | None = None,
    work: Path | None = None,
    userxattr: bool = False,
    attributes: int = 0,
) -> int:
    """Mount an overlay without attaching it anywhere; the descriptor is an O_PATH dirfd of its root.

    `lower` runs from the topmost to the base; without `upper` the mount is read-only and the kernel
    wants two lowers at least. An `upper` once mounted volatile is mounted again only after its
    `work` directory was emptied. Layers are
    named by /proc/self/fd, since fsconfig(2) takes at most 255 bytes. Kernels before 6.5 lack
    `lowerdir+` and get one `lowerdir` string, which limits them to some ten layers here.
    Raises: OSError with the kernel's words.
    """
    handles: list[int] = []
    fs = fsopen("overlay")
    try:
        handles.extend(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in lower)
        names = [f"/proc/self/fd/{fd}" for fd in handles]
        try:
            for name in names:
                fsconfig_set_string(fs, "lowerdir+", name)
        except OSError as e:
            if e.errno != errno_.EINVAL or len(":".join(names)) > 255:
                raise
            os.close(fs)
            fs = fsopen("overlay")
            fsconfig_set_string(fs, "lowerdir", ":".join(names))
        if upper is not None and work is not None:
            for key, path in (("upperdir", upper), ("workdir", work)):
                handles.append(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
                fsconfig_set_string(fs, key, f"/proc/self/fd/{handles[-1]}")
            # Upper directories are scratch until the store's barrier: no sync on unmount.
            fsconfig_set_flag(fs, "volatile")
        if userxattr:
            # Left out in a user namespace, the mount works until rmdir and mkdir of one name give EIO.
            fsconfig_set_flag(fs, "userxattr")
        fsconfig_create(fs)
        return fsmount(fs, attributes)
    finally:
        os.close(fs)
        for fd in handles:
            os.close(fd)


@cache
def machine() -> str:
    """The architecture by its kernel name: `x86_64`, `aarch64`, ..."""
    return os.uname().machine


def _number(call: str) -> int:
    try:
        return _NR_OF[machine()][call]
    except KeyError:
        raise OSError(errno_.ENOSYS, f"{call}: not known on {machine()}") from None


def clone(flags: int, *, cgroup_fd: int | None = None) -> tuple[int, int]:
    """Fork into new namespaces (CLONE_NEW*): (pid, pidfd) in the parent, (0, -1) in the child.

    Only for processes with one thread. Unlike unshare(2) it leaves the caller's own namespaces
    alone, so a user-namespace's root, which may not setns(2) back into the PID namespace of its
    birth, can start one PID namespace after another. `cgroup_fd` puts the child into a cgroup v2.
    Raises: OSError.
    """
    pidfd = ctypes.c_int(-1)
    flags |= CLONE_PIDFD
    if cgroup_fd is not None:
        flags |= CLONE_INTO_CGROUP
    args = struct.pack(
        "=11Q", flags, ctypes.addressof(pidfd), 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, 0 if cgroup_fd is None else cgroup_fd
    )
    pid = int(_syscall_locked(_NR_CLONE3, args, ctypes.c_size_t(len(args))))
    if pid < 0 and ctypes.get_errno() in {errno_.ENOSYS, errno_.EPERM} and cgroup_fd is None:
        # Filters that cannot look into clone3's memory refuse it whole.
        pid = int(
            _syscall_locked(_number("clone"), ctypes.c_ulong(flags | _SIGCHLD), None, ctypes.byref(pidfd), None, None)
        )
    if pid < 0:
        raise _fail(f"clone({flags:#x})")
    return (pid, pidfd.value) if pid else (0, -1)


PIDFD_THREAD = os.O_EXCL


def pidfd_open(pid: int, flags: int = 0) -> int:
    """pidfd_open(2); PIDFD_THREAD, for threads other than the first, is from Linux 6.9. Raises: OSError."""
    fd = int(_syscall(_NR_PIDFD_OPEN, pid, flags))
    if fd < 0:
        raise _fail("pidfd_open")
    return fd


def pidfd_send_signal(pidfd: int, signal: int) -> None:
    """pidfd_send_signal(2). Raises: OSError (ESRCH where the process is gone)."""
    if _syscall(_NR_PIDFD_SEND_SIGNAL, pidfd, signal, None, 0) != 0:
        raise _fail("pidfd_send_signal")


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2). Raises: OSError."""
    result = int(_libc.prctl(option, arg2, arg3, arg4, arg5))
    if result < 0:
        raise _fail(f"prctl({option})")
    return result


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """capset(2) of this thread; each set as a bit mask. Raises: OSError."""
    header = struct.pack("=Ii", 0x20080522, 0)
    data = b"".join(
        struct.pack("=III", *((mask >> shift) & 0xFFFFFFFF for mask in (effective, permitted, inheritable)))
        for shift in (0, 32)
    )
    if _syscall(_number("capset"), header, data) != 0:
        raise _fail("capset")


def capget() -> tuple[int, int, int]:
    """capget(2) of this thread: effective, permitted, inheritable. Raises: OSError."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    data = ctypes.create_string_buffer(24)
    if _syscall(_number("capget"), header, data) != 0:
        raise _fail("capget")
    low, high = struct.unpack("=3I", data.raw[:12]), struct.unpack("=3I", data.raw[12:])
    effective, permitted, inheritable = (a | b << 32 for a, b in zip(low, high, strict=True))
    return effective, permitted, inheritable


def seccomp_filter(program: bytes, flags: int = 0) -> None:
    """seccomp(2), SECCOMP_SET_MODE_FILTER: `program` is an array of struct sock_filter. Raises: OSError."""
    # The address of the bytes themselves: a ctypes array type would be made for each length.
    address = ctypes.cast(ctypes.c_char_p(program), ctypes.c_void_p).value or 0
    fprog = struct.pack("@HP", len(program) // 8, address)
    if _syscall(_number("seccomp"), SECCOMP_SET_MODE_FILTER, flags, fprog) != 0:
        raise _fail("seccomp")


def join_session_keyring(name: str) -> None:
    """keyctl(2), KEYCTL_JOIN_SESSION_KEYRING: leave the caller's session keyring for a new one. Raises: OSError."""
    if _syscall(_number("keyctl"), KEYCTL_JOIN_SESSION_KEYRING, name.encode()) < 0:
        raise _fail("keyctl")


def seccomp_listener(program: bytes) -> int:
    """Install a filter whose SECCOMP_RET_USER_NOTIF verdicts are answered at the descriptor returned.

    A call that was received is not interrupted by signals any more, from Linux 5.19 on. Raises: OSError
    (EBUSY where a filter has a listener already).
    """
    address = ctypes.cast(ctypes.c_char_p(program), ctypes.c_void_p).value or 0
    fprog = struct.pack("@HP", len(program) // 8, address)
    for flags in (
        SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE,
        SECCOMP_FILTER_FLAG_NEW_LISTENER,
    ):
        fd = int(_syscall(_number("seccomp"), SECCOMP_SET_MODE_FILTER, flags, fprog))
        if fd >= 0:
            return fd
        if ctypes.get_errno() != errno_.EINVAL:
            break
    raise _fail("seccomp")


def read_memory(pid: int, address: int, size_bytes: int) -> bytes:
    """process_vm_readv(2): what can be read of another process's memory, from `address` on. Raises: OSError."""
    buffer = ctypes.create_string_buffer(size_bytes)
    done = _transfer(_libc.process_vm_readv, pid, ctypes.addressof(buffer), address, size_bytes)
    return ctypes.string_at(buffer, done)


def write_memory(pid: int, address: int, data: bytes) -> None:
    """process_vm_writev(2), all of `data`. Raises: OSError."""
    buffer = ctypes.create_string_buffer(data, len(data))
    if _transfer(_libc.process_vm_writev, pid, ctypes.addressof(buffer), address, len(data)) != len(data):
        raise OSError(errno_.EFAULT, f"process_vm_writev: {os.strerror(errno_.EFAULT)}")


_IOVEC = struct.Struct("@PN")
_NONE, _ONE = ctypes.c_ulong(0), ctypes.c_ulong(1)


def _transfer(call: Callable[..., int], pid: int, ours: int, theirs: int, size_bytes: int) -> int:
    done = int(call(pid, _IOVEC.pack(ours, size_bytes), _ONE, _IOVEC.pack(theirs, size_bytes), _ONE, _NONE))
    if done < 0:
        raise _fail("process_vm")
    return done


def statx(dirfd: int, path: Path, flags: int, mask: int) -> bytearray:
    """statx(2): the structure as the kernel writes it. Raises: OSError."""
    buffer = ctypes.create_string_buffer(256)
    if _syscall(_number("statx"), dirfd, _bytes(path), flags, ctypes.c_uint(mask), buffer) != 0:
        raise _fail("statx", path)
    return bytearray(buffer.raw)
