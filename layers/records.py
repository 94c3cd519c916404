"""The store's small tables: names, layers, cache records and digests of context files.

Each class owns one table's SQL. Nothing here touches files. Thread-safe through `Database`.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterable, Sequence

from layers.database import EPOCH, Database, Value
from layers.oci import Descriptor, Digest
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3

CACHE_OWNER = "cache"
"""Who holds the leases of cache records on blobs: nobody who could die."""
_CHUNK = 500
_TOUCH_NS = 600 * 10**9
"""A cache record's time of use is written at most every ten minutes: a cached build writes nothing."""


def encode_descriptor(descriptor: Descriptor) -> str:
    return json.dumps(descriptor.to_json(), separators=(",", ":"), ensure_ascii=False)


def decode_descriptor(text: str) -> Descriptor:
    return Descriptor.from_json(json.loads(text))


class NamedImage(NamedTuple):
    """A name of the store: a canonical reference and what it stands for."""

    name: str
    descriptor: Descriptor
    created_ns: int


class Names:
    """Durable names. `set` is `Store.publish` of one name: see there for what it guarantees."""

    def __init__(self, database: Database, publish: Callable[[dict[str, Descriptor | None]], None]) -> None:
        self._database = database
        self._publish = publish

    def set(self, name: str, descriptor: Descriptor) -> None:
        """Name an image, durably. Raises: BlobNotFound if part of it is missing."""
        self._publish({name: descriptor})

    def get(self, name: str) -> Descriptor | None:
        row = self._database.row("SELECT descriptor FROM names WHERE name=?", (name,))
        return None if row is None else decode_descriptor(str(row[0]))

    def delete(self, name: str) -> bool:
        """Remove a name, not what it named; whether it was there."""
        if self._database.row("SELECT 1 FROM names WHERE name=?", (name,)) is None:
            return False
        self._publish({name: None})
        return True

    def list(self) -> Sequence[NamedImage]:
        """All names, in order."""
        rows = self._database.rows("SELECT name, descriptor, created_ns FROM names ORDER BY name")
        return [NamedImage(str(n), decode_descriptor(str(d)), int(t or 0)) for n, d, t in rows]

    def of(self, digest: Digest) -> Sequence[str]:
        """The names that stand for a manifest or index."""
        return [
            str(n) for (n,) in self._database.rows("SELECT name FROM names WHERE digest=? ORDER BY name", (digest,))
        ]


class LayerRecord(NamedTuple):
    """A blob that is a snapshot's changes as a layer, in one compression."""

    diff_id: Digest
    descriptor: Descriptor
    uncompressed_size: int


def compression_of(media_type: str) -> str:
    """`gzip`, `zstd` or `none`, by a layer's media type."""
    for suffix in ("gzip", "zstd"):
        if media_type.endswith(suffix):
            return suffix
    return "none"


def insert_layer(c: sqlite3.Connection, snapshot_id: str, record: LayerRecord, compression: str) -> None:
    """`Layers.record` within somebody's transaction."""
    described = encode_descriptor(record.descriptor)
    c.execute(
        "INSERT OR REPLACE INTO layers VALUES(?,?,?,?,?,?)",
        (
            snapshot_id,
            compression,
            record.diff_id,
            record.descriptor.digest,
            described,
            record.uncompressed_size,
        ),
    )


class Layers:
    """Which blob is the (compressed) form of which snapshot's changes, and of which diff ID."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, snapshot_id: str, record: LayerRecord, *, compression: str | None = None) -> None:
        """Remember a layer; replaces an earlier one of the same snapshot and compression.

        `compression` tells variants apart that share a media type (`estargz`); by default the media type's.
        """
        with self._database.write() as c:
            insert_layer(c, snapshot_id, record, compression or compression_of(record.descriptor.media_type))

    def lookup(self, snapshot_id: str, compression: str | None = None) -> LayerRecord | None:
        """A snapshot's layer whose blob is in the store; with None, in any compression."""
        sql = (
            "SELECT l.diff_id, l.descriptor, l.uncompressed_size FROM layers l JOIN blobs b ON b.digest=l.digest"
            " WHERE l.snapshot=?"
        )
        parameters: list[Value] = [snapshot_id]
        if compression is not None:
            sql += " AND l.compression=?"
            parameters.append(compression)
        row = self._database.row(sql + " ORDER BY l.compression LIMIT 1", parameters)
        if row is None:
            return None
        return LayerRecord(Digest(str(row[0])), decode_descriptor(str(row[1])), int(row[2] or 0))


