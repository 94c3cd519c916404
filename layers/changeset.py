"""From a stream of changes to a layer: tar, DiffID, compressed blob and its digest in one pass.

Each file is read once, into blocks of the tar stream; a block is hashed in one thread and
compressed in others while the next one is filled. The queues between them are bounded, so memory is
flat whatever the layer's size. A layer of less than one block needs no thread.

The changes come from `layers.layerdiff`, whose names are re-exported here, or have the places of their
files with them (`Origin`); the bytes go to an `Ingest`.
Spec: image-spec layer.md, "Representing Changes" and "DiffID" in config.md.
"""

from __future__ import annotations

import hashlib
import os
import queue
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from layers import lowerview, ownership, xattrs
from layers.compression import BLOCK_BYTES, Compression, compressor, media_type
from layers.errors import Cancelled, LayerError
from layers.layerdiff import OPAQUE_WHITEOUT, WHITEOUT_PREFIX, Change, Origin, diff_overlay, diff_trees
from layers.oci import Digest
from layers.tarstream import BLOCK_DEVICE, CHARACTER_DEVICE, HARDLINK, REGULAR, SYMLINK, TYPES_BY_FORMAT, TarWriter
from layers.values import NamedTuple, Protocol

__all__ = [
    "OPAQUE_WHITEOUT",
    "WHITEOUT_PREFIX",
    "Change",
    "LayerResult",
    "Origin",
    "diff_overlay",
    "diff_trees",
    "write_layer",
]

_QUEUED_BLOCKS = 4
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_OPEN_PARENT = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Sink(Protocol):
    """Where the blob goes; `layers.content.Ingest` is one."""

    def write(self, data: bytes | memoryview) -> int: ...


class LayerResult(NamedTuple):
    """A written layer. `size_bytes` is the blob's, `uncompressed_bytes` the tar's."""

    diff_id: Digest
    digest: Digest
    size_bytes: int
    uncompressed_bytes: int
    media_type: str
    entries: int


def write_layer(
    changes: Iterable[Change],
    root: Path | str,
    ingest: Sink,
    *,
    compression: Compression = "gzip",
    level: int | None = None,
    clamp_mtime: int | None = None,
    threads: int | None = None,
    reproducible: bool = False,
    nanoseconds: bool = False,
    cancelled: Callable[[], bool] | None = None,
) -> LayerResult:
    """Write the layer of `changes`, whose files lie in `root`, to `ingest`; the caller commits or aborts it.

    `clamp_mtime` is SOURCE_DATE_EPOCH in seconds; `threads` None means one for each CPU, and no
    number changes the bytes; `reproducible` makes them independent of the processor too. A change whose
    status says another type than the disk's, as `layers.ownership` records it, is written as that, without data.
    Files from elsewhere (`Origin`) must have no attributes that belong into a layer: what a copy of them would keep
    of those, only making one can tell.
    Raises: LayerError (a file changed meanwhile, cannot be read, or fits no tar header), Cancelled, and
    what `ingest.write` raises.
    """
    if threads is None:
        threads = len(os.sched_getaffinity(0))
    pipeline = _Pipeline(ingest, compression, level, threads, reproducible, cancelled)
    try:
        tar = TarWriter(pipeline.put, block_bytes=BLOCK_BYTES, clamp_mtime_s=clamp_mtime, nanoseconds=nanoseconds)
        with _Entries(root, tar, lambda: pipeline.error) as entries:
            for change in changes:
                entries.write(change)
        uncompressed = tar.finish()
        diff_id, digest, size = pipeline.finish()
    finally:
        pipeline.close()
    return LayerResult(diff_id, digest, size, uncompressed, media_type(compression), entries.count)


