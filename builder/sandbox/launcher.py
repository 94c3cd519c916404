"""The launcher: starts the zygote, sends it sandboxes and waits for their ends.

`Launcher.start()` comes early, while the process has one thread and few imports; `run` is
thread-safe. Each run has a control socket of its own, so that no thread waits on another's.
`builder.solve` and `builder.container` call this; the protocol is drawn in `zygote`.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import json
import os
import select
import signal
import time
from _thread import allocate_lock
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from builder.errors import SandboxError
from builder.sandbox import channel
from builder.sandbox.channel import Socket
from builder.sandbox.operations import Host, mount_outside, operations, prelude
from builder.sandbox.spec import SandboxSpec
from builder.sandbox.userns import threads
from layers import linux
from layers.snapshot import Mount
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from builder.sandbox.operations import Operation

_MAX_INLINE_BYTES = 1 << 16
_MAX_MESSAGE_BYTES = 1 << 16
_FLAGS = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS | linux.CLONE_NEWCGROUP
"""The namespaces of a sandbox that shares none; one that has not the host's network has another beside these."""


_NONE_JOINED: Mapping[str, int] = {}


class Usage(NamedTuple):
    """What the command and its waited-for descendants used."""

    user_s: float = 0.0
    system_s: float = 0.0
    max_rss_bytes: int = 0
    """The largest process; with limits of memory, the peak of all together."""
    read_bytes: int = 0
    written_bytes: int = 0


class ExitStatus(NamedTuple):
    """How a sandbox ended. `code` is the shell's: 128 + signal where a signal ended it."""

    code: int
    signal: int | None = None
    oom_killed: bool = False
    timed_out: bool = False
    usage: Usage = Usage()


class _ZygoteDied(SandboxError):
    """The zygote is gone, and every sandbox with it."""


