"""Paths inside a tree that is known by the descriptor of its root: resolve, open, make directories.

The tree may be hostile: its symlinks, absolute ones too, lead to places inside it, as in a chroot,
and a path that does not exist yet is resolved as far as it does. Results are canonical paths,
relative to the root, without symlinks: "" is the root itself. Every opening goes through
openat2(RESOLVE_IN_ROOT), so that not even a rename under our feet leads outside. A short path is opened
a component at a time, following no symlink, which is as safe and spares a cached build ctypes.
Used by everything in `builder.solve` that touches a build context or a snapshot.
"""

from __future__ import annotations

import errno
import os
import posixpath

from builder.errors import ContextError, SourceNotFound
from builder.solve import filedata

MAX_LINKS = 255
_SHALLOW = 5
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def clean(path: str) -> str:
    """The shortest form of an absolute or relative `path`, without the leading slash; "" for the root."""
    return posixpath.normpath("/" + path).lstrip("/")


def shown(path: str) -> str:
    """`path` as an error message names it: absolute in its tree and quoted."""
    return f'"/{clean(path)}"'


def not_found(path: str) -> ContextError:
    """The error for a source that is not in its tree, in BuildKit's words."""
    return SourceNotFound(f"{shown(path)}: not found", path=path)


def open_directory(root_fd: int, path: str) -> int:
    """Open the directory at canonical `path` for reading. Raises: OSError."""
    if path.count("/") < _SHALLOW:
        try:
            return _walk(root_fd, path, _DIRECTORY)
        except OSError as e:
            if e.errno not in (errno.ENOTDIR, errno.ELOOP):  # of a symlink, or of a file in its place
                raise
    from layers import linux

    return linux.openat2(root_fd, path, _DIRECTORY, resolve=linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS)


def open_file(root_fd: int, path: str) -> int:
    """Open the file at canonical `path` for reading, never waiting for a fifo's writer. Raises: OSError."""
    from layers import linux

    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    return linux.openat2(root_fd, path, flags, resolve=linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS)


def lstat(root_fd: int, path: str) -> os.stat_result | None:
    """The status of what is at canonical `path`, itself if a symlink; None if nothing is. Raises: OSError."""
    try:
        fd = _open_path(root_fd, path)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _open_path(root_fd: int, path: str) -> int:
    if path.count("/") < _SHALLOW:
        try:
            return _walk(root_fd, path, os.O_PATH)
        except OSError as e:
            if e.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
    from layers import linux

    inside = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
    return linux.openat2(root_fd, path, os.O_PATH | os.O_NOFOLLOW, resolve=inside)


def _walk(root_fd: int, path: str, flags: int) -> int:
    """Open canonical `path` a component at a time, none of them through a symlink. Raises: OSError."""
    *parents, last = path.split("/")
    here = root_fd
    try:
        for part in parents:
            child = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            if here != root_fd:
                os.close(here)
            here = child
        return os.open(last or ".", flags | os.O_NOFOLLOW, dir_fd=here)
    finally:
        if here != root_fd:
            os.close(here)


def _read_link(root_fd: int, path: str) -> str | None:
    """The target of the symlink at canonical `path`, or None if there is none."""
    try:
        fd = _open_path(root_fd, path)
    except FileNotFoundError:
        return None
    try:
        return os.readlink("", dir_fd=fd)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.EINVAL):  # not a symlink
            return None
        raise
    finally:
        os.close(fd)


def resolve(root_fd: int, path: str, *, follow_last: bool = True) -> str:
    """The canonical path of `path`, which may not exist, or not wholly.

    With `follow_last` false, a symlink in the last place is left alone.
    Raises: ContextError for a loop of symlinks or a file in a directory's place; OSError.
    """
    pending = clean(path).split("/")[::-1]
    done: list[str] = []
    links = 0
    while pending:
        part = pending.pop()
        if part in ("", "."):
            continue
        if part == "..":
            del done[-1:]
            continue
        here = "/".join((*done, part))
        if not pending and not follow_last:
            done.append(part)
            break
        try:
            target = _read_link(root_fd, here)
        except NotADirectoryError:
            raise ContextError(f"{shown('/'.join(done))}: not a directory") from None
        if target is None:
            done.append(part)
            continue
        links += 1
        if links > MAX_LINKS:
            raise ContextError(f"{shown(path)}: too many links")
        if target.startswith("/"):
            done.clear()
        pending.extend(target.split("/")[::-1])
    return "/".join(done)


def make_directories(
    root_fd: int, path: str, mode: int, owner: tuple[int, int] | None, *, created: list[str] | None = None
) -> None:
    """Make the directory at canonical `path` with its parents; those that exist are left as they are.

    `mode` and `owner` are for the new ones, whose paths go to `created`. Idempotent.
    Raises: ContextError where a file is in the way; OSError.
    """
    try:
        os.close(open_directory(root_fd, path))
        return
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise ContextError(f"mkdir {shown(path)[1:-1]}: not a directory") from None
    here = ""
    fd = open_directory(root_fd, "")
    try:
        for part in path.split("/"):
            here = f"{here}/{part}" if here else part
            try:
                os.mkdir(part, mode, dir_fd=fd)
                new = True
            except FileExistsError:
                new = False
            from layers import linux

            try:
                child = linux.openat2(fd, part, _DIRECTORY | os.O_NOFOLLOW, resolve=linux.RESOLVE_BENEATH)
            except (NotADirectoryError, OSError) as e:
                if e.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                raise ContextError(f"mkdir /{here}: not a directory") from None
            os.close(fd)
            fd = child
            if new:
                if owner is not None:
                    filedata.own(fd, *owner)
                os.fchmod(fd, mode)
                if created is not None:
                    created.append(here)
    finally:
        os.close(fd)


def stamp(root_fd: int, created: list[str], mtime_ns: int | None) -> None:
    """Give directories their time, children first, since making a child changed its parent's."""
    if mtime_ns is None:
        return
    for path in reversed(created):
        fd = open_directory(root_fd, path)
        try:
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(fd)
