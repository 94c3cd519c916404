"""A tree that COPY reads from: what of it is visible, what a source's wildcards name, the walk over it.

Two filters apply. The ignore file hides paths of the build context as if they were not there; a
hidden directory is seen only for the sake of something visible inside. The include and exclude
patterns of `--parents` and `--exclude` select beneath one source. `fileops` and `contenthash` walk
alike, so that a cache key covers what the copy takes, neither more nor less.
"""

from __future__ import annotations

import os
import stat as stat_
from collections.abc import Callable, Iterator
from typing import Protocol

from builder.errors import ContextError
from builder.solve import rootpath, wildcard
from layers.errors import Cancelled

# Two descriptors a level stay within the usual 1024 of a process.
MAX_DEPTH = 400


class Matcher(Protocol):
    """What `builder.frontend.ignorefile.IgnoreMatcher` does here.

    `parent` is what the same call gave for the parent directory, None at the top. The second value
    is that for the children.
    """

    def match_below(self, path: str, parent: object) -> tuple[bool, object]: ...

    def may_except_below(self, path: str) -> bool: ...


class Directory:
    """One directory of a walk, open while the walk is inside it.

    `path` is relative to the walk's top, "" for the top itself. `included` is false for one that the
    patterns did not select, but which may hold selected entries. `entries` are the selected
    non-directories, by name.
    """

    __slots__ = (
        "entries",
        "exclude_state",
        "fd",
        "ignore_state",
        "include_state",
        "included",
        "name",
        "parent",
        "path",
        "stat",
        "subdirectories",
    )

    def __init__(self, name: str, path: str, stat: os.stat_result, fd: int, parent: Directory | None) -> None:
        self.name = name
        self.path = path
        self.stat = stat
        self.fd = fd
        self.parent = parent
        self.included = True
        self.entries: list[tuple[str, os.stat_result]] = []
        self.subdirectories: list[tuple[str, os.stat_result, bool, tuple[object, object, object]]] = []
        self.ignore_state: object = None
        self.include_state: object = None
        self.exclude_state: object = None


def never_cancelled() -> bool:
    """The `cancelled` callback of who cannot be stopped."""
    return False


