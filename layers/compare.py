"""Trees in memory, and how two of them differ: from a tar stream, a stack of layers, or a directory.

A tree holds what a layer can say of each path: kind, mode, owner, size, the digest of the content, time,
link target, device, attributes and which names are one file; no file's data. Callers: `pybuild diff` and
`verify` (`builder.difference`, `builder.verify`).

Spec: image-spec layer.md, "Applying Changesets".
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from layers import ownership, xattrs
from layers.errors import LayerError
from layers.layerdiff import OPAQUE_WHITEOUT, WHITEOUT_PREFIX
from layers.tarreader import (
    BLOCK_DEVICE,
    CHARACTER_DEVICE,
    DIRECTORY,
    FIFO,
    HARDLINK,
    REGULAR,
    SYMLINK,
    TarEntry,
    TarReader,
    normal_name,
)
from layers.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

Kind = Literal["file", "directory", "symlink", "character device", "block device", "fifo", "socket", "whiteout"]

_KINDS: dict[bytes, Kind] = {
    REGULAR: "file",
    b"\0": "file",
    b"7": "file",
    DIRECTORY: "directory",
    SYMLINK: "symlink",
    CHARACTER_DEVICE: "character device",
    BLOCK_DEVICE: "block device",
    FIFO: "fifo",
}
_STAT_KINDS: dict[int, Kind] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_MAX_ENTRIES = 5_000_000
_MAX_HOPS = 40
_READ_BYTES = 1 << 20
_NO_ATTRIBUTES: dict[str, bytes] = {}


class Node(NamedTuple):
    """What is known of a file. Nodes of one `inode` are names of the same file.

    `content` is the digest of a file's data, or, for a file on disk, the path to read it from.
    """

    kind: Kind
    mode: int
    uid: int
    gid: int
    size: int
    mtime_s: int
    inode: object
    content: bytes | str = b""
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    attributes: dict[str, bytes] = _NO_ATTRIBUTES

    def digest(self) -> bytes:
        """The SHA-256 of a file's data. Raises: LayerError if it cannot be read any more."""
        if isinstance(self.content, bytes):
            return self.content
        try:
            with open(self.content, "rb", buffering=0) as stream:
                return hashlib.file_digest(stream, "sha256").digest()
        except OSError as e:
            raise LayerError(f"{self.content}: {e.strerror}") from e


_WHITEOUT = Node("whiteout", 0, 0, 0, 0, 0, None)
_IMPLIED = Node("directory", 0o755, 0, 0, 0, 0, None)
"""A directory that no entry speaks of."""


class _Place:
    """A name in a tree."""

    __slots__ = ("children", "node")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.children: dict[bytes, _Place] = {}


def _only_fresh(top: _Place, fresh: dict[int, _Place]) -> bool:
    """Drop what is not `fresh` below a place; whether it is fresh itself, or has anything left in it."""
    order, todo = [], [top]
    while todo:
        place = todo.pop()
        order.append(place)
        todo += place.children.values()
    left: set[int] = set()
    for place in reversed(order):
        place.children = {name: child for name, child in place.children.items() if id(child) in left}
        if id(place) in fresh or place.children:
            left.add(id(place))
    return id(top) in left


