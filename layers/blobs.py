"""Blobs on disk: `blobs/ALGORITHM/HEX`, written under `ingest/` and verified before they appear.

A blob's file is trusted when its row in `blobs` says so: the row is written after the rename. A
file without a row (a crash came between, the machine lost power, another tool put it there) is
hashed once before anybody sees it, and removed if it is not what its name says. Nothing is synced
here; `Store.barrier` does that for everything at once.

`BlobDirectory` is the `ContentStore` that `layers.store.Store` exposes.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat as stat_
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from layers import faults
from layers.content import BlobInfo
from layers.database import EPOCH, Database
from layers.errors import BlobNotFound, DigestMismatch, ImageError, SizeMismatch, StoreError
from layers.leases import Leases, StoreLock, release
from layers.oci import Descriptor, Digest
from layers.sha import sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

_CHUNK = 1 << 20
_LARGE_BYTES = 16 << 20
_CORRUPT_HINT = "the store is damaged: run `pybuild fsck --repair`, then pull or build the image again"


class BlobDirectory:
    """Thread-safe; several processes may work on one directory."""

    def __init__(
        self, root: Path, database: Database, lock: StoreLock, leases: Leases, clock: Callable[[], int]
    ) -> None:
        self._blobs = str(root / "blobs")
        self._ingests = str(root / "ingest")
        self._database = database
        self._lock = lock
        self._leases = leases
        self._clock = clock

    def _file(self, digest: Digest) -> str:
        algorithm, _, encoded = digest.partition(":")
        return f"{self._blobs}/{algorithm}/{encoded}"

    def stat(self, digest: Digest) -> BlobInfo | None:
        """See ContentStore.stat. Hashes a file that the database does not vouch for."""
        path = self._file(digest)
        row = self._database.row("SELECT size FROM blobs WHERE digest=?", (digest,))
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return None
        if row is not None and row[0] == status.st_size:
            return BlobInfo(digest, status.st_size)
        return self._adopt(digest, path)

    def _adopt(self, digest: Digest, path: str) -> BlobInfo | None:
        """Take a file into the database if its bytes are right; remove it if they are not."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            good = hash_file(fd, digest) == digest
            with self._lock.shared() if good else self._lock.exclusive():
                mine = os.fstat(fd)
                try:
                    there = os.stat(path)
                except FileNotFoundError:
                    return None
                if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
                    return BlobInfo(digest, there.st_size)  # somebody has put a verified one in its place
                if good:
                    self._record(digest, mine.st_size)
                    return BlobInfo(digest, mine.st_size)
                with self._database.write(sync=True) as c:
                    c.execute("DELETE FROM blobs WHERE digest=?", (digest,))
                os.unlink(path)
                return None
        finally:
            os.close(fd)

    def _record(self, digest: Digest, size_bytes: int) -> None:
        """Vouch for a file, and protect it while this process lives. The store lock is held."""
        owner = self._leases.owner()
        with self._database.write() as c:
            c.execute(
                f"INSERT INTO blobs VALUES(?,?,{EPOCH},?) ON CONFLICT(digest) DO UPDATE"
                " SET size=excluded.size, epoch=excluded.epoch",
                (digest, size_bytes, self._clock()),
            )
            c.execute("INSERT OR IGNORE INTO leases VALUES(?,'','blob',?)", (owner, digest))

    def path(self, digest: Digest) -> Path | None:
        """See ContentStore.path. The file is trusted, not verified again."""
        return Path(self._file(digest)) if self.stat(digest) is not None else None

    def open(self, digest: Digest) -> BinaryIO:
        """See ContentStore.open. Read from start to end, the bytes are verified.

        A read that reaches the end without a seek in between raises DigestMismatch if they are wrong.
        """
        if self.stat(digest) is None:
            raise BlobNotFound(f"blob {digest} is not in the store")
        try:
            raw = VerifyingReader(self._file(digest), digest)
        except FileNotFoundError:
            raise BlobNotFound(f"blob {digest} is not in the store") from None
        return io.BufferedReader(raw, 128 << 10)

    def read(self, digest: Digest, limit_bytes: int) -> bytes:
        """See ContentStore.read."""
        info = self.stat(digest)
        if info is None:
            raise BlobNotFound(f"blob {digest} is not in the store")
        if info.size_bytes > limit_bytes:
            raise SizeMismatch(f"blob {digest} has {info.size_bytes} bytes; at most {limit_bytes} were expected")
        try:
            with io.FileIO(self._file(digest), "rb") as f:
                data = f.read(limit_bytes + 1) or b""
        except FileNotFoundError:
            raise BlobNotFound(f"blob {digest} is not in the store") from None
        if not _is(data, digest):
            raise DigestMismatch(f"blob {digest} is damaged", hint=_CORRUPT_HINT)
        return data

    def ingest(
        self,
        *,
        expected: Descriptor | None = None,
        media_type: str = "application/octet-stream",
        ref: str | None = None,
    ) -> BlobIngest:
        """See ContentStore.ingest."""
        if expected is not None:
            self._check_room(expected)
        self._leases.owner()  # so that a process that only ingests is seen to be alive
        if ref is None:
            name = os.urandom(12).hex()
        else:
            name = "ref-" + sha256(ref.encode()).hexdigest()[:40]
        fd = self._claim(f"{self._ingests}/{name}", ref)
        try:
            return BlobIngest(self, f"{self._ingests}/{name}", fd, expected, media_type, ref)
        except BaseException:
            os.close(fd)
            raise

    def _check_room(self, expected: Descriptor) -> None:
        """Refuse a large blob that cannot fit before its download rather than at its end."""
        if expected.size_bytes < _LARGE_BYTES:
            return
        status = os.statvfs(self._ingests)
        free = status.f_bavail * status.f_frsize
        if expected.size_bytes > free:
            raise StoreError(
                f"{self._ingests}: the disk has {free} bytes left; blob {expected.digest} has {expected.size_bytes}",
                hint="free some space, or run `pybuild prune`",
            )

    def _claim(self, path: str, ref: str | None) -> int:
        """Open and lock an ingest's file."""
        for attempt in range(10):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except OSError as e:
                raise _write_error(e, path) from e
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine, there = os.fstat(fd), os.stat(path)
                if mine.st_ino == there.st_ino:
                    return fd
            except FileNotFoundError:
                pass  # swept between our open and our lock
            except BlockingIOError:
                # A sweep holds it for microseconds while it asks whether anybody lives behind it.
                time.sleep(0.002 * attempt)
            os.close(fd)
        raise StoreError(f"another process is already fetching {ref}", hint="wait for it to finish, then try again")

    def publish(self, ingest_path: str, digest: Digest, size_bytes: int) -> None:
        """Move a verified ingest to its name; drop it if a trusted blob is there. Idempotent."""
        target = self._file(digest)
        with self._lock.shared():
            row = self._database.row("SELECT size FROM blobs WHERE digest=?", (digest,))
            if row is not None and _size(target) == size_bytes:
                owner = self._leases.owner()
                with self._database.write() as c:
                    c.execute("INSERT OR IGNORE INTO leases VALUES(?,'','blob',?)", (owner, digest))
                os.unlink(ingest_path)
                return
            if faults.ARMED:
                faults.reach("store.ingest.before-rename")
            try:
                os.rename(ingest_path, target)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
                os.rename(ingest_path, target)
            if faults.ARMED:
                faults.reach("store.ingest.after-rename")
            self._record(digest, size_bytes)

    def delete(self, digest: Digest) -> bool:
        """See ContentStore.delete. Whether something still refers to it is the caller's question."""
        with self._lock.exclusive():
            with self._database.write(sync=True) as c:
                c.execute("DELETE FROM blobs WHERE digest=?", (digest,))
                c.execute("DELETE FROM layers WHERE digest=?", (digest,))
            try:
                os.unlink(self._file(digest))
            except FileNotFoundError:
                return False
            return True

    def walk(self) -> Iterator[BlobInfo]:
        """See ContentStore.walk. Files that are not named as blobs are passed over."""
        for algorithm in sorted(os.listdir(self._blobs)):
            try:
                entries = list(os.scandir(f"{self._blobs}/{algorithm}"))
            except NotADirectoryError:
                continue
            for entry in entries:
                try:
                    digest = Digest(f"{algorithm}:{entry.name}")
                    status = entry.stat(follow_symlinks=False)
                except (ImageError, FileNotFoundError):
                    continue
                if stat_.S_ISREG(status.st_mode):
                    yield BlobInfo(digest, status.st_size)


