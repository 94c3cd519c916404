"""What COPY, ADD, WORKDIR and heredoc files do to a tree: BuildKit's file operations, over descriptors.

Both trees are known by a descriptor of their root; `builder.solve.rootpath` keeps every path inside
them. The copying itself is `builder.solve.treecopy`'s, archives are `builder.solve.unpack`'s.
Called by the solver's steps. The functions are thread-safe, each call on its own trees.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from builder.errors import ContextError
from builder.solve import filedata, rootpath
from builder.solve.copyoptions import CopyOptions, CopyStats, resolve_in
from builder.solve.sourcetree import SourceTree, never_cancelled
from builder.solve.treecopy import TreeCopier
from layers.errors import Cancelled

if TYPE_CHECKING:
    from builder.solve.treepack import LeftOut

__all__ = ["CopyOptions", "CopyStats", "copy", "copy_data", "make_directory", "make_file", "resolve_sources"]


def resolve_sources(source_fd: int, pattern: str, options: CopyOptions) -> list[str]:
    """The paths that one source of COPY names, in the order in which they are copied.

    Raises: ContextError where it names nothing and must, or a `required` path is not there.
    """
    return resolve_in(SourceTree(source_fd, options.ignore, context=options.reset_owner), pattern, options)


def copy(
    source_fd: int,
    source: str,
    dest_fd: int,
    dest: str,
    options: CopyOptions,
    *,
    cancelled: Callable[[], bool] = never_cancelled,
    upper_fd: int | None = None,
    left_out: LeftOut | None = None,
) -> CopyStats:
    """Copy what `source` names in one tree to `dest` in another.

    A trailing slash of `dest` says that it is a directory. `cancelled` is asked once a directory.
    `upper_fd`, of the overlay that `dest_fd` shows: nothing will be looked at through that any more.
    `left_out` is given the contents of directories that are new, which are not copied then.
    Not atomic: after an error the destination is unspecified, and to be thrown away.
    Raises: ContextError; Cancelled.
    """
    tree = SourceTree(source_fd, options.ignore, context=options.reset_owner)
    if not options.create_dest:
        parent = os.path.dirname(rootpath.resolve(dest_fd, dest))
        if rootpath.lstat(dest_fd, parent) is None:
            raise ContextError(f"{rootpath.shown(dest)}: its directory does not exist")
    entries = size = 0
    paths = resolve_in(tree, source, options)
    for number, path in enumerate(paths, 1):
        if cancelled():
            raise Cancelled
        if options.unpack:
            from builder.solve import unpack  # ADD alone needs it

            unpacked = unpack.unpack(tree, path, dest_fd, dest, options, cancelled=cancelled)
            if unpacked is not None:
                entries += unpacked.entries
                size += unpacked.size_bytes
                continue
        # What the others make, those behind them look at.
        upper, left = (upper_fd, left_out) if number == len(paths) else (None, None)
        copier = TreeCopier(tree, dest_fd, options, cancelled, upper, left)
        copier.copy(path, dest)
        entries += copier.entries
        size += copier.size_bytes
    return CopyStats(entries, size)


def copy_data(dest_fd: int, name: str, data: bytes, dest: str, options: CopyOptions) -> CopyStats:
    """Copy an inline document: as `copy` would a file `name` of mode 0644 that holds `data`. Raises: ContextError."""
    copier = TreeCopier(SourceTree(dest_fd), dest_fd, options, never_cancelled)
    copier.copy_data(name, data, dest)
    return CopyStats(copier.entries, copier.size_bytes)


def make_directory(
    root_fd: int, path: str, mode: int = 0o755, owner: tuple[int, int] | None = None, mtime_ns: int | None = None
) -> bool:
    """Make a directory with its parents, as WORKDIR does; True if anything was made.

    Existing directories stay as they are; new ones, parents too, get `mode`, `owner` and `mtime_ns`.
    Idempotent. Raises: ContextError.
    """
    created: list[str] = []
    try:
        rootpath.make_directories(root_fd, rootpath.resolve(root_fd, path), mode, owner, created=created)
        rootpath.stamp(root_fd, created, mtime_ns)
    except OSError as e:
        raise ContextError(f"mkdir {rootpath.shown(path)}: {e.strerror}") from e
    return bool(created)


def make_file(
    root_fd: int,
    path: str,
    data: bytes,
    mode: int = 0o644,
    owner: tuple[int, int] | None = None,
    mtime_ns: int | None = None,
) -> None:
    """Write a file, in a directory that exists, over what the path leads to. Raises: ContextError."""
    target = rootpath.resolve(root_fd, path)
    directory, name = os.path.split(target)
    try:
        parent = rootpath.open_directory(root_fd, directory)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(name, flags, mode, dir_fd=parent)
            try:
                filedata.write_all(fd, data)
                if owner is not None:
                    filedata.own(fd, *owner)
                os.fchmod(fd, mode)
                if mtime_ns is not None:
                    os.utime(fd, ns=(mtime_ns, mtime_ns))
            finally:
                os.close(fd)
        finally:
            os.close(parent)
    except OSError as e:
        raise ContextError(f"cannot write {rootpath.shown(path)}: {e.strerror}") from e
