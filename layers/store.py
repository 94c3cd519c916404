"""The local store: blobs, names, snapshots, layers and cache records under one directory.

    ROOT/
      oci-layout, index.json, blobs/ALGORITHM/HEX    an OCI image layout: `skopeo inspect oci:ROOT:NAME` works
      store.db (-wal, -shm)                          everything else that is known (layers.database)
      ingest/ID                                      blobs being written, locked while their writer lives
      snapshots/DIR/{fs,work}                        file systems (layers.snapshotters)
      empty/                                         what a snapshot of nothing shows
      leases/, flights/, lock                        who is alive (layers.leases)
      trash/                                         renamed away, being deleted

The law: **a durable name never points at undurable bytes**. Nothing is synced while a build runs;
`publish` syncs the whole file system once (the barrier) and then commits the names with a synced
transaction. What was written since the last barrier is forgotten when the machine has restarted in
between (`layers.database`, epochs). Deletion goes the other way: rows first, synced, then bytes.

Any number of processes and threads may share a store. The user namespace that a rootless build
runs in must be entered before the store is opened, and nothing here survives a fork.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

from layers import faults, ownership
from layers.blobs import BlobDirectory, BlobIngest
from layers.content import BlobInfo
from layers.database import Database, boot_id
from layers.errors import BlobNotFound, ImageError, StoreError
from layers.leases import Leases, StoreLock
from layers.oci import (
    INDEX_MEDIA_TYPES,
    MANIFEST_MEDIA_TYPES,
    MAX_MANIFEST_BYTES,
    MEDIA_OCI_INDEX,
    Descriptor,
    Digest,
    Index,
    parse_manifest,
)
from layers.records import Cache, FileStats, Layers, Names, encode_descriptor
from layers.root import default_root as default_root
from layers.snapshotters.catalog import Catalog
from layers.snapshotters.overlay import OverlaySnapshotter, overlay_works
from layers.values import Protocol, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    import threading
    from typing import BinaryIO, Literal, overload

    from layers.gc import GcReport, SweepReport
    from layers.prune import PruneReport, UsageReport
    from layers.records import CacheRecord
    from layers.snapshot import ActiveSnapshot, Dialect
    from layers.snapshotters.native import NativeSnapshotter

    Driver = Literal["auto", "overlay", "fuse-overlayfs", "native"]


REF_NAME = "org.opencontainers.image.ref.name"
_DIRECTORIES = ("blobs", "blobs/sha256", "ingest", "snapshots", "leases", "flights", "trash", "empty")
_RESERVE_BYTES = 1 << 20
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


def default_dialect() -> Dialect:
    """`trusted` as root of the initial user namespace, `user` everywhere else."""
    return "trusted" if os.geteuid() == 0 and _uid_map().split() == ["0", "0", "4294967295"] else "user"


def _uid_map() -> str:
    try:
        with open("/proc/self/uid_map", encoding="utf-8") as f:
            return f.read()
    except OSError:
        return ""


class _LayersOfStore:
    """Has packed snapshots' layers unpacked; see `layers.snapshotters.overlay.LayerUnpacker`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def alone(self, key: str) -> AbstractContextManager[bool]:
        return self._store.flight(f"fill:{key}")

    def unpack(self, id: str, active: ActiveSnapshot) -> None:
        from layers.image import unpack_layer

        with self._store.lease(snapshots=[id]):
            record = self._store.layers.lookup(id)
            if record is None or self._store.stat(record.descriptor.digest) is None:
                raise StoreError(f"snapshot {id} has lost its layer", hint="run `pybuild fsck --repair`")
            unpack_layer(self._store, record, active)


class _OpenStore(Protocol):
    def __call__(
        self,
        root: Path,
        *,
        driver: Driver = "auto",
        dialect: Dialect | None = None,
        clock: Callable[[], int] = time.time_ns,
        boot: str | None = None,
    ) -> Store: ...


class _OpenBlob(Protocol):
    def __call__(self, digest: Digest) -> BinaryIO: ...


class _Open:
    """`Store.open(root)` opens a store; `store.open(digest)` opens a blob, as ContentStore has it."""

    if TYPE_CHECKING:

        @overload
        def __get__(self, instance: None, owner: type[Store]) -> _OpenStore: ...

        @overload
        def __get__(self, instance: Store, owner: type[Store]) -> _OpenBlob: ...

    def __get__(self, instance: Store | None, owner: type[Store]) -> _OpenStore | _OpenBlob:
        return _open_store if instance is None else instance.blobs.open


