"""Snapshots by overlayfs: a snapshot is its layer's changes, stacked by the kernel when it is mounted.

`prepare` and `commit` cost two or three directories and a row, whatever the size of the base. The
mount itself is made where it is needed, from the `Mount` that describes it: by the sandbox in its
own namespaces, or detached by `open_tree` for a reader in this process.
Kernel documentation: filesystems/overlayfs.rst. overlayfs stacks at most 500 lower directories;
a longer chain gets its first `MAX_LOWER` merged into one directory, once (`_flattened`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from layers.errors import StoreError
from layers.snapshot import ActiveSnapshot, Mount, Snapshot
from layers.snapshotters.catalog import Catalog, Entry, disk_error
from layers.snapshotters.catalogued import CataloguedSnapshotter
from layers.values import Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.records import LayerRecord
    from layers.snapshot import Dialect


class LayerUnpacker(Protocol):
    """How a packed snapshot comes to its files."""

    def alone(self, key: str) -> AbstractContextManager[bool]:
        """Be the only one, of all threads and processes, that unpacks what `key` stands for."""

    def unpack(self, id: str, active: ActiveSnapshot) -> None:
        """Unpack the layer of snapshot `id` into an active one on the same parent.

        Raises: StoreError if it is lost; LayerError, DigestMismatch.
        """


MAX_LOWER = 497
"""The kernel's OVL_MAX_STACK is 500: a sandbox adds two for mount points, a reader of a container its upper."""


class OverlaySnapshotter(CataloguedSnapshotter):
    """See `layers.snapshot.Snapshotter`."""

    driver = "overlay"

    def __init__(
        self,
        catalog: Catalog,
        dialect: Dialect,
        *,
        max_lower: int = MAX_LOWER,
        program: str | None = None,
        unpack: LayerUnpacker | None = None,
    ) -> None:
        super().__init__(catalog, dialect)
        self._program = program
        self._unpack = unpack
        self._max_lower = max_lower
        # A committed chain never changes while it exists, and a directory's name is never reused.
        self._lowers: dict[str, tuple[str, tuple[Path, ...]]] = {}

    def prepare(self, parent: str | None, *, keep: str | None = None) -> ActiveSnapshot:
        """See Snapshotter.prepare. With `keep`, the snapshot outlives this process under that name."""
        lower = self._lower(parent) if parent is not None else ()
        entry = self._catalog.begin(parent, work=parent is not None, keep=keep)
        active = self._active(entry)
        if lower:
            copy_root(lower[0], active.path)
        return active

    def reset_work(self, active: ActiveSnapshot) -> None:
        """Before an active snapshot is mounted once more: a volatile mount refuses a used work directory."""
        work = active.mount.work
        if work is not None:
            from layers.trees import remove_tree

            remove_tree(str(work))
            os.mkdir(work, 0o700)

    def _active(self, entry: Entry) -> ActiveSnapshot:
        lower = self._lower(entry.parent) if entry.parent is not None else ()
        fs, work = self._catalog.fs(entry.dir), self._catalog.work(entry.dir)
        if lower:
            mount = Mount("overlay", lower, upper=fs, work=work, dialect=self._dialect, program=self._program)
        else:
            mount = Mount("bind", (fs,), dialect=self._dialect, program=self._program)
        return ActiveSnapshot(entry.id, entry.parent, fs, mount)

    def view(self, snapshot: str | None) -> Mount:
        if snapshot is None:
            empty = self._catalog.empty()
            return Mount("bind", (empty,), readonly=True, dialect=self._dialect, program=self._program)
        lower = self._lower(snapshot)
        # overlayfs wants two lower directories at least.
        kind = "overlay" if len(lower) > 1 else "bind"
        return Mount(kind, lower, None, None, True, self._dialect, self._program)  # type: ignore[arg-type]

    def commit(self, active: ActiveSnapshot, *, id: str | None = None) -> Snapshot:
        if self._program is not None and active.mount.type == "overlay":
            from layers import fusemount

            fusemount.normalize(str(active.path), self._dialect)
        return super().commit(active, id=id)

    @property
    def can_defer(self) -> bool:
        """Whether snapshots may be packed here, and what an upper directory shows is its layer as it is."""
        return self._program is None and self._unpack is not None

    def defer(self, parent: str | None, layer: LayerRecord, *, compression: str) -> Snapshot:
        """A committed snapshot that has its layer, and no files until they are asked for by `prepare` or `view`.

        `compression` is the layer's variant, as in `layers.records`. Raises: StoreError.
        """
        return self._snapshot(self._catalog.defer(parent, layer, compression=compression))

    def _filled(self, entry: Entry) -> Entry:
        """The row of a snapshot whose files are there, unpacked now if they have to be. Raises: as LayerUnpacker."""
        if not entry.packed:
            return entry
        assert self._unpack is not None
        with self._unpack.alone(f"{self.label}:{entry.id}"):
            there = self._catalog.get(entry.id)
            if there is not None and there.packed:
                active = self.prepare(entry.parent)
                try:
                    self._unpack.unpack(entry.id, active)
                    self._catalog.fill(entry.id, active.id)
                except BaseException:
                    self.discard(active)
                    raise
                there = self._catalog.get(entry.id)
        if there is None:
            raise StoreError(f"snapshot {entry.id} is not in the store")
        return there

    def _rebased(self, source: Entry, id: str, parent: str | None) -> Snapshot:
        source = self._filled(source)
        return self._snapshot(self._catalog.share(id, source, parent))

    def _beneath(self, active: ActiveSnapshot) -> Sequence[Path]:
        return active.mount.lower if active.mount.type == "overlay" else ()

    def adopt(self, active: ActiveSnapshot, id: str, parent: str | None) -> Snapshot:
        """Commit on another parent than it was prepared on: layers unpack side by side, then are stacked."""
        return self._snapshot(self._catalog.commit(active.id, id=id, parent=parent))

    def remove(self, id: str) -> None:
        self._lowers.pop(id, None)
        super().remove(id)

    def _lower(self, id: str) -> tuple[Path, ...]:
        """A chain's directories, topmost first, no more than the kernel stacks."""
        entry = self._catalog.get(id)
        if entry is None:
            raise StoreError(f"snapshot {id} is not in the store")
        entry = self._filled(entry)
        known = self._lowers.get(id)
        if known is not None and known[0] == entry.dir:
            return known[1]
        below = self._lowers.get(entry.parent) if entry.parent is not None else None
        parent = self._catalog.get(entry.parent) if below is not None and entry.parent is not None else None
        if below is not None and parent is not None and below[0] == parent.dir:
            lower = self._stacked(entry, parent.id, below[1])
        else:
            lower, parent_id = (), ""
            for each in map(self._filled, reversed(self._catalog.chain(id))):
                lower, parent_id = self._stacked(each, parent_id, lower), each.id
        self._lowers[id] = (entry.dir, lower)
        return lower

    def _stacked(self, entry: Entry, parent: str, lower: tuple[Path, ...]) -> tuple[Path, ...]:
        if len(lower) == self._max_lower:
            lower = (self._flattened(parent, lower),)
        top = self._catalog.fs(entry.dir)
        if top in lower:
            # Twice the same `COPY --link`: overlayfs takes no directory twice, and the upper one hides the lower.
            lower = tuple(path for path in lower if path != top)
        return (top, *lower)

    def _flattened(self, id: str, stack: tuple[Path, ...]) -> Path:
        """One directory with the tree that a full stack shows; made once per chain."""
        name = f"flat:{id}"
        there = self._catalog.get(name)
        if there is None:
            entry = self._catalog.begin(None, work=False)
            try:
                fd = open_tree(Mount("overlay", stack, None, None, True, self._dialect, self._program))
                try:
                    from layers.trees import copy_tree

                    copy_tree(fd, str(self._catalog.fs(entry.dir)))
                finally:
                    os.close(fd)
            except BaseException as e:
                self._catalog.abandon(entry.id)
                if isinstance(e, OSError):
                    raise disk_error(e, str(self._catalog.fs(entry.dir))) from e
                raise
            there = self._catalog.commit(entry.id, id=name, parent=None)
        return self._catalog.fs(there.dir)


