"""The bytes and the extended attributes of one file: copied from descriptor to descriptor.

Data goes the cheapest way that the two file systems allow: a shared extent (FICLONE), then
copy_file_range(2) within the kernel, then read and write. Holes stay holes. Attributes that belong
to the machine rather than to the file are left behind.
"""

from __future__ import annotations

import errno
import os
import stat as stat_
from collections.abc import Mapping

from builder.errors import ContextError
from layers import ownership

_SMALL = 128 * 1024  # below this, one read and one write cost less than asking for anything cleverer
_CHUNK = 1024 * 1024
_RANGE = 1 << 30
_NO_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY)
_NO_ATTRIBUTES = (errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.E2BIG, errno.ENOSPC)

# Overlay's own marks, the security labels of this host, its integrity measurements; and the records of
# owners, which the copy makes itself.
_FOREIGN = (
    "user.overlay.",
    "trusted.overlay.",
    "security.selinux",
    "security.ima",
    "security.evm",
    "security.apparmor",
    ownership.ATTRIBUTE,
)


def current_umask() -> int:
    """The umask, read without setting it, which another thread would notice."""
    try:
        with open("/proc/self/status", encoding="utf-8", errors="replace") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line[6:], 8)
    except OSError:
        pass
    return 0o777  # unknown: every mode is then set explicitly


def is_plain(directory_fd: int) -> bool:
    """Whether new files in a directory get the creator's ids, and a mode cut by the umask alone."""
    if os.fstat(directory_fd).st_mode & stat_.S_ISGID:
        return False
    try:
        return "system.posix_acl_default" not in os.listxattr(directory_fd)
    except OSError:
        return True


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`. Raises: OSError."""
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, memoryview(data)[written:])


def _not_mapped(uid: int, gid: int, error: OSError) -> ContextError:
    return ContextError(
        f"cannot give a file to {uid}:{gid}: {error.strerror}",
        hint="a build without root can use the ids that /etc/subuid and /etc/subgid lend to its user",
    )


def own(fd: int, uid: int, gid: int) -> None:
    """Give an open file an owner. Raises: ContextError where the user namespace has no such id; OSError."""
    try:
        ownership.here().fchown(fd, uid, gid)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.EPERM):
            raise _not_mapped(uid, gid, e) from e
        raise


def own_entry(directory_fd: int, name: str, uid: int, gid: int) -> None:
    """The same for an entry that is not opened, itself if a symlink."""
    try:
        ownership.here().lchown(name, uid, gid, dir_fd=directory_fd)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.EPERM):
            raise _not_mapped(uid, gid, e) from e
        raise


def set_mode(directory_fd: int, name: str, mode: int) -> None:
    """Give an entry that is not opened its mode; a symlink, which has none, is left alone, and never followed.

    A container that runs may make it one at any moment (`builder.container.copying`). Raises: OSError.
    """
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        if not stat_.S_ISLNK(os.fstat(fd).st_mode):
            os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


class DataCopier:
    """Copies the data of many files, and remembers what their file systems cannot do."""

    def __init__(self) -> None:
        self.clone = True
        self.ranges = True

    def copy(self, source: int, target: int, status: os.stat_result) -> int:
        """Copy all of the open file `source` into the empty `target`; the number of bytes. Raises: OSError."""
        size = status.st_size
        if size < _SMALL:
            if size == 0:
                return 0
            data = os.read(source, size + 1)
            if len(data) == size:
                write_all(target, data)
                return size
            return self._stream(source, target, data)
        if self.clone and self._clone(source, target):
            return size
        if status.st_blocks * 512 < size:
            return self._sparse(source, target, size)
        return self._range(source, target, 0, size)

    def _clone(self, source: int, target: int) -> bool:
        import fcntl

        from layers.linux import FICLONE

        try:
            fcntl.ioctl(target, FICLONE, source)
        except OSError as e:
            if e.errno not in _NO_CLONE:
                raise
            self.clone = False
            return False
        return True

    def _stream(self, source: int, target: int, data: bytes) -> int:
        """Copy a file whose size changed under us, from where `data` ends."""
        total = 0
        while data:
            write_all(target, data)
            total += len(data)
            data = os.read(source, _CHUNK)
        return total

    def _range(self, source: int, target: int, start: int, end: int) -> int:
        """Copy the bytes from `start` to `end`, at the same offsets; less if the file ends before."""
        position = start
        while position < end and self.ranges:
            try:
                count = os.copy_file_range(source, target, min(end - position, _RANGE), position, position)
            except OSError as e:
                if e.errno not in _NO_CLONE:
                    raise
                self.ranges = False
                break
            if count == 0:
                break  # the end, or a file system that answers so for what it cannot do: read() will tell
            position += count
        while position < end:
            data = os.pread(source, min(_CHUNK, end - position), position)
            if not data:
                break
            written = 0
            while written < len(data):
                written += os.pwrite(target, memoryview(data)[written:], position + written)
            position += len(data)
        return position - start

    def _sparse(self, source: int, target: int, size: int) -> int:
        position = 0
        while position < size:
            try:
                start = os.lseek(source, position, os.SEEK_DATA)
                end = min(os.lseek(source, start, os.SEEK_HOLE), size)
            except OSError as e:
                if e.errno == errno.ENXIO:  # a hole to the end
                    break
                if e.errno == errno.EINVAL:  # this file system knows no holes
                    self._range(source, target, position, size)
                    break
                raise
            self._range(source, target, start, end)
            position = end
        os.ftruncate(target, size)
        return size


def foreign(name: str) -> bool:
    """Whether an extended attribute stays behind when its file is copied."""
    return name.startswith(_FOREIGN)


def copy_xattrs(source: int, target: int) -> None:
    """Copy the extended attributes between open files; what the target cannot hold is left out."""
    try:
        names = os.listxattr(source)
    except OSError:
        return
    for name in names:
        if not foreign(name):
            try:
                os.setxattr(target, name, os.getxattr(source, name))
            except OSError as e:
                if e.errno not in (*_NO_ATTRIBUTES, errno.ENODATA):
                    raise


def copy_link_xattrs(source_fd: int, name: str, target_fd: int, target: str) -> None:
    """The same for an entry that cannot be opened: a symlink, device or fifo."""
    origin = f"/proc/self/fd/{source_fd}/{name}"
    try:
        names = os.listxattr(origin, follow_symlinks=False)
    except OSError:
        return
    for attribute in names:
        if not foreign(attribute) and attribute != ownership.CAPABILITY:
            try:
                value = os.getxattr(origin, attribute, follow_symlinks=False)
                os.setxattr(f"/proc/self/fd/{target_fd}/{target}", attribute, value, follow_symlinks=False)
            except OSError as e:
                if e.errno not in (*_NO_ATTRIBUTES, errno.ENODATA):
                    raise


def set_xattrs(target: int, attributes: Mapping[str, bytes]) -> None:
    """Give an open file the attributes of an archive's entry; what its file system cannot hold is left out."""
    for name, value in attributes.items():
        if not foreign(name):
            try:
                os.setxattr(target, name, value)
            except OSError as e:
                if e.errno not in _NO_ATTRIBUTES:
                    raise


def set_link_xattrs(target_fd: int, target: str, attributes: Mapping[str, bytes]) -> None:
    """The same for an entry that cannot be opened."""
    for name, value in attributes.items():
        if not foreign(name):
            try:
                os.setxattr(f"/proc/self/fd/{target_fd}/{target}", name, value, follow_symlinks=False)
            except OSError as e:
                if e.errno not in _NO_ATTRIBUTES:
                    raise
