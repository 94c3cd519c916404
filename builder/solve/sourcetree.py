"""A tree that COPY reads from: what of it is visible, what a source's wildcards name, the walk over it.

Two filters apply. The ignore file hides paths of the build context as if they were not there; a
hidden directory is seen only for the sake of something visible inside. The include and exclude
patterns of `--parents` and `--exclude` select beneath one source. `fileops` and `contenthash` walk
alike, so that a cache key covers what the copy takes, neither more nor less.
"""

from __future__ import annotations

import os
import re
import stat as stat_
from collections.abc import Callable, Generator

from builder.errors import ContextError
from builder.frontend.pathpattern import check_go_pattern, go_match
from builder.solve import rootpath
from layers import ownership
from layers.errors import Cancelled
from layers.values import NamedTuple, Protocol

_ESCAPED = re.compile(r"\\(.)")

# Two descriptors a level stay within the usual 1024 of a process.
MAX_DEPTH = 400


class Matcher(Protocol):
    """What `builder.frontend.ignorefile.IgnoreMatcher` does here; paths are relative."""

    def match(self, path: str) -> bool: ...

    def can_prune(self, directory: str) -> bool: ...


class Selection(NamedTuple):
    """The patterns of `--parents` and `--exclude`; `heads` are the literal beginnings of the former."""

    include: Matcher | None = None
    exclude: Matcher | None = None
    heads: tuple[str, ...] = ()

    def may_lead_to_included(self, directory: str) -> bool:
        """Whether something that `include` matches can be in a directory that it does not match."""
        inside = directory + "/"
        return any(not head or head.startswith(inside) or inside.startswith(head + "/") for head in self.heads)


