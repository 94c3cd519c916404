"""The life of containers: start, stop, kill, restart, pause, wait, rename, remove.

Functions take the store's directory and a container's name or ID. Those that start or remove one need
the user namespace of snapshots, entered beforehand (`builder.api.prepare_namespaces`); the others do not.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from builder.container import control, events, records
from builder.container.records import ContainerError, Record, find
from layers.errors import PybuildError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from builder.container.front import Front
    from builder.container.options import Restart
    from builder.sandbox.launcher import Launcher
    from builder.sandbox.spec import Resources
    from layers.store import Store

_LEFT_BEHIND = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTSTP)
"""What a monitor without a terminal ignores."""
_SIGNALS = 64
_NUMBER = re.compile("[0-9]{1,2}")
_REAL_TIME = re.compile(r"(RTMIN|RTMAX)([+-][0-9]{1,2})?")
_HALF_MADE_S = 60.0
_STOP_GRACE_S = 20.0
"""How long a monitor may take to notice that its container was killed."""


def signal_number(text: str) -> int:
    """A signal by number or name, with or without SIG. Raises: ContainerError."""
    word = text.strip().upper()
    name = word.removeprefix("SIG")
    number: object = getattr(signal, f"SIG{name}", None)
    real = _REAL_TIME.fullmatch(name)
    if real is not None:
        number = int(getattr(signal, f"SIG{real[1]}")) + int(real[2] or 0)
    elif _NUMBER.fullmatch(word):
        number = int(word)
    elif not isinstance(number, signal.Signals):
        number = 0
    if not isinstance(number, int) or not 0 < number <= _SIGNALS:
        raise ContainerError(f"there is no signal {text[:40]!r}", hint="such as TERM, SIGKILL or 9")
    return int(number)


# Starting


def run_foreground(
    record: Record, launcher: Launcher, front: Front | None, ended: Callable[[], None] = lambda: None
) -> int:
    """Start a container and stay with it; its command's status. `ended` is called while nobody else can start it.

    Raises: ContainerError, SandboxError, what `ended` raises.
    """
    from builder.container.monitor import Monitor

    lock = _take_lock(record)
    try:
        try:
            return Monitor(record, launcher, front).run()
        finally:
            ended()
    finally:
        os.close(lock)


def start_detached(record: Record) -> None:
    """Start a container under a monitor of its own, and return once its command runs.

    The caller has one thread and no store open: neither survives a fork.
    Raises: ContainerError, SandboxError with what kept it from starting.
    """
    lock = _take_lock(record)
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _become_monitor(record, lock, write)
    os.close(write)
    os.close(lock)
    with open(read, "rb") as stream:
        words = stream.read().decode(errors="replace")
    os.waitpid(pid, 0)
    if words != "ok":
        raise ContainerError(words.partition("\n")[0] or "its monitor died", hint=words.partition("\n")[2] or None)


def launcher_of(record: Record) -> Launcher:
    """What starts this container. Raises: SandboxError."""
    from builder.container.starting import start_launcher

    sandbox = record.settings["sandbox"]
    own_pids = all(kind != "pid" for kind, _ in sandbox.get("shared", ()))
    return start_launcher(record.settings.get("runtime"), sandbox.get("network", "host"), own_pids=own_pids)


def _take_lock(record: Record) -> int:
    lock = record.lock()
    if lock is None:
        raise ContainerError(f"container {record.name} is running already")
    os.set_inheritable(lock, False)
    return lock


def _become_monitor(record: Record, lock: int, ready: int) -> NoReturn:
    """The process between and, forked from it so that nobody waits for it, the monitor. Never returns."""
    status = 0
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        _settle({lock, ready})
        status = _monitor(record, ready)
    except PybuildError as e:
        with contextlib.suppress(OSError):
            os.write(ready, f"{e}\n{e.hint or ''}".encode(errors="replace")[:4000])
    except BaseException as e:  # noqa: BLE001 - the process boundary
        with contextlib.suppress(OSError):
            os.write(ready, f"{type(e).__name__}: {e}".encode(errors="replace")[:4000])
    finally:
        os._exit(status)


def go_on_alone() -> None:
    """End this process for who waits for it, with success, and go on as a child of it without its terminal.

    For a process of one thread, with no store open.
    """
    # Before the fork: the end of a session's first process hangs up on all others in the foreground.
    for number in _LEFT_BEHIND:
        signal.signal(number, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.chdir("/")


def _settle(keep: set[int]) -> None:
    """Leave the caller behind: its directory, its descriptors, its signals."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    sys.stdin = sys.stdout = sys.stderr = open(os.devnull, "r+")  # noqa: SIM115 - for good
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep and fd != sys.stdin.fileno():
            with contextlib.suppress(OSError):
                os.close(fd)
    for number in _LEFT_BEHIND:
        signal.signal(number, signal.SIG_IGN)