class Running:
    """A started sandbox. Dropping it without `wait` kills the sandbox."""

    def __init__(self, spec: SandboxSpec, control: Socket) -> None:
        self._lock = allocate_lock()
        self._spec = spec
        self._control = control
        self._pidfd = -1
        self._status: ExitStatus | None = None
        self.trace: tuple[tuple[str, float], ...] = ()
        self._terminal = -1
        self._started = time.monotonic()
        self._await_start()

    @property
    def pid(self) -> int:
        """The first process's id in this process's PID namespace; 0 once it is reaped."""
        with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{self._pidfd}") as stream:
            for line in stream:
                if line.startswith("Pid:"):
                    return max(0, int(line.split()[1]))
        return 0

    def fileno(self) -> int:
        """What becomes readable when there is something to `poll` for."""
        return self._control.fileno()

    def take_terminal(self, timeout_s: float = 10.0) -> int:
        """The master of the terminal that the spec asks for; it is the caller's from now on.

        Raises: SandboxError where the setup failed.
        """
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while self._terminal < 0 and self._status is None:
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                break
            self._take(*self._receive())
        if self._terminal < 0:
            raise SandboxError("the sandbox gave no terminal", operation="terminal")
        fd, self._terminal = self._terminal, -1
        return fd

    def kill(self) -> None:
        """Kill everything in the sandbox at once. Thread-safe, idempotent."""
        self.signal(signal.SIGKILL)
        if self._spec.resources.freezer or self._spec.resources.accounting:
            # On v1 what is frozen dies when it thaws; nobody waits for the answer.
            with contextlib.suppress(OSError):
                self._control.send(b"thaw")

    def pause(self) -> None:
        """Freeze every process; the spec must ask for it (`Resources.freezer`, `accounting`). Raises: SandboxError."""
        self._wish(b"freeze")

    def resume(self) -> None:
        """Let frozen processes go on. Raises: SandboxError."""
        self._wish(b"thaw")

    def _wish(self, word: bytes) -> None:
        """Not to be called while another thread waits. The end may come in between, which is no error."""
        with contextlib.suppress(BrokenPipeError):
            self._control.send(word)
        while self._status is None:
            message, fds = self._receive()
            if "done" in message:
                return
            if "refused" in message:
                raise _error(message["refused"])
            self._take(message, fds)

    def signal(self, number: int) -> None:
        """Send a signal to the sandbox's first process. Thread-safe; without effect after the end."""
        if number == signal.SIGKILL and not self._spec.own("pid"):
            # The kernel would kill this one process alone.
            with contextlib.suppress(OSError):
                self._control.send(b"end")
            return
        # Under the lock, `close` cannot give the descriptor's number to another sandbox meanwhile.
        with self._lock, contextlib.suppress(OSError):
            if self._pidfd >= 0:
                linux.pidfd_send_signal(self._pidfd, number)

    def poll(self, timeout_s: float | None = 0) -> ExitStatus | None:
        """The end if it comes within `timeout_s`, else None. Raises: SandboxError where the setup failed."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._status is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            # poll(2), not select(2): a large build has more than 1024 descriptors
            if not poller.poll(None if left is None else left * 1000):
                return None
            self._take(*self._receive())
        return self._status

    def wait(self, timeout_s: float | None = None) -> ExitStatus:
        """Wait for the end; after `timeout_s` or the spec's own timeout, kill it.

        Raises: SandboxError where the setup failed or the zygote died.
        """
        limits = [t for t in (timeout_s, self._spec.timeout_s) if t is not None]
        left = min(limits) - (time.monotonic() - self._started) if limits else None
        status = self.poll(left if left is None else max(0.0, left))
        if status is None:
            self.kill()
            status = self.poll(None)
            assert status is not None
            status = status._replace(timed_out=True)
            self._status = status
        return status

    def close(self) -> None:
        """Let go; a sandbox that still runs is killed. Idempotent."""
        with self._lock:
            self._control.close()
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
            if self._terminal >= 0:
                os.close(self._terminal)
                self._terminal = -1

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _await_start(self) -> None:
        while self._pidfd < 0:
            message, fds = self._receive()
            if message.get("started") and fds:
                self._pidfd = fds[0]
            else:
                self._take(message, fds)

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        try:
            data, fds = channel.receive(self._control, _MAX_MESSAGE_BYTES, 1)
        except ConnectionError:
            data, fds = b"", []
        if not data:
            raise _ZygoteDied("the process that runs sandboxes has died", operation="zygote")
        message: dict[str, Any] = json.loads(data)
        return message, fds

    def _take(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        """Raises: SandboxError if the message is one."""
        if "terminal" in message and fds:
            self._terminal = fds[0]
        if "error" in message:
            raise _error(message)
        if "trace" in message:
            self.trace = tuple((name, seconds) for name, seconds in message["trace"])
        if "exit" in message:
            self._status = _status(message)


class Launcher:
    """Owns the zygote. `run` may be called from any thread."""

    bare = False
    """Whether sandboxes have neither namespaces nor mounts (`builder.sandbox.bare`)."""
    accounting = False
    """Whether sandboxes are expected to ask for that (`Resources.accounting`), one after the other."""

    def __init__(self, server: Socket, pid: int, host: Host, network: str = "host") -> None:
        self._own_pids = True
        self._expected = network
        self._server = server
        self._pid = pid
        self._host = host
        self._prelude = prelude(SandboxSpec(args=("-",), root=Mount("bind", ())), host)
        self._lock = allocate_lock()
        self._programs: dict[bytes, int] = {}

    @classmethod
    def start(cls, network: str = "host", *, own_pids: bool = True) -> Launcher:
        """Start the zygote. Best called before any thread is started: afterwards a new interpreter has to be.

        The network is the one that most sandboxes are expected to have: as much as can be is made ahead.
        `own_pids`: all sandboxes have PID namespaces of their own; else none has.
        Raises: SandboxError where the kernel refuses namespaces.
        """
        ours, theirs = channel.pair()
        try:
            pid = _clone_zygote(ours, theirs, own_pids) if threads() == 1 else spawn(theirs, alone=own_pids)
        except OSError as e:
            ours.close()
            raise SandboxError(
                f"cannot make namespaces: {os.strerror(e.errno or 0)}",
                operation="clone",
                errno=e.errno,
                hint="as an ordinary user, enter a user namespace first; `pybuild doctor` tells what is missing",
            ) from e
        finally:
            theirs.close()
        launcher = cls(ours, pid, host_now(), network)
        expected = SandboxSpec(args=("-",), root=Mount("bind", ()), network=network)  # type: ignore[arg-type]
        hello = {"prelude": launcher._prelude, "flags": _clone_flags(expected), "accounting": cls.accounting}
        hello.update(supervise=launcher._supervise(), network=launcher._helper(network))
        if not own_pids:
            launcher._own_pids = False
            hello["flags"] = 0  # no spare: its end would not be the zygote's
        with contextlib.suppress(OSError):  # a zygote that has died says why when it is asked to do something
            ours.send(json.dumps(hello).encode())
        return launcher

    def run(
        self,
        spec: SandboxSpec,
        *,
        stdin_fd: int | None = None,
        stdout_fd: int,
        stderr_fd: int,
        joined: Mapping[str, int] = _NONE_JOINED,
        trace: bool = False,
    ) -> Running:
        """Start a sandbox with these descriptors as 0, 1 and 2 (stdin None: /dev/null). Thread-safe.

        The caller keeps its descriptors. `joined` has those of the namespaces of `spec.shared`, and with "ipc" that of
        "shm", a detached mount. With `trace`, `Running.trace` tells the time of each setup operation.
        Raises: SandboxError.
        """
        if self._own_pids != spec.own("pid"):
            raise SandboxError("the launcher was started for other PID namespaces", operation="clone")
        program = self.filter_of(spec)
        with self._lock:
            # Requests that name a filter for the first time bring it along, and must not be overtaken.
            number, programs = self._number(program)
            asking, more = self._number(self._supervision())
            programs = {**programs, **more}
            host = self._host._replace(seccomp=number)
            host = host._replace(supervised=asking) if host.single else host._replace(nodes=asking)
            steps = operations(spec, host)
            flags = _clone_flags(spec)
            request: dict[str, Any] = {
                "flags": flags,
                "trace": trace,
                "args": list(spec.args),
                "env": spec.environment(),
                "init": spec.init,
                "terminal": spec.terminal,
                "network": self._helper(spec.network),
                "joined": list(joined),
            }
            ahead = len(self._prelude)
            letter = b"D"
            # The spare is in groups without limits, or in none: others need a child that is made for them.
            limited = spec.resources._replace(accounting=None).any
            limited = limited or bool(spec.resources.accounting) != self.accounting
            if programs:
                request.update(programs=programs, nodes=host.nodes)
            if spec.resources.any:
                request["limits"] = {key: value for key, value in spec.resources._asdict().items() if value is not None}
            if spec.network == self._expected and not (limited or spec.shared) and steps[:ahead] == self._prelude:
                letter, steps = b"P" if programs else b"S", steps[ahead:]
            trees: list[int] = []
            try:
                trees = _mounted_outside(steps)
                request.update(operations=steps, trees=len(trees))
                data, extra = json.dumps(request).encode(), [*joined.values(), *trees]
                ours = self._send(letter, data, stdin_fd, stdout_fd, stderr_fd, extra)
            except BaseException:
                self._programs = {data: known for data, known in self._programs.items() if known not in programs}
                raise
            finally:
                for fd in trees:
                    os.close(fd)
        try:
            return Running(spec, ours)
        except _ZygoteDied:
            raise self._epitaph() from None

    def filter_of(self, spec: SandboxSpec) -> bytes | None:
        """The compiled filter of a spec; None for none. Raises: SandboxError."""
        return compiled_filter(spec)

    def _helper(self, network: str) -> str | None:
        """Which helper a private network needs."""
        if network != "private":
            return None
        return "rootless" if self._host.rootless else "rootful"

    def _supervise(self) -> str | None:
        """For what a user namespace needs somebody who answers."""
        return "ids" if self._host.single else "nodes" if self._host.rootless else None

    def _supervision(self) -> bytes | None:
        """The filter that has that one asked."""
        what = self._supervise()
        if what is None:
            return None
        from builder.sandbox import seccomp

        return (seccomp.supervised_program if what == "ids" else seccomp.nodes_program)(linux.machine())

    def _number(self, program: bytes | None) -> tuple[int | None, dict[int, str]]:
        """The number of a filter, and what the zygote must be told about it."""
        if program is None:
            return None, {}
        known = self._programs.get(program)
        if known is not None:
            return known, {}
        number = self._programs[program] = len(self._programs)
        return number, {number: binascii.b2a_base64(program, newline=False).decode()}

    def _send(
        self,
        letter: bytes,
        request: bytes,
        stdin_fd: int | None,
        stdout_fd: int,
        stderr_fd: int,
        more: Sequence[int] = (),
    ) -> Socket:
        """Send a request, as `zygote` tells it; returns our end of its control socket. Raises: SandboxError."""
        ours, theirs = channel.pair()
        extra: list[int] = []
        try:
            if stdin_fd is None:
                stdin_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
                extra.append(stdin_fd)
            fds = [theirs.fileno(), stdin_fd, stdout_fd, stderr_fd]
            if len(request) > _MAX_INLINE_BYTES:
                memfd = os.memfd_create("sandbox", os.MFD_CLOEXEC)
                extra.append(memfd)
                os.write(memfd, request)
                os.lseek(memfd, 0, os.SEEK_SET)
                fds.append(memfd)
                request = b""
            try:
                channel.send(self._server, letter + request, [*fds, *more])
            except OSError as e:
                raise self._epitaph() from e
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            for fd in extra:
                os.close(fd)
        return ours

    def _epitaph(self) -> SandboxError:
        """Why the zygote is gone, in its own last words if it had time for any."""
        words = "killed"
        with contextlib.suppress(OSError, ValueError, KeyError):
            words = json.loads(self._server.recv(_MAX_MESSAGE_BYTES, channel.MSG_DONTWAIT))["message"]
        return _ZygoteDied(f"the process that runs sandboxes has died: {words}", operation="zygote")

    def close(self) -> None:
        """Kill every sandbox, and wait until the zygote is gone. Idempotent."""
        if self._pid:
            self._server.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
            self._pid = 0

    def let_go(self) -> None:
        """As `close`, but do not wait: for a process that ends itself, all of whose sandboxes have ended.

        Taking a network down means waiting for the kernel, some 70 ms, which nobody else has to.
        """
        if self._pid:
            self._server.close()
            self._pid = 0

    def __enter__(self) -> Launcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _mounted_outside(steps: list[Operation]) -> list[int]:
    try:
        return mount_outside(steps)
    except OSError as e:
        raise SandboxError(
            f"cannot mount the image: {e.strerror}", operation="root", errno=e.errno, path=e.filename
        ) from e


def _clone_zygote(ours: Socket, theirs: Socket, alone: bool) -> int:
    """Clone the zygote off this process. Raises: OSError."""
    pid, pidfd = linux.clone(linux.CLONE_NEWNS | (linux.CLONE_NEWPID if alone else 0))
    if pid == 0:
        from builder.sandbox import zygote

        ours.close()
        zygote.serve(theirs, alone=alone)
    os.close(pidfd)
    return pid


def spawn(theirs: Socket, module: str = "zygote", *, alone: bool = True) -> int:
    """Start the zygote in an interpreter of its own, as a process with threads may not be cloned. Raises: OSError."""
    import sys

    package_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    call = "main(3)" if alone else "main(3, alone=False)"
    code = f"import sys; sys.path.insert(0, {package_root!r}); from builder.sandbox import {module}; {module}.{call}"
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", "-c", code],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 3)],
    )


def host_now() -> Host:
    """What this process's namespaces and mounts allow."""
    return Host(
        cgroup2=os.path.exists("/sys/fs/cgroup/cgroup.controllers"),
        tty_gid=5 if any(first <= 5 < first + count for first, count in _mapped("gid_map")) else None,
        setgroups=_read("/proc/self/setgroups") != "deny",
        rootless=_read("/proc/self/uid_map").split() != ["0", "0", "4294967295"],
        single=sum(count for _first, count in _mapped("uid_map")) == 1,
    )