class Tree:
    """A tree of nodes. `flat` has the final form: every path, and which file it is."""

    def __init__(self) -> None:
        self._root = _Place(_IMPLIED)
        self._numbers = count()
        self._entries = 0

    def flat(self) -> dict[bytes, Node]:
        """All paths below the root, in the order of the walk, names sorted."""
        found: dict[bytes, Node] = {}
        todo = [(b"", self._root)]
        while todo:
            path, place = todo.pop()
            if path:
                found[path] = place.node
            prefix = path + b"/" if path else b""
            todo += [(prefix + name, place.children[name]) for name in sorted(place.children, reverse=True)]
        return found

    # Layers

    def apply(self, stream: BinaryIO, *, whiteouts: Literal["apply", "keep"] = "apply") -> None:
        """Put the uncompressed layer `stream` on top. With "keep", deletions stay as nodes of their own.

        Raises: LayerError for a malformed stream, or more entries than anybody can mean.
        """
        reader = TarReader(stream)
        fresh: dict[int, _Place] = {}
        for entry in reader:
            self._count(entry)
            path = normal_name(entry.name)
            parent_path, _, name = path.rpartition(b"/")
            if name.startswith(WHITEOUT_PREFIX):
                self._whiteout(parent_path, name, keep=whiteouts == "keep", fresh=fresh)
                continue
            node = self._node(entry, reader)
            if node is None:
                continue
            if not path:
                self._root.node = node
                continue
            parent = self._directory(parent_path)
            old = parent.children.get(name)
            place = parent.children[name] = _Place(node)
            fresh[id(place)] = place
            if old is not None and node.kind == "directory" and old.node.kind == "directory":
                place.children = old.children

    def _count(self, entry: TarEntry) -> None:
        self._entries += 1
        if self._entries > _MAX_ENTRIES:
            raise LayerError(f"more than {_MAX_ENTRIES} entries: {os.fsdecode(entry.name)!r} is too many to compare")

    def _node(self, entry: TarEntry, reader: TarReader) -> Node | None:
        if entry.type == HARDLINK:
            target = self._find(normal_name(entry.linkname))
            if target is None:
                raise LayerError(f"{os.fsdecode(entry.name)!r} is a link to a file that is not there")
            return target.node
        kind = _KINDS.get(entry.type)
        if kind is None:
            return None
        content = b""
        size = 0
        if kind == "file":
            content, size = _hash_entry(reader)
        return Node(
            kind,
            entry.mode & 0o7777,
            entry.uid,
            entry.gid,
            size,
            entry.mtime_ns // 10**9,
            next(self._numbers),
            content,
            entry.linkname if kind == "symlink" else b"",
            (entry.devmajor, entry.devminor) if kind.endswith("device") else (0, 0),
            entry.xattrs or _NO_ATTRIBUTES,
        )

    def _whiteout(self, parent_path: bytes, name: bytes, *, keep: bool, fresh: dict[int, _Place]) -> None:
        """Take away what lower layers have there; what this layer has put there itself stays."""
        found = self._find(parent_path, follow=True)
        if not keep and (found is None or found.node.kind != "directory"):
            return  # nothing is there to be hidden, and none of it is made for that
        parent = self._directory(parent_path)
        if name == OPAQUE_WHITEOUT:
            hidden = list(parent.children)
        else:
            hidden = [name[len(WHITEOUT_PREFIX) :]]
            if keep:
                parent.children.setdefault(hidden[0], _Place(_WHITEOUT))
                return
        for child in hidden:
            if child in parent.children and not _only_fresh(parent.children[child], fresh):
                del parent.children[child]

    def _resolve(self, path: bytes, *, follow: bool) -> list[bytes] | None:
        """The path without symbolic links, all within the tree, as far as it is there, then as it is written.

        With `follow`, a link at its end counts, too. None for links that lead nowhere, in circles.
        """
        stack = [self._root]
        trail: list[bytes] = []
        todo = [part for part in path.split(b"/") if part not in {b"", b"."}]
        hops = 0
        while todo:
            name = todo.pop(0)
            if name == b"..":
                del trail[-1:]
                stack = stack[: len(trail) + 1]
                continue
            child = stack[-1].children.get(name) if len(stack) == len(trail) + 1 else None
            if child is not None and child.node.kind == "symlink" and (todo or follow):
                hops += 1
                if hops > _MAX_HOPS:
                    return None
                target = child.node.target
                if target.startswith(b"/"):
                    stack, trail = [self._root], []
                todo = [part for part in target.split(b"/") if part not in {b"", b"."}] + todo
                continue
            trail.append(name)
            if child is not None:
                stack.append(child)
        return trail

    def _find(self, path: bytes, *, follow: bool = False) -> _Place | None:
        """What is at a path; symbolic links on the way, with `follow` also the last, are followed."""
        parts = self._resolve(path, follow=follow)
        place: _Place | None = None if parts is None else self._root
        for part in parts or ():
            place = None if place is None else place.children.get(part)
        return place

    def _directory(self, path: bytes) -> _Place:
        """The directory at a path, made if it is missing, in place of whatever else is there.

        Raises: LayerError for symbolic links in circles.
        """
        parts = self._resolve(path, follow=True)
        if parts is None:
            raise LayerError(f"{os.fsdecode(path)!r} leads through symbolic links in circles")
        place = self._root
        for part in parts:
            child = place.children.get(part)
            if child is None or child.node.kind != "directory":
                child = place.children[part] = _Place(_IMPLIED._replace(inode=next(self._numbers)))
            place = child
        return place


def read_directory(path: Path, *, warn: Callable[[str], None] | None = None) -> dict[bytes, Node]:
    """The tree below a directory, of one file system or several. Raises: LayerError if it cannot be read."""
    tree = Tree()
    owners = ownership.here()
    todo = [(b"", tree._root)]
    top = os.fsencode(path)
    entries = 0
    while todo:
        inner, place = todo.pop()
        here = top + b"/" + inner if inner else top
        try:
            listed = list(os.scandir(here))
        except OSError as e:
            raise LayerError(f"{os.fsdecode(here)}: {e.strerror}") from e
        for entry in listed:
            entries += 1
            if entries > _MAX_ENTRIES:
                raise LayerError(f"{path} has more than {_MAX_ENTRIES} entries")
            try:
                status = owners.seen(entry.path, entry.stat(follow_symlinks=False))
                node = _stat_node(os.fsdecode(entry.path), status)
            except OSError as e:
                if warn is not None:
                    warn(f"{os.fsdecode(entry.path)}: {e.strerror}")
                continue
            child = place.children[entry.name] = _Place(node)
            if node.kind == "directory":
                todo.append((inner + b"/" + entry.name if inner else entry.name, child))
    return tree.flat()


