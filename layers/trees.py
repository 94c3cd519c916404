"""Directory trees as the store needs them: removed, copied and measured, whatever is in them.

What a build step left behind is hostile: directories without permissions, symlinks in every
place, names of any bytes, thousands of levels. Everything here goes by directory descriptors and
never follows a symlink. Reading and writing layers is `layers.changeset` and `layers.apply`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BATCH = 4096
_DEPTH = 64
"""Open descriptors on the way down; deeper directories are first moved up to the top."""

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_FROZEN = 0x10 | 0x20  # immutable, append-only


def remove_tree(path: str | bytes) -> None:
    """Remove a directory and all in it, or a single file; nothing happens if it is not there.

    Atomic it is not: callers rename the tree away first. Raises: OSError naming what would not go.
    """
    name = os.fsencode(path)
    try:
        if not stat.S_ISDIR(os.lstat(name).st_mode):
            os.unlink(name)
            return
    except FileNotFoundError:
        return
    parent = os.open(os.path.dirname(name) or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        base = os.path.basename(name)
        top = _open_dir(base, parent)
        try:
            # Directories found too deep are moved to the top, and make another round.
            while not _empty(top):
                pass
        finally:
            os.close(top)
        _persist(partial(os.rmdir, base, dir_fd=parent), base, parent)
    except FileNotFoundError:
        pass  # another process removes the same tree
    finally:
        os.close(parent)


def _empty(top: int) -> bool:
    """Remove what lies under `top`; False if some of it was only moved up to it."""
    frames: list[tuple[int, bytes, list[bytes]]] = [(top, b"", _unlink_files(top))]
    moved = False
    try:
        while True:
            fd, name, children = frames[-1]
            if children:
                child = children.pop()
                if len(frames) > _DEPTH:
                    _lift(child, fd, top)
                    moved = True
                    continue
                opened = _open_dir(child, fd)
                frames.append((opened, child, []))
                frames[-1] = (opened, child, _unlink_files(opened))
                continue
            if len(frames) == 1:
                return not moved
            frames.pop()
            os.close(fd)
            try:
                _persist(partial(os.rmdir, name, dir_fd=frames[-1][0]), name, frames[-1][0])
            except OSError as e:
                if e.errno != errno.ENOTEMPTY:
                    raise
                # Some file systems skip entries while others are deleted; a dying process may add some.
                frames[-1][2].append(name)
    finally:
        for fd, _, _ in frames[1:]:
            os.close(fd)


def _lift(name: bytes, dir_fd: int, top: int) -> None:
    """Move a directory up to the top of the tree, so that depth costs no descriptors."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        # A rename to another parent rewrites `..`, for which the directory must be writable.
        os.chmod(f"/proc/self/fd/{handle}", 0o700)
    finally:
        os.close(handle)
    away = b".pybuild-" + os.urandom(8).hex().encode()
    _persist(partial(os.rename, name, away, src_dir_fd=dir_fd, dst_dir_fd=top), name, dir_fd)


def _unlink_files(fd: int) -> list[bytes]:
    """Unlink the non-directories in a directory; the names of the directories in it."""
    directories: list[bytes] = []
    with os.scandir(fd) as entries:
        while batch := [(os.fsencode(e.name), e.is_dir(follow_symlinks=False)) for e in islice(entries, _BATCH)]:
            for name, is_dir in batch:
                if is_dir:
                    directories.append(name)
                    continue
                try:
                    os.unlink(name, dir_fd=fd)
                except FileNotFoundError:
                    pass
                except PermissionError:
                    _persist(partial(os.unlink, name, dir_fd=fd), name, fd)
    return directories


def _open_dir(name: bytes, dir_fd: int) -> int:
    """Open a directory that is no symlink and no mount point. Raises: OSError, EXDEV for a mount point."""
    try:
        return _open_same_mount(name, dir_fd)
    except PermissionError:
        handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        finally:
            os.close(handle)
        return _open_same_mount(name, dir_fd)


def _open_same_mount(name: bytes, dir_fd: int) -> int:
    from layers import linux

    # A bind mount from the same file system has the same device number: only the kernel can tell.
    try:
        return linux.openat2(dir_fd, name, _DIR, resolve=linux.RESOLVE_NO_XDEV)
    except OSError as e:
        if e.errno != errno.EXDEV:
            raise
        raise OSError(errno.EBUSY, "something is mounted here", os.fsdecode(name)) from e