class BlobIngest:
    """See `layers.content.Ingest`. Not thread-safe: one writer each."""

    def __init__(
        self,
        directory: BlobDirectory,
        path: str,
        fd: int,
        expected: Descriptor | None,
        media_type: str,
        ref: str | None,
    ) -> None:
        self._directory = directory
        self._path = path
        self._fd = fd
        self._expected = expected
        self._media_type = media_type
        self._ref = ref
        self._limit = expected.size_bytes if expected is not None else None
        self._algorithm = expected.digest if expected is not None else Digest.of(b"")
        self._hasher = self._algorithm.hasher()
        self._offset = 0
        self._resume()

    def _resume(self) -> None:
        """Re-read what an earlier process wrote, so that the running hash is right."""
        size = os.fstat(self._fd).st_size
        if size == 0:
            return
        if self._limit is not None and size > self._limit:
            self.restart()
            return
        while chunk := os.read(self._fd, _CHUNK):
            self._hasher.update(chunk)
            self._offset += len(chunk)

    @property
    def offset(self) -> int:
        return self._offset

    def write(self, data: bytes | memoryview) -> int:
        """See Ingest.write."""
        view = memoryview(data).cast("B")
        if self._limit is not None and self._offset + len(view) > self._limit:
            self.abort()
            raise SizeMismatch(f"blob {self._name()} is larger than the {self._limit} bytes that were promised")
        written = 0
        try:
            if faults.ARMED:
                faults.reach("store.ingest.write")
            while written < len(view):
                written += os.write(self._fd, view[written:])
        except OSError as e:
            # What is on disk and what was hashed must agree, or a resumption would be wrong.
            os.ftruncate(self._fd, self._offset)
            os.lseek(self._fd, self._offset, os.SEEK_SET)
            raise _write_error(e, self._path) from e
        self._hasher.update(view)
        self._offset += written
        return written

    def restart(self) -> None:
        """See Ingest.restart."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._hasher = self._algorithm.hasher()
        self._offset = 0

    def commit(self) -> Descriptor:
        """See Ingest.commit."""
        digest = Digest.from_hasher(self._hasher)
        expected = self._expected
        if expected is not None:
            if self._offset != expected.size_bytes:
                self.abort()
                raise SizeMismatch(
                    f"blob {expected.digest} has {self._offset} bytes where {expected.size_bytes} were promised"
                )
            if digest != expected.digest:
                self.abort()
                raise DigestMismatch(f"blob {expected.digest} arrived with other bytes: they hash to {digest}")
        self._directory.publish(self._path, digest, self._offset)
        self._close()
        if expected is not None:
            return expected
        return Descriptor(media_type=self._media_type, digest=digest, size_bytes=self._offset)

    def abort(self) -> None:
        """See Ingest.abort. Idempotent."""
        if self._fd >= 0:
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            release(self._fd)
            self._fd = -1

    def _name(self) -> str:
        return str(self._expected.digest) if self._expected is not None else (self._ref or "being written")

    def __enter__(self) -> BlobIngest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ref is None:
            self.abort()
        self._close()


class VerifyingReader(io.RawIOBase):
    """A blob's file that is hashed as it is read; a seek other than to the start ends the hashing."""

    def __init__(self, path: str, digest: Digest) -> None:
        super().__init__()
        self._file = io.FileIO(path, "rb")
        self._digest = digest
        self._size = os.fstat(self._file.fileno()).st_size
        self._hasher: object = None
        self._begin()

    def _begin(self) -> None:
        self._state = self._digest.hasher()
        self._seen = 0
        self._verifying = True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        count = self._file.readinto(view)
        if self._verifying and count:
            self._state.update(view[:count])
            self._seen += count
            # Judged together with the last bytes, so that nobody takes them for good.
            if self._seen >= self._size and self._state.hexdigest() != self._digest.encoded:
                raise DigestMismatch(f"blob {self._digest} is damaged", hint=_CORRUPT_HINT)
        return count or 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        before = self._file.tell()
        position = self._file.seek(offset, whence)
        if position == 0:
            self._begin()
        elif position != before:
            self._verifying = False
        return position

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def hash_file(fd: int, digest: Digest) -> Digest:
    """The digest of an open file's bytes, from its start, by the algorithm of `digest`."""
    hasher = digest.hasher()
    os.lseek(fd, 0, os.SEEK_SET)
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    while count := os.readv(fd, [buffer]):
        hasher.update(view[:count])
    return Digest.from_hasher(hasher)


def _is(data: bytes, digest: Digest) -> bool:
    if digest.startswith("sha256:"):
        return Digest.of(data) == digest  # without the import of hashlib, which a cached build does not need
    hasher = digest.hasher()
    hasher.update(data)
    return hasher.hexdigest() == digest.encoded


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1


def _write_error(error: OSError, path: str) -> StoreError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StoreError(f"{path}: the disk is full", hint="free some space, or run `pybuild prune`")
    return StoreError(f"{path}: {error.strerror}")
