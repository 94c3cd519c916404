"""ADD of a local archive: is it a tar, of whatever compression, and if so, its extraction.

What counts is the content: a file is unpacked if its first tar header is sound, else copied like
any other. Extraction stays within the target directory, which is to the archive what a chroot
is: names and symlinks lead to places inside it. As in BuildKit, owners and modes are the
archive's, `--chown` overrides the owners, and `--chmod` does nothing here.
"""

from __future__ import annotations

import os
import posixpath
import stat as stat_
from collections.abc import Callable, Iterator
from typing import BinaryIO

from builder.errors import ContextError
from builder.solve import filedata, rootpath
from builder.solve.copyoptions import CopyOptions, CopyStats
from builder.solve.sourcetree import SourceTree, never_cancelled
from layers import ownership
from layers.errors import Cancelled, LayerError
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

_SPARSE = b"S"
_SPECIAL = {FIFO: stat_.S_IFIFO, CHARACTER_DEVICE: stat_.S_IFCHR, BLOCK_DEVICE: stat_.S_IFBLK}


def unpack(
    tree: SourceTree,
    source: str,
    dest_fd: int,
    dest: str,
    options: CopyOptions,
    *,
    cancelled: Callable[[], bool] = never_cancelled,
) -> CopyStats | None:
    """Extract the archive at `source` into the directory `dest`, which is made; None if it is not an archive.

    Not atomic. Raises: ContextError for an archive that is damaged, leads outside or cannot be written; Cancelled.
    """
    path = rootpath.resolve(tree.root_fd, source)
    status = tree.lstat(path)
    if status is None or not stat_.S_ISREG(status.st_mode):
        return None
    try:
        with os.fdopen(rootpath.open_file(tree.root_fd, path), "rb", buffering=0) as file:
            entries = _open(file)
            if entries is None:
                return None
            reader, rest, first = entries
            created: list[str] = []
            target = rootpath.resolve(dest_fd, dest)
            rootpath.make_directories(dest_fd, target, 0o755, options.owner, created=created)
            root = rootpath.open_directory(dest_fd, target)
            try:
                extraction = _Extraction(root, reader, options.owner)
                extraction.run(rest, first, cancelled)
                return CopyStats(extraction.entries + len(created), extraction.size_bytes)
            finally:
                os.close(root)
    except LayerError as e:
        raise ContextError(f"cannot unpack {rootpath.shown(source)}: {e.message}", hint=e.hint) from e
    except OSError as e:
        raise ContextError(f"cannot unpack {rootpath.shown(source)}: {e.strerror}") from e


def unpack_stream(
    stream: BinaryIO, dest_fd: int, *, cancelled: Callable[[], bool] = never_cancelled, what: str = "the archive"
) -> bool:
    """Extract an archive, compressed or not, into the directory `dest_fd`; False if the stream is not one.

    `stream` needs `read` alone, and is consumed either way. Raises: ContextError; Cancelled.
    """
    try:
        opened = _open(stream)
        if opened is None:
            return False
        reader, rest, first = opened
        root = rootpath.open_directory(dest_fd, "")
        try:
            _Extraction(root, reader, None).run(rest, first, cancelled)
        finally:
            os.close(root)
    except LayerError as e:
        raise ContextError(f"cannot unpack {what}: {e.message}", hint=e.hint) from e
    except OSError as e:
        raise ContextError(f"cannot unpack {what}: {e.strerror}") from e
    return True


def _open(file: BinaryIO) -> tuple[TarReader, Iterator[TarEntry], TarEntry] | None:
    """The reader, begun, and its first entry; None if the file is not an archive, or has no entry."""
    from layers.decompression import open_stream

    try:
        reader = TarReader(open_stream(file, None))
        entries = iter(reader)
        first = next(entries, None)
    except LayerError:
        return None
    return None if first is None else (reader, entries, first)


def _clean(name: bytes, kind: str) -> str:
    """The canonical path of an archive's name; "" for the root itself. Raises: ContextError if it leads outside."""
    path = posixpath.normpath(os.fsdecode(name).lstrip("/"))
    if path == ".." or path.startswith("../"):
        raise ContextError(f"{kind} {os.fsdecode(name)!r} of the archive is outside of the directory to unpack into")
    return "" if path == "." else path