class Directory:
    """One directory of a walk, open while the walk is inside it.

    `path` is relative to the walk's top, "" for the top itself. `included` is false for one that the
    patterns did not select, but which may hold selected entries. `entries` are the selected
    non-directories, by name.
    """

    __slots__ = (
        "entries",
        "fd",
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
        self.subdirectories: list[tuple[str, os.stat_result, bool]] = []


def split_wildcards(path: str) -> tuple[str, list[str]]:
    """Part a cleaned `path` into its literal head and the components from the first unescaped wildcard on."""
    parts = path.split("/")
    for index, part in enumerate(parts):
        at = 0
        while at < len(part):
            if part[at] in "*?[":
                return "/".join(parts[:index]), parts[index:]
            at += 2 if part[at] == "\\" else 1
    return path, []


def never_cancelled() -> bool:
    """The `cancelled` callback of who cannot be stopped."""
    return False


class SourceTree:
    """A tree by the descriptor of its root, seen through an ignore file's matcher, if any.

    Of a build context only empty files may stand for devices: asking costs as much as its whole walk.
    """

    def __init__(self, root_fd: int, ignore: Matcher | None = None, *, context: bool = False) -> None:
        self.root_fd = root_fd
        self.ignore = ignore
        self._owners = ownership.here()
        self._only_empty = context and not self._owners.recording

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
        return self._seen(self.root_fd, path or ".", status)

    def _seen(self, fd: int, name: str, status: os.stat_result) -> os.stat_result:
        """The status as the image has it, where the disk cannot hold that."""
        if not self._owners.concerns(status) or (self._only_empty and status.st_size):
            return status
        return self._owners.seen(f"/proc/self/fd/{fd}/{name}", status)

    def _hidden(self, path: str, status: os.stat_result) -> bool:
        """Whether the ignore file hides canonical `path`."""
        assert self.ignore is not None
        if not self.ignore.match(path):
            return False
        return not stat_.S_ISDIR(status.st_mode) or not self._shows_something(path)

    def _shows_something(self, path: str) -> bool:
        """Whether an ignored directory holds something that an exception of the ignore file shows."""
        assert self.ignore is not None
        if self.ignore.can_prune(path):
            return False
        fd = rootpath.open_directory(self.root_fd, path)
        try:
            with os.scandir(fd) as entries:
                listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        finally:
            os.close(fd)
        for name, is_directory in listed:
            inner = f"{path}/{name}"
            if not self.ignore.match(inner) or (is_directory and self._shows_something(inner)):
                return True
        return False

    # What a source names

    def resolve(self, pattern: str, *, wildcards: bool, follow: bool) -> list[str]:
        """The paths that `pattern` names, in walking order; those of wildcards may be none.

        Each is canonical but for its last component, which may be a symlink still to be followed. Where
        nothing is a wildcard, a backslash is one of the name as with BuildKit, or else, as with others, an escape.
        Raises: ContextError where the path, or the literal head of the pattern, is not there.
        """
        path = rootpath.clean(pattern)
        head, tail = split_wildcards(path) if wildcards else (path, [])
        if not tail:
            literal = _ESCAPED.sub(r"\1", path)
            for name in (path, literal) if wildcards and literal != path else (path,):
                if self.lstat(rootpath.resolve(self.root_fd, name, follow_last=follow)) is not None:
                    return [name]
            raise rootpath.not_found(pattern)
        for component in tail:
            check_go_pattern(component)  # it fails even where there is nothing to match
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
                    if go_match(tail[0], entry.name)
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
        selection: Selection | None = None,
        *,
        cancelled: Callable[[], bool] = never_cancelled,
    ) -> Generator[tuple[Directory, bool], None, None]:
        """Walk the directory at canonical `top`, each directory twice: on entering, and (True) on leaving it.

        Its entries are complete on entering; subdirectories follow in order of name. Close it if not
        exhausted. `cancelled` is asked once a directory. Raises: ContextError, naming the path; Cancelled.
        """
        current: Directory | None = None
        try:
            fd = rootpath.open_directory(self.root_fd, top)
            current = Directory("", "", self._seen(fd, ".", os.fstat(fd)), fd, None)
            depth = 0
            self._list(current, top, selection)
            yield current, False
            while current is not None:
                if current.subdirectories:
                    if cancelled():
                        raise Cancelled
                    current = self._enter(current)
                    depth += 1
                    if depth > MAX_DEPTH:
                        raise ContextError(f"{self._shown(top, current)}: more than {MAX_DEPTH} directories deep")
                    self._list(current, top, selection)
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
        name, status, included = parent.subdirectories.pop()
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent.fd)
        path = f"{parent.path}/{name}" if parent.path else name
        child = Directory(name, path, status, fd, parent)
        child.included = included
        return child

    def _list(self, directory: Directory, top: str, selection: Selection | None) -> None:
        """Fill in the entries and the subdirectories; those last in reverse, to be popped in order."""
        with os.scandir(directory.fd) as listing:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in listing]
        found.sort()
        if self._owners.deviceless:
            found = [(name, self._seen(directory.fd, name, status)) for name, status in found]
        if self.ignore is None and selection is None:
            directory.entries = [item for item in found if not stat_.S_ISDIR(item[1].st_mode)]
            if len(directory.entries) != len(found):
                directory.subdirectories = [
                    (name, status, True) for name, status in reversed(found) if stat_.S_ISDIR(status.st_mode)
                ]
            return
        for name, status in found:
            self._select(directory, top, name, status, selection)
        directory.subdirectories.reverse()

    def _select(
        self, directory: Directory, top: str, name: str, status: os.stat_result, selection: Selection | None
    ) -> None:
        path = f"{directory.path}/{name}" if directory.path else name
        if self.ignore is not None and self._hidden(f"{top}/{path}" if top else path, status):
            return
        is_directory = stat_.S_ISDIR(status.st_mode)
        included = True
        if selection is not None and selection.include is not None:
            included = selection.include.match(path)
            if is_directory and not included and not selection.may_lead_to_included(path):
                return
        if selection is not None and selection.exclude is not None and selection.exclude.match(path):
            included = False
            if is_directory and selection.exclude.can_prune(path):
                return
        if is_directory:
            directory.subdirectories.append((name, status, included))
        elif included:
            directory.entries.append((name, status))
