"""`exec` in a container of an OCI runtime's: the runtime does it, as it alone knows what its containers are.

The runtime has our descriptors and our terminal; we pass signals on and wait.
https://github.com/opencontainers/runtime-spec/blob/main/config.md#process
"""

from __future__ import annotations

import json
import os
import select
from typing import Any

from builder.container.front import Front
from builder.container.inside import resolve_user
from builder.container.records import ContainerError, Record
from builder.sandbox.runtime import missing_status
from layers import linux


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
    """See `builder.container.inside.run_inside`. Raises: ContainerError."""
    place = record.state["runtime"]
    process = _document(_process(record, args, tty, env, cwd, user, privileged))
    log = os.memfd_create("log")
    path = f"/proc/{os.getpid()}/fd/"
    argv = [place["path"], "--root", place["root"], "--log", f"{path}{log}", "--log-format", "json"]
    argv += ["exec", "--process", f"{path}{process}", *(["--detach"] if front is None else []), place["id"]]
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    stdio = (null, null, null) if front is None else (front.input_fd if front.stdin else null, *front.output)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdio)]
        pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions)
        status = _attend(pid, front)
        words = os.pread(log, 1 << 16, 0).decode(errors="replace") if status else ""
    except OSError as e:
        raise ContainerError(f"container {record.name}: {place['path']}: {e.strerror}") from e
    finally:
        for fd in (process, log, null):
            os.close(fd)
    return missing_status(words) or status


def _attend(pid: int, front: Front | None) -> int:
    """Wait for the runtime, and pass on signals; the status that it ended with."""
    if front is not None:
        # The terminal's mode and size are the runtime's to look after.
        listener = Front(tty=False, stdin=front.stdin, output=front.output, input_fd=front.input_fd)
        pidfd = linux.pidfd_open(pid)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        with listener.engaged(lambda number: linux.pidfd_send_signal(pidfd, number)) as signals:
            poller.register(signals, select.POLLIN)
            while pidfd not in (ready := {fd for fd, _ in poller.poll()}):
                if signals in ready:
                    listener.take_signals(signals)
        os.close(pidfd)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _process(
    record: Record,
    args: tuple[str, ...],
    tty: bool,
    env: tuple[tuple[str, str], ...],
    cwd: str | None,
    user: str | None,
    privileged: bool,
) -> dict[str, Any]:
    sandbox = record.settings["sandbox"]
    uid, gid, groups = sandbox["uid"], sandbox["gid"], tuple(sandbox["groups"])
    environment = dict(map(tuple, sandbox["env"]))
    if user is not None:
        uid, gid, groups, environment["HOME"] = resolve_user(record, user)
    if tty:
        environment.setdefault("TERM", "xterm")
    environment.update(env)
    everything = privileged or sandbox["privileged"]
    names = [f"CAP_{name}" for name in linux.CAPABILITIES] if everything else sandbox["capabilities"]
    held = [] if uid else names
    return {
        "terminal": tty,
        "user": {"uid": uid, "gid": gid, "additionalGids": list(groups)},
        "args": list(args),
        "env": [f"{key}={value}" for key, value in environment.items()],
        "cwd": cwd or sandbox["cwd"],
        "capabilities": {"bounding": names, "permitted": held, "effective": held},
        "noNewPrivileges": bool(sandbox["no_new_privs"]),
    }


def _document(process: dict[str, Any]) -> int:
    """A file of it that has no name, as a descriptor."""
    fd = os.memfd_create("process")
    os.write(fd, json.dumps(process).encode("utf-8", "surrogateescape"))
    return fd