class _Extraction:
    """One archive on its way into the directory `root_fd`."""

    def __init__(self, root_fd: int, reader: TarReader, owner: tuple[int, int] | None) -> None:
        self.root_fd = root_fd
        self.reader = reader
        self.owner = owner
        self.entries = 0
        self.size_bytes = 0
        self.times: list[tuple[str, int]] = []
        self.parent: str | None = None  # the canonical path of the directory open as `parent_fd`
        self.parent_fd = -1
        self.parent_asked: str | None = None  # and the name by which the archive knows it

    def run(self, entries: Iterator[TarEntry], first: TarEntry, cancelled: Callable[[], bool]) -> None:
        """Extract `first` and what follows. Raises: ContextError, LayerError, OSError, Cancelled."""
        entry: TarEntry | None = first
        try:
            while entry is not None:
                if self.entries & 0xFF == 0 and cancelled():
                    raise Cancelled
                path = _clean(entry.name, "the entry")
                if path:
                    try:
                        self._extract(path, entry, cancelled)
                    except OSError as e:
                        raise ContextError(f"entry {path!r} of the archive: {e.strerror}") from e
                entry = next(entries, None)
            for path, mtime_ns in reversed(self.times):
                try:
                    fd = rootpath.open_directory(self.root_fd, path)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # a later entry took its place
                try:
                    os.utime(fd, ns=(mtime_ns, mtime_ns))
                finally:
                    os.close(fd)
        finally:
            self._forget()

    def _forget(self) -> None:
        if self.parent_fd >= 0:
            os.close(self.parent_fd)
        self.parent_fd = -1
        self.parent = self.parent_asked = None

    def _enter(self, asked: str) -> int:
        """The open directory that the archive calls `asked`, made if need be with mode 0755 and root's."""
        if asked != self.parent_asked:
            self._forget()
            self.parent = rootpath.resolve(self.root_fd, asked)
            rootpath.make_directories(self.root_fd, self.parent, 0o755, (0, 0))
            self.parent_fd = rootpath.open_directory(self.root_fd, self.parent)
            self.parent_asked = asked
        return self.parent_fd

    def _extract(self, path: str, entry: TarEntry, cancelled: Callable[[], bool]) -> None:
        if entry.type == DIRECTORY:  # an existing symlink to a directory is followed
            path = rootpath.resolve(self.root_fd, path)
            if not path:
                return
        asked, name = os.path.split(path)
        parent = self._enter(asked)
        self.entries += 1
        owner = self.owner or (entry.uid, entry.gid)
        mtime_ns = max(entry.mtime_ns, 0)
        if entry.type == DIRECTORY:
            self._directory(parent, name, entry, owner)
            self.times.append((path, mtime_ns))
        elif entry.type in (REGULAR, _SPARSE):
            self._clear(parent, name)
            self._file(parent, name, entry, owner, cancelled)
        elif entry.type == HARDLINK:
            self._link(parent, name, entry, owner)
        elif entry.type == SYMLINK:
            self._clear(parent, name)
            os.symlink(entry.linkname, name, dir_fd=parent)
            self._finish(parent, name, entry, owner)
        elif entry.type in _SPECIAL:
            self._clear(parent, name)
            device = os.makedev(entry.devmajor, entry.devminor)
            ownership.here().mknod(name, _SPECIAL[entry.type] | 0o600, device, dir_fd=parent)
            self._finish(parent, name, entry, owner)
        else:
            raise ContextError(f"entry {path!r} of the archive has the unknown type {entry.type!r}")

    def _clear(self, parent: int, name: str) -> None:
        """Remove what is in the place of an entry, a whole directory too."""
        try:
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):
            if not stat_.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                raise
            import shutil

            shutil.rmtree(name, dir_fd=parent)

    def _directory(self, parent: int, name: str, entry: TarEntry, owner: tuple[int, int]) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            if not stat_.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                os.unlink(name, dir_fd=parent)
                os.mkdir(name, 0o700, dir_fd=parent)
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        try:
            filedata.own(fd, *owner)
            os.fchmod(fd, entry.mode & 0o7777)
            filedata.set_xattrs(fd, entry.xattrs)
        finally:
            os.close(fd)

    def _file(
        self, parent: int, name: str, entry: TarEntry, owner: tuple[int, int], cancelled: Callable[[], bool]
    ) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=parent)
        try:
            end = 0
            for offset, piece in self.reader.segments():
                if cancelled():
                    raise Cancelled
                if offset != end:
                    os.lseek(fd, offset, os.SEEK_SET)
                filedata.write_all(fd, piece)
                end = offset + len(piece)
            if self.reader.sparse:
                os.ftruncate(fd, entry.size)
            self.size_bytes += entry.size
            filedata.own(fd, *owner)
            os.fchmod(fd, entry.mode & 0o7777)
            filedata.set_xattrs(fd, entry.xattrs)
            os.utime(fd, ns=(max(entry.mtime_ns, 0),) * 2)
        finally:
            os.close(fd)

    def _link(self, parent: int, name: str, entry: TarEntry, owner: tuple[int, int]) -> None:
        target = _clean(entry.linkname, "the hard link")
        if not target:
            raise ContextError(f"hard link {os.fsdecode(entry.name)!r} of the archive leads to the directory itself")
        directory, base = os.path.split(rootpath.resolve(self.root_fd, target, follow_last=False))
        fd = rootpath.open_directory(self.root_fd, directory)
        try:
            original = os.lstat(base, dir_fd=fd)
            try:
                existing = os.lstat(name, dir_fd=parent)
            except FileNotFoundError:
                existing = None
            if existing is None or (existing.st_dev, existing.st_ino) != (original.st_dev, original.st_ino):
                self._clear(parent, name)
                os.link(base, name, src_dir_fd=fd, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(fd)
        self._finish(parent, name, entry, owner)

    def _finish(self, parent: int, name: str, entry: TarEntry, owner: tuple[int, int]) -> None:
        """Owner, mode, attributes and time of an entry that is not opened."""
        filedata.own_entry(parent, name, *owner)
        filedata.set_mode(parent, name, entry.mode & 0o7777)
        filedata.set_link_xattrs(parent, name, entry.xattrs)
        os.utime(name, ns=(max(entry.mtime_ns, 0),) * 2, dir_fd=parent, follow_symlinks=False)