class _Entries:
    """Turns changes into tar entries. The directory of the current file is held open for its neighbours."""

    def __init__(
        self,
        root: Path | str,
        tar: TarWriter,
        failed: Callable[[], BaseException | None],
    ) -> None:
        self._failed = failed
        self._root = os.fsencode(root)
        self._tar = tar
        self._parent: bytes | None = None
        self._fd = -1
        self.count = 0

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd != -1:
            os.close(self._fd)
            self._fd = -1

    def write(self, change: Change) -> None:
        """Write one change. Raises: LayerError, OSError."""
        self.count += 1
        path = change.path
        parent, _, name = path.rpartition(b"/")
        if change.kind == "delete":
            whiteout = parent + b"/" + WHITEOUT_PREFIX + name if parent else WHITEOUT_PREFIX + name
            self._tar.add(whiteout, REGULAR, mode=0, uid=0, gid=0)
            return
        st = change.st
        assert st is not None
        try:
            if change.origin is not None:
                name = change.origin.name
            elif parent != self._parent:
                self._enter(parent)
            if change.link is None and stat.S_ISREG(st.st_mode):
                self._regular(change, name, st)
            else:
                self._other(change, name, st)
        except OSError as e:
            if e is self._failed():
                raise  # of the blob's destination, not of this file
            raise LayerError(f"cannot read {os.fsdecode(path)!r}: {e.strerror}") from e

    def _enter(self, parent: bytes) -> None:
        if self._fd != -1:
            os.close(self._fd)
            self._fd = -1
        self._fd = lowerview.open_beneath(self._root, parent, _OPEN_PARENT)
        self._parent = parent

    def _regular(self, change: Change, name: bytes, st: os.stat_result) -> None:
        path, attributes, origin = change.path, change.xattrs, change.origin
        size = st.st_size
        fd = os.open(name, _OPEN_FILE, dir_fd=self._fd if origin is None else origin.fd)
        try:
            names = xattrs.names_of(fd)
            if names and origin is not None:
                _refuse_attributes(path, names)
            elif names:
                if any(n.endswith(".overlay.metacopy") for n in names):
                    raise LayerError(
                        f"{os.fsdecode(path)!r} holds metadata alone (overlayfs's metacopy), its data is elsewhere",
                        hint="mount the overlay with metacopy=off",
                    )
                if attributes is None:
                    attributes = xattrs.pick(fd, names)
            self._tar.add(
                path,
                REGULAR,
                mode=st.st_mode,
                uid=st.st_uid,
                gid=st.st_gid,
                size=size,
                mtime_ns=st.st_mtime_ns,
                xattrs=attributes or xattrs.NONE,
            )
            if size:
                if self._tar.copy_from(fd, size) != size:
                    raise LayerError(
                        f"{os.fsdecode(path)!r} became shorter while it was read",
                        hint="something still writes to it; stop that and try again",
                    )
                self._tar.pad()
            if origin is not None:
                _check_unchanged(path, origin.st, os.fstat(fd))
        finally:
            os.close(fd)

    def _other(self, change: Change, name: bytes, st: os.stat_result) -> None:
        """Links, directories, special files."""
        mode, uid, gid, attributes = st.st_mode, st.st_uid, st.st_gid, change.xattrs
        kind = TYPES_BY_FORMAT.get(stat.S_IFMT(mode))
        if kind is None:
            raise LayerError(f"{os.fsdecode(change.path)!r} is of a type that layers cannot hold")
        if change.link is not None:
            self._tar.add(
                change.path, HARDLINK, mode=mode, uid=uid, gid=gid, mtime_ns=st.st_mtime_ns, linkname=change.link
            )
            return
        parent_fd = self._fd
        if change.origin is not None:
            parent_fd = change.origin.fd
            _refuse_attributes(change.path, xattrs.names_of(b"/proc/self/fd/%d/%s" % (parent_fd, name)))
        elif attributes is None:
            attributes = xattrs.load(b"/proc/self/fd/%d/%s" % (parent_fd, name))
        if attributes:
            attributes = ownership.without_records(attributes, mode)
        self._tar.add(
            change.path,
            kind,
            mode=mode,
            uid=uid,
            gid=gid,
            mtime_ns=st.st_mtime_ns,
            linkname=os.readlink(name, dir_fd=parent_fd) if kind == SYMLINK else b"",
            device=(os.major(st.st_rdev), os.minor(st.st_rdev)) if kind in (CHARACTER_DEVICE, BLOCK_DEVICE) else None,
            xattrs=attributes or xattrs.NONE,
        )