def _monitor(record: Record, ready: int) -> int:
    from builder.container.monitor import Monitor

    launcher = launcher_of(record)
    try:
        monitor = Monitor(record, launcher, ready_fd=ready)

        def terminate(_number: int, _frame: object) -> None:
            raise SystemExit(143)

        signal.signal(signal.SIGTERM, terminate)
        monitor.run()
    finally:
        launcher.close()
    if record.settings["auto_remove"]:
        from layers.store import Store

        with Store.open(record.root) as store:
            remove_record(store, record, volumes=True, locked=True)
    return 0


# Ending


def stop(root: Path, word: str, *, timeout_s: float | None = None, number: int | None = None) -> None:
    """Send the stop signal, and SIGKILL after `timeout_s`; return when it has ended. No error if it had.

    Raises: NoSuchContainer, ContainerError.
    """
    record = find(root, word)
    grace = float(record.settings["stop_timeout_s"]) if timeout_s is None else timeout_s
    chosen = signal_number(record.settings["stop_signal"]) if number is None else number
    if not record.locked():
        return
    with contextlib.suppress(ContainerError):
        control.ask(record, do="stop", number=chosen, timeout_s=grace)
    if not record.wait(grace + _STOP_GRACE_S):
        raise ContainerError(f"container {record.name} does not end: its monitor is stuck")
    events.of_container(record, "stop")


def kill(root: Path, word: str, number: int = signal.SIGKILL) -> None:
    """Send a signal to a running container's first process. Raises: NoSuchContainer, ContainerError."""
    record = find(root, word)
    control.ask(record, do="signal", number=int(number), final=number == signal.SIGKILL)
    if number == signal.SIGKILL:
        record.wait(_STOP_GRACE_S)


def pause(root: Path, word: str) -> None:
    """Freeze every process of a container. Raises: NoSuchContainer, ContainerError."""
    control.ask(find(root, word), do="pause")


def unpause(root: Path, word: str) -> None:
    """Let a paused container go on. Raises: NoSuchContainer, ContainerError."""
    control.ask(find(root, word), do="resume")


def wait(root: Path, word: str) -> int:
    """Wait for a container's end; its exit status. Raises: NoSuchContainer."""
    record = find(root, word)
    while True:
        record.wait()
        with contextlib.suppress(records.NoSuchContainer):
            record.refresh()
        if record.status != "restarting" or not record.locked():
            return int(record.state.get("exit_code") or 0)


def rename(root: Path, word: str, name: str) -> None:
    """Give a container another name. Raises: NoSuchContainer, ContainerError if it is taken."""
    record = find(root, word, working=True)
    if record.working:
        from builder.container import working

        working.rename(record, name)
        return
    old = record.name
    if old == name:
        return
    records.take_name(root, name, record.id)
    record.settings["name"] = name
    record.save_settings()
    records.drop_name(root, old, record.id)
    events.of_container(record, "rename", oldName=old)


def update(root: Path, word: str, limits: Resources, restart: Restart | None = None) -> None:
    """Change a container's limits (None leaves one as it is) and restart policy, at once if it runs.

    Raises: NoSuchContainer; ContainerError where a limit cannot be had.
    """
    from builder.container import codec

    record = find(root, word)
    wanted = codec.encode_resources(limits)
    if wanted and record.running:
        control.ask(record, do="limits", limits=wanted)
    record.settings["sandbox"]["resources"] |= wanted
    if restart is not None:
        if restart.name != "no" and record.settings["auto_remove"]:
            raise ContainerError(f"container {record.name} is removed when it ends: it cannot be started again")
        record.settings["restart"] = list(restart)
    record.save_settings()
    events.of_container(record, "update")


