"""Snapshots by copying: each holds the whole tree, for kernels and file systems without overlayfs.

`prepare` copies the parent's tree (by reflink where the file system can: nearly free on btrfs and
XFS); mounts are plain binds. Layers come from comparing a tree with its parent's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from layers.errors import StoreError
from layers.snapshot import ActiveSnapshot, Mount, Snapshot
from layers.snapshotters.catalog import Entry, disk_error
from layers.snapshotters.catalogued import CataloguedSnapshotter
from layers.trees import copy_tree


class NativeSnapshotter(CataloguedSnapshotter):
    """See `layers.snapshot.Snapshotter`."""

    driver = "native"

    def prepare(self, parent: str | None, *, keep: str | None = None) -> ActiveSnapshot:
        """See Snapshotter.prepare. With `keep`, the snapshot outlives this process under that name."""
        entry = self._catalog.begin(parent, work=False, keep=keep)
        active = self._active(entry)
        if parent is not None:
            try:
                source = self._catalog.get(parent)
                if source is None:
                    raise StoreError(f"snapshot {parent} is not in the store")
                fd = os.open(self._catalog.fs(source.dir), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    copy_tree(fd, str(active.path))
                finally:
                    os.close(fd)
            except BaseException as e:
                self.discard(active)
                if isinstance(e, OSError):
                    raise disk_error(e, str(active.path)) from e
                raise
        return active

    def reset_work(self, active: ActiveSnapshot) -> None:
        """Nothing: there is no mount that would mind."""

    def _active(self, entry: Entry) -> ActiveSnapshot:
        fs = self._catalog.fs(entry.dir)
        return ActiveSnapshot(entry.id, entry.parent, fs, Mount("bind", (fs,), dialect=self._dialect))

    def view(self, snapshot: str | None) -> Mount:
        if snapshot is None:
            return Mount("bind", (self._catalog.empty(),), readonly=True, dialect=self._dialect)
        entry = self._catalog.get(snapshot)
        if entry is None:
            raise StoreError(f"snapshot {snapshot} is not in the store")
        return Mount("bind", (self._catalog.fs(entry.dir),), readonly=True, dialect=self._dialect)

    def _rebased(self, source: Entry, id: str, parent: str | None) -> Snapshot:
        # What the snapshot changed is packed as a layer and unpacked onto the other parent.
        active = self.prepare(parent)
        try:
            self._replay(source, active)
        except BaseException as e:
            self.discard(active)
            if isinstance(e, OSError):
                raise disk_error(e, str(active.path)) from e
            raise
        return self.commit(active, id=id)

    def _replay(self, source: Entry, active: ActiveSnapshot) -> None:
        from layers.apply import apply_layer
        from layers.changeset import write_layer
        from layers.layerdiff import diff_trees

        below = self._catalog.get(source.parent) if source.parent is not None else None
        old = None if below is None else self._catalog.fs(below.dir)
        new = self._catalog.fs(source.dir)
        fd = os.open(active.path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        with open(fd, "w+b") as layer:
            write_layer(diff_trees(old, new), new, layer, compression="none", nanoseconds=True)
            layer.seek(0)
            apply_layer(layer, active.path, whiteouts="delete", dialect=self._dialect)

    def _beneath(self, active: ActiveSnapshot) -> Sequence[Path]:
        return ()  # the layer changes a copy of the parent's tree
