"""The snapshots table and directories, which all drivers share.

A snapshot is a row (driver, id) and a directory `snapshots/DIR` with `fs` and, while it is being
written, `work`. Directory names are random and never reused, so that a path that somebody holds
means one snapshot or nothing. Several rows may share a directory (`rebase`); it is removed with
the last of them. Rows and directories are brought into agreement under the store lock; a
directory without a row is debris of a crash, which gc removes.

A committed snapshot may be *packed*: its layer is in the store (a row of `layers`, a blob), its files are
not on the disk, and its directory, whose name says so, does not exist. `fill` gives it one, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from layers import faults
from layers.database import EPOCH, Database
from layers.errors import StoreError
from layers.leases import Leases, StoreLock
from layers.records import LayerRecord, insert_layer
from layers.values import NamedTuple

KEPT = "kept"
"""The owner of active snapshots that outlive their process (working containers)."""
PACKED = "packed-"
"""What the directory of a packed snapshot is called, and not yet made."""


class Entry(NamedTuple):
    """A row. `owner` is None once the snapshot is committed."""

    id: str
    parent: str | None
    dir: str
    owner: str | None

    @property
    def packed(self) -> bool:
        """Whether its layer is all that there is of it."""
        return self.dir.startswith(PACKED)


class Catalog:
    """Snapshots of one driver (its label tells dialects apart). Thread-safe."""

    def __init__(
        self,
        root: Path,
        label: str,
        database: Database,
        lock: StoreLock,
        leases: Leases,
        clock: Callable[[], int],
    ) -> None:
        self.label = label
        self._top = str(root / "snapshots")
        self._trash = str(root / "trash")
        self._empty = root / "empty"
        self._database = database
        self._lock = lock
        self._leases = leases
        self._clock = clock

    def fs(self, dir: str) -> Path:
        return Path(f"{self._top}/{dir}/fs")

    def work(self, dir: str) -> Path:
        return Path(f"{self._top}/{dir}/work")

    def empty(self) -> Path:
        """An empty directory that nobody writes to."""
        return self._empty

    def get(self, id: str, *, active: bool = False) -> Entry | None:
        row = self._database.row(
            "SELECT id, parent, dir, owner FROM snapshots WHERE driver=? AND id=?", (self.label, id)
        )
        if row is None or (row[3] is not None) != active:
            return None
        return Entry(*row)  # type: ignore[arg-type]

    def chain(self, id: str) -> list[Entry]:
        """From `id` down to the base. Raises: StoreError if one of them is missing."""
        rows = self._database.rows(
            "WITH RECURSIVE c(id, parent, dir, owner, depth) AS ("
            " SELECT id, parent, dir, owner, 0 FROM snapshots WHERE driver=? AND id=? AND owner IS NULL"
            " UNION ALL SELECT s.id, s.parent, s.dir, s.owner, depth+1 FROM c JOIN snapshots s"
            " ON s.driver=? AND s.id=c.parent WHERE depth < 10000)"
            " SELECT id, parent, dir, owner FROM c ORDER BY depth",
            (self.label, id, self.label),
        )
        entries = [Entry(*row) for row in rows]  # type: ignore[arg-type]
        if not entries:
            raise StoreError(f"snapshot {id} is not in the store")
        if entries[-1].parent is not None:
            raise StoreError(
                f"snapshot {entries[-1].parent}, on which {id} builds, is missing from the store",
                hint="run `pybuild fsck --repair`",
            )
        return entries

    def begin(self, parent: str | None, *, work: bool, keep: str | None = None) -> Entry:
        """Directories and a row for a snapshot to be written; `keep` names one that outlives the process.

        Raises: StoreError (parent unknown, name taken, disk full).
        """
        dir = os.urandom(6).hex()
        id = f"keep:{keep}" if keep is not None else f"active:{dir}"
        owner = KEPT if keep is not None else self._leases.owner()
        base = f"{self._top}/{dir}"
        with self._lock.shared():
            try:
                os.mkdir(base, 0o700)
                os.mkdir(f"{base}/fs", 0o755)
                os.chmod(f"{base}/fs", 0o755)  # noqa: S103 - whatever the umask: it becomes the container's `/`
                if work:
                    os.mkdir(f"{base}/work", 0o700)
                if faults.ARMED:
                    faults.reach("store.prepare.before-row")
                with self._database.write() as c:
                    known = "SELECT 1 FROM snapshots WHERE driver=? AND id=? AND owner IS NULL"
                    if parent is not None and c.execute(known, (self.label, parent)).fetchone() is None:
                        raise StoreError(f"snapshot {parent} is not in the store")
                    taken = "SELECT 1 FROM snapshots WHERE driver=? AND id=?"
                    if keep is not None and c.execute(taken, (self.label, id)).fetchone() is not None:
                        raise StoreError(f"there is a working snapshot {keep!r} already")
                    c.execute(
                        f"INSERT INTO snapshots VALUES(?,?,?,?,?,{EPOCH},?)",
                        (self.label, id, parent, dir, owner, self._clock()),
                    )
            except BaseException as e:
                from layers.trees import remove_tree

                remove_tree(base)
                if isinstance(e, OSError):
                    raise disk_error(e, base) from e
                raise
        return Entry(id, parent, dir, owner)

    def pin(self, keep: str, snapshot: str) -> None:
        """Keep a committed snapshot from gc, beyond this process, until `unpin`; what `keep` pinned before is let go.

        Atomic. Raises: StoreError if there is no such snapshot.
        """
        id = f"keep:{keep}"
        if self.get(id, active=True) is None:
            self.begin(snapshot, work=False, keep=keep)
            return
        with self._lock.shared(), self._database.write() as c:
            known = "SELECT 1 FROM snapshots WHERE driver=? AND id=? AND owner IS NULL"
            if c.execute(known, (self.label, snapshot)).fetchone() is None:
                raise StoreError(f"snapshot {snapshot} is not in the store")
            c.execute("UPDATE snapshots SET parent=? WHERE driver=? AND id=?", (snapshot, self.label, id))

    def unpin(self, keep: str) -> None:
        """Undo `pin`. Idempotent."""
        self.abandon(f"keep:{keep}")

    def commit(self, active: str, *, id: str | None, parent: str | None) -> Entry:
        """Turn a row into a committed one called `id`; if there is such a one, drop this and return that."""
        owner = self._leases.owner()
        entry = self.get(active, active=True)
        if entry is None:
            raise StoreError(f"snapshot {active} is not being written")
        name = id if id is not None else f"snapshot:{entry.dir}"
        self._end_work(entry)
        if faults.ARMED:
            faults.reach("store.commit.before-row")
        with self._lock.shared():
            there = self._commit_row(active, name, parent, owner)
            if faults.ARMED:
                faults.reach("store.commit.after-row")
            trash = self.to_trash(entry.dir) if there is not None else None
        _empty(trash)
        return there if there is not None else Entry(name, parent, entry.dir, None)

    def _commit_row(self, active: str, name: str, parent: str | None, owner: str) -> Entry | None:
        """Rename the row, or delete it if there is one of that name, which is returned."""
        known = "SELECT id, parent, dir, owner FROM snapshots WHERE driver=? AND id=? AND owner IS NULL"
        with self._database.write() as c:
            there = c.execute(known, (self.label, name)).fetchone()
            if there is None:
                if parent is not None and c.execute(known, (self.label, parent)).fetchone() is None:
                    raise StoreError(f"snapshot {parent} is not in the store")
                changed = c.execute(
                    f"UPDATE snapshots SET id=?, parent=?, owner=NULL, epoch={EPOCH} WHERE driver=? AND id=?",  # noqa: S608
                    (name, parent, self.label, active),
                ).rowcount
                if changed != 1:
                    raise StoreError(f"snapshot {active} is not being written")
            else:
                c.execute("DELETE FROM snapshots WHERE driver=? AND id=?", (self.label, active))
            c.execute("INSERT OR IGNORE INTO leases VALUES(?,'','snapshot',?)", (owner, name))
        return None if there is None else Entry(*there)

    def _end_work(self, entry: Entry) -> None:
        # The kernel's own directory in it has no permissions; nothing of it belongs to the layer.
        work = f"{self._top}/{entry.dir}/work"
        try:
            os.rmdir(work)
        except FileNotFoundError:
            pass
        except OSError:
            from layers.trees import remove_tree

            remove_tree(work)

    def defer(self, parent: str | None, layer: LayerRecord, *, compression: str) -> Entry:
        """A committed snapshot that is packed: `layer`, whose blob is in the store, on `parent`. Atomic.

        Raises: StoreError if there is no such parent.
        """
        owner = self._leases.owner()
        number = os.urandom(6).hex()
        entry = Entry(f"snapshot:{number}", parent, f"{PACKED}{number}", None)
        with self._lock.shared(), self._database.write() as c:
            known = "SELECT 1 FROM snapshots WHERE driver=? AND id=? AND owner IS NULL"
            if parent is not None and c.execute(known, (self.label, parent)).fetchone() is None:
                raise StoreError(f"snapshot {parent} is not in the store")
            insert_layer(c, entry.id, layer, compression)
            c.execute(
                f"INSERT INTO snapshots VALUES(?,?,?,?,NULL,{EPOCH},?)",
                (self.label, entry.id, parent, entry.dir, self._clock()),
            )
            c.execute("INSERT OR IGNORE INTO leases VALUES(?,'','snapshot',?)", (owner, entry.id))
        return entry

    def fill(self, id: str, active: str) -> None:
        """Give a packed snapshot the directory of an active one, in which its layer was unpacked, and end that one.

        Atomic. Where another process was first, its directory stays. Raises: StoreError if it was removed meanwhile.
        """
        entry = self.get(active, active=True)
        if entry is None:
            raise StoreError(f"snapshot {active} is not being written")
        self._end_work(entry)
        if faults.ARMED:
            faults.reach("store.fill.before-row")
        with self._lock.shared(), self._database.write() as c:
            found = c.execute(
                "SELECT dir FROM snapshots WHERE driver=? AND id=? AND owner IS NULL", (self.label, id)
            ).fetchone()
            if found is None:
                raise StoreError(f"snapshot {id} is not in the store")
            taken = str(found[0]).startswith(PACKED)
            if taken:
                c.execute("DELETE FROM snapshots WHERE driver=? AND id=?", (self.label, active))
                # The files are as durable as of now: a power cut forgets them, and the row with them.
                c.execute(
                    f"UPDATE snapshots SET dir=?, epoch={EPOCH} WHERE driver=? AND id=?",  # noqa: S608
                    (entry.dir, self.label, id),
                )
        if faults.ARMED:
            faults.reach("store.fill.after-row")
        if not taken:
            self.abandon(active)

    def share(self, id: str, source: Entry, parent: str | None) -> Entry:
        """A committed snapshot `id` on `parent` that has the directory of `source`. Idempotent."""
        owner = self._leases.owner()
        with self._lock.shared(), self._database.write() as c:
            for needed in filter(None, (source.id, parent)):
                known = "SELECT dir FROM snapshots WHERE driver=? AND id=? AND owner IS NULL"
                if c.execute(known, (self.label, needed)).fetchone() is None:
                    raise StoreError(f"snapshot {needed} is not in the store")
            there = c.execute(
                "SELECT id, parent, dir, owner FROM snapshots WHERE driver=? AND id=?", (self.label, id)
            ).fetchone()
            if there is None:
                # The bytes are as durable as their first row says.
                c.execute(
                    "INSERT INTO snapshots SELECT driver, ?, ?, dir, NULL, epoch, ? FROM snapshots"
                    " WHERE driver=? AND id=?",
                    (id, parent, self._clock(), self.label, source.id),
                )
            c.execute("INSERT OR IGNORE INTO leases VALUES(?,'','snapshot',?)", (owner, id))
        return Entry(*there) if there is not None else Entry(id, parent, source.dir, None)

    def abandon(self, active: str) -> None:
        """Remove an active snapshot. The bytes go first: the row may be what no longer fits on the disk."""
        entry = self.get(active, active=True)
        if entry is None:
            return
        trash = self.to_trash(entry.dir)
        _empty(trash)
        with self._database.write() as c:
            c.execute("DELETE FROM snapshots WHERE driver=? AND id=?", (self.label, active))

    def drop(self, id: str) -> None:
        """Remove a committed row, and its directory if no other has it. Raises: StoreError if another builds on it."""
        with self._lock.exclusive():
            entry = self.get(id)
            if entry is None:
                return
            # Synced, as the row must not come back after a power cut when its directory is gone.
            with self._database.write(sync=True) as c:
                child = c.execute(
                    "SELECT id FROM snapshots WHERE driver=? AND parent=? LIMIT 1", (self.label, id)
                ).fetchone()
                if child is not None:
                    raise StoreError(f"snapshot {id} cannot be removed: {child[0]} builds on it")
                c.execute("DELETE FROM snapshots WHERE driver=? AND id=?", (self.label, id))
                shared = c.execute("SELECT 1 FROM snapshots WHERE dir=? LIMIT 1", (entry.dir,)).fetchone()
            trash = None if shared is not None else self.to_trash(entry.dir)
        _empty(trash)

    def to_trash(self, dir: str) -> str | None:
        """Rename a snapshot's directory away, which is atomic and fast; None if it is not there."""
        trash = f"{self._trash}/{dir}"
        try:
            os.rename(f"{self._top}/{dir}", trash)
        except FileNotFoundError:
            return None
        return trash


def _empty(trash: str | None) -> None:
    """Remove what was renamed away. What will not go, for a mount in it, stays for gc."""
    if trash is not None:
        try:
            from layers.trees import remove_tree

            remove_tree(trash)
        except OSError:
            pass


def disk_error(error: OSError, path: str) -> StoreError:
    """A file-system error as one about the store, with what to do about it."""
    import errno

    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StoreError(f"{path}: the disk is full", hint="free some space, or run `pybuild prune`")
    return StoreError(f"{error.filename or path}: {error.strerror}")
