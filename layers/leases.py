"""Locks and leases of the store: who is alive, and what must not be collected.

All locks are flock(2) locks, so they die with their process. Three kinds of file:

    lock            the store lock: shared for the moments in which files and rows are made to agree
                    (a rename and its row), exclusive for gc. Held for milliseconds; never deleted.
    leases/OWNER    one per process that protects something, locked while it lives. Rows in `leases`
                    and active snapshots name their OWNER; when the file is unlocked they are void.
    flights/HASH    one per piece of work that two processes should not do twice; deleted after use.

A thread that holds the store lock must not take it again: locks belong to open files, so a second
one would wait for the first.
"""

from __future__ import annotations

import fcntl
import os
from _thread import allocate_lock
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from layers.database import Database
from layers.errors import StoreError
from layers.sha import sha256

_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


def lock_file(path: str, *, wait: bool = True) -> int | None:
    """Create and lock a file that its last user deletes; None if it is held and `wait` is false.

    The holder of the result unlinks the path before closing the descriptor.
    Raises: OSError naming `path`.
    """
    while True:
        fd = os.open(path, _OPEN, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(fd)
                return None
            # Its last user may have deleted it between our open and our lock.
            mine, there = os.fstat(fd), os.stat(path)
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def unlock_file(fd: int, path: str) -> None:
    """Delete and unlock what `lock_file` gave."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    finally:
        release(fd)


def release(fd: int) -> None:
    """Unlock and close. A child forked meanwhile (the zygote) has a copy of the descriptor: closing is not enough."""
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


class StoreLock:
    """The store lock. Each use opens the file anew, so that threads do not share a lock."""

    def __init__(self, root: Path) -> None:
        self._path = str(root / "lock")

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While files and rows are brought into agreement. Waits for a running gc's deletions."""
        yield from self._hold(fcntl.LOCK_SH)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While rows and then files are deleted."""
        yield from self._hold(fcntl.LOCK_EX)

    def _hold(self, operation: int) -> Iterator[None]:
        fd = os.open(self._path, _OPEN, 0o600)
        try:
            fcntl.flock(fd, operation)
            yield
        finally:
            release(fd)


class Leases:
    """This process's lease, made when first needed, and what can be known of the others'. Thread-safe."""

    def __init__(self, root: Path, database: Database, lock: StoreLock) -> None:
        self._dir = str(root / "leases")
        self._flights = str(root / "flights")
        self._database = database
        self._lock = lock
        self._guard = allocate_lock()
        self._owner: str | None = None
        self._fd = -1
        self._count = 0

    def owner(self) -> str:
        """The name under which this process protects things; its lock file lives from the first call on."""
        with self._guard:
            if self._owner is None:
                owner = f"{os.getpid()}-{os.urandom(6).hex()}"
                fd = lock_file(f"{self._dir}/{owner}")
                assert fd is not None
                self._owner, self._fd = owner, fd
            return self._owner

    @contextmanager
    def hold(self, *, blobs: Iterable[str] = (), snapshots: Iterable[str] = ()) -> Iterator[None]:
        """Protect blobs (here or to come) and committed snapshots from gc within the block.

        Raises: StoreError if a snapshot is not there (any more).
        """
        owner = self.owner()
        with self._guard:
            self._count += 1
            token = str(self._count)
        wanted = list(snapshots)
        # Under the store lock: a gc that has already asked who is alive must end first.
        with self._lock.shared(), self._database.write() as c:
            for id in wanted:
                if c.execute("SELECT 1 FROM snapshots WHERE id=? LIMIT 1", (id,)).fetchone() is None:
                    raise StoreError(f"snapshot {id} is not in the store")
            rows = [(owner, token, "blob", d) for d in blobs] + [(owner, token, "snapshot", s) for s in wanted]
            c.executemany("INSERT OR IGNORE INTO leases VALUES(?,?,?,?)", rows)
        try:
            yield
        finally:
            try:
                with self._database.write() as c:
                    c.execute("DELETE FROM leases WHERE owner=? AND token=?", (owner, token))
            except StoreError:
                pass  # it ends with this process at the latest

    def claim(self, *, blobs: Iterable[str] = (), snapshots: Iterable[str] = ()) -> set[str]:
        """Protect what is there of these until this process ends; the IDs and digests of what is.

        What a process writes is claimed by itself. What it merely found, a gc may take at any moment.
        """
        owner = self.owner()
        found: set[str] = set()
        with self._lock.shared(), self._database.write() as c:
            for kind, column, table, names in (
                ("blob", "digest", "blobs", blobs),
                ("snapshot", "id", "snapshots", snapshots),
            ):
                for name in names:
                    there = c.execute(f"SELECT 1 FROM {table} WHERE {column}=? LIMIT 1", (name,))  # noqa: S608
                    if there.fetchone() is not None:
                        found.add(name)
                        c.execute("INSERT OR IGNORE INTO leases VALUES(?,'',?,?)", (owner, kind, name))
        return found

    @contextmanager
    def flight(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Be the only one, of all threads and processes, that works on `key` within the block.

        Waits for whoever does; then look whether the work is still to be done. With `wait=False`,
        yields False at once if somebody does.
        """
        path = f"{self._flights}/{sha256(key.encode()).hexdigest()[:40]}"
        fd = lock_file(path, wait=wait)
        if fd is None:
            yield False
            return
        try:
            yield True
        finally:
            unlock_file(fd, path)

    def dead(self) -> list[str]:
        """Owners whose process is gone; their lock files stay until `bury`."""
        return [n for n in os.listdir(self._dir) if n != self._owner and not is_locked(f"{self._dir}/{n}")]

    def alive(self) -> set[str]:
        """Owners whose process lives, this one included. Call it under the exclusive store lock."""
        return {n for n in os.listdir(self._dir) if n == self._owner or is_locked(f"{self._dir}/{n}")}

    def bury(self, owner: str) -> None:
        """Forget a dead owner's leases and lock file; its active snapshots are the caller's matter."""
        with self._database.write() as c:
            c.execute("DELETE FROM leases WHERE owner=?", (owner,))
        try:
            os.unlink(f"{self._dir}/{owner}")
        except FileNotFoundError:
            pass

    def close(self) -> None:
        """End this process's lease. Idempotent."""
        with self._guard:
            owner, fd = self._owner, self._fd
            self._owner, self._fd = None, -1
        if owner is None:
            return
        try:
            with self._database.write() as c:
                c.execute("DELETE FROM leases WHERE owner=?", (owner,))
        except StoreError:
            release(fd)  # the disk is full, say: without its lock the lease is void, and swept later
        else:
            unlock_file(fd, f"{self._dir}/{owner}")


def is_locked(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