# Removing


def remove(store: Store, word: str, *, force: bool = False, volumes: bool = False) -> str:
    """Remove a container, its snapshot, its log, with `volumes` its anonymous volumes; its ID.

    Raises: NoSuchContainer; ContainerError while it runs, unless `force`, which kills it.
    """
    record = _find_damaged(store.root, word) if force else find(store.root, word, working=True)
    if record.working:
        from builder.container import working

        working.remove(store, record, force=force)
        return record.id
    if record.locked():
        if not force:
            raise ContainerError(
                f"container {record.name} is running", hint="stop it first, or use --force, which kills it"
            )
        with contextlib.suppress(ContainerError):
            control.ask(record, do="stop", number=int(signal.SIGKILL), timeout_s=0)
        if not record.wait(_STOP_GRACE_S):
            raise ContainerError(f"container {record.name} does not end: its monitor is stuck")
    remove_record(store, record, volumes=volumes)
    return record.id


def _find_damaged(root: Path, word: str) -> Record:
    """As `find`, but one whose documents cannot be read is found too, by its whole name or ID."""
    try:
        return find(root, word, working=True)
    except records.NoSuchContainer:
        raise
    except ContainerError:
        top = records.containers_dir(root)
        with contextlib.suppress(OSError):
            return Record(top / os.readlink(top / "names" / word))
        if (top / word).is_dir():
            return Record(top / word)
        raise


def remove_record(store: Store, record: Record, *, volumes: bool, locked: bool = False) -> None:
    """Remove a container that does not run. Its files go last: what is left after a crash is removed again."""
    from layers.trees import remove_tree

    lock = None if locked else record.lock()
    if lock is None and not locked:
        raise ContainerError(f"container {record.name} has just been started")
    try:
        active = store.snapshots.kept(str(record.settings.get("snapshot", record.id)))
        if active is not None:
            store.snapshots.discard(active)
        anonymous = [str(v["name"]) for v in record.settings.get("volumes", []) if v.get("anonymous")]
        if record.settings:
            records.drop_name(store.root, record.name, record.id)
        else:
            records.drop_names(store.root, record.id)
        with contextlib.suppress(FileNotFoundError):
            remove_tree(str(record.directory))
        events.of_container(record, "destroy")
        if record.state.get("error"):
            clear_remains()
        if volumes and anonymous:
            from builder.container import volumes as rooms

            in_use = rooms.users(store.root)
            for name in anonymous:
                with contextlib.suppress(ContainerError):
                    rooms.remove(store.root, name, in_use=in_use)
    finally:
        if lock is not None:
            os.close(lock)


def clear_remains() -> None:
    """Remove control groups and networks of containers whose processes were all killed. Never raises OSError."""
    from builder.sandbox import cgroup, network

    cgroup.sweep_all()
    network.sweep()


def sweep(store: Store) -> None:
    """Remove what a killed `create` or `run` has begun: containers without settings, a minute old. Cheap."""
    from layers.trees import remove_tree

    for id in records.ids(store.root):
        record = Record(records.containers_dir(store.root) / id)
        try:
            if record.path("settings.json").exists() or time.time() - record.directory.stat().st_mtime < _HALF_MADE_S:
                continue
        except OSError:
            continue
        active = store.snapshots.kept(id)
        if active is not None:
            store.snapshots.discard(active)
        for name in os.listdir(records.containers_dir(store.root) / "names"):
            records.drop_name(store.root, name, id)
        with contextlib.suppress(OSError):
            remove_tree(str(record.directory))


def prune(store: Store, matches: Callable[[Record], bool] = lambda _record: True) -> list[str]:
    """Remove all containers that do not run, working ones excepted; their IDs."""
    sweep(store)
    gone = []
    for record in records.every(store.root):
        if record.locked() or not matches(record):
            continue
        with contextlib.suppress(ContainerError):
            remove_record(store, record, volumes=False)
            gone.append(record.id)
    return gone
