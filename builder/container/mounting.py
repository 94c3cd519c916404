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
    _refuse_elsewhere(container.record)
    snapshots = container.store.snapshots
    active = _active(container)
    if active is None:
        active = snapshots.prepare(container.top, keep=_keep(container.record))
    else:
        snapshots.reset_work(active)
    attach(active.mount, place, f"working container {container.record.name}")
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


def _seal(container: WorkingContainer) -> None:
    _refuse_elsewhere(container.record)
    detach(mount_point(container.record))
    active = _active(container)
    if active is None:
        return
    if _is_changed(active):
        container.advance([Work(active=active)], [Line(CREATED_BY, 0)])
    else:
        container.store.snapshots.discard(active)


def _is_changed(active: ActiveSnapshot) -> bool:
    from layers.layerdiff import diff_overlay, diff_trees

    if active.mount.type == "overlay":
        return next(iter(diff_overlay(active.path, active.mount.lower, active.mount.dialect)), None) is not None
    return next(iter(diff_trees(None, active.path)), None) is not None


def _active(container: WorkingContainer) -> ActiveSnapshot | None:
    return container.store.snapshots.kept(_keep(container.record))


def _keep(record: Record) -> str:
    return f"{record.id}.mount"


def _refuse_elsewhere(record: Record) -> None:
    """Two mounts of one upper directory would spoil it. Raises: ContainerError."""
    place = mount_point(record)
    if not os.path.lexists(place) or is_mounted(place):
        return
    seen = {_namespace("self")}
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            namespace = _namespace(process)
            if namespace not in seen and is_mounted(place, process):
                raise ContainerError(
                    f"working container {record.name} is mounted in another mount namespace, that of process {process}",
                    hint="work there, or unmount it there",
                )
            seen.add(namespace)


def _namespace(process: str) -> str:
    return os.readlink(f"/proc/{process}/ns/mnt")
