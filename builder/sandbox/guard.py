"""The guard of a sandbox without a PID namespace of its own: what such a sandbox leaves behind, it ends.

Elsewhere the kernel kills every process of a sandbox with its first one. In the PID namespace of the host,
or of another container, nobody does. There the zygote's child stays behind as the guard: it forks the command,
reaps its orphans, and when the command ends, or the zygote is gone, kills every process that is in the
sandbox's mount namespace or descends from it. Commands that were started by `exec` are among them.

The guard has capabilities that the command has not: nobody inside may look into it, but for a privileged
command, which may look into all of the machine's. It goes by the kernel's own /proc, opened before the
image's is in its place. `zygote` calls this.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct

from builder.sandbox import channel
from builder.sandbox.channel import Socket
from layers import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_NAME = b"pybuild-guard"
_STATUS = struct.Struct("=i")


def stay_behind(control: Socket, life: Socket, pid_namespace: int | None) -> None:
    """Guard the sandbox; returns in a child alone, which is to become the command, perhaps in another PID namespace.

    `control` is told of the command's start, with a pidfd of it; `life` ends with the zygote, or by its will, and
    is given the command's wait status.
    """
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        _hide_arguments(proc)
    ready, go = os.pipe2(os.O_CLOEXEC)
    if pid_namespace is not None:
        # For children alone: the guard stays where it is, out of sight. Orphans of that namespace are not its own,
        # but they are in the mount namespace.
        linux.setns(pid_namespace, linux.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        life.close()
        os.close(proc)
        os.close(go)
        os.read(ready, 1)  # until the guard is at its post
        os.close(ready)
        return
    _guard(pid, proc, go, control, life)


def _hide_arguments(proc: int) -> None:
    """Be another name than pybuild's own command line, which those inside could read otherwise. Raises: OSError."""
    with open(os.open("self/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc), "rb") as stream:
        first, end = map(int, stream.read().rpartition(b")")[2].split()[45:47])
    with open(os.open("self/mem", os.O_RDWR | os.O_CLOEXEC, dir_fd=proc), "r+b", buffering=0) as memory:
        memory.seek(first)
        memory.write(_NAME[: end - first].ljust(end - first, b"\0"))


def status_of(life: Socket) -> int | None:
    """The wait status that a guard told before its end; None if it was killed."""
    with contextlib.suppress(OSError):
        data = life.recv(_STATUS.size, channel.MSG_DONTWAIT)
        if len(data) == _STATUS.size:
            return int(_STATUS.unpack(data)[0])
    return None


def _guard(pid: int, proc: int, go: int, control: Socket, life: Socket) -> NoReturn:
    """The guard's life. Never returns."""
    status = int(signal.SIGKILL)
    try:
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
            with contextlib.suppress(OSError):
                signal.signal(number, signal.SIG_IGN)
        wake, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        pidfd = linux.pidfd_open(pid)
        channel.send(control, b'{"started": true}', [pidfd])
        os.close(pidfd)
        linux.close_all_but([proc, life.fileno(), wake, write, go], first=0)
        os.close(go)
        status = _await(pid, wake, life)
    except BaseException:  # noqa: BLE001, S110 - the process boundary: what counts now is to leave nothing behind
        pass
    finally:
        try:
            end_all(os.stat("self/ns/mnt", dir_fd=proc), proc, mine=True)
            with contextlib.suppress(OSError):
                life.send(_STATUS.pack(status))
        finally:
            os._exit(0)


def _await(pid: int, wake: int, life: Socket) -> int:
    """Until the command ends, or is to end; its wait status."""
    poller = select.poll()
    poller.register(wake, select.POLLIN)
    poller.register(life, select.POLLIN)
    while True:
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == pid:
                return ended[1]
        if any(fd == life.fileno() for fd, _ in poller.poll()):
            return int(signal.SIGKILL)


def end_all(mounts: os.stat_result, proc: int = -1, *, mine: bool = False) -> None:
    """Kill every process of a mount namespace, and if `mine` every descendant, and reap the children.

    All are stopped first, so that none starts another. `proc` is a /proc that shows them; -1 is this process's own.
    """
    if proc < 0:
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            end_all(mounts, proc, mine=mine)
        finally:
            os.close(proc)
        return
    stopped: set[int] = set()
    while found := _members(proc, mounts, mine) - stopped:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        stopped |= found
    while found := _members(proc, mounts, mine):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in found:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        select.select([], [], [], 0.001)
    # A PID namespace ends only when all who were in it are reaped: nobody else would do that for ours.
    while mine:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break


def _members(proc: int, mounts: os.stat_result, mine: bool) -> set[int]:
    """Those processes that live, by the ids that they have in this process's own PID namespace."""
    depth = len(_ids(proc, os.readlink("self", dir_fd=proc))) - 1
    parents: dict[str, str] = {}
    inside: dict[str, int] = {}
    found: set[str] = set()
    me = ""
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):
            ids = _ids(proc, name)
            if len(ids) <= depth:
                continue
            state, parents[name] = _state(proc, name)
            if ids[depth] == os.getpid():
                me = name
            elif state not in b"ZX":
                inside[name] = ids[depth]
                if os.path.samestat(os.stat(f"{name}/ns/mnt", dir_fd=proc), mounts):
                    found.add(name)
    for name in inside if mine else ():
        at = name
        while (at := parents.get(at, "")) and at != me:
            pass
        if at:
            found.add(name)
    return {inside[name] for name in found}


def _ids(proc: int, name: str) -> list[int]:
    """A process's ids, from the namespace of that /proc down to its own. Raises: OSError."""
    with open(os.open(f"{name}/status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc), "rb") as stream:
        line = next((line for line in stream if line.startswith(b"NSpid:")), b"")
    return [int(word) for word in line.split()[1:]]


def _state(proc: int, name: str) -> tuple[bytes, str]:
    """Its state's letter, and its parent as that /proc names it. Raises: OSError."""
    with open(os.open(f"{name}/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc), "rb") as stream:
        state, parent = stream.read().rpartition(b")")[2].split()[:2]
    return state, parent.decode()
