"""The store's SQLite database: its schema, its transactions, and the epochs that survive a power cut.

Several processes and threads share it (WAL). An ordinary commit is not synced: it survives the
death of the process, not of the machine. That is made harmless by *epochs*: each row that speaks
of bytes on disk carries the epoch in which it was written, and `durable_epoch` says up to which
epoch everything has been synced (`Store.barrier`). When the machine's boot id has changed, rows
beyond it are dropped, since their bytes may be torn (`forget_undurable`).

    meta        epoch, durable_epoch, boot, names_generation, index_generation, driver:…
    names       canonical reference -> descriptor
    blobs       what is known to lie whole under blobs/; a file without a row is hashed before use
    snapshots   (driver, id) -> parent, directory under snapshots/; `owner` set while it is written
    layers      (snapshot, compression) -> the blob that is that snapshot's layer
    cache       cache key -> snapshot, record
    filestats   (device, inode) -> size, times and digest of a context file, packed
    leases      owner (a live process), token -> what it protects from gc

SQL lives with the tables' owners (`records`, `blobs`, `snapshotters.catalog`, `gc`); this module
knows connections, errors and versions only.
"""

from __future__ import annotations

import _sqlite3 as sqlite3  # what `sqlite3` adds, for dates in queries, takes longer to import than this
import os
import time
from _thread import RLock
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from layers.errors import ForeignStore, StoreError

SCHEMA_VERSION = 1
"""Of the tables beneath and of what their columns mean; a test holds both against each other."""
EPOCH = "(SELECT value FROM meta WHERE key='epoch')"
"""The SQL of the current epoch, read in the writing transaction itself."""

_APPLICATION_ID = 0x70796264  # "pybd"
_BUSY_TIMEOUT_S = 60.0
_LOG_BYTES = 256 << 10
"""Reading it takes 0.2 ms."""

_SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE names(name TEXT PRIMARY KEY, digest TEXT NOT NULL, descriptor TEXT NOT NULL,
  created_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE blobs(digest TEXT PRIMARY KEY, size INTEGER NOT NULL, epoch INTEGER NOT NULL,
  created_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE snapshots(driver TEXT NOT NULL, id TEXT NOT NULL, parent TEXT, dir TEXT NOT NULL, owner TEXT,
  epoch INTEGER NOT NULL, created_ns INTEGER NOT NULL, PRIMARY KEY(driver, id)) WITHOUT ROWID;
CREATE INDEX snapshots_parent ON snapshots(driver, parent);
CREATE INDEX snapshots_dir ON snapshots(dir);
CREATE INDEX snapshots_owner ON snapshots(owner) WHERE owner IS NOT NULL;
CREATE TABLE layers(snapshot TEXT NOT NULL, compression TEXT NOT NULL, diff_id TEXT NOT NULL,
  digest TEXT NOT NULL, descriptor TEXT NOT NULL, uncompressed_size INTEGER NOT NULL,
  PRIMARY KEY(snapshot, compression)) WITHOUT ROWID;
CREATE INDEX layers_diff_id ON layers(diff_id);
CREATE INDEX layers_digest ON layers(digest);
CREATE TABLE cache(key TEXT PRIMARY KEY, snapshot TEXT, record BLOB NOT NULL, epoch INTEGER NOT NULL,
  created_ns INTEGER NOT NULL, used_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX cache_snapshot ON cache(snapshot);
CREATE TABLE filestats(device INTEGER NOT NULL, inode INTEGER NOT NULL, value BLOB NOT NULL,
  recorded_ns INTEGER NOT NULL, PRIMARY KEY(device, inode)) WITHOUT ROWID;
CREATE TABLE leases(owner TEXT NOT NULL, token TEXT NOT NULL, kind TEXT NOT NULL, resource TEXT NOT NULL,
  PRIMARY KEY(owner, token, kind, resource)) WITHOUT ROWID;
INSERT INTO meta VALUES('epoch', 1), ('durable_epoch', 0), ('boot', ''),
  ('names_generation', 0), ('index_generation', -1);
"""

_LEFT: list[sqlite3.Connection] = []
"""Referred to, so that nobody closes them."""

Value = str | int | bytes | float | None
Row = tuple[Value, ...]


class Database:
    """One connection, shared by the threads of a process under a lock. Not usable after a fork."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises: StoreError (not writable, damaged, of another version)."""
        self.path = path
        self._lock = RLock()
        with self._errors():
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=256
            )
            try:
                # Ordinary commits need not survive a power cut: see the charter.
                self._connection.execute("PRAGMA synchronous=NORMAL")
                version = self._connection.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    version = self._create()
                self._check(int(version))
            except BaseException:
                self._connection.close()
                raise

    def _check(self, version: int) -> None:
        """Raises: StoreError for a database of something else, or a store of another format."""
        if self._connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            raise ForeignStore(f"{self.path} is a database of something else, not of a pybuild store")
        if version != SCHEMA_VERSION:
            newer = version > SCHEMA_VERSION
            raise ForeignStore(
                f"{self.path}: the store has format {version}, {'newer' if newer else 'older'} than this pybuild's,"
                f" which is {SCHEMA_VERSION}",
                hint="use a newer pybuild, or another --root"
                if newer
                else "save its images with the pybuild that made it, and load them into another --root",
            )

    def _create(self) -> int:
        execute = self._connection.execute
        deadline_s = time.monotonic() + _BUSY_TIMEOUT_S
        while True:
            try:
                execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as e:
                # Of two that make this change at once one is told so immediately, whatever the time-out.
                if (e.sqlite_errorcode & 0xFF) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.005)
        execute("BEGIN IMMEDIATE")
        version = int(execute("PRAGMA user_version").fetchone()[0])
        if version == 0:
            if execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                execute("ROLLBACK")
                raise ForeignStore(f"{self.path} is a database of something else, not of a pybuild store")
            for statement in _SCHEMA.split(";"):
                if statement.strip():
                    execute(statement)
            execute(f"PRAGMA application_id={_APPLICATION_ID}")
            execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            version = SCHEMA_VERSION
        execute("COMMIT")
        return version

    def rows(self, sql: str, parameters: Sequence[Value] = ()) -> list[Row]:
        """All rows of a query. Raises: StoreError."""
        with self._lock, self._errors():
            return self._connection.execute(sql, parameters).fetchall()

    def row(self, sql: str, parameters: Sequence[Value] = ()) -> Row | None:
        """The first row of a query, or None. Raises: StoreError."""
        with self._lock, self._errors():
            found: Row | None = self._connection.execute(sql, parameters).fetchone()
            return found

    @contextmanager
    def write(self, *, sync: bool = False) -> Iterator[sqlite3.Connection]:
        """A write transaction; with `sync`, it and all earlier ones survive a power cut once it ends.

        Rolled back if the block raises. Raises: StoreError (busy for a minute, disk full, damaged).
        """
        with self._lock, self._errors():
            connection = self._connection
            if sync:
                connection.execute("PRAGMA synchronous=FULL")
            try:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
            finally:
                if sync:
                    connection.execute("PRAGMA synchronous=NORMAL")

    def meta(self) -> dict[str, Value]:
        """The whole `meta` table, which is small."""
        return {str(key): value for key, value in self.rows("SELECT key, value FROM meta")}

    def check(self) -> list[str]:
        """What SQLite finds wrong with the file; empty if nothing."""
        try:
            found = self.rows("PRAGMA integrity_check")
        except StoreError as e:
            return [e.message]
        return [str(row[0]) for row in found if row[0] != "ok"]

    def close(self) -> None:
        """Idempotent. Raises: StoreError if the last checkpoint fails."""
        with self._lock, self._errors():
            if self._connection not in _LEFT:
                self._connection.close()

    def let_go(self) -> None:
        """Leave the connection as it is: for a process that ends itself, without a fork before that.

        Who closes the last one copies the log into the database and deletes it, with two syncs, and the next has
        to make a new one, with two more: 3 ms. The next opener reads the log, as after a crash; one that has grown
        long is not left to it.
        """
        with suppress(OSError):
            if os.stat(f"{self.path}-wal").st_size <= _LOG_BYTES:
                _LEFT.append(self._connection)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            raise _explained(e, self.path) from e


def _explained(error: sqlite3.Error, path: Path) -> StoreError:
    """What the user can do about an SQLite error, by its primary code (sqlite.org/rescode.html)."""
    code = getattr(error, "sqlite_errorcode", None) or 0
    match code & 0xFF:
        case sqlite3.SQLITE_FULL:
            return StoreError(f"{path}: the disk is full", hint="free some space, or run `pybuild prune`")
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StoreError(f"{path}: another process kept the store locked for {_BUSY_TIMEOUT_S:.0f} seconds")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            return StoreError(
                f"{path}: cannot write to the store: {error}",
                hint=f"it must belong to the user (uid {os.geteuid()}) who runs pybuild; or use another --root",
            )
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return StoreError(
                f"{path}: the store's database is damaged: {error}", hint="run `pybuild fsck --repair` to rebuild it"
            )
        case sqlite3.SQLITE_IOERR:
            return StoreError(f"{path}: input/output error of the store's database: {error}", hint="is the disk full?")
        case _:
            return StoreError(f"{path}: {error}")


def boot_id() -> str:
    """What tells this boot of the machine from every other one (random(4), boot_id)."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as f:
            return f.read(64).decode("ascii", "replace").strip()
    except OSError:
        return "unknown"