class Store:
    """A store that is open; a `ContentStore` itself. Thread-safe. `Store.open` makes one."""

    def __init__(
        self, root: Path, database: Database, driver: Driver, dialect: Dialect, boot: str, clock: Callable[[], int]
    ) -> None:
        self.root = root
        self.dialect: Dialect = dialect
        self.database = database
        self._driver = driver
        self._boot = boot
        self._clock = clock
        self.lock = StoreLock(root)
        self.leases = Leases(root, database, self.lock)
        self.blobs = BlobDirectory(root, database, self.lock, self.leases, clock)
        self.names = Names(database, self._publish)
        self.layers = Layers(database)
        self.cache = Cache(database, self._label, clock)
        self.filestats = FileStats(database)
        self._snapshots: OverlaySnapshotter | NativeSnapshotter | None = None
        self._flushing: threading.Thread | None = None

    def _start(self) -> None:
        meta = self.database.meta()
        if meta.get("boot") != self._boot:
            from layers.gc import forget_undurable

            forget_undurable(self, self._boot)
            self.refresh_index()
        elif meta.get("names_generation") != meta.get("index_generation"):
            self.refresh_index()  # a process died between its commit and the new index.json
        if self.leases.dead():
            try:
                self.sweep()
            except StoreError:
                pass  # the disk is full, say: what dead processes left can wait for the next opening

    # Blobs: the ContentStore protocol

    open = _Open()

    def stat(self, digest: Digest) -> BlobInfo | None:
        """See ContentStore.stat."""
        return self.blobs.stat(digest)

    def read(self, digest: Digest, limit_bytes: int = MAX_MANIFEST_BYTES) -> bytes:
        """See ContentStore.read."""
        return self.blobs.read(digest, limit_bytes)

    def ingest(
        self,
        *,
        expected: Descriptor | None = None,
        media_type: str = "application/octet-stream",
        ref: str | None = None,
    ) -> BlobIngest:
        """See ContentStore.ingest. What this process ingests is safe from gc until it ends."""
        return self.blobs.ingest(expected=expected, media_type=media_type, ref=ref)

    def put(self, data: bytes, media_type: str) -> Descriptor:
        """Store a small blob that is in memory. Idempotent."""
        descriptor = Descriptor.of(data, media_type)
        with self.ingest(expected=descriptor) as ingest:
            ingest.write(data)
            return ingest.commit()

    def delete(self, digest: Digest) -> bool:
        """See ContentStore.delete."""
        return self.blobs.delete(digest)

    def walk(self) -> Iterator[BlobInfo]:
        """See ContentStore.walk."""
        return self.blobs.walk()

    def path(self, digest: Digest) -> Path | None:
        """See ContentStore.path."""
        return self.blobs.path(digest)

    # Snapshots

    @property
    def snapshots(self) -> OverlaySnapshotter | NativeSnapshotter:
        """The driver's snapshotter; overlay where the kernel mounts one here, or fuse-overlayfs, else native."""
        if self._snapshots is None:
            driver = self._choose_driver()
            label = "native" if driver == "native" else f"overlay-{self.dialect}"
            owners = ownership.here()
            if owners.recording:
                label += "-single"  # who has owners of his own would take the recorded ones for root's
            elif owners.deviceless and driver == "native":
                label += "-user"  # and recorded devices for empty files
            catalog = Catalog(self.root, label, self.database, self.lock, self.leases, self._clock)
            if driver == "native":
                from layers.snapshotters.native import NativeSnapshotter

                self._snapshots = NativeSnapshotter(catalog, self.dialect)
            else:
                program = _fuse_program() if driver == "fuse-overlayfs" else None
                self._snapshots = OverlaySnapshotter(
                    catalog, self.dialect, program=program, unpack=_LayersOfStore(self)
                )
        return self._snapshots

    def _label(self) -> str:
        return self.snapshots.label

    def _choose_driver(self) -> Driver:
        if self._driver != "auto":
            return self._driver
        # A probe takes a mount and some directories: its outcome holds until the next boot.
        key = f"driver:{self.dialect}:{' '.join(_uid_map().split())}"
        row = self.database.row("SELECT value FROM meta WHERE key=?", (key,))
        if row is None:
            row = (self._probe_driver(),)
            with self.database.write() as c:
                c.execute("INSERT OR REPLACE INTO meta VALUES(?,?)", (key, row[0]))
        return row[0]  # type: ignore[return-value]

    def _probe_driver(self) -> Driver:
        place = self.root / "trash"
        if overlay_works(place, self.dialect):
            return "overlay"
        from layers import fusemount

        program = fusemount.find_program()
        return "fuse-overlayfs" if program and overlay_works(place, self.dialect, program) else "native"

    # Names

    def publish(self, names: Mapping[str, Descriptor]) -> None:
        """Name images, all or none; once it returns, names and bytes survive a power cut.

        A no-op, without a sync, for names that stand for the same durable bytes already.
        Raises: BlobNotFound if a manifest, config or layer is missing; platforms of an index may be.
        """
        self._publish(dict(names))

    def _publish(self, changes: dict[str, Descriptor | None]) -> None:
        needed: set[Digest] = set()
        for name, descriptor in changes.items():
            if descriptor is not None:
                needed |= self.closure(descriptor, name)
        if not changes or self._is_published(changes, needed):
            return
        with self.leases.hold(blobs=needed):
            if self._undurable(needed):
                self.barrier()
            with self.lock.shared():
                missing = self._undurable(needed)
                if missing:
                    raise BlobNotFound(f"blob {missing[0]} was removed while {next(iter(changes))} was being named")
                self._commit_names(changes)
        if faults.ARMED:
            faults.reach("store.publish.before-index")
        self.refresh_index()

    def _is_published(self, changes: dict[str, Descriptor | None], needed: set[Digest]) -> bool:
        same = all(d is not None and self.names.get(name) == d for name, d in changes.items())
        return same and not self._undurable(needed)

    def _commit_names(self, changes: dict[str, Descriptor | None]) -> None:
        now = self._clock()
        with self.database.write(sync=True) as c:
            for name, descriptor in changes.items():
                if descriptor is None:
                    c.execute("DELETE FROM names WHERE name=?", (name,))
                else:
                    c.execute(
                        "INSERT OR REPLACE INTO names VALUES(?,?,?,?)",
                        (name, descriptor.digest, encode_descriptor(descriptor), now),
                    )
            c.execute("UPDATE meta SET value=value+1 WHERE key='names_generation'")
            if faults.ARMED:
                faults.reach("store.publish.before-commit")

    def closure(
        self, descriptor: Descriptor, name: str = "", *, present: Callable[[Digest], object] | None = None
    ) -> set[Digest]:
        """All blobs that a manifest or index needs and that are here, or of which `present` says so.

        Raises: BlobNotFound for a missing config or layer; a missing platform of an index is passed over.
        """
        there = present or self.stat
        found: set[Digest] = set()
        pending = [(descriptor, True)]
        while pending:
            current, required = pending.pop()
            if current.digest in found:
                continue
            if not there(current.digest):
                if required:
                    shown = name or descriptor.digest
                    raise BlobNotFound(f"{shown} needs blob {current.digest}, which is not in the store")
                continue
            found.add(current.digest)
            if current.media_type in MANIFEST_MEDIA_TYPES | INDEX_MEDIA_TYPES:
                document = parse_manifest(self.read(current.digest, MAX_MANIFEST_BYTES), current.media_type)
                if isinstance(document, Index):
                    pending.extend((d, False) for d in document.manifests)
                else:
                    # Foreign layers (Windows bases) lie elsewhere for good.
                    pending.extend((d, not d.urls) for d in (document.config, *document.layers))
        return found

    def _undurable(self, digests: Iterable[Digest]) -> list[str]:
        """Those of the digests that no barrier has covered yet, or that have no blob."""
        rows = self.database.rows(
            "SELECT j.value FROM json_each(?) j LEFT JOIN blobs b ON b.digest=j.value WHERE b.epoch IS NULL"
            " OR b.epoch > (SELECT value FROM meta WHERE key='durable_epoch')",
            (json.dumps(sorted(digests)),),
        )
        return [str(row[0]) for row in rows]

    def barrier(self) -> None:
        """Make all that was written to the store survive a power cut. Raises: StoreError (I/O error)."""
        with self.database.write() as c:
            epoch = c.execute("SELECT value FROM meta WHERE key='epoch'").fetchone()[0]
            # Rows written from here on may speak of bytes that the sync below no longer sees.
            c.execute("UPDATE meta SET value=? WHERE key='epoch'", (epoch + 1,))
        if faults.ARMED:
            faults.reach("store.barrier.before-sync")
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            from layers import linux

            linux.syncfs(fd)
        except OSError as e:
            raise StoreError(f"{self.root}: the disk failed to write what was stored: {e.strerror}") from e
        finally:
            os.close(fd)
        if faults.ARMED:
            faults.reach("store.barrier.after-sync")
        with self.database.write(sync=True) as c:
            c.execute("UPDATE meta SET value=max(value, ?) WHERE key='durable_epoch'", (epoch,))

    def flush_ahead(self) -> None:
        """Begin to write out, in the background, what the next barrier would have to wait for.

        For who has just written much and has other work to do before it is named. Changes nothing
        of what is durable: errors are the barrier's to find.
        """
        import threading

        if self._flushing is None or not self._flushing.is_alive():
            self._flushing = threading.Thread(target=self._flush, name="flush", daemon=True)
            self._flushing.start()

    def _flush(self) -> None:
        from layers import linux

        try:
            fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            linux.syncfs(fd)
        except OSError:
            pass
        finally:
            os.close(fd)

    def refresh_index(self) -> None:
        """Bring index.json up to the names, for the tools that read OCI layouts."""
        with self.leases.flight("index.json"):
            generation = self.database.meta()["names_generation"]
            document = {
                "schemaVersion": 2,
                "mediaType": MEDIA_OCI_INDEX,
                "manifests": [_with_name(n.descriptor, n.name) for n in self.names.list()],
            }
            path = self.root / "index.json"
            write_file(path, json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode())
            with self.database.write() as c:
                c.execute("UPDATE meta SET value=? WHERE key='index_generation'", (generation,))

    def import_index(self, c: sqlite3.Connection) -> None:
        """Take the names of an OCI layout, or of a store that has lost its database. Raises: StoreError."""
        path = self.root / "index.json"
        try:
            with open(path, "rb") as f:
                document = json.load(f)
            manifests = [Descriptor.from_json(d) for d in document.get("manifests") or ()]
        except FileNotFoundError:
            return
        except (ValueError, AttributeError, TypeError, ImageError) as e:
            raise StoreError(f"{path} is damaged: {e}", hint="remove it: its names are lost, its blobs are not") from e
        for descriptor in manifests:
            name = descriptor.annotations.get(REF_NAME)
            if name:
                rest = {k: v for k, v in descriptor.annotations.items() if k != REF_NAME}
                plain = replace(descriptor, annotations=rest)
                c.execute(
                    "INSERT OR IGNORE INTO names VALUES(?,?,?,?)",
                    (name, plain.digest, encode_descriptor(plain), self._clock()),
                )

    # Life

    def lease(self, *, blobs: Iterable[Digest] = (), snapshots: Iterable[str] = ()) -> AbstractContextManager[None]:
        """Protect blobs (also such as are still to come) and snapshots from gc within the block.

        What this process writes is protected anyway until it ends; take a lease on what it found.
        Raises, on entering: StoreError if a snapshot is not there any more.
        """
        return self.leases.hold(blobs=blobs, snapshots=snapshots)

    def claim(self, *, blobs: Iterable[Digest] = (), snapshots: Iterable[str] = ()) -> set[str]:
        """Protect what is there of these from gc until this process ends; which are. See Leases.claim."""
        return self.leases.claim(blobs=blobs, snapshots=snapshots)

    def flight(self, key: str, *, wait: bool = True) -> AbstractContextManager[bool]:
        """Be the only one, of all threads and processes, that does the work `key`; see Leases.flight."""
        return self.leases.flight(key, wait=wait)

    def sweep(self) -> SweepReport:
        """Clear away what dead processes left half-done. See `layers.gc.sweep`."""
        from layers.gc import sweep

        with self.reserve():
            return sweep(self)

    def gc(self) -> GcReport:
        """Remove what no name, cache record, lease or live process needs. See `layers.gc.collect`."""
        from layers.gc import collect

        with self.reserve():
            return collect(self)

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """On a full disk, have room in the block for the rows that deletions take."""
        _release_reserve(self.root)
        try:
            yield
        finally:
            _make_reserve(self.root)

    def usage(self) -> UsageReport:
        """How much disk the store takes. See `layers.prune.usage`."""
        from layers.prune import usage

        return usage(self)

    def prune(
        self,
        *,
        all: bool = False,
        until_ns: int | None = None,
        keep_bytes: int | None = None,
        match: Callable[[CacheRecord], bool] | None = None,
    ) -> PruneReport:
        """Forget cache records and remove what only they needed. See `layers.prune.prune`."""
        from layers.prune import prune

        with self.reserve():
            return prune(self, all=all, until_ns=until_ns, keep_bytes=keep_bytes, match=match)

    def make_room(self, *, min_free_bytes: int = 0, max_bytes: int | None = None) -> PruneReport | None:
        """Automatic gc by free space and quota. See `layers.prune.make_room`."""
        from layers.prune import make_room

        return make_room(self, min_free_bytes=min_free_bytes, max_bytes=max_bytes)

    def close(self) -> None:
        """End this process's leases and close the database. Idempotent."""
        try:
            self.leases.close()
        finally:
            self.database.close()

    def let_go(self) -> None:
        """As `close`, for a process that ends itself at once; see `Database.let_go`."""
        self.leases.close()
        self.database.let_go()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_store(
    root: Path,
    *,
    driver: Driver = "auto",
    dialect: Dialect | None = None,
    clock: Callable[[], int] = time.time_ns,
    boot: str | None = None,
) -> Store:
    """Open the store at `root`, which is made if it is missing or empty.

    `boot` identifies this run of the machine; only tests give it.
    Raises: StoreError (not writable, not a store, of another version, damaged).
    """
    root = Path(os.path.abspath(root))
    if not os.path.exists(root / "store.db"):
        _create(root)
    database = _open_database(root)
    try:
        store = Store(root, database, driver, dialect or default_dialect(), boot or boot_id(), clock)
        store._start()
    except BaseException:
        database.close()
        raise
    return store