def _refuse_attributes(path: bytes, names: list[str]) -> None:
    """Raises: LayerError for a file from elsewhere that has attributes for a layer."""
    for name in names:
        if xattrs.belongs(name):
            raise LayerError(f"{os.fsdecode(path)!r} has the attribute {name}")


def _check_unchanged(path: bytes, listed: os.stat_result, now: os.stat_result) -> None:
    """Raises: LayerError for a file that was written to since it was listed."""
    if (listed.st_size, listed.st_mtime_ns, listed.st_ctime_ns) != (now.st_size, now.st_mtime_ns, now.st_ctime_ns):
        raise LayerError(
            f"{os.fsdecode(path)!r} changed while it was read",
            hint="something still writes to it; stop that and try again",
        )


class _Pipeline:
    """Blocks of tar in, a blob and two digests out. `put` is called by one thread; two more start with block two."""

    def __init__(
        self,
        sink: Sink,
        compression: Compression,
        level: int | None,
        threads: int,
        reproducible: bool,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._sink = sink
        self._plain = compression == "none"
        self._compressor = compressor(compression, level, threads, reproducible=reproducible)
        self._cancelled = cancelled
        self._diff = hashlib.sha256()
        self._blob = hashlib.sha256()
        self._size = 0
        self._first: bytearray | None = None
        self._to_hash: queue.Queue[bytearray | None] = queue.Queue(_QUEUED_BLOCKS)
        self._to_pack: queue.Queue[bytearray | None] = queue.Queue(_QUEUED_BLOCKS)
        self._threads: list[threading.Thread] = []
        self.error: BaseException | None = None

    def put(self, block: bytearray) -> None:
        """Take over one block of the tar stream. Raises: Cancelled, or what failed behind."""
        if self._cancelled is not None and self._cancelled():
            raise Cancelled
        if self.error is not None:
            raise self.error
        if self._first is None and not self._threads:
            self._first = block
            return
        if not self._threads:
            self._start()
        self._to_hash.put(block)
        self._to_pack.put(block)

    def finish(self) -> tuple[Digest, Digest, int]:
        """The DiffID, the blob's digest and its size, when all is written."""
        if self._threads:
            self._join()
            if self.error is not None:
                raise self.error
        elif self._first is not None:
            self._diff.update(self._first)
            self._emit(self._compressor.write_block(self._first))
        self._emit(self._compressor.finish())
        diff_id = Digest.from_hasher(self._diff)
        return diff_id, diff_id if self._plain else Digest.from_hasher(self._blob), self._size

    def close(self) -> None:
        """Stop the threads; idempotent."""
        if self._threads:
            # Whatever is queued is dropped by the threads, once an error is set.
            self.error = self.error or Cancelled()
            self._join()
        self._compressor.close()

    def _start(self) -> None:
        for name, work in (("layer-hash", self._hash), ("layer-pack", self._pack)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        assert self._first is not None
        self._to_hash.put(self._first)
        self._to_pack.put(self._first)
        self._first = None

    def _join(self) -> None:
        self._to_hash.put(None)
        self._to_pack.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _hash(self) -> None:
        while (block := self._to_hash.get()) is not None:
            self._diff.update(block)

    def _pack(self) -> None:
        while (block := self._to_pack.get()) is not None:
            if self.error is not None:
                continue
            try:
                self._emit(self._compressor.write_block(block))
            except BaseException as e:  # noqa: BLE001  # raised again by the thread that puts
                self.error = e

    def _emit(self, data: bytes) -> None:
        if data:
            if not self._plain:
                self._blob.update(data)
            self._size += len(data)
            view = memoryview(data)
            while len(view):
                written = self._sink.write(view)
                if written <= 0:
                    raise LayerError("the layer's destination takes no more data")
                view = view[written:]
