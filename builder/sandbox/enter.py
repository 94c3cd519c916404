"""Entering a running sandbox: another process in all of its namespaces and control groups.

`spawn` forks the *keeper*, which joins the namespaces and forks the command (setns(2) on a PID
namespace holds for children alone), and stays to tell how it ended. The keeper is in no PID
namespace of the sandbox and nobody inside may look into it: it is not dumpable. The command gets its
ids, capabilities and filter as the sandbox's own first process does. Only for a process of one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from collections.abc import Mapping

from builder.errors import SandboxError
from builder.sandbox import cgroup, channel, setup, userns
from builder.sandbox.channel import Socket
from layers import linux
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_MAX_MESSAGE_BYTES = 1 << 14
_LINGER_S = 0.2


class Command(NamedTuple):
    """What to run inside. `identity` holds the arguments of the setup operation of that name but the filter."""

    args: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    identity: Mapping[str, Any]
    seccomp: bytes | None = None
    rlimits: tuple[tuple[str, int, int], ...] = ()
    umask: int = 0o022
    terminal: tuple[int, int] | None = None
    detached: bool = False
    """It outlives the caller, who learns nothing of its end."""


class Entered:
    """A command inside. `terminal` is its master's descriptor, the caller's, or -1."""

    def __init__(self, keeper: int, control: Socket, terminal: int) -> None:
        self.keeper = keeper
        self._control = control
        self.terminal = terminal

    def fileno(self) -> int:
        """What becomes readable when the command has ended."""
        return self._control.fileno()

    def signal(self, number: int) -> None:
        """Have the keeper send a signal to the command. Harmless after the end."""
        with contextlib.suppress(OSError):
            self._control.send(str(number).encode())

    def wait(self) -> int:
        """The command's status as a shell tells it; the keeper is reaped."""
        with contextlib.suppress(ConnectionError):
            while self._control.recv(_MAX_MESSAGE_BYTES):
                pass
        self._control.close()
        status = os.waitpid(self.keeper, 0)[1]
        return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def join_user_namespace(pid: int) -> bool:
    """Join a process's user namespace, if it is another than ours; whether it was.

    Its owner may, from outside: that is how an ordinary user comes to a container started by another of
    his commands. Raises: SandboxError.
    """
    try:
        theirs, ours = os.stat(f"/proc/{pid}/ns/user"), os.stat("/proc/self/ns/user")
        if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
            return False
        fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            linux.setns(fd, linux.CLONE_NEWUSER)
        finally:
            os.close(fd)
    except OSError as e:
        raise SandboxError(
            f"cannot enter the user namespace of process {pid}: {e.strerror}", operation="setns", errno=e.errno
        ) from e
    return True


def spawn(pid: int, pidfd: int, command: Command, stdin_fd: int, stdout_fd: int, stderr_fd: int) -> Entered:
    """Start `command` in the sandbox whose first process is `pid`; `pidfd` proves that it is still that one.

    Raises: SandboxError where the sandbox is gone, or cannot be entered.
    """
    ours, theirs = channel.pair()
    keeper = os.fork()
    if keeper == 0:
        ours.close()
        _keep(pid, pidfd, command, theirs, (stdin_fd, stdout_fd, stderr_fd))
    theirs.close()
    terminal = -1
    try:
        while True:
            data, fds = channel.receive(ours, _MAX_MESSAGE_BYTES, 1)
            if fds:
                terminal = fds[0]
                continue
            if not data:
                break
            message = json.loads(data)
            if message.get("ready"):
                return Entered(keeper, ours, terminal)
            raise SandboxError(
                f"cannot enter the container: {message['operation']}: {message['words']}",
                operation=message["operation"],
                errno=message["errno"],
            )
    except ConnectionError:
        pass
    except BaseException:
        ours.close()
        os.waitpid(keeper, 0)
        raise
    ours.close()
    os.waitpid(keeper, 0)
    raise SandboxError("cannot enter the container: it has ended", operation="enter")