def _open_database(root: Path) -> Database:
    """Open it also on a full disk, or nobody could run the command that makes room."""
    try:
        return Database(root / "store.db")
    except StoreError:
        if not _release_reserve(root):
            raise
        return Database(root / "store.db")


def _make_reserve(root: Path) -> None:
    """Set some space aside: to delete anything, SQLite must first write what is deleted."""
    path = root / "reserve"
    if os.path.exists(path):
        return
    temporary = f"{path}.{os.urandom(4).hex()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _RESERVE_BYTES)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError:
        try:
            os.unlink(temporary)
        except OSError:
            pass


def _release_reserve(root: Path) -> bool:
    """Give the reserve back to a disk that is all but full; whether there was any need and any reserve."""
    try:
        status = os.statvfs(root)
        if status.f_bavail * status.f_frsize >= _RESERVE_BYTES:
            return False
        os.unlink(root / "reserve")
    except OSError:
        return False
    return True


def _create(root: Path) -> None:
    """Make the directories of a store; what is there of them is kept. Raises: StoreError."""
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        names = os.listdir(root)
        # Another process may be creating the store at this moment; the layout file comes last.
        strangers = [] if "oci-layout" in names else [n for n in names if n.partition(".")[0] not in _OWN]
        if strangers:
            raise StoreError(
                f"{root} is neither empty nor a pybuild store (it has {strangers[0]!r})",
                hint="choose an empty directory with --root or PYBUILD_ROOT",
            )
        create_directories(root)
        _make_reserve(root)
    except OSError as e:
        raise StoreError(
            f"{e.filename or root}: cannot create the store: {e.strerror}", hint="use --root or PYBUILD_ROOT"
        ) from e


