"""What the store forgets: debris of dead processes, bytes torn by a power cut, and garbage.

    forget_undurable   once after each boot: rows whose bytes no barrier covered
    sweep              when a dead process's lease is found: its active snapshots and ingests
    collect            garbage: blobs and snapshots that no name, cache record, lease or live process needs

Rows go first, in a synced transaction under the exclusive store lock; then files are unlinked and
trees renamed into trash/; the lock is released; the trash is emptied. A crash anywhere leaves files
without rows, which the next `collect` removes, never rows without files.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from layers import faults
from layers.database import Row
from layers.errors import ImageError
from layers.leases import is_locked
from layers.oci import (
    INDEX_MEDIA_TYPES,
    MANIFEST_MEDIA_TYPES,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    MEDIA_DOCKER_CONFIG,
    MEDIA_OCI_CONFIG,
    Descriptor,
    Digest,
    ImageConfig,
    Index,
    chain_id,
    parse_manifest,
)
from layers.records import CACHE_OWNER, decode_descriptor
from layers.snapshotters.catalog import KEPT
from layers.trees import disk_usage, remove_tree
from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.store import Store

_RESUMABLE_S = 7 * 86400
"""How long an interrupted download that can be resumed is kept."""
_SURVIVED = "survived:"
WORK = "work:"
"""What the names of snapshots begin with that a working container made: they are its own."""
CONFIG_MEDIA_TYPES = frozenset({MEDIA_OCI_CONFIG, MEDIA_DOCKER_CONFIG})


class SweepReport(NamedTuple):
    """What dead processes had left."""

    snapshots: int
    ingests: int


class GcReport(NamedTuple):
    """What a collection removed. `bytes` are allocated blocks."""

    blobs: int
    snapshots: int
    ingests: int
    bytes: int


def forget_undurable(store: Store, boot: str) -> None:
    """After a restart of the machine: drop the rows whose bytes may be torn, and all leases."""
    with store.lock.exclusive():
        trash: list[str] = []
        with store.database.write(sync=True) as c:
            meta = dict(c.execute("SELECT key, value FROM meta"))
            if meta["boot"] == boot:
                return  # another process was first
            if not meta["boot"]:
                store.import_index(c)
            durable = meta["durable_epoch"]
            # Files of these blobs stay: they are hashed when somebody asks for them.
            c.execute("DELETE FROM blobs WHERE epoch > ?", (durable,))
            c.execute("DELETE FROM cache WHERE epoch > ?", (durable,))
            # What a user works in is kept whatever the disk made of it, as any directory would be.
            _set_apart(c, int(durable))
            gone = c.execute(
                "DELETE FROM snapshots WHERE (epoch > ? OR owner IS NOT NULL) AND owner IS NOT ?"
                " AND substr(id, 1, 9) <> ? AND substr(id, 1, 5) <> ? RETURNING dir",
                (durable, KEPT, _SURVIVED, WORK),
            ).fetchall()
            drop_broken_chains(c)
            c.execute("DELETE FROM leases WHERE owner<>?", (CACHE_OWNER,))
            c.execute("DELETE FROM meta WHERE key LIKE 'driver:%'")
            c.execute("UPDATE meta SET value=max(value, ?)+1 WHERE key='epoch'", (durable,))
            c.execute("UPDATE meta SET value=? WHERE key='boot'", (boot,))
            trash = [str(row[0]) for row in gone if not _dir_in_use(c, str(row[0]))]
        _to_trash(store, trash)
    _empty_trash(store)


def _set_apart(c: sqlite3.Connection, durable: int) -> None:
    """Give what kept snapshots build on, and no barrier covered, names by which nobody else finds it.

    Snapshots of steps by hand have such names from the start.
    """
    below = c.execute(
        "WITH RECURSIVE chain(driver, id) AS ("
        " SELECT driver, parent FROM snapshots WHERE owner=? UNION"
        " SELECT s.driver, s.parent FROM chain JOIN snapshots s ON s.driver=chain.driver AND s.id=chain.id)"
        " SELECT s.driver, s.id FROM chain JOIN snapshots s ON s.driver=chain.driver AND s.id=chain.id"
        " WHERE s.epoch > ? AND s.owner IS NULL",
        (KEPT, durable),
    ).fetchall()
    for driver, id in below:
        if not str(id).startswith((_SURVIVED, WORK)):
            name = f"{_SURVIVED}{os.urandom(4).hex()}:{id}"
            c.execute("UPDATE snapshots SET id=? WHERE driver=? AND id=?", (name, driver, id))
            c.execute("UPDATE snapshots SET parent=? WHERE driver=? AND parent=?", (name, driver, id))


def drop_broken_chains(c: sqlite3.Connection) -> None:
    """Rows whose parent is gone, and those that build on them."""
    while c.execute(
        "DELETE FROM snapshots WHERE parent IS NOT NULL AND NOT EXISTS"
        " (SELECT 1 FROM snapshots p WHERE p.driver=snapshots.driver AND p.id=snapshots.parent)"
    ).rowcount:
        pass


def _dir_in_use(c: sqlite3.Connection, dir: str) -> bool:
    return c.execute("SELECT 1 FROM snapshots WHERE dir=? LIMIT 1", (dir,)).fetchone() is not None


def sweep(store: Store) -> SweepReport:
    """Remove what dead processes were in the middle of. Resumable ingests are kept for a week."""
    trash: list[str] = []
    with store.lock.exclusive():
        alive = store.leases.alive()
        with store.database.write() as c:
            owners = {str(r[0]) for r in c.execute("SELECT DISTINCT owner FROM snapshots WHERE owner IS NOT NULL")}
            for owner in owners - alive - {KEPT}:
                trash += [str(r[0]) for r in c.execute("SELECT dir FROM snapshots WHERE owner=?", (owner,))]
                c.execute("DELETE FROM snapshots WHERE owner=?", (owner,))
        for owner in store.leases.dead():
            store.leases.bury(owner)
        ingests = _sweep_ingests(store)
        _to_trash(store, trash)
    _empty_trash(store)
    return SweepReport(len(trash), ingests)


def _sweep_ingests(store: Store) -> int:
    """Remove ingests that nobody writes and nobody will resume."""
    directory = f"{store.root}/ingest"
    removed = 0
    for name in os.listdir(directory):
        path = f"{directory}/{name}"
        try:
            age_s = time.time() - os.stat(path).st_mtime
            if (name.startswith("ref-") and age_s < _RESUMABLE_S) or is_locked(path):
                continue
            os.unlink(path)
            removed += 1
        except FileNotFoundError:
            continue
    return removed


def collect(store: Store) -> GcReport:
    """Remove garbage. What live processes have written or leased is not garbage; nor is this process's."""
    freed = 0
    marker = Marker(store)
    marker.warm()
    with store.lock.exclusive():
        marker.respect(store.leases.alive())
        with store.database.write(sync=True) as c:
            snapshots = marker.snapshots(c)
            blobs = marker.blobs(c, snapshots)
            dirs = _forget_snapshots(c, snapshots)
            _forget_blobs(c, blobs)
            if faults.ARMED:
                faults.reach("store.gc.before-commit")
        if faults.ARMED:
            faults.reach("store.gc.after-commit")
        garbage = [info.digest for info in store.walk() if info.digest not in blobs]
        for digest in garbage:
            path = f"{store.root}/blobs/{digest.replace(':', '/')}"
            freed += disk_usage(path)
            os.unlink(path)
            if faults.ARMED:
                faults.reach("store.gc.after-unlink")
        orphans = _orphans(store)
        _to_trash(store, orphans)
        ingests = _sweep_ingests(store)
    freed += _empty_trash(store, measure=True)
    return GcReport(len(garbage), len(dirs), ingests, freed)


