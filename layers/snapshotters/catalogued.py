"""What the snapshotters have in common, whatever a snapshot is made of: names, chains, commits.

A driver says how an active snapshot is made and mounted, and what it takes to put a snapshot's changes
on another parent; the rows and directories are the catalog's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from layers.errors import StoreError
from layers.oci import Digest, chain_id
from layers.snapshot import ActiveSnapshot, Snapshot
from layers.snapshotters.catalog import Catalog, Entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Literal

    from layers.snapshot import Dialect

LayerApplier = Callable[[ActiveSnapshot, Sequence[Path]], None]
"""Fills an active snapshot with a layer; the paths are the layers beneath, topmost first."""


class CataloguedSnapshotter(ABC):
    """See `layers.snapshot.Snapshotter`."""

    driver: ClassVar[Literal["overlay", "native"]]

    def __init__(self, catalog: Catalog, dialect: Dialect) -> None:
        self._catalog = catalog
        self._dialect: Dialect = dialect

    # -- a driver's own --------------------------------------------------------------------------

    @abstractmethod
    def prepare(self, parent: str | None, *, keep: str | None = None) -> ActiveSnapshot:
        """See Snapshotter.prepare. With `keep`, the snapshot outlives this process under that name."""

    @abstractmethod
    def _active(self, entry: Entry) -> ActiveSnapshot:
        """The active snapshot of a row."""

    @abstractmethod
    def _rebased(self, source: Entry, id: str, parent: str | None) -> Snapshot:
        """`source`'s changes on another parent, under that name."""

    @abstractmethod
    def _beneath(self, active: ActiveSnapshot) -> Sequence[Path]:
        """What a layer that fills an active snapshot is told of those beneath it."""

    # -- what they share -------------------------------------------------------------------------

    @property
    def dialect(self) -> Dialect:
        return self._dialect

    @property
    def label(self) -> str:
        """Driver and dialect in one: snapshots of another label are not seen."""
        return self._catalog.label

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

    def commit(self, active: ActiveSnapshot, *, id: str | None = None) -> Snapshot:
        """See Snapshotter.commit."""
        return self._snapshot(self._catalog.commit(active.id, id=id, parent=active.parent))

    def rebase(self, snapshot: str, parent: str | None) -> Snapshot:
        """See Snapshotter.rebase."""
        source = self._catalog.get(snapshot)
        if source is None:
            raise StoreError(f"snapshot {snapshot} is not in the store")
        if source.parent == parent:
            return self._snapshot(source)
        # The same name for whoever asks.
        id = "rebased:" + Digest.of(f"{snapshot}\n{parent or ''}".encode()).encoded
        there = self._catalog.get(id)
        return self._snapshot(there) if there is not None else self._rebased(source, id, parent)

    def import_layer(self, parent: str | None, diff_id: Digest, apply: LayerApplier) -> Snapshot:
        """The snapshot of a base layer on `parent`, a chain ID; `apply` fills it if it is not there.

        Snapshots of base layers are called by their chain ID, so that images share them. When two
        processes import one, the second to finish drops its own.
        """
        name = chain_id([Digest(parent), diff_id] if parent is not None else [diff_id])
        there = self._catalog.get(name)
        if there is not None:
            return self._snapshot(there)
        active = self.prepare(parent)
        try:
            apply(active, self._beneath(active))
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