def open_tree(mount: Mount) -> int:
    """The root of what `mount` describes, as an O_PATH descriptor, without mounting it anywhere.

    To list it, `os.open(".", os.O_RDONLY, dir_fd=fd)`. The tree goes with the last descriptor.
    Raises: StoreError with the kernel's words.
    """
    try:
        if mount.type == "bind":
            return os.open(mount.lower[0], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        from layers import linux

        lower = [os.fspath(path) for path in mount.lower]
        upper = None if mount.upper is None else os.fspath(mount.upper)
        work = None if mount.work is None else os.fspath(mount.work)
        attributes = linux.MOUNT_ATTR_RDONLY if mount.readonly else 0
        if mount.program is not None:
            from layers import fusemount

            return fusemount.mount(mount.program, lower, upper, work, attributes)
        return linux.fsmount_overlay(
            list(lower), upper=upper, work=work, userxattr=mount.dialect == "user", attributes=attributes
        )
    except OSError as e:
        raise StoreError(f"cannot mount a snapshot of {len(mount.lower)} layers: {e}") from e


def overlay_works(directory: Path, dialect: Dialect, program: str | None = None) -> bool:
    """Whether the kernel, or the program, mounts an overlay with its upper directory here, and makes whiteouts."""
    probe = f"{directory}/probe-{os.urandom(4).hex()}"
    try:
        for name in ("", "/a", "/b", "/u", "/w"):
            os.mkdir(probe + name, 0o700)
        lower, upper, work = (Path(f"{probe}/a"), Path(f"{probe}/b")), Path(f"{probe}/u"), Path(f"{probe}/w")
        os.close(os.open(f"{probe}/a/x", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        fd = open_tree(Mount("overlay", lower, upper, work, False, dialect, program))
        try:
            os.unlink("x", dir_fd=fd)
            deleted = os.lstat(f"{probe}/u/x")
        finally:
            os.close(fd)
        return stat.S_ISCHR(deleted.st_mode) and deleted.st_rdev == 0
    except (OSError, StoreError):
        return False
    finally:
        from layers.trees import remove_tree

        remove_tree(probe)


def copy_root(source: Path, target: Path) -> None:
    """The upper directory's own attributes are those that `/` has: take the parent's."""
    status = os.stat(source)
    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(target, status.st_uid, status.st_gid)
    mode = status.st_mode & 0o7777
    if mode != 0o755:
        os.chmod(target, mode)
    for name in os.listxattr(source):
        if not name.startswith(("trusted.overlay.", "user.overlay.")):
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
