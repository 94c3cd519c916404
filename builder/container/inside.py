"""Running further commands in a container that runs: what `exec` and health checks share.

The command has the container's user, environment, working directory, capabilities and filter unless
told otherwise. To be called while the process has one thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator

from builder.container import events
from builder.container.records import ContainerError, Record
from builder.sandbox import enter
from builder.sandbox.operations import capability_mask
from layers import linux
from layers.values import Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from builder.container.front import Front


class Attended(Protocol):
    """A command that is under way: readable when it has ended; `terminal` is its terminal's other end, or -1."""

    @property
    def terminal(self) -> int: ...

    def fileno(self) -> int: ...

    def wait(self) -> int: ...


@contextlib.contextmanager
def first_process(record: Record) -> Iterator[tuple[int, int]]:
    """The container's first process and a pidfd of it. Raises: ContainerError if it does not run."""
    pid = int(record.state.get("pid") or 0)
    if not record.running or pid <= 0:
        raise ContainerError(f"container {record.name} is not running", hint=f"start it: pybuild start {record.name}")
    try:
        pidfd = linux.pidfd_open(pid)
    except OSError as e:
        raise ContainerError(f"container {record.name} has just ended") from e
    try:
        # The monitor that wrote this pid lives, and reaps it through the zygote alone.
        if not record.locked():
            raise ContainerError(f"container {record.name} has just ended")
        yield pid, pidfd
    finally:
        os.close(pidfd)


def command(
    record: Record,
    args: tuple[str, ...],
    *,
    env: tuple[tuple[str, str], ...] = (),
    cwd: str | None = None,
    user: str | None = None,
    privileged: bool = False,
    terminal: tuple[int, int] | None = None,
    detached: bool = False,
) -> enter.Command:
    """A command for inside. Raises: ContextError for an unknown user, ContainerError."""
    sandbox = record.settings["sandbox"]
    who: dict[str, Any] = {"uid": sandbox["uid"], "gid": sandbox["gid"], "groups": list(sandbox["groups"])}
    environment = dict(map(tuple, sandbox["env"]))
    if user is not None:
        resolved = resolve_user(record, user)
        who = {"uid": resolved[0], "gid": resolved[1], "groups": list(resolved[2])}
        environment["HOME"] = resolved[3]
    if terminal is not None:
        environment.setdefault("TERM", "xterm")
    environment.update(env)
    privileged = privileged or bool(sandbox["privileged"])
    mask = (1 << len(linux.CAPABILITIES)) - 1 if privileged else capability_mask(frozenset(sandbox["capabilities"]))
    return enter.Command(
        args=args,
        env=environment,
        cwd=cwd or sandbox["cwd"],
        identity={**who, "capabilities": mask, "no_new_privs": sandbox["no_new_privs"]},
        seccomp=None if privileged else _filter(record),
        rlimits=tuple((name, soft, hard) for name, soft, hard in sandbox["rlimits"]),
        umask=int(sandbox["umask"]),
        terminal=terminal,
        detached=detached,
    )


def run_inside(
    record: Record,
    args: tuple[str, ...],
    *,
    front: Front | None,
    tty: bool = False,
    env: tuple[tuple[str, str], ...] = (),
    cwd: str | None = None,
    user: str | None = None,
    privileged: bool = False,
) -> int:
    """Run a command in a container, and stay with it; its status. Without `front` it is left alone: 0.

    Raises: ContainerError if the container does not run, SandboxError, ContextError.
    """
    if record.status == "paused":
        raise ContainerError(f"container {record.name} is paused", hint=f"pybuild unpause {record.name}")
    # An ordinary user's container lies in the namespace of the command that started it.
    enter.join_user_namespace(_pid(record))
    events.of_container(record, "exec_start", command=" ".join(args)[:200])
    if record.settings.get("runtime"):
        from builder.container import runtimes

        return runtimes.run_inside(
            record, args, front=front, tty=tty, env=env, cwd=cwd, user=user, privileged=privileged
        )
    with first_process(record) as (pid, pidfd):
        window = (front.window() if front is not None else (24, 80)) if tty else None
        inner = command(
            record, args, env=env, cwd=cwd, user=user, privileged=privileged, terminal=window, detached=front is None
        )
        if front is not None and not tty and not _terminals(front):
            # Files and pipes can be the command's own.
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            try:
                entered = enter.spawn(pid, pidfd, inner, front.input_fd if front.stdin else null, *front.output)
            finally:
                os.close(null)
            with front.engaged(entered.signal) as signals:
                return attend(entered, front, signals, {}, -1)
        return _piped(pid, pidfd, inner, front)


def _pid(record: Record) -> int:
    with first_process(record) as (pid, _pidfd):
        return pid


def _terminals(front: Front) -> bool:
    return any(os.isatty(fd) for fd in (*front.output, *([front.input_fd] if front.stdin else [])))