class CacheRecord(NamedTuple):
    """What a step's key led to: a snapshot (or none), and bytes that are the caller's own."""

    key: str
    snapshot_id: str | None
    record: bytes
    created_ns: int
    used_ns: int


_CACHE_COLUMNS = "c.key, c.snapshot, c.record, c.created_ns, c.used_ns"


class Cache:
    """Cache records. One whose snapshot is gone, or was made by another driver, is not seen."""

    def __init__(self, database: Database, driver: Callable[[], str], clock: Callable[[], int] = time.time_ns) -> None:
        self._database = database
        self._driver = driver
        self._clock = clock

    def put(self, key: str, snapshot_id: str | None, record: bytes, *, blobs: Iterable[Digest] = ()) -> None:
        """Remember; replaces an earlier record of that key. `blobs` live as long as the record."""
        now = self._clock()
        with self._database.write() as c:
            c.execute("DELETE FROM leases WHERE owner=? AND token=?", (CACHE_OWNER, key))
            c.executemany("INSERT INTO leases VALUES(?,?,'blob',?)", [(CACHE_OWNER, key, d) for d in set(blobs)])
            c.execute(
                f"INSERT OR REPLACE INTO cache VALUES(?,?,?,{EPOCH},?,?)",
                (key, snapshot_id, record, now, now),
            )

    def get(self, key: str) -> CacheRecord | None:
        return self.get_many([key]).get(key)

    def get_many(self, keys: Sequence[str]) -> dict[str, CacheRecord]:
        """The records that there are, in one query per 500 keys."""
        found: dict[str, CacheRecord] = {}
        for start in range(0, len(keys), _CHUNK):
            some = keys[start : start + _CHUNK]
            found.update((r.key, r) for r in self._select(f"c.key IN ({','.join('?' * len(some))})", some))
        return found

    def list(self, prefix: str = "") -> Sequence[CacheRecord]:
        """All records whose key begins so, least recently used first."""
        # A range, not LIKE or GLOB: a prefix may hold their wildcards.
        return sorted(
            self._select("c.key >= ? AND c.key < ?", (prefix, prefix + "\U0010ffff")), key=lambda r: (r.used_ns, r.key)
        )

    def _select(self, condition: str, parameters: Sequence[Value]) -> Sequence[CacheRecord]:
        rows = self._database.rows(
            f"SELECT {_CACHE_COLUMNS} FROM cache c WHERE {condition} AND (c.snapshot IS NULL OR EXISTS"  # noqa: S608
            " (SELECT 1 FROM snapshots s WHERE s.driver=? AND s.id=c.snapshot AND s.owner IS NULL))",
            (*parameters, self._driver()),
        )
        return [CacheRecord(*row) for row in rows]  # type: ignore[arg-type]

    def touch(self, keys: Iterable[str]) -> None:
        """Note that records were used; a no-op for those noted in the last ten minutes."""
        now = self._clock()
        wanted = list(keys)
        stale: list[str] = []
        for start in range(0, len(wanted), _CHUNK):
            some = wanted[start : start + _CHUNK]
            rows = self._database.rows(
                f"SELECT key FROM cache WHERE used_ns < ? AND key IN ({','.join('?' * len(some))})",  # noqa: S608
                (now - _TOUCH_NS, *some),
            )
            stale.extend(str(row[0]) for row in rows)
        if stale:
            with self._database.write() as c:
                c.executemany("UPDATE cache SET used_ns=? WHERE key=?", [(now, key) for key in stale])

    def delete(self, keys: Iterable[str]) -> int:
        """Forget records; how many there were. Their snapshots go with the next gc."""
        gone = list(keys)
        with self._database.write() as c:
            c.executemany("DELETE FROM leases WHERE owner=? AND token=?", [(CACHE_OWNER, key) for key in gone])
            return c.executemany("DELETE FROM cache WHERE key=?", [(key,) for key in gone]).rowcount


