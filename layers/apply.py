"""From a layer to a directory: the inverse of `layers.changeset`, confined to its target.

Whiteouts either remove (onto a flattened tree) or become overlayfs's own marks (into the fresh
directory of one layer). Nothing that a layer says reaches outside the target: names are resolved by
`layers.confine`, files are created anew and never opened, and sizes are bounded. Decompression and
the DiffID run in a thread of their own, with a bounded queue in between.

Order of metadata: owner, mode, attributes (a chown drops capabilities), times; those of directories
come last, when nothing is written into them any more.
Spec: image-spec layer.md, "Applying Changesets".
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from layers import lowerview, ownership, xattrs
from layers.compression import decompressor, kind_of_media_type
from layers.confine import MAX_NAME_BYTES, ConfinedTree, Directory, Metadata
from layers.errors import Cancelled, LayerError, PybuildError
from layers.layerdiff import OPAQUE_WHITEOUT, WHITEOUT_PREFIX
from layers.oci import Digest
from layers.tarreader import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    FIFO,
    HARDLINK,
    REGULAR,
    SYMLINK,
    TarEntry,
    TarReader,
)
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.snapshot import Dialect

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_QUEUED_PIECES = 4
_ATTRIBUTE_REFUSED = frozenset({errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EINVAL})
_UNMAPPED_HINT = "run as root, or give this user subordinate ids (/etc/subuid, /etc/subgid) that cover the image's"
_HOLLOW_DEPTH = 64
_META_PREFIX = WHITEOUT_PREFIX + WHITEOUT_PREFIX
_TAR_BLOCK = 512


class Limits(NamedTuple):
    """What one layer may cost at most: entries (directories made on the way included) and unpacked bytes."""

    max_entries: int = 20_000_000
    max_bytes: int = 1 << 42


class ApplyResult(NamedTuple):
    """An applied layer. `size_bytes` is the uncompressed tar's, `unpacked_bytes` that of all files.

    `independent`: the lower layers had no influence on what was made, so that it is the same over any,
    once `settle_whiteouts` was told of `whiteouts`: those made without knowing whether they hide anything.
    `recorded_devices` counts the devices for which there are files (`layers.ownership`).
    """

    diff_id: Digest
    size_bytes: int
    entries: int
    unpacked_bytes: int
    independent: bool
    whiteouts: tuple[bytes, ...] = ()
    recorded_devices: int = 0


def apply_layer(
    stream: BinaryIO,
    target: Path,
    *,
    whiteouts: Literal["delete", "overlay", "keep"] = "delete",
    dialect: Dialect = "trusted",
    lower: Sequence[Path] | None = (),
    media_type: str | None = None,
    limits: Limits | None = None,
    keep_owners: bool = True,
    warn: Callable[[str], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> ApplyResult:
    """Unpack the layer that `stream` holds, in whatever compression, into the existing directory `target`.

    `whiteouts`: "delete" removes from the tree that is there; "overlay" makes `target`, which must be
    empty, a layer directory over `lower` (topmost first; None: not known yet, see ApplyResult), with
    marks of `dialect`; "keep" gives the names no meaning (ADD of an archive). `media_type` must be a
    layer's, if it is given; how the blob is compressed is found out. `keep_owners` False leaves
    everything with the caller's ids. The whole stream is read and hashed, whatever follows its end
    mark included; comparing the DiffID is the caller's part.
    After an error the target holds a part of the layer. Raises: LayerError, Cancelled.
    """
    if media_type is not None and kind_of_media_type(media_type) is None:
        raise LayerError(f"{media_type!r} is not the media type of a layer")
    limits = limits or Limits()
    feed = _Feed(decompressor(stream), limits.max_bytes, cancelled)
    try:
        unpacker = _Unpacker(target, whiteouts, dialect, lower, limits, keep_owners, warn)
        try:
            reader = TarReader(feed)  # type: ignore[arg-type]  # `read` is all it needs
            unpacker.run(reader)
            feed.drain()
            return ApplyResult(
                feed.diff_id(),
                feed.size,
                unpacker.entries,
                unpacker.unpacked,
                unpacker.independent,
                tuple(unpacker.unsettled),
                unpacker.recorded_devices,
            )
        finally:
            unpacker.close()
    finally:
        feed.close()


def settle_whiteouts(target: Path, whiteouts: Sequence[bytes], lower: Sequence[Path], dialect: Dialect) -> None:
    """Remove those marks that hide nothing in `lower`: overlayfs lists them where it has nothing to merge.

    `whiteouts` is what `apply_layer` said without `lower`. Idempotent. Raises: LayerError.
    """
    tree = ConfinedTree(
        os.fsencode(target), overlay=True, dialect=dialect, lower=tuple(map(os.fsencode, lower)), track=False, gid=0
    )
    try:
        _drop_idle(tree, whiteouts)
    except OSError as e:
        raise _explained(e, None) from e
    finally:
        tree.close()


def _drop_idle(tree: ConfinedTree, marks: Sequence[bytes]) -> None:
    """Remove the whiteouts at these paths that hide nothing beneath. Raises: LayerError, OSError."""
    for path in marks:
        if tree.beneath(path) is not None:
            continue
        parent, _, name = path.rpartition(b"/")
        fd = tree.open_existing(parent)
        if fd == -1:
            continue  # something else took the directory's place
        try:
            st = _lstat(name, fd)
            if st is not None and stat.S_ISCHR(st.st_mode) and st.st_rdev == 0:
                os.unlink(name, dir_fd=fd)
        finally:
            os.close(fd)


class _Feed:
    """The tar stream, hashed on its way. A thread reads ahead, from the second piece on."""

    def __init__(self, plain: BinaryIO, max_bytes: int, cancelled: Callable[[], bool] | None) -> None:
        self._plain = plain
        self._max_bytes = max_bytes
        self._cancelled = cancelled
        self._hash = hashlib.sha256()
        self._queue: queue.Queue[bytes] = queue.Queue(_QUEUED_PIECES)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stop = False
        self._reads = 0
        self.size = 0

    def read(self, _size: int = -1) -> bytes:
        """The next piece, of whatever size; b"" at the end."""
        if self._cancelled is not None and self._cancelled():
            raise Cancelled
        if self._thread is None:
            self._reads += 1
            if self._reads <= 2:
                return self._next()
            self._thread = threading.Thread(target=self._run, name="layer-read", daemon=True)
            self._thread.start()
        piece = self._queue.get()
        if not piece:
            self._queue.put(b"")  # for whoever asks again
            if self._error is not None:
                raise self._error
        return piece

    def drain(self) -> None:
        """Read what follows the end mark: the DiffID covers it."""
        while self.read():
            pass

    def diff_id(self) -> Digest:
        return Digest.from_hasher(self._hash)

    def close(self) -> None:
        self._stop = True
        if self._thread is not None:
            while self._thread.is_alive():
                try:
                    self._queue.get(timeout=0.02)
                except queue.Empty:
                    pass
            self._thread.join()

    def _next(self) -> bytes:
        piece = self._plain.read(1 << 20)
        self._hash.update(piece)
        self.size += len(piece)
        if self.size > self._max_bytes:
            raise LayerError(f"the layer unpacks to more than the {self._max_bytes} bytes allowed")
        return piece

    def _run(self) -> None:
        try:
            while not self._stop:
                piece = self._next()
                if not piece:
                    break
                self._queue.put(piece)
        except BaseException as e:  # noqa: BLE001  # raised again by the thread that reads
            self._error = e
        self._queue.put(b"")


class _Unpacker:
    """Applies entries to the target, one after the other."""

    def __init__(
        self,
        target: Path,
        whiteouts: Literal["delete", "overlay", "keep"],
        dialect: Dialect,
        lower: Sequence[Path] | None,
        limits: Limits,
        keep_owners: bool,
        warn: Callable[[str], None] | None,
    ) -> None:
        root = os.fsencode(target)
        try:
            with os.scandir(root) as entries:
                fresh = next(entries, None) is None
        except OSError as e:
            raise LayerError(f"cannot unpack into {target}: {e.strerror}") from e
        self._overlay = whiteouts == "overlay"
        if self._overlay and not fresh:
            raise LayerError(f"cannot unpack a layer into {target}: it is not empty")
        self._keep_names = whiteouts == "keep"
        # Onto an empty tree, whiteouts have nothing to remove: that saves keeping the names.
        self._track = whiteouts == "delete" and not fresh
        self._fresh = fresh
        self._limits = limits
        self._keep_owners = keep_owners
        self._owners = ownership.here()
        self._warn = warn
        self._uid = os.geteuid()
        self._gid = os.getegid()
        self._umask = _umask()
        self._probed = False
        self._always_chown = False
        self._opaque = False
        self._lower_known = lower is not None
        self.unsettled: list[bytes] = []
        self._marks: list[bytes] = []
        self._opaque_late = False
        self.entries = 0
        self.unpacked = 0
        self.recorded_devices = 0
        self._tree = ConfinedTree(
            root,
            overlay=self._overlay,
            dialect=dialect,
            lower=tuple(os.fsencode(path) for path in lower or ()) if self._overlay else (),
            track=self._track,
            gid=self._gid,
        )

    def close(self) -> None:
        self._tree.close()

    @property
    def independent(self) -> bool:
        """Whether nothing of the lower layers was needed. One that lacks them fails on links to their files."""
        return self._tree.implicit == 0 and not self._opaque

    def run(self, reader: TarReader) -> None:
        """Apply every entry. Raises: LayerError, Cancelled."""
        tree = self._tree
        entry: TarEntry | None = None
        last: bytes | None = None
        directory: Directory | None = None
        try:
            for entry in reader:
                self._count(entry)
                path = entry.name
                if (
                    path[:1] in {b"/", b"."} or path[-1:] == b"/" or b"//" in path or b"/." in path
                    or len(path) > MAX_NAME_BYTES
                ):  # fmt: skip
                    path = _clean(path)
                parent, _, name = path.rpartition(b"/")
                if name.startswith(WHITEOUT_PREFIX) and not self._keep_names:
                    self._whiteout(parent, name)
                    directory = None
                    continue
                if parent != last or directory is None:
                    directory = tree.enter_to_write(parent)
                    last = parent
                if not path:
                    self._root(entry, directory)
                else:
                    if tree.followed and _join(directory.path, name) in tree.followed:
                        tree.forget()
                    self._create(directory, name, entry, reader)
                    if directory.names is not None:
                        directory.names.add(name)
            entry = None
            if self._opaque_late:
                _drop_idle(tree, self._marks)
            self._finish_directories()
        except PybuildError:
            raise
        except OSError as e:
            raise _explained(e, entry) from e

    def _count(self, entry: TarEntry) -> None:
        self.entries += 1
        if self.entries + self._tree.implicit > self._limits.max_entries:
            raise LayerError(f"the layer has more than the {self._limits.max_entries} entries allowed")
        if entry.type == REGULAR:
            self.unpacked += entry.size
            if self.unpacked > self._limits.max_bytes:
                raise LayerError(f"the layer unpacks to more than the {self._limits.max_bytes} bytes allowed")

    # -- kinds of entries ------------------------------------------------------------------------

    def _create(self, directory: Directory, name: bytes, entry: TarEntry, reader: TarReader) -> None:
        kind = entry.type
        if kind == REGULAR:
            self._regular(directory, name, entry, reader)
        elif kind == DIRECTORY:
            self._directory(directory, name, entry)
        elif kind == SYMLINK:
            if not entry.linkname:
                raise LayerError(f"the symbolic link {os.fsdecode(entry.name)!r} has no target")
            self._afresh(directory, name, lambda: os.symlink(entry.linkname, name, dir_fd=directory.fd))
            self._finish_special(directory, name, entry)
        elif kind == HARDLINK:
            self._hardlink(directory, name, entry)
        elif kind in (CHARACTER_DEVICE, BLOCK_DEVICE, FIFO):
            self._special(directory, name, entry)
        else:
            raise LayerError(f"{os.fsdecode(entry.name)!r} is of an unknown tar type {kind!r}")

    def _afresh(self, directory: Directory, name: bytes, make: Callable[[], None]) -> None:
        """Make something, replacing whatever has the name."""
        try:
            make()
        except FileExistsError:
            self._clear(directory, name)
            make()

    def _clear(self, directory: Directory, name: bytes) -> None:
        """Remove what has the name."""
        st = os.lstat(name, dir_fd=directory.fd)
        self._tree.remove(directory, name, st)

    def _regular(self, directory: Directory, name: bytes, entry: TarEntry, reader: TarReader) -> None:
        mode = entry.mode
        try:
            fd = os.open(name, _CREATE, mode & 0o777, dir_fd=directory.fd)
        except FileExistsError:
            self._clear(directory, name)
            fd = os.open(name, _CREATE, mode & 0o777, dir_fd=directory.fd)
        try:
            size = entry.size
            if size:
                data = reader.small_data()
                if data is None:
                    self._copy_data(fd, entry, reader)
                elif os.write(fd, data) != size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if not self._probed:
                self._probe(fd, directory)
            if self._keep_owners and (entry.uid != self._uid or entry.gid != directory.gid or self._always_chown):
                self._owners.fchown(fd, entry.uid, entry.gid)
            if mode & 0o7000 or mode & self._umask or directory.default_acl:
                self._drop_inherited(fd, directory)
                os.fchmod(fd, mode)
            if entry.xattrs:
                self._set_xattrs(fd, entry.xattrs, entry.name)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _copy_data(self, fd: int, entry: TarEntry, reader: TarReader) -> None:
        if reader.sparse:
            os.ftruncate(fd, entry.size)
            for offset, piece in reader.segments():
                while piece:
                    written = os.pwrite(fd, piece, offset)
                    piece = piece[written:]
                    offset += written
            return
        for _, piece in reader.segments():
            while piece:
                piece = piece[os.write(fd, piece) :]

    def _probe(self, fd: int, directory: Directory) -> None:
        """Whether this file system gives new files the group that is expected (not so with `grpid`)."""
        self._probed = True
        st = os.fstat(fd)
        self._always_chown = (st.st_uid, st.st_gid) != (self._uid, directory.gid)

    def _directory(self, directory: Directory, name: bytes, entry: TarEntry) -> None:
        fd = directory.fd
        made = True
        opaque = False
        try:
            os.mkdir(name, 0o700, dir_fd=fd)
        except FileExistsError:
            st = os.lstat(name, dir_fd=fd)
            made = not stat.S_ISDIR(st.st_mode)
            if made:
                self._clear(directory, name)
                os.mkdir(name, 0o700, dir_fd=fd)
                # Whatever this layer had there, a whiteout included, had replaced the lower directory.
                opaque = self._overlay
        child = self._tree.child(directory, name, made=made)
        if opaque:
            self._set_opaque(child.fd)
        if made and directory.default_acl:
            self._drop_inherited(child.fd, directory)
        self._remember(child, entry)

    def _root(self, entry: TarEntry, directory: Directory) -> None:
        """The entry `./`: metadata of the root itself."""
        if entry.type != DIRECTORY:
            raise LayerError(f"the layer's entry {os.fsdecode(entry.name)!r} is its root, but no directory")
        self._remember(directory, entry)

    def _remember(self, directory: Directory, entry: TarEntry) -> None:
        self._tree.metadata[directory.key] = Metadata(
            directory.path, entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.xattrs, False
        )

    def _special(self, directory: Directory, name: bytes, entry: TarEntry) -> None:
        """Devices and fifos."""
        if entry.type == FIFO:
            self._afresh(directory, name, lambda: os.mkfifo(name, 0o600, dir_fd=directory.fd))
            self._finish_special(directory, name, entry)
            return
        kind = stat.S_IFCHR if entry.type == CHARACTER_DEVICE else stat.S_IFBLK
        shown = os.fsdecode(entry.name)
        if self._overlay and kind == stat.S_IFCHR and not (entry.devmajor or entry.devminor):
            # It would hide what lies beneath instead of being a device.
            self._warned(f"{shown!r}: a character device 0:0 cannot be unpacked for overlayfs; left out")
            return
        try:
            device = os.makedev(entry.devmajor, entry.devminor)
            self._afresh(directory, name, lambda: self._owners.mknod(name, kind | 0o600, device, dir_fd=directory.fd))
        except PermissionError:
            self._warned(f"{shown!r}: device nodes cannot be made without root; left out")
            return
        self.recorded_devices += self._owners.deviceless
        self._finish_special(directory, name, entry)

    def _finish_special(self, directory: Directory, name: bytes, entry: TarEntry) -> None:
        """Metadata of what must not be opened."""
        fd = directory.fd
        if self._keep_owners and (entry.uid != self._uid or entry.gid != directory.gid or self._always_chown):
            self._owners.lchown(name, entry.uid, entry.gid, dir_fd=fd)
        if entry.type != SYMLINK:
            place = b"/proc/self/fd/%d/%s" % (fd, name)
            self._drop_inherited(place, directory)
            os.chmod(name, entry.mode, dir_fd=fd)
        if entry.xattrs:
            self._set_xattrs(b"/proc/self/fd/%d/%s" % (fd, name), entry.xattrs, entry.name)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=fd, follow_symlinks=False)

    # -- hard links ------------------------------------------------------------------------------

    def _hardlink(self, directory: Directory, name: bytes, entry: TarEntry) -> None:
        tree = self._tree
        path = _clean(entry.linkname)
        parent, _, base = path.rpartition(b"/")
        if not base:
            raise LayerError(f"the hard link {os.fsdecode(entry.name)!r} points to a directory")
        real = _join(tree.resolve(parent), base)
        source = tree.full_path(real)
        st = lowerview.lstat(source)
        hidden = st is not None and self._overlay and stat.S_ISCHR(st.st_mode) and st.st_rdev == 0
        if hidden:
            st = None
        if st is None and self._overlay:
            found = tree.beneath(real) if not hidden else None
            if found is not None and not found.dirs:
                self._copy_up(real, found, entry)
                st = found.st
        if st is None or stat.S_ISDIR(st.st_mode):
            raise LayerError(
                f"the hard link {os.fsdecode(entry.name)!r} points to {os.fsdecode(entry.linkname)!r},"
                f" which is {'missing' if st is None else 'a directory'}"
            )
        if real == _join(directory.path, name):
            return

        def link(at_path: bytes) -> None:
            os.link(at_path, name, dst_dir_fd=directory.fd, follow_symlinks=False)

        self._afresh(directory, name, lambda: lowerview.at(link, source))

    def _copy_up(self, real: bytes, found: lowerview.Found, entry: TarEntry) -> None:
        """Bring a lower layer's file into this one, as overlayfs would before it links to it."""
        parent, _, name = real.rpartition(b"/")
        directory = self._tree.directory(parent)
        st = lowerview.at(lambda p: self._owners.seen(p, found.st), found.path)
        copied = TarEntry(
            real, b"", stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_size, st.st_mtime_ns, b"", 0, 0,
            lowerview.at(xattrs.load, found.path),
        )  # fmt: skip
        if stat.S_ISREG(st.st_mode):
            self.unpacked += st.st_size
            self._afresh(directory, name, lambda: lowerview.at(lambda p: _copy_file(p, name, directory.fd), found.path))
            fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
            try:
                if self._keep_owners:
                    self._owners.fchown(fd, st.st_uid, st.st_gid)
                self._drop_inherited(fd, directory)
                os.fchmod(fd, copied.mode)
                self._set_xattrs(fd, copied.xattrs, entry.name)
                os.utime(fd, ns=(st.st_mtime_ns, st.st_mtime_ns))
            finally:
                os.close(fd)
            return
        if stat.S_ISLNK(st.st_mode):
            target = lowerview.at(os.readlink, found.path)
            self._create(directory, name, copied._replace(type=SYMLINK, linkname=target), None)  # type: ignore[arg-type]
            return
        kinds = {stat.S_IFIFO: FIFO, stat.S_IFCHR: CHARACTER_DEVICE, stat.S_IFBLK: BLOCK_DEVICE}
        kind = kinds.get(stat.S_IFMT(st.st_mode))
        if kind is None:
            raise LayerError(f"the hard link {os.fsdecode(entry.name)!r} points to a socket")
        device = copied._replace(type=kind, devmajor=os.major(st.st_rdev), devminor=os.minor(st.st_rdev))
        self._special(directory, name, device)

    # -- whiteouts -------------------------------------------------------------------------------

    def _whiteout(self, parent: bytes, name: bytes) -> None:
        tree = self._tree
        hidden = name[len(WHITEOUT_PREFIX) :]
        if hidden in {b"", b".", b".."}:
            raise LayerError(f"invalid whiteout {os.fsdecode(_join(parent, name))!r}")
        if name != OPAQUE_WHITEOUT and name.startswith(_META_PREFIX):
            return  # bookkeeping of AUFS
        if (self._lower_known or not self._overlay) and not tree.holds(parent):
            return  # nothing there to hide
        if self._overlay:
            self._hide(tree.enter(parent), name, hidden)
        elif self._track:
            self._delete(tree.enter(parent), name, hidden)

    def _delete(self, directory: Directory, name: bytes, hidden: bytes) -> None:
        """Remove what a whiteout hides. It speaks of lower layers alone (layer.md): what this one made stays."""
        tree = self._tree
        if name == OPAQUE_WHITEOUT:
            tree.empty(directory.path)
            return
        path = _join(directory.path, hidden)
        if path in tree.followed:
            tree.forget()
        st = _lstat(hidden, directory.fd)
        if st is None:
            return
        if (directory.names is None or hidden not in directory.names) and path not in tree.written:
            self._clear(directory, hidden)
        elif stat.S_ISDIR(st.st_mode):
            tree.empty(path)

    def _hide(self, directory: Directory, name: bytes, hidden: bytes) -> None:
        """Make the mark that hides a name, or all of a directory, in the lower layers."""
        tree = self._tree
        if name == OPAQUE_WHITEOUT:
            if directory.path:
                self._set_opaque(directory.fd)
            else:
                self._opaque_root(directory)
            return
        path = _join(directory.path, hidden)
        if path in tree.followed:
            tree.forget()
        # A mark that hides nothing would be listed by overlayfs in directories that it does not merge.
        if self._lower_known and tree.beneath(path) is None:
            return
        if self._mark(directory, hidden, _lstat(hidden, directory.fd)):
            (self._marks if self._lower_known else self.unsettled).append(path)

    def _set_opaque(self, fd: int) -> None:
        """Cut a directory off from those beneath: marks that are in it by then hide nothing any more."""
        self._opaque_late = True
        self._tree.set_opaque(fd)

    def _mark(self, directory: Directory, name: bytes, st: os.stat_result | None) -> bool:
        """Hide one name, unless this layer has something there; whether a whiteout was made."""
        if st is None:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=directory.fd)
            return True
        if stat.S_ISDIR(st.st_mode):
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
            try:
                if not self._is_hollow(fd, _HOLLOW_DEPTH):
                    self._set_opaque(fd)
                    return False
            finally:
                os.close(fd)
            self._clear(directory, name)
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=directory.fd)
            return True
        return False

    def _is_hollow(self, fd: int, depth: int) -> bool:
        """Whether a directory is there for the sake of whiteouts in it alone: no entry made it, or anything in it."""
        st = os.fstat(fd)
        record = self._tree.metadata.get((st.st_dev, st.st_ino))
        if record is None or not record.implicit or not depth:
            return False
        with os.scandir(fd) as entries:
            for entry in entries:
                st = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(st.st_mode):
                    inner = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                    try:
                        if not self._is_hollow(inner, depth - 1):
                            return False
                    finally:
                        os.close(inner)
                elif not stat.S_ISCHR(st.st_mode) or st.st_rdev:
                    return False
        return True

    def _opaque_root(self, directory: Directory) -> None:
        """overlayfs knows no opaque root: hide each name beneath it."""
        self._opaque = True
        for name in sorted(lowerview.names(self._tree.lower)):
            if lowerview.find(self._tree.lower, name, self._tree.dialect) is not None:
                self._mark(directory, name, _lstat(name, directory.fd))

    # -- metadata --------------------------------------------------------------------------------

    def _finish_directories(self) -> None:
        """Owners, modes, attributes and times of directories, the deepest first."""
        for key, record in sorted(self._tree.metadata.items(), key=lambda item: item[1].path, reverse=True):
            fd = self._tree.open_existing(record.path)
            if fd == -1:
                continue
            try:
                st = self._owners.seen(fd, os.fstat(fd))
                if (st.st_dev, st.st_ino) != key:
                    continue
                if self._keep_owners and (record.uid, record.gid) != (st.st_uid, st.st_gid):
                    self._owners.fchown(fd, record.uid, record.gid)
                if not self._fresh:
                    for name in xattrs.names_of(fd):
                        if xattrs.belongs(name) and name not in record.xattrs:
                            os.removexattr(fd, name)
                os.fchmod(fd, record.mode)
                if record.xattrs:
                    self._set_xattrs(fd, record.xattrs, record.path)
                os.utime(fd, ns=(record.mtime_ns, record.mtime_ns))
            except OSError as e:
                raise _explained(e, record.path) from e
            finally:
                os.close(fd)

    def _drop_inherited(self, place: bytes | int, directory: Directory) -> None:
        """Undo what a default ACL of the directory gave to a new file."""
        if directory.default_acl:
            for name in (xattrs.ACL_ACCESS, xattrs.ACL_DEFAULT):
                try:
                    os.removexattr(place, name)
                except OSError as e:
                    if e.errno not in {errno.ENODATA, errno.ENOTSUP}:
                        raise

    def _set_xattrs(self, place: bytes | int, attributes: dict[str, bytes], name: bytes) -> None:
        for key, value in attributes.items():
            if not xattrs.belongs(key):
                continue
            try:
                if isinstance(place, int):
                    os.setxattr(place, key, value)
                else:
                    os.setxattr(place, key, value, follow_symlinks=False)
            except OSError as e:
                if e.errno not in _ATTRIBUTE_REFUSED:
                    raise
                self._warned(f"{os.fsdecode(name)!r}: attribute {key} cannot be set here: {e.strerror}")

    def _warned(self, message: str) -> None:
        if self._warn is not None:
            self._warn(message)


