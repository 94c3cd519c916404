"""What changed: an overlay's upper directory, or a pair of trees, as a stream of changes.

The stream is ordered: by the bytes of names, depth first, a directory before what it holds. Both
walks give the same stream for the same change, since both are one walk with two ways of learning
what is gone. What counts as unchanged follows BuildKit: a directory whose mode, owner and
attributes are the lower's is only mentioned if something within it changed, whatever its time; a
copied-up file that equals the lower one is not mentioned, not even where the copying alone parted it
from other names of the same file.

Nothing is read here but metadata, and the content of files whose metadata alone cannot tell.
`layers.changeset.write_layer` makes the tar. Kernel: Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from layers import lowerview, ownership, xattrs
from layers.errors import LayerError
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.snapshot import Dialect

WHITEOUT_PREFIX = b".wh."
OPAQUE_WHITEOUT = b".wh..wh..opq"

_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HELD_FRAMES = 64  # directories deeper than that are opened again on the way back
_COMPARE_BYTES = 1 << 18
_INDEXED_LOOKUPS = 2000


class Origin(NamedTuple):
    """Where the file of a change lies that is not in the root: `name` in the open directory `fd`.

    `st` is its status when it was listed; the change's own has what the layer is to say of it. Both are good
    until the next change is asked for.
    """

    fd: int
    name: bytes
    st: os.stat_result


class Change(NamedTuple):
    """One path that differs. `path` is relative to the root, without a slash at either end.

    `st` is None for a deletion. `link` is the path of an earlier change that is the same file.
    `xattrs` None means that they were not needed so far.
    """

    kind: Literal["add", "modify", "delete"]
    path: bytes
    st: os.stat_result | None = None
    link: bytes | None = None
    xattrs: dict[str, bytes] | None = None
    origin: Origin | None = None


def diff_overlay(
    upper: Path,
    lower: tuple[Path, ...] | list[Path],
    dialect: Dialect,
    *,
    exclude: frozenset[bytes] = frozenset(),
    warn: Callable[[str], None] | None = None,
) -> Iterator[Change]:
    """What `upper` changes in the merge of `lower` (topmost first; a mounted merge counts as one layer).

    The root itself is never mentioned, nor are paths in `exclude` and what lies beneath them. Names
    in opaque directories are compared with the lower's, so that no opaque mark is needed.
    Raises: LayerError for what a layer cannot say (redirects, metacopy, names like whiteouts, what cannot be read).
    """
    lowers = tuple(os.fsencode(path) for path in lower)
    return _Walk(os.fsencode(upper), dialect, exclude, warn, None, None).run(lowers, full=False)


def diff_trees(
    old: Path | str | None,
    new: Path | str,
    *,
    exclude: frozenset[bytes] = frozenset(),
    warn: Callable[[str], None] | None = None,
    unchanged_before_ns: int | None = None,
) -> Iterator[Change]:
    """What makes `new` out of `old` (None: out of nothing).

    Files of equal metadata count as equal, save where both times have no fraction of a second (as
    after unpacking a layer): then their content is compared. With `unchanged_before_ns`, the time
    when `new` was copied from `old`, the content of just those that were touched since is compared.
    Raises: LayerError.
    """
    lowers = () if old is None else (os.fsencode(old),)
    base = None if old is None else os.fsencode(old)
    return _Walk(os.fsencode(new), None, exclude, warn, base, unchanged_before_ns).run(lowers, full=True)


class _Frame:
    """A directory on the way: what is left of its names, and the merged directories beneath it."""

    __slots__ = ("fd", "full", "holders", "lowers", "names", "next", "path", "pending")

    def __init__(self, path: bytes, fd: int, lowers: tuple[bytes, ...], full: bool) -> None:
        self.path = path
        self.fd = fd
        self.lowers = lowers
        self.full = full
        self.pending = False
        self.next = 0
        names = set(os.listdir(b"/proc/self/fd/%d" % fd))
        if full and lowers:
            names |= lowerview.names(lowers)
        self.names = sorted(names)
        # With many names over many layers, listing each layer once beats looking each name up in each.
        self.holders = lowerview.holders(lowers) if len(names) * len(lowers) > _INDEXED_LOOKUPS else None

    def beneath(self, name: bytes) -> tuple[bytes, ...]:
        """The lower directories in which to look for `name`, topmost first."""
        return self.lowers if self.holders is None else self.holders.get(name, ())


class _Walk:
    """One walk over an upper directory (`dialect` given) or a whole tree (None)."""

    def __init__(
        self,
        root: bytes,
        dialect: Dialect | None,
        exclude: frozenset[bytes],
        warn: Callable[[str], None] | None,
        old_root: bytes | None,
        unchanged_before_ns: int | None,
    ) -> None:
        self._root = root
        self._dialect = dialect
        self._exclude = exclude
        self._warn = warn
        self._old_root = old_root
        self._unchanged_before_ns = unchanged_before_ns
        self._owners = ownership.here()
        self._links: dict[tuple[int, int], bytes] = {}
        self._pending: list[Change] = []
        self._groups: tuple[dict[int, frozenset[bytes]], dict[int, frozenset[bytes]]] | None = None

    def run(self, lowers: tuple[bytes, ...], full: bool) -> Iterator[Change]:
        path = b""
        try:
            stack = [_Frame(b"", lowerview.at(_open_dir, self._root), lowers, full)]
        except OSError as e:
            raise _unreadable(self._root, e) from e
        try:
            while stack:
                frame = stack[-1]
                if frame.next == len(frame.names):
                    stack.pop()
                    if frame.fd != -1:
                        os.close(frame.fd)
                    if frame.pending and self._pending:
                        self._pending.pop()
                    continue
                if frame.fd == -1:
                    frame.fd = lowerview.open_beneath(self._root, frame.path, _OPEN_DIR)
                name = frame.names[frame.next]
                frame.next += 1
                path = frame.path + b"/" + name if frame.path else name
                if path in self._exclude:
                    continue
                found = lowerview.find(frame.beneath(name), name, self._dialect) if frame.lowers else None
                try:
                    st = os.lstat(name, dir_fd=frame.fd)
                except FileNotFoundError:
                    # In a full walk a name may be the lower's alone.
                    st = None
                if self._owners.deviceless:
                    st, found = self._recorded(frame, name, st, found)
                if st is not None and stat.S_ISDIR(st.st_mode):
                    child, change = self._enter(frame, name, path, st, found)
                    stack.append(child)
                    if child.pending:
                        self._pending.append(change)
                    else:
                        yield from self._flush(change)
                    if len(stack) > _HELD_FRAMES:
                        outer = stack[-_HELD_FRAMES - 1]
                        if outer.fd != -1:
                            os.close(outer.fd)
                            outer.fd = -1
                    continue
                changed = self._file(frame, name, path, st, found)
                if changed is not None:
                    yield from self._flush(changed)
        except OSError as e:
            raise _unreadable(path, e) from e
        finally:
            for frame in stack:
                if frame.fd != -1:
                    os.close(frame.fd)

    def _flush(self, change: Change) -> Iterator[Change]:
        """The unchanged directories that lead to a change, once each, then the change."""
        if self._pending:
            # A directory that was mentioned is not popped again when the walk leaves it.
            yield from self._pending
            self._pending.clear()
        yield change

    def _recorded(
        self, frame: _Frame, name: bytes, st: os.stat_result | None, found: lowerview.Found | None
    ) -> tuple[os.stat_result | None, lowerview.Found | None]:
        """Both sides as the image has them, where the disk cannot hold that."""
        if st is not None and self._owners.concerns(st):
            st = self._owners.seen(b"/proc/self/fd/%d/%s" % (frame.fd, name), st)
        if found is not None and self._owners.concerns(found.st):
            low = found.st
            found = found._replace(st=lowerview.at(lambda path: self._owners.seen(path, low), found.path))
        return st, found

    def _enter(
        self, frame: _Frame, name: bytes, path: bytes, st: os.stat_result, found: lowerview.Found | None
    ) -> tuple[_Frame, Change]:
        """A directory: its change, and the frame for what it holds. `pending` tells that it is unchanged itself."""
        refuse_name(name, path)
        fd = os.open(name, _OPEN_DIR, dir_fd=frame.fd)
        try:
            names = xattrs.names_of(fd)
            own = xattrs.pick(fd, names) if names else xattrs.NONE
            full = frame.full
            if names and self._dialect is not None:
                full = self._overlay_marks(fd, names, path) or full
            lowers = found.dirs if found is not None else ()
            child = _Frame(path, fd, lowers, full)
        except BaseException:
            os.close(fd)
            raise
        change = Change("modify" if found is not None else "add", path, st, None, own)
        if found is not None and found.dirs:
            low = found.st
            child.pending = (
                (st.st_mode, st.st_uid, st.st_gid) == (low.st_mode, low.st_uid, low.st_gid)
                and own == lowerview.at(xattrs.load, found.path)
            )  # fmt: skip
        return child, change

    def _overlay_marks(self, fd: int, names: list[str], path: bytes) -> bool:
        """Whether an upper's directory is opaque. Raises: LayerError for a redirect."""
        prefix = f"{self._dialect}.overlay."
        if prefix + "redirect" in names:
            raise LayerError(
                f"{os.fsdecode(path)!r} was renamed by overlayfs's redirect_dir, which layers cannot express",
                hint="mount the overlay with redirect_dir=off",
            )
        if prefix + "protattr" in names:
            self._warned(f"{os.fsdecode(path)!r}: immutable and append-only flags are not kept in layers")
        return prefix + "opaque" in names and xattrs.get(fd, prefix + "opaque") == b"y"

    def _file(
        self, frame: _Frame, name: bytes, path: bytes, st: os.stat_result | None, found: lowerview.Found | None
    ) -> Change | None:
        """Anything but a directory; None if it is unchanged or cannot be kept."""
        gone = st is None
        if st is not None and self._dialect is not None and (st.st_size == 0 or stat.S_ISCHR(st.st_mode)):
            here = b"/proc/self/fd/%d/%s" % (frame.fd, name)
            gone = lowerview.is_whiteout(here, st, frame.fd, self._dialect)
        if st is not None and not gone and stat.S_ISSOCK(st.st_mode):
            self._warned(f"{os.fsdecode(path)!r}: sockets are not kept in layers")
            gone = True
        if gone or st is None:
            if found is None:
                return None
            refuse_name(name, path)
            return Change("delete", path)
        refuse_name(name, path)
        own: dict[str, bytes] | None = None
        if found is not None and not found.dirs:
            own = xattrs.load(b"/proc/self/fd/%d/%s" % (frame.fd, name))
            if self._is_same(frame, name, path, st, own, found):
                return None
        link = None
        if st.st_nlink > 1:
            key = (st.st_dev, st.st_ino)
            link = self._links.get(key)
            if link is None:
                self._links[key] = path
        return Change("modify" if found is not None else "add", path, st, link, own)

    def _is_same(
        self,
        frame: _Frame,
        name: bytes,
        path: bytes,
        st: os.stat_result,
        own: dict[str, bytes],
        found: lowerview.Found,
    ) -> bool:
        """Whether a file equals the lower's in all that a layer keeps."""
        low = found.st
        if (st.st_mode, st.st_uid, st.st_gid, st.st_rdev, st.st_size, st.st_mtime_ns) != (
            low.st_mode, low.st_uid, low.st_gid, low.st_rdev, low.st_size, low.st_mtime_ns,
        ):  # fmt: skip
            return False
        if st.st_nlink > 1 and not self._same_links(path, st, low):
            return False
        if own != lowerview.at(xattrs.load, found.path):
            return False
        here = b"/proc/self/fd/%d/%s" % (frame.fd, name)
        if stat.S_ISLNK(st.st_mode):
            return os.readlink(here) == lowerview.at(os.readlink, found.path)
        if not stat.S_ISREG(st.st_mode) or not st.st_size:
            return True
        if self._dialect is None:
            before = self._unchanged_before_ns
            if before is None:
                if st.st_mtime_ns % 1_000_000_000:
                    return True
            elif st.st_ctime_ns < before:
                return True
        return lowerview.at(lambda p: _equal_content(here, p), found.path)

    def _same_links(self, path: bytes, st: os.stat_result, low: os.stat_result) -> bool:
        """Whether a file of several names had all of them before.

        In an upper directory a second name can only be a new one: overlayfs copies up one name alone.
        """
        if self._old_root is None:
            return False
        if self._groups is None:
            self._groups = (_link_groups(self._root), _link_groups(self._old_root))
        new, old = self._groups
        return new.get(st.st_ino, frozenset({path})) <= old.get(low.st_ino, frozenset({path}))

    def _warned(self, message: str) -> None:
        if self._warn is not None:
            self._warn(message)