class FileStat(NamedTuple):
    """What identifies an unchanged file, from one `stat` of it."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


_FINE_NS = 50 * 10**6
_COARSE_NS = 2 * 10**9
_STAT = struct.Struct("<qqq")
_STAT_BYTES = _STAT.size
_SIGNED_LIMIT = 1 << 63
_FILESTATS_MAX = 1_000_000


class FileStats:
    """Digests of context files by their stat, as git's index keeps them.

    A file that was changed in the same tick of the file system's clock in which it was read looks
    unchanged afterwards ("racily clean"): its digest is not kept, so that it is read once more.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def get_many(self, stats: Sequence[FileStat]) -> list[bytes | None]:
        """For each stat the digest that was put for exactly it, or None. Ask for thousands at a time."""
        found: list[bytes | None] = [None] * len(stats)
        pack = _STAT.pack
        for device in {stat.device for stat in stats}:
            # CROSS JOIN keeps the planner from scanning the table for each number.
            rows = self._database.rows(
                "SELECT f.inode, f.value FROM json_each(?) j CROSS JOIN filestats f ON f.device=? AND f.inode=j.value",
                (json.dumps([_signed(s.inode) for s in stats if s.device == device]), _signed(device)),
            )
            lookup: Callable[[int], bytes | None] = dict(rows).get  # type: ignore[arg-type, assignment]
            # Unpacked by hand: this loop runs a hundred thousand times in a cached build.
            for position, (of, inode, size_bytes, mtime_ns, ctime_ns) in enumerate(stats):
                if of == device:
                    value = lookup(inode if inode < _SIGNED_LIMIT else inode - (1 << 64))
                    if value is not None and value[:_STAT_BYTES] == pack(size_bytes, mtime_ns, ctime_ns):
                        found[position] = value[_STAT_BYTES:]
        return found

    def put_many(self, items: Iterable[tuple[FileStat, bytes]], *, observed_ns: int) -> None:
        """Remember digests. `observed_ns` is the wall clock before the first of the files was read."""
        rows = [
            (_signed(s.device), _signed(s.inode), _packed(s) + digest, observed_ns)
            for s, digest in items
            if not _racy(s, observed_ns)
        ]
        if rows:
            with self._database.write() as c:
                c.executemany("INSERT OR REPLACE INTO filestats VALUES(?,?,?,?)", rows)

    def trim(self, keep: int = _FILESTATS_MAX) -> int:
        """Forget the oldest records beyond `keep`; how many."""
        with self._database.write() as c:
            count = c.execute("SELECT count(*) FROM filestats").fetchone()[0]
            if count <= keep:
                return 0
            limit = c.execute(
                "SELECT recorded_ns FROM filestats ORDER BY recorded_ns DESC LIMIT 1 OFFSET ?", (keep,)
            ).fetchone()[0]
            return c.execute("DELETE FROM filestats WHERE recorded_ns <= ?", (limit,)).rowcount


def _racy(stat: FileStat, observed_ns: int) -> bool:
    newest = max(stat.mtime_ns, stat.ctime_ns)
    # A time of whole seconds comes from a file system that keeps no better one (two seconds on FAT).
    return newest + (_COARSE_NS if newest % 10**9 == 0 else _FINE_NS) >= observed_ns


def _packed(stat: FileStat) -> bytes:
    return _STAT.pack(stat.size_bytes, stat.mtime_ns, stat.ctime_ns)


def _signed(number: int) -> int:
    """SQLite's integers are signed; inode numbers of some file systems use all 64 bits."""
    return number - (1 << 64) if number >= _SIGNED_LIMIT else number
