"""How much disk the store takes, and making it take less.

`usage` counts allocated blocks, as du(1) does. `prune` forgets cache records, by age, by what they
are worth keeping to, or all, and then collects the garbage (`layers.gc.collect`): it never removes
anything itself, so whatever a name, a lease or a live process needs stays.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from layers.gc import Marker, collect
from layers.records import CACHE_OWNER, CacheRecord
from layers.trees import disk_usage, remove_tree
from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.store import Store


DOWNLOADS = "remote"
"""The directory of the store with files from the network; a file's time of change is that of its last use."""

_MEASURE_ANEW_NS = 3600 * 10**9
_IN_USE_NS = 24 * 3600 * 10**9


class UsageItem(NamedTuple):
    """A blob or a snapshot's directory. `bytes` are allocated blocks.

    `state` says what keeps it: a name (or live process), a cache record, or nothing. `used_ns` is when
    a cache record that needs it was last used.
    """

    kind: Literal["blob", "snapshot"]
    id: str
    bytes: int
    state: Literal["named", "cached", "garbage"]
    used_ns: int | None


class UsageReport(NamedTuple):
    """What the store's directory takes. `other_bytes` is the database, cache mounts, downloads under way…"""

    items: tuple[UsageItem, ...]
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.other_bytes + sum(item.bytes for item in self.items)

    @property
    def reclaimable_bytes(self) -> int:
        """What `prune(all=True)` frees, if no build is running."""
        return sum(item.bytes for item in self.items if item.state != "named")


class PruneReport(NamedTuple):
    """What was removed. `bytes` are allocated blocks."""

    records: int
    blobs: int
    snapshots: int
    bytes: int
    downloads: int = 0


def usage(store: Store) -> UsageReport:
    """Measure the store. Walks all of it; what changes meanwhile is counted as it is met."""
    graph = _Graph(store)
    seen: set[tuple[int, int]] = set()
    blobs = f"{store.root}/blobs"
    trees = f"{store.root}/snapshots"
    items = [
        graph.item("blob", info.digest, disk_usage(f"{blobs}/{info.digest.replace(':', '/')}", seen=seen))
        for info in store.walk()
    ]
    items += [
        graph.item("snapshot", name, disk_usage(f"{trees}/{name}", seen=seen)) for name in sorted(os.listdir(trees))
    ]
    return UsageReport(tuple(items), _other_bytes(store, items, seen))


def _other_bytes(store: Store, items: Iterable[UsageItem], seen: set[tuple[int, int]]) -> int:
    total = os.lstat(store.root).st_blocks * 512
    blobs = sum(item.bytes for item in items if item.kind == "blob")
    for entry in os.scandir(store.root):
        if entry.name == "snapshots":
            total += entry.stat(follow_symlinks=False).st_blocks * 512
        else:
            total += disk_usage(entry.path, seen=seen)
            if entry.name == "blobs":
                total -= blobs
    return total


class _Graph:
    """What needs what, loaded once: why each blob and each snapshot directory is kept."""

    def __init__(self, store: Store) -> None:
        marker = Marker(store)
        marker.warm()
        marker.respect(store.leases.alive())
        with store.database.write() as c:  # one consistent view
            named = marker.snapshots(c, cache=False)
            self._named_blobs = marker.blobs(c, named, cache=False)
            self._rows = {(str(d), str(i)): (p, str(dir)) for d, i, p, dir in c.execute(_SNAPSHOTS)}
            self._blobs_of = _grouped(c.execute("SELECT snapshot, digest FROM layers"))
            self._leased_by = _grouped(
                c.execute("SELECT token, resource FROM leases WHERE owner=? AND kind='blob'", (CACHE_OWNER,))
            )
            self.records = [
                (str(key), snapshot, int(used))
                for key, snapshot, used in c.execute("SELECT key, snapshot, used_ns FROM cache ORDER BY used_ns")
            ]
            self.exported = _exported(c, marker)
        self._named_dirs = {self._rows[key][1] for key in named if key in self._rows}
        self._drivers = sorted({driver for driver, _ in self._rows})
        self.used_ns: dict[str, int] = {}
        for key, snapshot, used in self.records:  # oldest first: the last one to need a thing has its say
            for item in self._needs(key, snapshot):
                self.used_ns[item] = used

    def _needs(self, key: str, snapshot: str | None) -> Iterable[str]:
        """Directories and digests that a record keeps."""
        yield from self._leased_by.get(key, ())
        if snapshot is None:
            return
        for driver in self._drivers:
            current: str | None = snapshot
            while current is not None and (driver, current) in self._rows:
                yield from self._blobs_of.get(current, ())
                parent, dir = self._rows[driver, current]
                yield dir
                current = parent

    def item(self, kind: Literal["blob", "snapshot"], id: str, size_bytes: int) -> UsageItem:
        used = self.used_ns.get(id)
        state: Literal["named", "cached", "garbage"] = "garbage" if used is None else "cached"
        if id in (self._named_blobs if kind == "blob" else self._named_dirs):
            state = "named"
        return UsageItem(kind, id, size_bytes, state, used)


