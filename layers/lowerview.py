"""Layer directories seen as overlayfs would merge them, without a mount.

A merged directory is a tuple of absolute paths, topmost first. `find` looks one name up in it and
answers what overlayfs would show: whiteouts hide, opaque directories cut off what lies beneath.
Paths longer than the kernel takes at once are reached in steps (`at`).

Callers: `layers.layerdiff` (what did an upper change?) and `layers.apply` (what is beneath this layer?).
Kernel: Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories".
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable

from layers import xattrs
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from layers.snapshot import Dialect

    T = TypeVar("T")


_STEP_BYTES = 4000  # below PATH_MAX, which counts the NUL and what we put in front


class Found(NamedTuple):
    """What a merged directory shows under a name. `dirs` are the directories merged there; empty for other files."""

    path: bytes
    st: os.stat_result
    dirs: tuple[bytes, ...]


def at(operation: Callable[[bytes], T], path: bytes) -> T:
    """`operation(path)` for a path of any length. Raises: what `operation` raises, or OSError on the way."""
    if len(path) < _STEP_BYTES:
        return operation(path)
    handle = -1
    try:
        while len(path) >= _STEP_BYTES:
            cut = path.rindex(b"/", 0, _STEP_BYTES)
            step = path[:cut] if handle == -1 else b"/proc/self/fd/%d/%s" % (handle, path[:cut])
            deeper = os.open(step, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            if handle != -1:
                os.close(handle)
            handle = deeper
            path = path[cut + 1 :]
        return operation(b"/proc/self/fd/%d/%s" % (handle, path))
    finally:
        if handle != -1:
            os.close(handle)


def open_beneath(root: bytes, path: bytes, flags: int) -> int:
    """Open `path` of a tree that may be changed meanwhile, by a container that runs: through no symbolic link.

    Raises: OSError (ELOOP, ENOTDIR where a directory has become something else).
    """
    fd = at(_open_directory, root)
    try:
        if path and len(path) < _STEP_BYTES:
            from layers import linux

            try:
                return linux.openat2(fd, path, flags, 0, linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS)
            except OSError as e:
                if e.errno not in {errno.ENOSYS, errno.EPERM}:  # before Linux 5.6, or behind a filter
                    raise
        *parents, last = path.split(b"/")
        for name in parents:
            deeper = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = deeper
        return os.open(last or b".", flags | os.O_NOFOLLOW, dir_fd=fd)
    finally:
        os.close(fd)


def _open_directory(path: bytes) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def lstat(path: bytes) -> os.stat_result | None:
    """The file's status; None if there is none."""
    try:
        return at(os.lstat, path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_whiteout(path: bytes, st: os.stat_result, directory: bytes | int, dialect: Dialect) -> bool:
    """Whether a file in a layer directory stands for an absence, in either form.

    The attribute form counts only in a directory marked `opaque=x` (Linux 6.7), as for the kernel.
    """
    if stat.S_ISCHR(st.st_mode):
        return st.st_rdev == 0
    if st.st_size or not stat.S_ISREG(st.st_mode):
        return False
    if at(lambda p: xattrs.mark(p, dialect, "whiteout"), path) is None:
        return False
    if isinstance(directory, int):
        return xattrs.mark(directory, dialect, "opaque") == b"x"
    return at(lambda p: xattrs.mark(p, dialect, "opaque"), directory) == b"x"


def find(dirs: tuple[bytes, ...], name: bytes, dialect: Dialect | None) -> Found | None:
    """What the merged directory shows as `name`; None if nothing. `dialect` None: a plain tree, no marks.

    Raises: OSError.
    """
    top: tuple[bytes, os.stat_result] | None = None
    merged: list[bytes] = []
    for number, directory in enumerate(dirs):
        path = directory + b"/" + name
        st = lstat(path)
        if st is None:
            continue
        if dialect is not None and is_whiteout(path, st, directory, dialect):
            break
        if not stat.S_ISDIR(st.st_mode):
            if top is None:
                return Found(path, st, ())
            break
        if top is None:
            top = (path, st)
        merged.append(path)
        # Only what could show through is worth a system call.
        if dialect is not None and number + 1 < len(dirs) and is_opaque(path, dialect):
            break
    if top is None:
        return None
    return Found(*top, tuple(merged))


def is_opaque(path: bytes, dialect: Dialect) -> bool:
    """Whether a layer's directory hides what lies beneath it."""
    return at(lambda p: xattrs.mark(p, dialect, "opaque"), path) == b"y"


def names(dirs: Iterable[bytes]) -> set[bytes]:
    """Every name that any of the directories holds, whiteouts included."""
    found: set[bytes] = set()
    for directory in dirs:
        found.update(at(os.listdir, directory))
    return found


def holders(dirs: tuple[bytes, ...]) -> dict[bytes, tuple[bytes, ...]]:
    """For each name the directories that hold it (as whatever), in their order: `find` needs no others."""
    found: dict[bytes, list[bytes]] = {}
    for directory in dirs:
        for name in at(os.listdir, directory):
            found.setdefault(name, []).append(directory)
    return {name: tuple(where) for name, where in found.items()}