def _keep(pid: int, pidfd: int, command: Command, control: Socket, stdio: tuple[int, int, int]) -> NoReturn:
    """The keeper's life. Never returns."""
    status = 125
    operation = "setns"
    try:
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        if command.detached:
            os.setsid()
        else:
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGWINCH, signal.SIGTSTP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        if command.terminal:
            from builder.sandbox import terminal  # noqa: F401 - now: the image has no such module
        box, inner_root = _open(pid, pidfd)
        supervision = _supervised(pid, command)
        with contextlib.suppress(OSError):
            # Limits count for this process too; where they cannot be joined there are none of ours.
            cgroup.join([path for _hierarchy, path in cgroup.of_process(pid)])
        for fd, flag in box:
            linux.setns(fd, flag)
            os.close(fd)
        chrooted = _enter_root(inner_root)
        operation = "fork"
        child = os.fork()
        if child == 0:
            _become(command, control, stdio, chrooted, supervision)
        if command.detached:
            # Whoever reads what the caller says would wait for the command's end otherwise.
            for fd, given in enumerate(stdio):
                os.dup2(given, fd)
        for fd in {*stdio}:
            if fd > 2:
                os.close(fd)
        if supervision.fd >= 0:
            os.close(supervision.fd)
        status = _await(child, None if command.detached else control)
        supervision.bury()
    except OSError as e:
        _tell(control, operation, e.errno, e.strerror or str(e))
    except BaseException as e:  # noqa: BLE001 - the process boundary: whatever it is, it must be told
        _tell(control, operation, None, f"{type(e).__name__}: {e}")
    finally:
        os._exit(status)


def _open(pid: int, pidfd: int) -> tuple[list[tuple[int, int]], int]:
    """The namespaces that are not ours already, and the sandbox's root; of this very process. Raises: OSError."""
    join_user_namespace(pid)
    found = []
    for name, flag in linux.NAMESPACES.items():
        path = f"/proc/{pid}/ns/{name}"
        theirs, ours = os.stat(path), os.stat(f"/proc/self/ns/{name}")
        if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
            found.append((os.open(path, os.O_RDONLY | os.O_CLOEXEC), flag))
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    linux.pidfd_send_signal(pidfd, 0)  # still the process that was meant, so all of these are its own
    return found, root


def _enter_root(root: int) -> bool:
    """Make the sandbox's root ours; whether it is not that of its mount namespace (a chroot)."""
    setup.forget_modules()
    inside, whole = os.fstat(root), os.stat("/")
    chrooted = (inside.st_dev, inside.st_ino) != (whole.st_dev, whole.st_ino)
    os.fchdir(root)
    if chrooted:
        os.chroot(".")
    os.chdir("/")
    os.close(root)
    return chrooted


class _Supervision(NamedTuple):
    """Who answers for missing ids or devices, if anybody has to: its process, the socket that leads to it, the filter,
    and the name of the operation that installs that."""

    pid: int = 0
    fd: int = -1
    program: bytes = b""
    operation: str = ""

    def bury(self) -> None:
        """Reap it, if it has nobody left to wait for."""
        if self.pid:
            fd = linux.pidfd_open(self.pid)
            select.select([fd], [], [], _LINGER_S)
            os.close(fd)
            os.waitpid(self.pid, os.WNOHANG)


def _supervised(pid: int, command: Command) -> _Supervision:
    """In a user namespace: start who answers for ids that are missing, or for devices if any may be made.

    Now: the command's root is not ours. The fork is in no PID namespace of the sandbox.
    """
    tier = userns.current().tier
    may = command.identity["capabilities"] >> linux.CAPABILITIES.index("MKNOD") & 1
    if tier == "root" or (tier == "subordinate" and not may):
        return _Supervision()
    from builder.sandbox import nodes, seccomp, supervisor

    single = tier == "single"
    program = (seccomp.supervised_program if single else seccomp.nodes_program)(linux.machine())
    asked, answerer = channel.pair()
    helper = os.fork()
    if helper == 0:
        (supervisor.serve if single else nodes.serve_from)(asked, pid)
    asked.close()
    return _Supervision(helper, answerer.detach(), program, "supervise" if single else "nodes")