class Marker:
    """Finds what is needed. Documents are read once: `warm` does most of it before the lock is taken."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._owners = [CACHE_OWNER]
        self._children: dict[Digest, tuple[Descriptor, ...]] = {}
        self._diff_ids: dict[Digest, tuple[Digest, ...]] = {}

    def warm(self) -> None:
        for (descriptor,) in self._store.database.rows("SELECT descriptor FROM names"):
            self._chain_ids(decode_descriptor(str(descriptor)))

    def respect(self, alive: Iterable[str]) -> None:
        """Count these owners' leases and active snapshots as needed."""
        self._owners = [*alive, CACHE_OWNER]

    def snapshots(self, c: sqlite3.Connection, *, cache: bool = True) -> set[tuple[str, str]]:
        """(driver, id) of all snapshots to keep; without `cache`, of those that no cache record keeps alone."""
        wanted = self._leased(c, "snapshot", cache=cache)
        if cache:
            wanted |= {str(r[0]) for r in c.execute("SELECT snapshot FROM cache WHERE snapshot IS NOT NULL")}
        for (descriptor,) in c.execute("SELECT descriptor FROM names").fetchall():
            wanted |= self._chain_ids(decode_descriptor(descriptor))
        rows = c.execute("SELECT driver, id, parent, owner FROM snapshots").fetchall()
        parents = {(r[0], r[1]): r[2] for r in rows}
        owners = {*self._owners, KEPT}
        pending = [(d, i) for d, i, _, owner in rows if i in wanted or owner in owners]
        keep: set[tuple[str, str]] = set()
        while pending:
            key = pending.pop()
            if key in keep or key not in parents:
                continue
            keep.add(key)
            if parents[key] is not None:
                pending.append((key[0], parents[key]))
            pending.append((key[0], f"flat:{key[1]}"))
        return keep

    def _leased(self, c: sqlite3.Connection, kind: str, *, cache: bool = True) -> set[str]:
        owners = [owner for owner in self._owners if cache or owner != CACHE_OWNER]
        rows = c.execute(
            "SELECT resource FROM leases WHERE kind=? AND owner IN (SELECT value FROM json_each(?))",
            (kind, json.dumps(owners)),
        )
        return {str(r[0]) for r in rows}

    def blobs(self, c: sqlite3.Connection, snapshots: set[tuple[str, str]], *, cache: bool = True) -> set[str]:
        """Digests of all blobs to keep."""
        ids = {id for _, id in snapshots}
        keep = {str(d) for s, d in c.execute("SELECT snapshot, digest FROM layers") if s in ids}
        return keep | self._leased(c, "blob", cache=cache) | self.named_blobs(c)

    def named_blobs(self, c: sqlite3.Connection) -> set[str]:
        """Digests of all that names lead to, whether it is here or not."""
        named: set[str] = set()
        for (descriptor,) in c.execute("SELECT descriptor FROM names").fetchall():
            named |= {d.digest for d in self._reachable(decode_descriptor(descriptor))}
        return named

    def _reachable(self, descriptor: Descriptor) -> list[Descriptor]:
        """Everything that a descriptor leads to, itself included; damaged documents lead nowhere."""
        found: dict[Digest, Descriptor] = {}
        pending = [descriptor]
        while pending:
            current = pending.pop()
            if current.digest not in found:
                found[current.digest] = current
                pending.extend(self._children_of(current))
        return list(found.values())

    def _children_of(self, descriptor: Descriptor) -> tuple[Descriptor, ...]:
        if descriptor.media_type not in MANIFEST_MEDIA_TYPES | INDEX_MEDIA_TYPES:
            return ()
        known = self._children.get(descriptor.digest)
        if known is not None:
            return known
        raw = self._raw(descriptor, MAX_MANIFEST_BYTES)
        if raw is None:
            return ()  # a platform that was not pulled; it may be, later
        try:
            document = parse_manifest(raw, descriptor.media_type)
        except ImageError:
            return ()
        children = document.manifests if isinstance(document, Index) else (document.config, *document.layers)
        self._children[descriptor.digest] = children
        return children

    def _chain_ids(self, descriptor: Descriptor) -> set[str]:
        """The names of the snapshots that a named image unpacks to."""
        ids: set[str] = set()
        for reached in self._reachable(descriptor):
            if reached.media_type in CONFIG_MEDIA_TYPES:
                below: Digest | None = None
                for diff_id in self._diff_ids_of(reached):
                    below = chain_id([diff_id] if below is None else [below, diff_id])
                    ids.add(below)
        return ids

    def _diff_ids_of(self, config: Descriptor) -> tuple[Digest, ...]:
        known = self._diff_ids.get(config.digest)
        if known is not None:
            return known
        raw = self._raw(config, MAX_CONFIG_BYTES)
        if raw is None:
            return ()
        try:
            diff_ids = ImageConfig.parse(raw).diff_ids
        except ImageError:
            return ()
        self._diff_ids[config.digest] = diff_ids
        return diff_ids

    def _raw(self, descriptor: Descriptor, limit: int) -> bytes | None:
        """A document as it lies there: whether it is intact is for its readers to say."""
        try:
            with open(f"{self._store.root}/blobs/{descriptor.digest.replace(':', '/')}", "rb") as f:
                return f.read(limit)
        except OSError:
            return None