def _lstat(name: bytes, dir_fd: int) -> os.stat_result | None:
    try:
        return os.lstat(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return None


def _join(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent else name


def _clean(path: bytes) -> bytes:
    """A name as tar programs write it, made relative and plain. Raises: LayerError for `..` and absurd lengths."""
    if len(path) > MAX_NAME_BYTES:
        raise LayerError(f"the name {os.fsdecode(path[:80])!r}… has {len(path)} bytes, more than {MAX_NAME_BYTES}")
    parts = [part for part in path.split(b"/") if part not in {b"", b"."}]
    if b".." in parts:
        raise LayerError(
            f"the name {os.fsdecode(path[:200])!r} leaves its directory", hint="do not trust where this layer came from"
        )
    return b"/".join(parts)


def _umask() -> int:
    """This process's umask, read without changing it (other threads create files meanwhile)."""
    try:
        with open("/proc/self/status", "rb") as status:
            for line in status:
                if line.startswith(b"Umask:"):
                    return int(line.split()[1], 8)
    except (OSError, ValueError):
        pass
    return 0o777  # unknown: set every mode explicitly


def _copy_file(source: bytes, name: bytes, dir_fd: int) -> None:
    read = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        write = os.open(name, _CREATE, 0o600, dir_fd=dir_fd)
        try:
            try:
                while os.copy_file_range(read, write, 1 << 30):
                    pass
            except OSError as e:
                # Not between all file systems, nor on all of them; the offsets stand where it ended.
                if e.errno not in {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
                    raise
                while os.sendfile(write, read, None, 1 << 30):
                    pass
        finally:
            os.close(write)
    finally:
        os.close(read)


def _explained(error: OSError, entry: TarEntry | bytes | None) -> LayerError:
    """A LayerError that says which entry could not be written, and what helps."""
    name = entry.name if isinstance(entry, TarEntry) else entry
    where = repr(os.fsdecode(name[:200])) if name else "the layer"
    hint = None
    if error.errno in {errno.EPERM, errno.EINVAL}:
        hint = _UNMAPPED_HINT
    elif error.errno in {errno.ENOSPC, errno.EDQUOT}:
        hint = "free some space on the target's file system"
    return LayerError(f"cannot unpack {where}: {os.strerror(error.errno or 0)}", hint=hint)