def compiled_filter(spec: SandboxSpec) -> bytes | None:
    """The seccomp program of a spec; None for none. Raises: SandboxError."""
    if spec.privileged or spec.seccomp == "unconfined":
        return None
    from builder.sandbox import seccomp

    machine = linux.machine()
    if spec.seccomp == "default":
        return seccomp.default_program(spec.capabilities, machine)
    major, minor = os.uname().release.split(".")[:2]
    kernel = (int(major), int("".join(digit for digit in minor if digit.isdigit())))
    return seccomp.compile_profile(seccomp.load_profile(Path(spec.seccomp), spec.capabilities, machine, kernel))


def _mapped(name: str) -> list[tuple[int, int]]:
    rows = [line.split() for line in _read(f"/proc/self/{name}").splitlines()]
    return [(int(row[0]), int(row[2])) for row in rows]


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read().strip()
    except OSError:
        return ""


def _clone_flags(spec: SandboxSpec) -> int:
    flags = _FLAGS if spec.network == "host" else _FLAGS | linux.CLONE_NEWNET
    for namespace, _ in spec.shared:
        flags &= ~linux.NAMESPACES[namespace]
    return flags


def _status(message: dict[str, Any]) -> ExitStatus:
    status: int = message["exit"]
    usage = Usage(*(message[name] for name in Usage._fields))
    oom = message.get("oom_kills", 0) > 0
    if os.WIFSIGNALED(status):
        return ExitStatus(128 + os.WTERMSIG(status), os.WTERMSIG(status), oom, usage=usage)
    # A shell survives the kill of what it ran, and tells by its own status.
    return ExitStatus(os.WEXITSTATUS(status), oom_killed=oom and os.WEXITSTATUS(status) != 0, usage=usage)


def _error(message: dict[str, Any]) -> SandboxError:
    operation, path = message["error"], message.get("path")
    words = message["message"]
    where = f" at {path}" if path and path not in words else ""
    return SandboxError(
        f"cannot set up the sandbox: {operation}: {words}{where}",
        operation=operation,
        errno=message.get("errno"),
        path=path,
        hint=message.get("hint") or _hint(operation, message.get("errno")),
    )


def _hint(operation: str, number: int | None) -> str | None:
    """What most often lies behind a refusal."""
    if operation == "root" and number in {errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV}:
        return "the store's file system may not bear an overlay: put it on ext4, xfs or btrfs with --root"
    if operation == "identity" and number == errno.EINVAL:
        return "the user's id is not mapped here: an ordinary user needs subordinate ids, see `pybuild doctor`"
    if operation == "supervise":
        return "owners cannot be recorded under a filter that has a supervisor of its own; `pybuild doctor` tells more"
    if operation == "limits":
        return "hard limits go up only with CAP_SYS_RESOURCE"
    if number in {errno.EPERM, errno.EACCES}:
        return "`pybuild doctor` tells what this machine forbids, and what would grant it"
    return None
