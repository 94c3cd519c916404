"""Checking the store: every blob re-hashed, every row held against what lies on disk.

Each finding is a `Problem`; with `repair`, what cannot be trusted is removed, so that the next pull
or build makes it anew, and what can be derived is derived again. A damaged database is replaced by
an empty one, which takes the names from index.json and hashes the blobs as they are asked for.
Nothing else in the store may be running a repair; builds may run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from layers.blobs import hash_file
from layers.database import Row, Value
from layers.errors import BlobNotFound, ContentError, ForeignStore, ImageError, StoreError
from layers.gc import drop_broken_chains
from layers.leases import StoreLock
from layers.oci import Digest
from layers.snapshotters.catalog import KEPT, PACKED
from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.store import Driver, Store

Kind = Literal["database", "blob", "name", "snapshot", "cache", "layout", "debris"]


class Problem(NamedTuple):
    """One finding: what it is about, what is wrong, and whether that has been repaired."""

    kind: Kind
    subject: str
    what: str
    repaired: bool


class FsckReport(NamedTuple):
    """All findings, and how much was looked at."""

    problems: tuple[Problem, ...]
    blobs: int
    bytes: int
    snapshots: int
    names: int

    @property
    def clean(self) -> bool:
        """Whether the store is sound now."""
        return all(problem.repaired for problem in self.problems)


def fsck(root: Path, *, repair: bool = False, snapshots: bool = False, driver: Driver = "auto") -> FsckReport:
    """Check the store at `root`. Reads every blob; with `snapshots`, every unpacked file, too.

    Raises: StoreError if there is no store, or one that cannot be opened and `repair` is not asked for.
    """
    from layers.store import Store

    if not os.path.exists(root / "oci-layout") and not os.path.exists(root / "store.db"):
        raise StoreError(f"{root}: there is no store here")
    first: list[Problem] = []
    try:
        store = Store.open(root, driver=driver)
        damage = store.database.check()
        if damage and repair:
            store.close()
    except ForeignStore:
        raise
    except StoreError as e:
        if not repair:
            raise
        damage, store = [e.message], None
    if damage and repair:
        _set_aside(root)
        store = Store.open(root, driver=driver)
    assert store is not None
    first.extend(Problem("database", "store.db", line, repair) for line in damage)
    with store:
        checker = _Checker(store, repair, snapshots)
        problems = [*first, *checker.run()]
        return FsckReport(tuple(problems), checker.blobs, checker.bytes, checker.snapshots, checker.names)


def _set_aside(root: Path) -> None:
    """Move a damaged database away, for those who want to look at it."""
    with StoreLock(root).exclusive():
        suffix = os.urandom(3).hex()
        for name in ("store.db", "store.db-wal", "store.db-shm"):
            try:
                os.rename(root / name, root / f"damaged-{suffix}-{name}")
            except FileNotFoundError:
                pass


class _Checker:
    """One run over an open store."""

    def __init__(self, store: Store, repair: bool, compare: bool) -> None:
        self._store = store
        self._repair = repair
        self._compare = compare
        self._intact_blobs: set[str] = set()
        self.blobs = self.bytes = self.snapshots = self.names = 0

    def run(self) -> Iterator[Problem]:
        yield from self._layout()
        yield from self._blobs()
        yield from self._names()
        yield from self._snapshots()
        if self._compare:
            yield from self._trees()
        yield from self._records()
        yield from self._debris()
        if self._repair:
            self._store.refresh_index()

    def _problem(self, kind: Kind, subject: str, what: str) -> Problem:
        return Problem(kind, subject, what, self._repair)

    def _layout(self) -> Iterator[Problem]:
        from layers.store import REF_NAME, create_directories

        missing = create_directories(self._store.root, only_check=not self._repair)
        for name in missing:
            yield self._problem("layout", name, "is missing")
        try:
            with open(self._store.root / "index.json", "rb") as f:
                entries = json.load(f)["manifests"]
            listed = sorted((e["annotations"][REF_NAME], e["digest"]) for e in entries)
        except (OSError, ValueError, LookupError, TypeError) as e:
            yield self._problem("layout", "index.json", f"cannot be read: {type(e).__name__}")
            return
        known = sorted((n.name, str(n.descriptor.digest)) for n in self._store.names.list())
        if listed != known:
            yield self._problem("layout", "index.json", "does not list the names that the store has")

    def _blobs(self) -> Iterator[Problem]:
        store = self._store
        present: set[str] = set()
        for info in list(store.walk()):
            present.add(info.digest)
            self.blobs += 1
            self.bytes += info.size_bytes
            if self._intact(info.digest):
                self._intact_blobs.add(info.digest)
                continue
            yield self._problem("blob", info.digest, "does not have the bytes that its name promises")
            if self._repair:
                store.delete(info.digest)
        for (digest,) in store.database.rows("SELECT digest FROM blobs"):
            if digest not in present and not os.path.exists(self._blob_file(str(digest))):
                yield self._problem("blob", str(digest), "is recorded, but its file is missing")
                if self._repair:
                    store.delete(Digest(str(digest)))

    def _blob_file(self, digest: str) -> str:
        return f"{self._store.root}/blobs/{digest.replace(':', '/')}"

    def _intact(self, digest: Digest) -> bool:
        try:
            fd = os.open(self._blob_file(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True  # collected meanwhile
        try:
            return hash_file(fd, digest) == digest
        except OSError:
            return False  # the disk cannot read it
        finally:
            os.close(fd)

    def _names(self) -> Iterator[Problem]:
        for named in self._store.names.list():
            self.names += 1
            try:
                self._store.closure(named.descriptor, present=self._intact_blobs.__contains__)
            except BlobNotFound as e:
                what = e.message
            except (ContentError, ImageError) as e:
                what = f"its manifest cannot be used: {e.message}"
            else:
                continue
            yield self._problem("name", named.name, what)
            if self._repair:
                self._store.names.delete(named.name)

    def _snapshots(self) -> Iterator[Problem]:
        bad: list[tuple[str, str]] = []
        # Under the lock, rows and directories agree where nothing is wrong.
        with self._store.lock.exclusive():
            rows = self._store.database.rows("SELECT driver, id, parent, dir, owner FROM snapshots")
            known = {(str(row[0]), str(row[1])) for row in rows}
            alive = self._store.leases.alive()
            found = [(row, None if row[4] in alive else self._torn(row, known)) for row in rows]
        self.snapshots = len(rows)
        for row, what in found:
            if what is not None:
                yield self._problem("snapshot", str(row[1]), what)
                bad.append((str(row[0]), str(row[1])))
        if bad and self._repair:
            self._forget(bad)

    def _trees(self) -> Iterator[Problem]:
        from layers.snapshotcheck import altered_snapshots

        label = self._store.snapshots.label
        bad: list[tuple[str, str]] = []
        for found in altered_snapshots(self._store):
            yield self._problem("snapshot", found.id, found.what)
            bad.append((label, found.id))
        if bad and self._repair:
            self._forget(bad)

    def _torn(self, row: Row, known: set[tuple[str, str]]) -> str | None:
        driver, id, parent, dir, owner = map(_text, row)
        base = f"{self._store.root}/snapshots/{dir}"
        if dir.startswith(PACKED):
            if self._store.layers.lookup(id) is None:
                return "its layer is missing, and its files were never unpacked"
        elif not os.path.isdir(f"{base}/fs") or os.path.islink(f"{base}/fs"):
            return "its directory is missing"
        if parent and (driver, parent) not in known:
            return f"the snapshot beneath it, {parent}, is missing"
        if not owner and os.path.isdir(f"{base}/work"):
            return "it counts as finished, but was still being written"
        return None

    def _forget(self, bad: list[tuple[str, str]]) -> None:
        """Delete rows and those that build on them; gc removes the directories."""
        with self._store.lock.exclusive(), self._store.database.write(sync=True) as c:
            c.executemany("DELETE FROM snapshots WHERE driver=? AND id=?", bad)
            drop_broken_chains(c)

    def _records(self) -> Iterator[Problem]:
        database = self._store.database
        lost = database.rows(
            "SELECT key FROM cache WHERE snapshot IS NOT NULL AND snapshot NOT IN (SELECT id FROM snapshots)"
        )
        for (key,) in lost:
            yield self._problem("cache", _text(key), "leads to a snapshot that is missing")
        if self._repair:
            self._store.cache.delete([str(key) for (key,) in lost])
        gone = database.rows("SELECT snapshot, digest FROM layers WHERE digest NOT IN (SELECT digest FROM blobs)")
        for snapshot, digest in gone:
            yield self._problem("cache", _text(snapshot), f"its layer {_text(digest)} is missing")
        if gone and self._repair:
            with database.write() as c:
                c.execute("DELETE FROM layers WHERE digest NOT IN (SELECT digest FROM blobs)")

    def _debris(self) -> Iterator[Problem]:
        """What dead processes left, which any gc removes."""
        store = self._store
        with store.lock.exclusive():
            alive = store.leases.alive() | {KEPT}
            known = {str(row[0]) for row in store.database.rows("SELECT dir FROM snapshots")}
            owners = store.database.rows("SELECT id, owner FROM snapshots WHERE owner IS NOT NULL")
            stray = [name for name in os.listdir(store.root / "snapshots") if name not in known]
        for name in stray:
            yield self._problem("debris", f"snapshots/{name}", "belongs to no snapshot")
        for id, owner in owners:
            if owner not in alive:
                yield self._problem("debris", str(id), "was being written by a process that is gone")
        for name in os.listdir(store.root / "trash"):
            yield self._problem("debris", f"trash/{name}", "was not removed to its end")
        if self._repair:
            store.sweep()
            store.gc()


def _text(value: Value) -> str:
    """A column that holds text, or nothing."""
    return value if isinstance(value, str) else ""
