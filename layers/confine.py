"""The directory that a layer is unpacked into: names are resolved inside it and nowhere else.

Directories are reached by descriptor: openat2(2) without symlinks where a path is plain, which is
nearly always, else one component after the other, symlinks followed by hand with the target as
their root, as in a chroot. Open directories are cached, so that a file costs no path walk.

With lower layers beneath (overlay mode) a name is resolved in the merged view, and directories that
the layer does not mention are made with the lower one's metadata, as overlayfs's copy-up would.
Callers: `layers.apply`. Not thread-safe; nobody else writes to the target meanwhile.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict

from layers import linux, lowerview, ownership, xattrs
from layers.errors import LayerError
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.snapshot import Dialect

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PLAIN = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS
_CACHED_DIRS = 96
_MAX_SYMLINKS = 40  # as the kernel has it
_STEP_BYTES = 4000
MAX_NAME_BYTES = 8 << 10
"""Longer paths are refused: no tool could have made them, and each component costs an inode."""


class Metadata(NamedTuple):
    """What a directory is given at the end, when nothing is written into it any more."""

    path: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: dict[str, bytes]
    implicit: bool


class Directory:
    """An open directory of the target. `names` are those that this layer made in it, where that is tracked."""

    __slots__ = ("default_acl", "fd", "gid", "key", "names", "path")

    def __init__(self, path: bytes, fd: int, names: dict[tuple[int, int], set[bytes]], new_gid: int) -> None:
        st = os.fstat(fd)
        self.path = path
        self.fd = fd
        self.key = (st.st_dev, st.st_ino)
        self.names = names.get(self.key)
        # Whom files made here belong to: with setgid, the directory's group.
        self.gid = st.st_gid if st.st_mode & stat.S_ISGID else new_gid
        self.default_acl = xattrs.get(fd, xattrs.ACL_DEFAULT) is not None


class ConfinedTree:
    """See the module. `track` keeps the names that the layer makes, for whiteouts that spare them."""

    def __init__(
        self, target: bytes, *, overlay: bool, dialect: Dialect, lower: tuple[bytes, ...], track: bool, gid: int
    ) -> None:
        self.root_fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.overlay = overlay
        self.dialect = dialect
        self._root = b"/proc/self/fd/%d" % self.root_fd
        self.lower = lower
        self._track = track
        self._gid = gid
        self._names: dict[tuple[int, int], set[bytes]] = {}
        self._cache: OrderedDict[bytes, Directory] = OrderedDict()
        self._current: Directory | None = None
        self._openat2 = True
        self.metadata: dict[tuple[int, int], Metadata] = {}
        self.implicit = 0
        # Directories that this layer put something into, where that is tracked.
        self.written: set[bytes] = set()
        # Where symlinks were followed: if one is replaced, cached directories may be others.
        self.followed: set[bytes] = set()

    def close(self) -> None:
        """Close every descriptor."""
        self._current = None
        self.forget()
        os.close(self.root_fd)

    def full_path(self, path: bytes) -> bytes:
        """A path for system calls without a dirfd; its components must be known to be directories."""
        return self._root + b"/" + (path or b".")

    # -- directories -----------------------------------------------------------------------------

    def enter(self, path: bytes) -> Directory:
        """As `directory`; its descriptor stays open until the next call, whatever is removed or opened."""
        self._current = self.directory(path)
        return self._current

    def enter_to_write(self, path: bytes) -> Directory:
        """As `enter`, for what the layer puts there: its directories are this layer's from now on."""
        directory = self.enter(path)
        if self._track:
            real = directory.path
            while real and real not in self.written:
                self.written.add(real)
                real = real.rpartition(b"/")[0]
        return directory

    def directory(self, path: bytes) -> Directory:
        """The directory that the layer calls `path`, made if it is missing.

        Raises: LayerError if a component is no directory, OSError.
        """
        found = self._cache.get(path)
        if found is not None:
            self._cache.move_to_end(path)
            return found
        fd = self._open_plain(path)
        real = path
        if fd == -1:
            real = self.resolve(path)
            if real != path:
                return self._remember(path, self._open_made(real), real)
            return self._remember(path, self._open_made(path), path)
        return self._remember(path, fd, real)

    def child(self, parent: Directory, name: bytes, *, made: bool) -> Directory:
        """The directory just found or `made` as `name` in `parent`."""
        path = parent.path + b"/" + name if parent.path else name
        fd = os.open(name, _OPEN, dir_fd=parent.fd)
        if made:
            self._new(fd)
        return self._remember(path, fd, path)

    def _new(self, fd: int) -> None:
        """A directory was made: what is known of an earlier one of its inode number does not hold."""
        st = os.fstat(fd)
        self._names.pop((st.st_dev, st.st_ino), None)
        self.metadata.pop((st.st_dev, st.st_ino), None)

    def _remember(self, alias: bytes, fd: int, real: bytes) -> Directory:
        try:
            directory = Directory(real, fd, self._names, self._gid)
        except BaseException:
            os.close(fd)
            raise
        if self._track and directory.names is None:
            directory.names = self._names[directory.key] = set()
        known = self._cache.get(alias)
        if known is not None:
            # Made again under its name; whoever holds the old one is `_current` at most.
            del self._cache[alias]
            self._close(known)
        self._cache[alias] = directory
        if len(self._cache) > _CACHED_DIRS:
            oldest, evicted = self._cache.popitem(last=False)
            if evicted is self._current:
                self._cache[oldest] = evicted
                _, evicted = self._cache.popitem(last=False)
            self._close(evicted)
        return directory

    def _close(self, directory: Directory) -> None:
        if directory is not self._current:
            os.close(directory.fd)

    def forget(self) -> None:
        """Drop cached directories: one of them may be gone or be another now."""
        self.followed.clear()
        current = self._current
        for directory in self._cache.values():
            if directory is not current:
                os.close(directory.fd)
        self._cache.clear()
        if current is not None:
            self._cache[current.path] = current

    def open_existing(self, path: bytes) -> int:
        """Open a directory that `Metadata` names; -1 if it is gone."""
        return self._open_plain(path)

    def _open_plain(self, path: bytes) -> int:
        """Open a directory of the target whose path is free of symlinks; -1 if it is not such a one."""
        if not path:
            return os.open(b".", _OPEN, dir_fd=self.root_fd)
        if not self._openat2 or len(path) >= _STEP_BYTES:
            return self._open_steps(path)
        try:
            return linux.openat2(self.root_fd, path, _OPEN, 0, _PLAIN)
        except OSError as e:
            if e.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV}:
                return -1
            if e.errno in {errno.ENOSYS, errno.EPERM}:
                # Before Linux 5.6, or behind a seccomp filter that does not know it.
                self._openat2 = False
                return self._open_steps(path)
            raise

    def _open_steps(self, path: bytes) -> int:
        """As `_open_plain`, one component after the other."""
        fd = os.open(b".", _OPEN, dir_fd=self.root_fd)
        for name in path.split(b"/"):
            try:
                deeper = os.open(name, _OPEN, dir_fd=fd)
            except OSError as e:
                if e.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
                    return -1
                raise
            finally:
                os.close(fd)
            fd = deeper
        return fd

    # -- resolution ------------------------------------------------------------------------------

    def resolve(self, path: bytes) -> bytes:
        """The symlink-free path of a directory in the merged view; what does not exist is left as it is named.

        Raises: LayerError if a component is there and no directory, or for a loop of symlinks.
        """
        todo = path.split(b"/")
        todo.reverse()
        real: list[bytes] = []
        lowers: list[tuple[bytes, ...]] = [self.lower]
        links = 0
        missing = 0  # how many of the last components do not exist: nothing is in them
        while todo:
            name = todo.pop()
            if name in {b"", b"."}:
                continue
            if name == b"..":
                if real:
                    real.pop()
                    lowers.pop()
                    missing -= missing > 0
                continue
            if missing:
                real.append(name)
                lowers.append(())
                missing += 1
                continue
            here, found = self._look(b"/".join(real), name, lowers[-1])
            if here is None:
                real.append(name)
                lowers.append(())
                missing = 1
            elif stat.S_ISDIR(here.st_mode):
                real.append(name)
                lowers.append(found.dirs if found is not None else ())
            elif stat.S_ISLNK(here.st_mode):
                links += 1
                if links > _MAX_SYMLINKS:
                    raise LayerError(f"too many symbolic links in {os.fsdecode(path)!r}")
                self.followed.add(b"/".join([*real, name]))
                link = lowerview.at(
                    os.readlink, found.path if found is not None else self.full_path(b"/".join([*real, name]))
                )
                if link.startswith(b"/"):
                    real.clear()
                    del lowers[1:]
                todo.extend(reversed(link.split(b"/")))
            else:
                raise LayerError(
                    f"{os.fsdecode(b'/'.join([*real, name]))!r} is not a directory, but the layer puts"
                    f" {os.fsdecode(path)!r} there"
                )
            if sum(map(len, real)) + len(real) > MAX_NAME_BYTES or len(todo) > MAX_NAME_BYTES:
                raise LayerError(f"the path {os.fsdecode(path[:200])!r} resolves to an absurd length")
        return b"/".join(real)

    def _look(
        self, parent: bytes, name: bytes, lowers: tuple[bytes, ...]
    ) -> tuple[os.stat_result | None, lowerview.Found | None]:
        """One name in the merged view: its status, and what the lower layers show there, unless the target hides it.

        For a directory of the target, `found.dirs` are what is merged beneath it.
        """
        path = self.full_path(parent + b"/" + name if parent else name)
        st = lowerview.lstat(path)
        if st is None:
            if not lowers or self._opaque(parent):
                return None, None
            found = lowerview.find(lowers, name, self.dialect)
            return (found.st, found) if found is not None else (None, None)
        if self.overlay and stat.S_ISCHR(st.st_mode) and st.st_rdev == 0:
            return None, None
        if stat.S_ISDIR(st.st_mode) and lowers and not self._opaque(parent):
            found = lowerview.find(lowers, name, self.dialect)
            if found is not None and found.dirs and not lowerview.is_opaque(path, self.dialect):
                return st, found
        return st, None

    def _opaque(self, path: bytes) -> bool:
        """Whether a directory of the target, if it is there, hides the lower ones."""
        if not path:
            return False
        full = self.full_path(path)
        return lowerview.lstat(full) is not None and lowerview.is_opaque(full, self.dialect)

    def beneath(self, path: bytes) -> lowerview.Found | None:
        """What the layers beneath show at a resolved path, unless this layer hides the directory it is in."""
        parent, _, name = path.rpartition(b"/")
        lowers = self.lower
        walked = b""
        for component in parent.split(b"/") if parent else ():
            st, found = self._look(walked, component, lowers)
            if st is None or found is None:
                return None
            lowers = found.dirs
            walked = walked + b"/" + component if walked else component
        if not lowers or self._opaque(parent):
            return None
        return lowerview.find(lowers, name, self.dialect)

    def holds(self, path: bytes) -> bool:
        """Whether the layer's `path` is a directory in the merged view. Raises: LayerError, as `directory` does."""
        if path in self._cache:
            return True
        fd = self._open_plain(path)
        if fd != -1:
            os.close(fd)
            return True
        real = self.resolve(path)
        if not real:
            return True
        st = lowerview.lstat(self.full_path(real))
        if st is None:
            found = self.beneath(real) if self.overlay else None
            return found is not None and bool(found.dirs)
        return stat.S_ISDIR(st.st_mode)

    # -- making and removing ---------------------------------------------------------------------

    def _open_made(self, path: bytes) -> int:
        """Open a resolved directory, making what is missing of it with the lower layers' metadata."""
        walked = b""
        lowers = self.lower
        fd = os.open(b".", _OPEN, dir_fd=self.root_fd)
        try:
            for name in path.split(b"/") if path else ():
                found = self._look(walked, name, lowers)[1] if lowers else None
                walked = walked + b"/" + name if walked else name
                lowers = found.dirs if found is not None else ()
                try:
                    deeper = os.open(name, _OPEN, dir_fd=fd)
                except FileNotFoundError:
                    self.implicit += 1
                    os.mkdir(name, 0o755, dir_fd=fd)
                    deeper = os.open(name, _OPEN, dir_fd=fd)
                    self._new(deeper)
                    self._made_implicitly(walked, deeper, found)
                except NotADirectoryError:
                    st = os.lstat(name, dir_fd=fd)
                    if not self.overlay or not stat.S_ISCHR(st.st_mode) or st.st_rdev:
                        raise
                    # A whiteout of this very layer: what comes now is new.
                    self.implicit += 1
                    os.unlink(name, dir_fd=fd)
                    os.mkdir(name, 0o755, dir_fd=fd)
                    deeper = os.open(name, _OPEN, dir_fd=fd)
                    self._new(deeper)
                    self.set_opaque(deeper)
                os.close(fd)
                fd = deeper
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _made_implicitly(self, path: bytes, fd: int, found: lowerview.Found | None) -> None:
        if found is None:
            if not self.overlay:
                return
            os.fchmod(fd, 0o755)
            return
        st = lowerview.at(lambda p: ownership.here().seen(p, found.st), found.path)
        key = os.fstat(fd)
        self.metadata[key.st_dev, key.st_ino] = Metadata(
            path, st.st_mode & 0o7777, st.st_uid, st.st_gid, st.st_mtime_ns, lowerview.at(xattrs.load, found.path), True
        )

    def set_opaque(self, fd: int) -> None:
        """Mark a directory so that nothing beneath it shows through."""
        os.setxattr(fd, f"{self.dialect}.overlay.opaque", b"y")

    def remove(self, directory: Directory, name: bytes, st: os.stat_result) -> None:
        """Remove a file or a whole tree."""
        if stat.S_ISDIR(st.st_mode):
            self._remove_whole(directory.path + b"/" + name if directory.path else name)
            self.forget()
        else:
            os.unlink(name, dir_fd=directory.fd)

    def _remove_whole(self, path: bytes) -> None:
        from layers.trees import remove_tree

        lowerview.at(remove_tree, self.full_path(path))

    def empty(self, path: bytes) -> None:
        """Remove from a resolved directory what this layer did not put there."""
        todo = [path]
        while todo:
            path = todo.pop()
            fd = lowerview.at(_open_dir, self.full_path(path))
            try:
                st = os.fstat(fd)
                kept = self._names.get((st.st_dev, st.st_ino), set())
                for name in os.listdir(b"/proc/self/fd/%d" % fd):
                    inner = path + b"/" + name if path else name
                    if not stat.S_ISDIR(os.lstat(name, dir_fd=fd).st_mode):
                        if name not in kept:
                            os.unlink(name, dir_fd=fd)
                    elif name in kept or inner in self.written:
                        todo.append(inner)
                    else:
                        self._remove_whole(inner)
            finally:
                os.close(fd)
        self.forget()


def _open_dir(path: bytes) -> int:
    return os.open(path, _OPEN)
