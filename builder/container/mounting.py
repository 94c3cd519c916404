"""The tree of a working container, mounted so that programs of the host can change it.

While it is mounted its changes go to a snapshot of their own, `ID.mount`. The next step, or `unmount`, makes
them a layer; a step that comes while it is mounted takes it down and mounts the new tree at the same place.
Where overlayfs does not work there is no mounting.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from builder.container.records import ContainerError, Record
from builder.container.working import Line, Work, WorkingContainer
from builder.rootfs import attach, detach, is_mounted, need_overlay

if TYPE_CHECKING:
    from layers.snapshot import ActiveSnapshot
    from layers.store import Store

CREATED_BY = "changes made in a mount"
"""What the history says of a layer that no command made."""


def mount_point(record: Record) -> Path:
    return record.path("merged")


def mounted_at(record: Record) -> Path | None:
    """Where it is mounted in this mount namespace."""
    place = mount_point(record)
    return place if is_mounted(place) else None


def mount(container: WorkingContainer) -> Path:
    """Mount the tree, for reading and writing, in this mount namespace. Idempotent.

    Raises: StoreError (not allowed, no overlayfs); ContainerError if it is mounted in another namespace.
    """
    place = mount_point(container.record)
    if is_mounted(place):
        return place
    need_overlay(container.store)
    refuse_elsewhere(container.record)
    snapshots = container.store.snapshots
    active = snapshots.prepare(container.top, keep=_keep(container.record))
    try:
        _write_note(container.record)
        attach(active.mount, place, f"working container {container.record.name}")
    except BaseException:
        snapshots.discard(active)
        raise
    return place


def unmount(container: WorkingContainer) -> bool:
    """Undo `mount`, and make a layer of what was changed; whether it was mounted. Raises: StoreError (in use)."""
    place = mount_point(container.record)
    there = is_mounted(place)
    _seal(container)
    return there


@contextlib.contextmanager
def set_aside(container: WorkingContainer) -> Iterator[None]:
    """For the block not mounted, with what was changed made a layer; mounted again afterwards, if it was."""
    again = unmount(container)
    try:
        yield
    finally:
        if again:
            mount(container)


def drop(store: Store, record: Record) -> None:
    """Take the mount down, and what was changed in it with it. Raises: StoreError (in use)."""
    detach(mount_point(record))
    store.snapshots.unpin(_keep(record))


def settle(container: WorkingContainer) -> None:
    """Make a layer of what was changed in a mount that is no more, as after a restart or a killed command."""
    if not is_mounted(mount_point(container.record)):
        with contextlib.suppress(ContainerError):
            _seal(container)


def _seal(container: WorkingContainer) -> None:
    active = container.store.snapshots.kept(_keep(container.record))
    if active is None:
        return
    refuse_elsewhere(container.record)
    detach(mount_point(container.record))
    _note(container.record).unlink(missing_ok=True)
    if _is_changed(active):
        container.advance([Work(active=active)], [Line(CREATED_BY, 0)])
    else:
        container.store.snapshots.discard(active)


def _is_changed(active: ActiveSnapshot) -> bool:
    from layers.layerdiff import diff_overlay, diff_trees

    if active.mount.type == "overlay":
        return next(iter(diff_overlay(active.path, active.mount.lower, active.mount.dialect)), None) is not None
    return next(iter(diff_trees(None, active.path)), None) is not None


def _keep(record: Record) -> str:
    return f"{record.id}.mount"


def refuse_elsewhere(record: Record) -> None:
    """Two mounts of one upper directory would spoil it. Raises: ContainerError."""
    place = mount_point(record)
    try:
        pid, started = _note(record).read_text().split()
    except (OSError, ValueError):
        return
    if is_mounted(place) or _started(pid) != started:
        return
    try:
        there = is_mounted(place, pid)
    except PermissionError:
        there = True  # of another user namespace: its mounts are not shown
    except OSError:
        there = False
    if there:
        raise ContainerError(
            f"working container {record.name} is mounted in another mount namespace, that of process {pid}",
            hint="work there, or unmount it there",
        )


def _note(record: Record) -> Path:
    """Says in whose mount namespace it is mounted: the oldest process of that, and when it was started."""
    return record.path("mounted")


def _write_note(record: Record) -> None:
    ours = _namespace("self")
    oldest = (0, str(os.getpid()))
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if _namespace(pid) == ours:
                oldest = min(oldest, (int(_started(pid)), pid)) if oldest[0] else (int(_started(pid)), pid)
    _note(record).write_text(f"{oldest[1]} {_started(oldest[1])}")


def _namespace(pid: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/mnt")


def _started(pid: str) -> str:
    """When a process was started, in ticks since the machine was; "0" if there is none. proc_pid_stat(5)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            return stream.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"