def _become(
    command: Command,
    control: Socket,
    stdio: tuple[int, int, int],
    chrooted: bool,
    supervision: _Supervision,
) -> NoReturn:
    """The command's process. Never returns."""
    status = 125
    operation = "setup"
    try:
        os.setsid()
        for number in signal.valid_signals():
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        if not command.detached:
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        # Duplicates first: one of the three may lie where another goes.
        copies = [os.dup(fd) for fd in stdio]
        for fd, copy in enumerate(copies):
            os.dup2(copy, fd)
        linux.close_range(3, flags=linux.CLOSE_RANGE_CLOEXEC)
        programs = {} if command.seccomp is None else {0: command.seccomp}
        programs[1] = supervision.program
        sandbox = setup.Sandbox(programs=programs, handover_fd=supervision.fd)
        sandbox.chrooted = chrooted
        limits = [list(row) for row in command.rlimits]
        identity = {**command.identity, "seccomp": None if command.seccomp is None else 0}
        if supervision.operation == "supervise":
            identity.update(uid=0, gid=0)
        if _read("/proc/self/setgroups") == "deny":
            identity["groups"] = None
        steps: list[list[Any]] = [["limits", {"umask": command.umask, "rlimits": limits, "oom_score_adj": None}]]
        if supervision.operation == "nodes":
            steps.append(["nodes", {"program": 1}])
        elif supervision.pid:
            who = {key: command.identity[key] for key in ("uid", "gid", "groups", "capabilities")}
            steps.append(["supervise", {"program": 1, **who}])
        setup.execute(sandbox, [*steps, ["identity", identity], ["cwd", {"path": command.cwd}]])
        if command.terminal:
            from builder.sandbox import terminal

            operation = "terminal"
            terminal.give(control, *command.terminal)
        control.send(b'{"ready": true}')
        status = setup.become(list(command.args), dict(command.env))
    except setup.SetupError as e:
        _tell(control, e.operation, e.errno, f"{e.words}" + (f" at {e.path}" if e.path else ""))
    except OSError as e:
        _tell(control, operation, e.errno, e.strerror or str(e))
    except BaseException as e:  # noqa: BLE001 - the process boundary
        _tell(control, operation, None, f"{type(e).__name__}: {e}")
    finally:
        os._exit(status)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read().strip()
    except OSError:
        return ""  # the sandbox need not have a /proc


def _await(child: int, control: Socket | None) -> int:
    """Wait for the command; signals that the other end wishes are sent to it. Its status."""
    try:
        child_fd = linux.pidfd_open(child)
    except OSError:
        child_fd = -1  # it ended already, and is a zombie that waitpid tells about
    poller = select.poll()
    if control is not None:
        poller.register(control, select.POLLIN)
    if child_fd >= 0:
        poller.register(child_fd, select.POLLIN)
    while child_fd >= 0:
        ready = {fd for fd, _ in poller.poll()}
        if child_fd in ready:
            break
        words = b""
        assert control is not None
        with contextlib.suppress(OSError):
            words = control.recv(64)
        # The other end is gone: nobody waits for the command any more.
        number = int(words) if words.isdigit() else signal.SIGKILL
        with contextlib.suppress(OSError):
            linux.pidfd_send_signal(child_fd, number)
        if not words:
            poller.unregister(control)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _tell(control: Socket, operation: str, number: int | None, words: str) -> None:
    with contextlib.suppress(OSError):
        control.send(json.dumps({"operation": operation, "errno": number, "words": words}).encode())