_SNAPSHOTS = "SELECT driver, id, parent, dir FROM snapshots"


def _grouped(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in rows:
        groups.setdefault(key, []).append(value)
    return groups


def _exported(c: sqlite3.Connection, marker: Marker) -> set[str]:
    """Snapshots whose changes are a layer of a named image."""
    blobs = marker.named_blobs(c)
    return {str(s) for s, d in c.execute("SELECT snapshot, digest FROM layers") if d in blobs}


def prune(
    store: Store,
    *,
    all: bool = False,
    until_ns: int | None = None,
    keep_bytes: int | None = None,
    match: Callable[[CacheRecord], bool] | None = None,
) -> PruneReport:
    """Forget cache records and remove what only they needed.

    Without a limit, the records that made no layer of a named image go; with `all`, those too.
    `until_ns` spares records used since then; `match` those that it is false for. `keep_bytes`: records
    go, least recently used first, until the store takes no more than that (or there are none left).
    Downloads that can be had again (ADD URL) go before anything else.
    """
    downloads, freed = (0, 0) if match is not None else _drop_downloads(store, until_ns, keep_bytes)
    graph = _Graph(store)
    chosen = [r for r in graph.records if until_ns is None or r[2] < until_ns]
    if match is not None:
        chosen = [r for r in chosen if (record := store.cache.get(r[0])) is not None and match(record)]
    if keep_bytes is not None:
        cutoff = _cutoff(usage(store), keep_bytes)
        chosen = [r for r in chosen if cutoff is not None and r[2] <= cutoff]
    elif not all:
        chosen = [r for r in chosen if r[1] not in graph.exported]
    records = store.cache.delete([key for key, _, _ in chosen])
    report = collect(store)
    return PruneReport(records, report.blobs, report.snapshots, report.bytes + freed, downloads)


def _drop_downloads(store: Store, until_ns: int | None, keep_bytes: int | None) -> tuple[int, int]:
    """Remove what ADD has fetched, least recently used first: how many files, and their allocated bytes.

    While another process lives, what was used within a day may be in its hands, and stays.
    """
    directory = store.root / DOWNLOADS
    limit_ns = time.time_ns() if until_ns is None else until_ns
    if store.leases.alive() - {store.leases.owner()}:
        limit_ns = min(limit_ns, time.time_ns() - _IN_USE_NS)
    try:
        found = [(entry.stat(follow_symlinks=False).st_ctime_ns, entry.path) for entry in os.scandir(directory)]
    except FileNotFoundError:
        return 0, 0
    excess = None if keep_bytes is None else usage(store).total_bytes - keep_bytes
    count = freed = 0
    for used_ns, path in sorted(found):
        if used_ns > limit_ns or (excess is not None and freed >= excess):
            break
        size_bytes = disk_usage(path)
        remove_tree(path)
        freed += size_bytes
        count += not path.endswith(".json")  # what was said of a file goes with it, uncounted
    return count, freed


def make_room(store: Store, *, min_free_bytes: int = 0, max_bytes: int | None = None) -> PruneReport | None:
    """Automatic gc: prune least recently used cache records until the disk has that much free and the store
    takes no more than `max_bytes`; None if both hold already.

    Mostly it costs one system call; the store is walked once an hour, and when the disk has lost as much
    as would bring it to its quota. Names are never removed, so that it may not succeed; what is left to do
    then is the user's.
    """
    free = _free_bytes(store)
    lacking = max(min_free_bytes - free, 0)
    if not lacking and (max_bytes is None or _known_below(store, max_bytes, free)):
        return None
    total = usage(store).total_bytes
    keep = total - lacking if max_bytes is None else min(max_bytes, total - lacking)
    report = None
    if total > keep:
        report = store.prune(all=True, keep_bytes=max(keep, 0))
        total -= report.bytes
    with store.database.write() as c:
        value = f"{total} {_free_bytes(store)} {time.time_ns()}"
        c.execute("INSERT OR REPLACE INTO meta VALUES('gc_measured',?)", (value,))
    return report


def _free_bytes(store: Store) -> int:
    status = os.statvfs(store.root)
    return status.f_bavail * status.f_frsize


def _known_below(store: Store, max_bytes: int, free: int) -> bool:
    """Whether what the store took when it was last walked, and all that the disk lost since, is within the quota."""
    row = store.database.row("SELECT value FROM meta WHERE key='gc_measured'")
    if row is None:
        return False
    total, free_then, measured_ns = map(int, str(row[0]).split())
    fresh = 0 <= time.time_ns() - measured_ns < _MEASURE_ANEW_NS
    return fresh and total + max(free_then - free, 0) <= max_bytes


def _cutoff(report: UsageReport, keep_bytes: int) -> int | None:
    """The time of use up to which records must go; None if none need to."""
    total = report.total_bytes - sum(item.bytes for item in report.items if item.state == "garbage")
    cutoff: int | None = None
    for item in sorted((i for i in report.items if i.state == "cached"), key=lambda i: i.used_ns or 0):
        # Records of one moment go together.
        if total <= keep_bytes and item.used_ns != cutoff:
            break
        total -= item.bytes
        cutoff = item.used_ns
    return cutoff
