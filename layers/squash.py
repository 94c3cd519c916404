"""Several snapshots' changes as one layer: what makes the last tree out of the first.

Only what the snapshots mention is looked at, not the whole of both trees. The files are read from the
merged tree of the last. Caller: `builder.solve.layering` (`--squash`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator

from layers import ownership
from layers.layerdiff import Change


def squash_changes(steps: Iterable[Iterable[Change]], base: str | None, merged: str) -> Iterator[Change]:
    """One stream of changes, in the order of `layers.layerdiff`, for those of `steps`, oldest first.

    `base` is the directory of the tree beneath them (None: nothing is), `merged` that of the last one's
    whole tree; both end in a slash and a dot where they are links. Raises: OSError, what the steps raise.
    """
    mentioned: set[bytes] = set()
    replaced: set[bytes] = set()
    for step in steps:
        for change in step:
            mentioned.add(change.path)
            if change.st is None or not stat.S_ISDIR(change.st.st_mode):
                replaced.add(change.path)
    owners = ownership.here()
    below = None if base is None else os.fsencode(base)
    top = os.fsencode(merged)
    if below is not None:
        for path in replaced:
            mentioned.update(_lost(below, top, path))
    links: dict[tuple[int, int], bytes] = {}
    for path in sorted(mentioned, key=lambda p: p.split(b"/")):
        old = None if below is None else _stat(below, path)
        new = _stat(top, path)
        if new is None:
            if old is not None and _parent_is_there(top, path):
                yield Change("delete", path)
            continue
        link = None
        if new.st_nlink > 1 and not stat.S_ISDIR(new.st_mode):
            key = (new.st_dev, new.st_ino)
            link = links.get(key)
            if link is None:
                links[key] = path
        new = owners.seen(top + b"/" + path, new)
        yield Change("add" if old is None else "modify", path, new, link)


def _lost(base: bytes, merged: bytes, top: bytes) -> Iterator[bytes]:
    """Paths of the base in a directory that was removed and made anew: what is not in the new one."""
    todo = [top]
    while todo:
        path = todo.pop()
        old, new = _stat(base, path), _stat(merged, path)
        if old is None or new is None or not stat.S_ISDIR(old.st_mode) or not stat.S_ISDIR(new.st_mode):
            continue
        there = set(os.listdir(merged + b"/" + path))
        for name in os.listdir(base + b"/" + path):
            inner = path + b"/" + name
            if name in there:
                todo.append(inner)
            else:
                yield inner


def _stat(root: bytes, path: bytes) -> os.stat_result | None:
    """What lies there, no symbolic link followed: a link in the place of a directory hides what was in it."""
    head = path.rpartition(b"/")[0]
    if head and not _is_directory(root, head):
        return None
    try:
        return os.lstat(root + b"/" + path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_directory(root: bytes, path: bytes) -> bool:
    """Whether every part of a path is a directory."""
    inner = root
    for part in path.split(b"/"):
        inner += b"/" + part
        try:
            if not stat.S_ISDIR(os.lstat(inner).st_mode):
                return False
        except FileNotFoundError:
            return False
    return True


def _parent_is_there(root: bytes, path: bytes) -> bool:
    """A deletion within a directory that is gone itself needs no mention."""
    head = path.rpartition(b"/")[0]
    return not head or _is_directory(root, head)
