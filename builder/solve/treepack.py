"""A copy whose files go from their source straight into a layer, without being made on the disk first.

`builder.solve.treecopy` makes what the tree of the base has a say in: the destination, with all that leads
there and all that is merged with what exists. A directory that is new shows nothing of the base, so that what
it holds is known by the source alone: that is left out, and comes here. The layer is that of the copy's
upper directory (`layers.layerdiff`), each left-out directory in it followed by its contents; names, order,
owners, modes and times are those that the diff of a full copy would have found.

What only making a file can tell (which attributes the file system keeps, whether it may be made at all) is
refused by a LayerError: the caller then copies as ever. Caller: `builder.solve.steps`.
"""

from __future__ import annotations

import os
import stat as stat_
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from builder.solve import filedata
from builder.solve.sourcetree import Directory, SourceTree
from layers import ownership, xattrs
from layers.errors import LayerError
from layers.layerdiff import Change, Origin, refuse_name

if TYPE_CHECKING:
    from builder.solve.treecopy import TreeCopier

_LAST_S = 0x7FFFFFFF
"""Every file system holds times up to 2038; later ones, and those before 1970, some cut."""


class LeftOut:
    """The new directories of one copied source, and how to tell what would be in them. To be closed."""

    def __init__(self) -> None:
        self._trees: dict[bytes, str] = {}
        self._copier: TreeCopier | None = None
        self._tree: SourceTree | None = None

    def __bool__(self) -> bool:
        return bool(self._trees)

    def take(self, copier: TreeCopier, source: str, target: str, directory_fd: int) -> bool:
        """Have the contents of a new directory left out, if that can be: those of `source`, both paths canonical."""
        if "system.posix_acl_default" in xattrs.names_of(directory_fd):
            return False  # what is made in it inherits that
        if self._tree is None:
            self._copier = copier
            context = copier.options.reset_owner
            self._tree = SourceTree(os.dup(copier.tree.root_fd), copier.tree.ignore, context=context)
        self._trees[os.fsencode(target)] = source
        return True

    def close(self) -> None:
        """Idempotent."""
        if self._tree is not None:
            os.close(self._tree.root_fd)
            self._tree = None

    def changes(self, made: Iterable[Change]) -> Iterator[Change]:
        """The changes that were `made`, and behind each directory what it would hold.

        Raises: LayerError for what has to be made; ContextError for what cannot be read; Cancelled.
        """
        assert self._copier is not None
        assert self._tree is not None
        contents = _Contents(self._copier, self._tree)
        waiting = dict(self._trees)
        for change in made:
            yield change
            source = waiting.pop(change.path, None)
            if source is not None:
                yield from contents.of(source, change.path + b"/")
        if waiting:
            raise LayerError(f"{os.fsdecode(next(iter(waiting)))!r} was removed while it was packed")


class _Level:
    """A directory on the way: its files in the diff's order, and how many of them were told of."""

    __slots__ = ("fd", "files", "next", "prefix")

    def __init__(self, directory: Directory, prefix: bytes) -> None:
        self.fd = directory.fd
        self.prefix = prefix
        # The walk sorts text, which has names that are not UTF-8 elsewhere.
        self.files = sorted([(os.fsencode(name), status) for name, status in directory.entries])
        directory.subdirectories.sort(key=lambda item: os.fsencode(item[0]), reverse=True)
        self.next = 0


class _Contents:
    """Tells what a copier would make of the contents of directories."""

    def __init__(self, copier: TreeCopier, tree: SourceTree) -> None:
        self._tree = tree
        self._copied = copier.links
        self._mode: Callable[[os.stat_result], int] = copier.mode_of
        self._owner = copier.owner
        self._stamp_ns = copier.options.mtime_ns
        self._cancelled = copier.cancelled
        self._links: dict[tuple[int, int], bytes] = {}
        self._owners: set[tuple[int, int]] = set()
        self._probe = not ownership.here().recording

    def of(self, source: str, prefix: bytes) -> Iterator[Change]:
        """All that lies in the directory at canonical `source`; `prefix` goes before the names."""
        walk = self._tree.walk(source, None, cancelled=self._cancelled)
        levels: list[_Level] = []
        try:
            for directory, leaving in walk:
                if leaving:
                    yield from self._files(levels.pop(), None)
                    continue
                if levels:
                    name = os.fsencode(directory.name)
                    yield from self._files(levels[-1], name)
                    path = levels[-1].prefix + name
                    yield self._directory(path, name, directory)
                    levels.append(_Level(directory, path + b"/"))
                else:
                    levels.append(_Level(directory, prefix))
        finally:
            walk.close()

    def _directory(self, path: bytes, name: bytes, directory: Directory) -> Change:
        refuse_name(name, path)
        status = directory.stat
        return Change("add", path, self._as_copied(path, status), None, None, Origin(directory.fd, b".", status))

    def _files(self, level: _Level, before: bytes | None) -> Iterator[Change]:
        """The files of a directory that come before the subdirectory of that name; without one, the rest."""
        files, fd, prefix = level.files, level.fd, level.prefix
        while level.next < len(files):
            name, status = files[level.next]
            if before is not None and name > before:
                return
            level.next += 1
            path = prefix + name
            mode = status.st_mode
            if name.startswith(b".wh."):
                refuse_name(name, path)
            if not stat_.S_ISREG(mode) and not stat_.S_ISLNK(mode):
                raise LayerError(f"{os.fsdecode(path)!r} is neither a file nor a link nor a directory")
            link = None
            if status.st_nlink > 1 and stat_.S_ISREG(mode):
                key = (status.st_dev, status.st_ino)
                if key in self._copied:
                    raise LayerError(f"{os.fsdecode(path)!r} is a link to a file that was copied")
                link = self._links.setdefault(key, path)
                link = None if link is path else link
            yield Change("add", path, self._as_copied(path, status), link, None, Origin(fd, name, status))

    def _as_copied(self, path: bytes, status: os.stat_result) -> os.stat_result:
        """The status that a copy would have."""
        owner = self._owner or (status.st_uid, status.st_gid)
        if owner not in self._owners:
            self._check_owner(owner)
        link = stat_.S_ISLNK(status.st_mode)
        mode = status.st_mode if link else stat_.S_IFMT(status.st_mode) | self._mode(status)
        mtime_ns = status.st_mtime_ns if self._stamp_ns is None else self._stamp_ns
        if not 0 <= mtime_ns // 1_000_000_000 <= _LAST_S:
            raise LayerError(f"{os.fsdecode(path)!r} has a time that not every file system holds")
        if (mode, owner, mtime_ns) == (status.st_mode, (status.st_uid, status.st_gid), status.st_mtime_ns):
            return status
        times = (mtime_ns // 1_000_000_000,) * 3
        fields = (mode, status.st_ino, status.st_dev, status.st_nlink, *owner, status.st_size, *times)
        return os.stat_result(fields, {"st_mtime_ns": mtime_ns, "st_rdev": 0})

    def _check_owner(self, owner: tuple[int, int]) -> None:
        """Raises: ContextError where no file can be given to that owner, as a copy would find."""
        if self._probe:
            fd = os.memfd_create("pybuild-owner", os.MFD_CLOEXEC)
            try:
                filedata.own(fd, *owner)
            finally:
                os.close(fd)
        if len(self._owners) < 4096:
            self._owners.add(owner)