def _stat_node(path: str, st: os.stat_result) -> Node:
    kind = _STAT_KINDS[stat.S_IFMT(st.st_mode)]
    attributes = ownership.without_records(xattrs.load(os.fsencode(path)), st.st_mode)
    return Node(
        kind,
        st.st_mode & 0o7777,
        st.st_uid,
        st.st_gid,
        st.st_size if kind == "file" else 0,
        st.st_mtime_ns // 10**9,
        (st.st_dev, st.st_ino),
        path if kind == "file" else b"",
        os.fsencode(os.readlink(path)) if kind == "symlink" else b"",
        (os.major(st.st_rdev), os.minor(st.st_rdev)) if kind.endswith("device") else (0, 0),
        attributes or _NO_ATTRIBUTES,
    )


def _hash_entry(reader: TarReader) -> tuple[bytes, int]:
    """The digest and the size of the current entry's data, holes included."""
    hasher = hashlib.sha256()
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    size = 0
    while length := reader.readinto(buffer):
        hasher.update(view[:length])
        size += length
    return hasher.digest(), size


# Comparing


class FieldChange(NamedTuple):
    """One thing in which a file differs, as text for people."""

    field: str
    old: str
    new: str


class FileChange(NamedTuple):
    """A path that only one tree has, or that differs. `old_size` and `new_size` are 0 where there is no file."""

    path: bytes
    change: Literal["added", "removed", "changed"]
    fields: tuple[FieldChange, ...]
    old_size: int
    new_size: int


def compare(
    old: dict[bytes, Node], new: dict[bytes, Node], *, times: bool = False, directories: bool = True
) -> Iterator[FileChange]:
    """How `new` differs from `old`, in the order of paths. `times`: modification times count, to the second.

    What is in a directory that is missing on one side is told of, too.
    """
    old_links, new_links = _link_names(old), _link_names(new)
    for path in sorted({*old, *new}, key=lambda p: p.split(b"/")):
        before, after = old.get(path), new.get(path)
        if before is None and after is not None:
            yield FileChange(path, "added", (), 0, after.size)
        elif after is None and before is not None:
            yield FileChange(path, "removed", (), before.size, 0)
        elif before is not None and after is not None:
            fields = list(_fields(before, after, times=times and (directories or before.kind != "directory")))
            first, second = old_links.get(path, b""), new_links.get(path, b"")
            if first != second:
                fields.append(FieldChange("hard link", _shown(first or b"none"), _shown(second or b"none")))
            if fields:
                yield FileChange(path, "changed", tuple(fields), before.size, after.size)


def _fields(old: Node, new: Node, *, times: bool) -> Iterator[FieldChange]:
    if old.kind != new.kind:
        yield FieldChange("kind", old.kind, new.kind)
        return
    if old.kind == "whiteout":
        return
    if old.kind == "file":
        if old.size != new.size:
            yield FieldChange("size", str(old.size), str(new.size))
        elif old.size:
            first, second = old.digest(), new.digest()
            if first != second:
                yield FieldChange("content", f"sha256:{first.hex()[:12]}", f"sha256:{second.hex()[:12]}")
    if old.target != new.target:
        yield FieldChange("target", _shown(old.target), _shown(new.target))
    if old.device != new.device:
        yield FieldChange("device", ":".join(map(str, old.device)), ":".join(map(str, new.device)))
    # The mode of a symbolic link means nothing.
    if old.mode != new.mode and old.kind != "symlink":
        yield FieldChange("mode", f"{old.mode:04o}", f"{new.mode:04o}")
    if (old.uid, old.gid) != (new.uid, new.gid):
        yield FieldChange("owner", f"{old.uid}:{old.gid}", f"{new.uid}:{new.gid}")
    for name in sorted({*old.attributes, *new.attributes}):
        first, second = old.attributes.get(name, b""), new.attributes.get(name, b"")
        if first != second:
            yield FieldChange(f"xattr {name}", first.hex() or "none", second.hex() or "none")
    if times and old.mtime_s != new.mtime_s:
        yield FieldChange("time", str(old.mtime_s), str(new.mtime_s))


def _link_names(tree: dict[bytes, Node]) -> dict[bytes, bytes]:
    """For each path that is one of several names of a file, the first of them."""
    groups: dict[object, list[bytes]] = {}
    for path, node in tree.items():
        if node.inode is not None and node.kind not in {"directory", "whiteout"}:
            groups.setdefault(node.inode, []).append(path)
    return {path: min(paths) for paths in groups.values() if len(paths) > 1 for path in paths}


def _shown(path: bytes) -> str:
    return os.fsdecode(path)


def read_tar(stream: BinaryIO, *, whiteouts: Literal["apply", "keep"] = "keep") -> dict[bytes, Node]:
    """The tree of one uncompressed tar. Raises: LayerError."""
    tree = Tree()
    tree.apply(stream, whiteouts=whiteouts)
    return tree.flat()