def _persist(action: Callable[[], None], name: bytes, dir_fd: int) -> None:
    """Do it; if refused, make the directory writable, thaw both, and do it again."""
    try:
        action()
        return
    except FileNotFoundError:
        return
    except PermissionError:
        pass
    _thaw(dir_fd)
    try:
        os.fchmod(dir_fd, 0o700)
    except PermissionError:
        pass
    try:
        status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        # Only these carry the flags, and to open a device or fifo would do something.
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
            try:
                _thaw(fd)
            finally:
                os.close(fd)
    except OSError:
        pass
    try:
        action()
    except FileNotFoundError:
        pass
    except OSError as e:
        shown = os.fsdecode(os.readlink(f"/proc/self/fd/{dir_fd}")) + "/" + os.fsdecode(name)
        raise OSError(e.errno, e.strerror, shown) from e


def _thaw(fd: int) -> None:
    """Clear the immutable and append-only flags, which even root must do before deleting."""
    import array
    import fcntl

    flags = array.array("l", [0])
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
        if flags[0] & _FS_FROZEN:
            flags[0] &= ~_FS_FROZEN
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, flags)
    except OSError as e:
        if e.errno not in {errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EINVAL}:
            raise


def disk_usage(path: str, *, seen: set[tuple[int, int]] | None = None) -> int:
    """Bytes allocated to a tree (st_blocks), each inode once; `seen` carries inodes across calls.

    What cannot be read counts as nothing. A missing tree has no bytes.
    """
    from layers.lowerview import at

    inodes: set[tuple[int, int]] = set() if seen is None else seen
    try:
        top = os.lstat(path)
    except FileNotFoundError:
        return 0
    total = top.st_blocks * 512
    if not stat.S_ISDIR(top.st_mode):
        return total
    pending = [os.fsencode(path)]
    while pending:
        directory = pending.pop()
        try:
            entries = at(_statuses, directory)
        except OSError:
            continue
        for name, status in entries:
            if stat.S_ISDIR(status.st_mode):
                pending.append(directory + b"/" + name)
            elif status.st_nlink > 1:
                key = (status.st_dev, status.st_ino)
                if key in inodes:
                    continue
                inodes.add(key)
            total += status.st_blocks * 512
    return total


def _statuses(directory: bytes) -> list[tuple[bytes, os.stat_result]]:
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                found.append((entry.name, entry.stat(follow_symlinks=False)))
            except OSError:
                continue
    return found


_SKIPPED_XATTRS = ("trusted.overlay.", "user.overlay.")


def copy_tree(source_fd: int, target: str | bytes) -> None:
    """Copy what lies under a directory (O_PATH will do) into an existing empty one, metadata included.

    Contents by reflink where the file system can, holes kept; hardlinks, owners, modes, xattrs
    (overlayfs' own left out), times; sockets are skipped. Within a user namespace devices other
    than overlayfs' whiteouts cannot be made: EPERM; those that are recorded are files with an attribute,
    and are copied as such. Raises: OSError naming the path.
    """
    source = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=source_fd)
    try:
        copier = _TreeCopier(os.fsencode(target), source)
    except BaseException:
        os.close(source)
        raise
    try:
        copier.run()
    finally:
        copier.close()


