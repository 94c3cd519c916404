"""A tar of a tree that changes while it is read: a running container's files, for `cp` and `export`.

The writer of layers (`layers.changeset`) looks names up by path in trees that nobody changes. Here each
directory is opened from the one above it, never through a link, so that a container that swaps a
directory for a link to the host's /etc gets nothing from there. A file that shrinks meanwhile is filled
up with zeros and one that grows is cut, as tar(1) has it; what vanishes is left out, and so are sockets.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable

from layers import ownership, xattrs
from layers.errors import LayerError
from layers.tarreader import BLOCK_DEVICE, CHARACTER_DEVICE, DIRECTORY, FIFO, HARDLINK, REGULAR, SYMLINK
from layers.tarstream import TarWriter

_KINDS = {
    stat.S_IFREG: REGULAR,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFIFO: FIFO,
    stat.S_IFCHR: CHARACTER_DEVICE,
    stat.S_IFBLK: BLOCK_DEVICE,
}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_ZEROS = bytes(1 << 16)
_MAX_DEPTH = 400
"""Each level holds a descriptor, and two of the interpreter's thousand calls."""


class TreeTar:
    """Writes entries to `sink`; call `finish` in the end. Names are those in the tar."""

    def __init__(self, sink: Callable[[bytes], object]) -> None:
        self._tar = TarWriter(lambda block: sink(bytes(block)), nanoseconds=True)
        self._links: dict[tuple[int, int], bytes] = {}
        self._owners = ownership.here()

    def finish(self) -> None:
        """The end mark, and what was not yet handed on. Raises: what `sink` raises."""
        self._tar.finish()

    def add(self, directory: int, name: str, path: bytes) -> None:
        """The entry `name` of an open directory, with all beneath it, as `path`. Raises: OSError, LayerError."""
        status = os.lstat(name, dir_fd=directory)
        if stat.S_ISDIR(status.st_mode):
            fd = os.open(name, _DIRECTORY, dir_fd=directory)
            try:
                self._header(directory, name, path, os.fstat(fd))
                self.add_contents(fd, path)
            finally:
                os.close(fd)
        elif stat.S_ISREG(status.st_mode):
            if not self._is_link(path, status):
                self._file(directory, name, path)
        elif not stat.S_ISSOCK(status.st_mode):
            self._header(directory, name, path, status)

    def add_contents(self, directory: int, path: bytes = b"") -> None:
        """All entries of an open directory, as beneath `path`. Raises: OSError, LayerError."""
        if path.count(b"/") > _MAX_DEPTH:
            raise LayerError(f"{os.fsdecode(path[:60])}…: directories are nested more than {_MAX_DEPTH} deep")
        for name in sorted(os.listdir(directory)):
            with contextlib.suppress(FileNotFoundError):  # it vanished
                self.add(directory, name, (path + b"/" if path else b"") + os.fsencode(name))

    def _is_link(self, path: bytes, status: os.stat_result) -> bool:
        """Whether the file is in the tar already, under another name: it becomes a link to that."""
        if status.st_nlink < 2:
            return False
        first = self._links.setdefault((status.st_dev, status.st_ino), path)
        if first == path:
            return False
        self._tar.add(
            path, HARDLINK, mode=status.st_mode, uid=status.st_uid, gid=status.st_gid,
            mtime_ns=status.st_mtime_ns, linkname=first,
        )  # fmt: skip
        return True

    def _file(self, directory: int, name: str, path: bytes) -> None:
        fd = os.open(name, _FILE, dir_fd=directory)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return  # it has become something else meanwhile
            if not self._header(directory, name, path, status, size=status.st_size, fd=fd):
                return  # it stands for a device
            left = status.st_size - self._tar.copy_from(fd, status.st_size)
            while left:
                piece = _ZEROS[:left]
                self._tar.write(piece)
                left -= len(piece)
            self._tar.pad()
        finally:
            os.close(fd)

    def _header(
        self, directory: int, name: str, path: bytes, status: os.stat_result, *, size: int = 0, fd: int = -1
    ) -> bool:
        """Write an entry's header; whether its data has to follow."""
        place = fd if fd >= 0 else b"/proc/self/fd/%d/%s" % (directory, os.fsencode(name))
        seen = self._owners.seen(place, status)
        kind = _KINDS[stat.S_IFMT(seen.st_mode)]
        regular = kind == REGULAR
        device = (os.major(seen.st_rdev), os.minor(seen.st_rdev)) if kind in {CHARACTER_DEVICE, BLOCK_DEVICE} else None
        self._tar.add(
            path, kind, mode=seen.st_mode, uid=seen.st_uid, gid=seen.st_gid, size=size if regular else 0,
            mtime_ns=seen.st_mtime_ns,
            linkname=os.fsencode(os.readlink(name, dir_fd=directory)) if kind == SYMLINK else b"",
            device=device,
            xattrs=ownership.without_records(xattrs.load(place), status.st_mode),
        )  # fmt: skip
        return regular
