"""Calls that wait for an answer: the listener that tells them, who made one, what it names, where we find that.

Notifications of seccomp_unotify(2) as bytes, and the kernel's struct stat, are known here alone; what is answered
is `builder.sandbox.supervisor`'s and `builder.sandbox.nodes`'s. Imported by the zygote before there is an image
in sight.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from collections.abc import Callable
from typing import Any

from builder.sandbox.setup import forget_modules
from builder.sandbox.syscalls import numbers
from layers import linux

_RECEIVE, _SEND, _ID_VALID, _SET_FLAGS = 0xC0502100, 0xC0182101, 0x40082102, 0x40082104
_CONTINUE_FLAG, _SYNC_WAKE_UP = 1, 1
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_ANSWER = struct.Struct("=QqiI")
_EMPTY = bytes(_NOTIFICATION.size)
_PATH_MAX, _PAGE = 4096, 4096
_USUAL_PATH_BYTES = 128


CONTINUE: Any = object()
"""The answer: let the kernel do it."""


def settle(keep: int) -> None:
    """In a process just forked to answer: leave behind what is the parent's, but for that descriptor."""
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    linux.close_all_but([keep])


def enter(pid: int) -> Callable[[int], bytes]:
    """Go where the sandbox is, into a /proc that shows its processes; how that numbers them. Raises: OSError."""
    number = _as_ours
    proc = -1
    if os.readlink("/proc/self") != str(os.getpid()):
        fs = linux.fsopen("proc")
        try:
            linux.fsconfig_create(fs)
            proc = linux.fsmount(fs)
        except PermissionError:
            # Where the caller's is masked there may be no other, and that is of an outer PID namespace.
            number = _as_the_callers
        finally:
            os.close(fs)
    if proc < 0:
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    process = linux.pidfd_open(pid)
    forget_modules()
    linux.setns(process, linux.CLONE_NEWNS)
    os.close(process)
    os.fchdir(proc)
    os.close(proc)
    return number


def _as_ours(pid: int) -> bytes:
    return b"%d" % pid


def _as_the_callers(pid: int) -> bytes:
    """What the /proc that we are in calls a process or thread. Raises: OSError."""
    try:
        fd = linux.pidfd_open(pid)
    except OSError as e:
        if e.errno not in {errno.EINVAL, errno.ENOENT}:
            raise
        fd = linux.pidfd_open(pid, linux.PIDFD_THREAD)
    try:
        with open(b"self/fdinfo/%d" % fd, "rb") as stream:
            for line in stream:
                if line.startswith(b"Pid:"):
                    return line[4:].strip()
    finally:
        os.close(fd)
    raise ProcessLookupError(errno.ESRCH, "fdinfo")


class Call:
    """One call: `number` is that of the system call, `id` what the kernel knows it by."""

    __slots__ = ("_shown", "args", "id", "number", "pid")

    def __init__(self, notification: bytearray, shown: Callable[[int], bytes]) -> None:
        self.id: int
        self.pid: int
        self.number: int
        self.args: list[int]
        self.id, self.pid, _flags, self.number, _arch, _ip, *self.args = _NOTIFICATION.unpack(notification)
        self._shown = shown

    def of_process(self, name: bytes) -> bytes:
        """A file of its process in /proc. Raises: OSError."""
        return b"%s/%s" % (self._shown(self.pid), name)

    def descriptor(self, index: int) -> int:
        """An argument that is an int."""
        number = self.args[index] & 0xFFFFFFFF
        return number - (1 << 32) if number >> 31 else number

    def word(self, index: int) -> int:
        """An argument that is an id, a mode or flags."""
        return self.args[index] & 0xFFFFFFFF

    def string(self, index: int) -> bytes:
        """A path in its memory. Raises: OSError."""
        address = self.args[index]
        found = b""
        size = _USUAL_PATH_BYTES
        while len(found) < _PATH_MAX:
            # Never over the end of a page: the next one may not be there.
            piece = linux.read_memory(self.pid, address, min(size, _PAGE - address % _PAGE))
            size = _PAGE
            head, end, _ = piece.partition(b"\0")
            found += head
            if end:
                return found
            address += len(piece)
        raise OSError(errno.ENAMETOOLONG, "path")

    def path(self, directory: int | None, index: int) -> bytes:
        """Where we find what argument `index` names in the directory of argument `directory`. Raises: OSError."""
        name = self.string(index)
        if not name:
            raise FileNotFoundError(errno.ENOENT, "path")
        if name[:1] == b"/":
            return name
        return b"%s/%s" % (self.base(directory), name)

    def base(self, directory: int | None) -> bytes:
        """The working directory, or the open file of an argument."""
        fd = linux.AT_FDCWD if directory is None else self.descriptor(directory)
        return self.of_process(b"cwd" if fd == linux.AT_FDCWD else b"fd/%d" % fd)