class _TreeCopier:
    """Walks with one descriptor each in source and target; the way back up is `..`."""

    def __init__(self, top: bytes, source: int) -> None:
        self._top = os.path.abspath(top)
        self._source = source
        self._target = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._links: dict[tuple[int, int], bytes] = {}
        self._reflinks = True

    def close(self) -> None:
        os.close(self._source)
        os.close(self._target)

    def run(self) -> None:
        # What is still to do in each directory on the way down, the directory's status, its path's length.
        frames = [(self._names(), os.fstat(self._source), 0)]
        prefix = b""
        while True:
            names, status, parent_length = frames[-1]
            for name in names:
                path = prefix + name
                try:
                    below = os.stat(name, dir_fd=self._source, follow_symlinks=False)
                    if not stat.S_ISDIR(below.st_mode):
                        self._copy_other(name, below, path)
                        continue
                    os.mkdir(name, 0o700, dir_fd=self._target)
                    self._enter(name)
                except OSError as e:
                    raise OSError(e.errno, e.strerror, "/" + os.fsdecode(path)) from e
                frames.append((self._names(), below, len(prefix)))
                prefix = path + b"/"
                break
            else:
                frames.pop()
                # Contents first, then the directory's own metadata: writing into it changes its times.
                self._leave(status, last=not frames)
                if not frames:
                    return
                prefix = prefix[:parent_length]

    def _names(self) -> Iterator[bytes]:
        with os.scandir(self._source) as entries:
            return iter([os.fsencode(entry.name) for entry in entries])

    def _enter(self, name: bytes) -> None:
        source = os.open(name, _DIR, dir_fd=self._source)
        os.close(self._source)
        self._source = source
        target = os.open(name, _DIR, dir_fd=self._target)
        os.close(self._target)
        self._target = target

    def _leave(self, status: os.stat_result, *, last: bool) -> None:
        if last:
            _copy_metadata(self._source, self._target, status)
            return
        source, target = os.open("..", _DIR, dir_fd=self._source), -1
        try:
            # Before the mode is set, which may forbid it.
            target = os.open("..", _DIR, dir_fd=self._target)
            _copy_metadata(self._source, self._target, status)
        finally:
            os.close(self._source)
            self._source = source
            if target >= 0:
                os.close(self._target)
                self._target = target

    def _copy_other(self, name: bytes, status: os.stat_result, path: bytes) -> None:
        source, target = self._source, self._target
        if status.st_nlink > 1:
            first = self._links.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                from layers.lowerview import at

                at(
                    lambda known: os.link(known, name, dst_dir_fd=target, follow_symlinks=False),
                    self._top + b"/" + first,
                )
                return
        if stat.S_ISREG(status.st_mode):
            old = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
            try:
                new = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
                try:
                    self._copy_data(old, new, status)
                    _copy_metadata(old, new, status)
                finally:
                    os.close(new)
            finally:
                os.close(old)
            return
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif stat.S_ISSOCK(status.st_mode):
            return
        else:
            os.mknod(name, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev, dir_fd=target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
        # There is no l*xattr by directory descriptor: the detour names the directory, not the link.
        old_path, new_path = (f"/proc/self/fd/{fd}/".encode() + name for fd in (source, target))
        for attribute in os.listxattr(old_path, follow_symlinks=False):
            if not attribute.startswith(_SKIPPED_XATTRS):
                value = os.getxattr(old_path, attribute, follow_symlinks=False)
                os.setxattr(new_path, attribute, value, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)

    def _copy_data(self, old: int, new: int, status: os.stat_result) -> None:
        size = status.st_size
        if self._reflinks and size:
            import fcntl

            from layers import linux

            try:
                fcntl.ioctl(new, linux.FICLONE, old)
                return
            except OSError as e:
                if e.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.ENOTTY, errno.EPERM}:
                    raise
                self._reflinks = False
        if size == 0:
            return
        if status.st_blocks * 512 >= size:
            _copy_range(old, new, 0, size)
            return
        os.ftruncate(new, size)
        end = 0
        while end < size:
            try:
                start = os.lseek(old, end, os.SEEK_DATA)
            except OSError as e:
                if e.errno == errno.ENXIO:  # nothing but a hole up to the end
                    return
                raise
            end = os.lseek(old, start, os.SEEK_HOLE)
            _copy_range(old, new, start, end)


def _copy_range(old: int, new: int, start: int, end: int) -> None:
    position = start
    while position < end:
        try:
            count = os.copy_file_range(old, new, min(end - position, 1 << 30), position, position)
        except OSError as e:
            if e.errno not in {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                raise
            count = os.pwrite(new, os.pread(old, min(end - position, 1 << 20), position), position)
        if count == 0:
            return  # it shrank under us: the tree's owner writes to it
        position += count


def _copy_metadata(old: int, new: int, status: os.stat_result) -> None:
    """Owner before mode and xattrs: chown clears set-id bits and capabilities."""
    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(new, status.st_uid, status.st_gid)
    for name in os.listxattr(old):
        if not name.startswith(_SKIPPED_XATTRS):
            os.setxattr(new, name, os.getxattr(old, name))
    os.fchmod(new, stat.S_IMODE(status.st_mode))
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