class SourceTree:
    """A tree by the descriptor of its root, seen through an ignore file's matcher, if any."""

    def __init__(self, root_fd: int, ignore: Matcher | None = None) -> None:
        self.root_fd = root_fd
        self.ignore = ignore

    # What is there

    def lstat(self, path: str) -> os.stat_result | None:
        """The status of what is at canonical `path`; None if nothing is, or it is hidden. Raises: ContextError."""
        try:
            status = rootpath.lstat(self.root_fd, path)
        except NotADirectoryError:
            return None
        except OSError as e:
            raise ContextError(f"cannot read {rootpath.shown(path)}: {e.strerror}") from e
        if status is None or (self.ignore is not None and path and self._hidden(path, status)):
            return None
        return status

    def _hidden(self, path: str, status: os.stat_result) -> bool:
        """Whether the ignore file hides canonical `path`."""
        assert self.ignore is not None
        state: object = None
        here = ""
        ignored = False
        for part in path.split("/"):
            here = f"{here}/{part}" if here else part
            ignored, state = self.ignore.match_below(here, state)
        if not ignored or not stat_.S_ISDIR(status.st_mode):
            return ignored
        return not self._shows_something(path, state)

    def _shows_something(self, path: str, state: object) -> bool:
        """Whether an ignored directory holds something that an exception of the ignore file shows."""
        assert self.ignore is not None
        if not self.ignore.may_except_below(path):
            return False
        fd = rootpath.open_directory(self.root_fd, path)
        try:
            with os.scandir(fd) as entries:
                listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        finally:
            os.close(fd)
        for name, is_directory in listed:
            inner = f"{path}/{name}"
            ignored, inner_state = self.ignore.match_below(inner, state)
            if not ignored or (is_directory and self._shows_something(inner, inner_state)):
                return True
        return False

    # What a source names

    def resolve(self, pattern: str, *, wildcards: bool, follow: bool) -> list[str]:
        """The paths that `pattern` names, in walking order; those of wildcards may be none.

        Each is canonical but for its last component, which may be a symlink still to be followed.
        Raises: ContextError where the path, or the literal head of the pattern, is not there.
        """
        path = rootpath.clean(pattern)
        head, tail = wildcard.split(path) if wildcards else (path, [])
        if not tail:
            if self.lstat(rootpath.resolve(self.root_fd, path, follow_last=follow)) is None:
                raise rootpath.not_found(pattern)
            return [path]
        for component in tail:
            wildcard.match(component, "")  # a malformed pattern fails even where there is nothing to match
        top = rootpath.resolve(self.root_fd, head, follow_last=follow)
        status = self.lstat(top)
        if status is None:
            raise rootpath.not_found(head)
        if not stat_.S_ISDIR(status.st_mode):
            return []
        found: list[str] = []
        self._expand(top, tail, found)
        return found

    def _expand(self, directory: str, tail: list[str], found: list[str]) -> None:
        fd = rootpath.open_directory(self.root_fd, directory)
        try:
            with os.scandir(fd) as entries:
                listed = sorted(
                    (entry.name, entry.is_dir(follow_symlinks=False))
                    for entry in entries
                    if wildcard.match(tail[0], entry.name)
                )
        finally:
            os.close(fd)
        for name, is_directory in listed:
            path = f"{directory}/{name}" if directory else name
            if len(tail) == 1:
                if self.ignore is None or self.lstat(path) is not None:
                    found.append(path)
            elif is_directory:
                self._expand(path, tail[1:], found)

    # What a copy takes

    def walk(
        self,
        top: str,
        *,
        include: Matcher | None = None,
        exclude: Matcher | None = None,
        cancelled: Callable[[], bool] = never_cancelled,
    ) -> Iterator[tuple[Directory, bool]]:
        """Walk the directory at canonical `top`, each directory twice: on entering, and (True) on leaving it.

        Its entries are complete on entering; subdirectories follow in order of name. `cancelled` is
        asked once a directory. Raises: ContextError, naming the path; Cancelled.
        """
        current: Directory | None = None
        try:
            fd = rootpath.open_directory(self.root_fd, top)
            current = Directory("", "", os.fstat(fd), fd, None)
            if self.ignore is not None and top:
                here = ""
                for part in top.split("/"):
                    here = f"{here}/{part}" if here else part
                    _, current.ignore_state = self.ignore.match_below(here, current.ignore_state)
            depth = 0
            self._list(current, top, include, exclude)
            yield current, False
            while current is not None:
                if current.subdirectories:
                    if cancelled():
                        raise Cancelled
                    current = self._enter(current)
                    depth += 1
                    if depth > MAX_DEPTH:
                        raise ContextError(f"{self._shown(top, current)}: more than {MAX_DEPTH} directories deep")
                    self._list(current, top, include, exclude)
                    yield current, False
                else:
                    yield current, True
                    os.close(current.fd)
                    current = current.parent
                    depth -= 1
        except OSError as e:
            raise ContextError(f"cannot read {self._shown(top, current)}: {e.strerror}") from e
        finally:
            while current is not None:
                os.close(current.fd)
                current = current.parent

    @staticmethod
    def _shown(top: str, directory: Directory | None) -> str:
        return rootpath.shown(f"{top}/{directory.path}" if directory else top)

    @staticmethod
    def _enter(parent: Directory) -> Directory:
        name, status, included, states = parent.subdirectories.pop()
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent.fd)
        path = f"{parent.path}/{name}" if parent.path else name
        child = Directory(name, path, status, fd, parent)
        child.included = included
        child.ignore_state, child.include_state, child.exclude_state = states
        return child

    def _list(self, directory: Directory, top: str, include: Matcher | None, exclude: Matcher | None) -> None:
        """Fill in the entries and the subdirectories; those last in reverse, to be popped in order."""
        fd = directory.fd
        with os.scandir(fd) as listing:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in listing]
        found.sort()
        if self.ignore is None and include is None and exclude is None:
            directory.entries = [item for item in found if not stat_.S_ISDIR(item[1].st_mode)]
            if len(directory.entries) != len(found):
                nothing = (None, None, None)
                directory.subdirectories = [
                    (name, status, True, nothing) for name, status in reversed(found) if stat_.S_ISDIR(status.st_mode)
                ]
            return
        for name, status in found:
            self._select(directory, top, name, status, include, exclude)
        directory.subdirectories.reverse()

    def _select(
        self,
        directory: Directory,
        top: str,
        name: str,
        status: os.stat_result,
        include: Matcher | None,
        exclude: Matcher | None,
    ) -> None:
        is_directory = stat_.S_ISDIR(status.st_mode)
        ignore_state = include_state = exclude_state = None
        path = f"{directory.path}/{name}" if directory.path else name
        if self.ignore is not None:
            full = f"{top}/{path}" if top else path
            ignored, ignore_state = self.ignore.match_below(full, directory.ignore_state)
            if ignored and not (is_directory and self._shows_something(full, ignore_state)):
                return
        included = True
        if include is not None:
            included, include_state = include.match_below(path, directory.include_state)
        if exclude is not None:
            excluded, exclude_state = exclude.match_below(path, directory.exclude_state)
            included = included and not excluded
            if is_directory and excluded and not exclude.may_except_below(path):
                return
        if is_directory:
            directory.subdirectories.append((name, status, included, (ignore_state, include_state, exclude_state)))
        elif included:
            directory.entries.append((name, status))