def create_directories(root: Path, *, only_check: bool = False) -> list[str]:
    """Make what a store's directory must have; what was missing of it."""
    missing = [name for name in (*_DIRECTORIES, "oci-layout") if not os.path.exists(root / name)]
    for name in missing:
        if only_check:
            continue
        if name == "oci-layout":
            write_file(root / name, _LAYOUT)
            continue
        os.makedirs(root / name, mode=0o755, exist_ok=True)
        # Snapshots hold set-id programs and whatever a build had: nobody else's business. The umask
        # must not make the root directory of an empty image any other.
        os.chmod(root / name, 0o700 if name == "snapshots" else 0o755)
    return missing


_OWN = frozenset({*_DIRECTORIES, "oci-layout", "index", "store", "lock", "reserve"})
"""What a store's directory has, up to the first dot: temporary files are `NAME.RANDOM`."""


def write_file(path: Path, data: bytes) -> None:
    """Replace a small file: whole or not at all, a power cut included. Raises: StoreError."""
    temporary = f"{path}.{os.urandom(4).hex()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, data)
            os.fdatasync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError as e:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise StoreError(f"{path}: {e.strerror}") from e


def _with_name(descriptor: Descriptor, name: str) -> dict[str, object]:
    document: dict[str, object] = descriptor.to_json()
    document["annotations"] = {**descriptor.annotations, REF_NAME: name}
    return document


def _fuse_program() -> str:
    from layers import fusemount

    program = fusemount.find_program()
    if program is None:
        raise StoreError(
            "storage driver fuse-overlayfs: the program or /dev/fuse is not to be had here",
            hint="install the package fuse-overlayfs; in a container, give it the device: --device /dev/fuse",
        )
    return program