def _piped(pid: int, pidfd: int, inner: enter.Command, front: Front | None) -> int:
    """Through pipes, or the command's terminal: nobody inside gets hold of ours."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    fds = [null]
    try:
        if front is None or inner.terminal is not None:
            entered = enter.spawn(pid, pidfd, inner, null, null, null)
            outputs, typed = ({entered.terminal: 1}, entered.terminal) if inner.terminal else ({}, -1)
        else:
            in_r, in_w = os.pipe2(os.O_CLOEXEC)
            out_r, out_w = os.pipe2(os.O_CLOEXEC)
            err_r, err_w = os.pipe2(os.O_CLOEXEC)
            fds += [in_r, out_w, err_w]
            entered = enter.spawn(pid, pidfd, inner, in_r if front.stdin else null, out_w, err_w)
            outputs, typed = {out_r: 1, err_r: 2}, in_w
    finally:
        for fd in fds:
            os.close(fd)
    if front is None:
        return 0
    with front.engaged(lambda number: _caught(number, entered, front)) as signals:
        return attend(entered, front, signals, outputs, typed if front.stdin else -1)


def _caught(number: int, entered: enter.Entered, front: Front) -> None:
    from builder.sandbox import terminal

    if number != signal.SIGWINCH:
        entered.signal(number)
    elif entered.terminal >= 0:
        with contextlib.suppress(OSError):
            terminal.resize(entered.terminal, *front.window())


def attend(entered: Attended, front: Front, signals: int, outputs: dict[int, int], typed: int) -> int:
    """Copy to and fro until the command has ended and all that it said is shown."""
    poller = select.poll()
    poller.register(entered, select.POLLIN)
    poller.register(signals, select.POLLIN)
    for fd in outputs:
        poller.register(fd, select.POLLIN)
    if typed >= 0:
        poller.register(front.input_fd, select.POLLIN)
        os.set_blocking(typed, False)
    status: int | None = None
    pending = b""
    while status is None or outputs:
        # What the command left running may hold the pipes for ever.
        events = poller.poll(None if status is None else 200)
        if status is not None and not events:
            break
        for fd, event in events:
            if event & select.POLLOUT and fd == typed:
                pending = _give(typed, pending)
                if not pending:
                    poller.register(typed, select.POLLIN if typed in outputs else 0)
                    poller.register(front.input_fd, select.POLLIN)
            if fd in outputs and event & ~select.POLLOUT:
                data = _said(fd)
                if data is None:
                    poller.unregister(fd)
                    del outputs[fd]
                elif data:
                    front.show(1 if fd == entered.terminal else outputs[fd], data)
            elif fd == signals:
                front.take_signals(fd)
            elif fd == front.input_fd and typed >= 0:
                data = os.read(fd, 4096)
                if not data:
                    poller.unregister(fd)
                    if typed == entered.terminal:
                        _give(typed, b"\x04")
                    else:
                        os.close(typed)
                        typed = -1
                    continue
                pending = _give(typed, data)
                if pending:
                    poller.register(typed, (select.POLLIN if typed in outputs else 0) | select.POLLOUT)
                    poller.register(fd, 0)
            elif status is None and fd == entered.fileno():
                poller.unregister(fd)
                status = entered.wait()
    return status or 0


def _give(fd: int, data: bytes) -> bytes:
    """Write what is taken at once; the rest."""
    try:
        while data:
            data = data[os.write(fd, data) :]
    except BlockingIOError:
        return data
    except OSError:
        return b""
    return b""


def _said(fd: int) -> bytes | None:
    """What there is to read; None at the end."""
    try:
        return os.read(fd, 1 << 16) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None


def _filter(record: Record) -> bytes | None:
    """The compiled seccomp filter."""
    from builder.container import filters

    sandbox = record.settings["sandbox"]
    if sandbox["seccomp"] == "unconfined":
        return None

    def make() -> bytes | None:
        from builder.container import codec
        from builder.sandbox.launcher import compiled_filter

        return compiled_filter(codec.decode(sandbox))

    return filters.program(record.root, sandbox["capabilities"], make) if sandbox["seccomp"] == "default" else make()


def resolve_user(record: Record, user: str) -> tuple[int, int, tuple[int, ...], str]:
    """(uid, gid, groups, home) of a user by the container's own files, as they are now. Raises: ContextError."""
    from builder.solve import accounts

    with first_process(record) as (pid, _pidfd):
        if user.replace(":", "").isdigit() and ":" in user:
            uid, gid = user.split(":")
            return int(uid), int(gid), (), "/"
        try:
            root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise ContainerError(f"cannot look into container {record.name}: {e.strerror}") from e
        try:
            found = accounts.resolve_user(root, user)
        finally:
            os.close(root)
    return found.uid, found.gid, found.groups, found.home