def _forget_snapshots(c: sqlite3.Connection, keep: set[tuple[str, str]]) -> list[str]:
    """Delete the rows of other snapshots; the directories that no row has any more."""
    rows = cast("list[Row]", c.execute("SELECT driver, id, dir FROM snapshots").fetchall())
    gone = [row for row in rows if (row[0], row[1]) not in keep]
    c.executemany("DELETE FROM snapshots WHERE driver=? AND id=?", [row[:2] for row in gone])
    c.execute("DELETE FROM layers WHERE snapshot NOT IN (SELECT id FROM snapshots)")
    return [str(row[2]) for row in gone if not _dir_in_use(c, str(row[2]))]


def _forget_blobs(c: sqlite3.Connection, keep: set[str]) -> None:
    gone = [(d,) for (d,) in c.execute("SELECT digest FROM blobs").fetchall() if d not in keep]
    c.executemany("DELETE FROM blobs WHERE digest=?", gone)
    c.executemany("DELETE FROM layers WHERE digest=?", gone)


def _orphans(store: Store) -> list[str]:
    """Directories under snapshots/ that no row knows; the exclusive lock is held."""
    known = {str(row[0]) for row in store.database.rows("SELECT dir FROM snapshots")}
    return [name for name in os.listdir(store.root / "snapshots") if name not in known]


def _to_trash(store: Store, dirs: Iterable[str]) -> None:
    for dir in dirs:
        try:
            os.rename(f"{store.root}/snapshots/{dir}", f"{store.root}/trash/{dir}")
        except FileNotFoundError:
            pass


def _empty_trash(store: Store, *, measure: bool = False) -> int:
    """Remove what lies in trash/; bytes freed. What will not go (a mount in it) waits for the next time."""
    freed = 0
    for name in os.listdir(store.root / "trash"):
        path = f"{store.root}/trash/{name}"
        size = disk_usage(path) if measure else 0
        try:
            remove_tree(path)
            freed += size
        except OSError:
            continue
    return freed