class Listener:
    """Serves one listener. Methods `do_NAME` answer calls: with a number, an OSError, or `CONTINUE`."""

    def __init__(self, listener: int, shown: Callable[[int], bytes]) -> None:
        self._listener = listener
        self._shown = shown
        self._handlers: dict[int, Callable[[Call], Any]] = {
            number: getattr(self, f"do_{name}")
            for name, number in numbers(linux.machine()).items()
            if hasattr(self, f"do_{name}")
        }

    def loop(self) -> None:
        """Answer until nobody is left to ask."""
        try:
            fcntl.ioctl(self._listener, _SET_FLAGS, _SYNC_WAKE_UP)
        except OSError:
            pass  # before Linux 6.6
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        buffer = bytearray(_NOTIFICATION.size)
        while True:
            _fd, event = poll.poll()[0]
            if not event & select.POLLIN:
                return
            buffer[:] = _EMPTY
            try:
                fcntl.ioctl(self._listener, _RECEIVE, buffer)
                call = Call(buffer, self._shown)
                self._answer(call, self._handlers[call.number])
            except OSError:
                continue  # killed meanwhile

    def _answer(self, call: Call, handler: Callable[[Call], Any]) -> None:
        value, error, flags = 0, 0, 0
        try:
            result = handler(call)
            if result is CONTINUE:
                flags = _CONTINUE_FLAG
            else:
                value = result
        except OSError as e:
            error = -(e.errno or errno.EPERM)
        except Exception:  # noqa: BLE001 - the process boundary: whoever waits must get an answer
            error = -errno.EIO
        finally:
            self._let_go()
        fcntl.ioctl(self._listener, _SEND, _ANSWER.pack(call.id, value, error, flags))

    def _let_go(self) -> None:
        """Give back what was needed for one answer."""

    def _check(self, call: Call) -> None:
        """Whether the process that asked is still there, so that its number is still its own. Raises: OSError."""
        fcntl.ioctl(self._listener, _ID_VALID, struct.pack("=Q", call.id))


def _status_x86_64(st: os.stat_result) -> bytes:
    return _pack_times(
        "=QQQIII4xQqqq",
        (st.st_dev, st.st_ino, st.st_nlink, st.st_mode, st.st_uid, st.st_gid, st.st_rdev, st.st_size, st.st_blksize,
         st.st_blocks),
        st, "24x",
    )  # fmt: skip


def _status_aarch64(st: os.stat_result) -> bytes:
    return _pack_times(
        "=QQIIIIQ8xqi4xq",
        (st.st_dev, st.st_ino, st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev, st.st_size, st.st_blksize,
         st.st_blocks),
        st, "8x",
    )  # fmt: skip


def _pack_times(form: str, fields: tuple[int, ...], st: os.stat_result, tail: str) -> bytes:
    times = [part for ns in (st.st_atime_ns, st.st_mtime_ns, st.st_ctime_ns) for part in divmod(ns, 1_000_000_000)]
    return struct.pack(f"{form}6q{tail}", *fields, *times)


STATUS = {"x86_64": _status_x86_64, "aarch64": _status_aarch64}
"""struct stat as the kernel has it."""
