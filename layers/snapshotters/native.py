"""Snapshots by copying: each holds the whole tree, for kernels and file systems without overlayfs.

`prepare` copies the parent's tree (by reflink where the file system can: nearly free on btrfs and
XFS); mounts are plain binds. Layers come from comparing a tree with its parent's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from layers.errors import StoreError
from layers.oci import Digest, chain_id
from layers.snapshot import ActiveSnapshot, Dialect, Mount, Snapshot
from layers.snapshotters.catalog import Catalog, Entry, disk_error
from layers.snapshotters.overlay import LayerApplier, rebased_id
from layers.trees import copy_tree


class NativeSnapshotter:
    """See `layers.snapshot.Snapshotter`."""

    driver = "native"

    def __init__(self, catalog: Catalog, dialect: Dialect) -> None:
        self._catalog = catalog
        self._dialect: Dialect = dialect

    @property
    def dialect(self) -> Dialect:
        return self._dialect

    @property
    def label(self) -> str:
        """Driver and dialect in one: snapshots of another label are not seen."""
        return self._catalog.label

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

    def kept(self, keep: str) -> ActiveSnapshot | None:
        """An active snapshot that was prepared with this `keep`, by whatever process."""
        entry = self._catalog.get(f"keep:{keep}", active=True)
        return None if entry is None else self._active(entry)

    def pin(self, keep: str, snapshot: str) -> None:
        """See Catalog.pin."""
        self._catalog.pin(keep, snapshot)

    def unpin(self, keep: str) -> None:
        """See Catalog.unpin."""
        self._catalog.unpin(keep)

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

    def commit(self, active: ActiveSnapshot, *, id: str | None = None) -> Snapshot:
        return self._snapshot(self._catalog.commit(active.id, id=id, parent=active.parent))

    def rebase(self, snapshot: str, parent: str | None) -> Snapshot:
        """See Snapshotter.rebase: what the snapshot changed is packed as a layer and unpacked onto the other parent."""
        source = self._catalog.get(snapshot)
        if source is None:
            raise StoreError(f"snapshot {snapshot} is not in the store")
        if source.parent == parent:
            return self._snapshot(source)
        id = rebased_id(snapshot, parent)
        there = self._catalog.get(id)
        if there is not None:
            return self._snapshot(there)
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

    def import_layer(self, parent: str | None, diff_id: Digest, apply: LayerApplier) -> Snapshot:
        """See OverlaySnapshotter.import_layer; `apply` changes a copy of the parent's tree."""
        name = chain_id([Digest(parent), diff_id] if parent is not None else [diff_id])
        there = self._catalog.get(name)
        if there is not None:
            return self._snapshot(there)
        active = self.prepare(parent)
        try:
            apply(active, ())
        except BaseException:
            self.discard(active)
            raise
        return self.commit(active, id=name)

    def get(self, id: str) -> Snapshot | None:
        entry = self._catalog.get(id)
        return None if entry is None else self._snapshot(entry)

    def chain(self, id: str) -> Sequence[Snapshot]:
        return [self._snapshot(entry) for entry in reversed(self._catalog.chain(id))]

    def discard(self, active: ActiveSnapshot) -> None:
        self._catalog.abandon(active.id)

    def remove(self, id: str) -> None:
        self._catalog.drop(id)

    def _snapshot(self, entry: Entry) -> Snapshot:
        return Snapshot(entry.id, entry.parent, self._catalog.fs(entry.dir), self.driver)