def refuse_name(name: bytes, path: bytes) -> None:
    """Raises: LayerError for a name that means something else in a layer."""
    if name.startswith(WHITEOUT_PREFIX):
        raise LayerError(
            f"{os.fsdecode(path)!r} cannot be stored in a layer: the prefix .wh. marks deletions there",
            hint="rename the file, or remove it in the step that makes it",
        )


def _unreadable(path: bytes, error: OSError) -> LayerError:
    return LayerError(f"cannot read {os.fsdecode(path)!r}: {error.strerror}")


def _open_dir(path: bytes) -> int:
    return os.open(path, _OPEN_DIR)


def _link_groups(root: bytes) -> dict[int, frozenset[bytes]]:
    """All paths of each file that has more than one, by inode."""
    groups: dict[int, set[bytes]] = {}
    todo = [b""]
    while todo:
        path = todo.pop()
        fd = lowerview.at(_open_dir, root + b"/" + path if path else root)
        try:
            for name in os.listdir(b"/proc/self/fd/%d" % fd):
                inner = path + b"/" + name if path else name
                st = os.lstat(name, dir_fd=fd)
                if stat.S_ISDIR(st.st_mode):
                    todo.append(inner)
                elif st.st_nlink > 1:
                    groups.setdefault(st.st_ino, set()).add(inner)
        finally:
            os.close(fd)
    return {inode: frozenset(paths) for inode, paths in groups.items()}


def _equal_content(one: bytes, other: bytes) -> bool:
    with open(one, "rb", buffering=0) as a, open(other, "rb", buffering=0) as b:
        while True:
            left, right = a.read(_COMPARE_BYTES), b.read(_COMPARE_BYTES)
            if left != right:
                return False
            if not left:
                return True
