"""What COPY, ADD, WORKDIR and heredoc files do to a tree: BuildKit's file operations, over descriptors.

Both trees are known by a descriptor of their root; `builder.solve.rootpath` keeps every path inside
them. The rules of merging, renaming and replacing are those of BuildKit's fsutil: a directory's
contents go into the target, which is made with mode 0755 or that of `--chmod`; what exists keeps its metadata at the
top and takes the source's below; a file never replaces a directory unless `replace_existing`.
What is copied is decided by `builder.solve.sourcetree`, archives are `builder.solve.unpack`'s.
Called by the solver's copy step. The functions are thread-safe, each call on its own trees.
"""

from __future__ import annotations

import errno
import os
import stat as stat_
import time
from collections.abc import Callable

from builder.errors import ContextError
from builder.solve import filedata, rootpath
from builder.solve.sourcetree import Directory, Matcher, Selection, SourceTree, never_cancelled, split_wildcards
from layers.errors import Cancelled
from layers.values import NamedTuple


class CopyOptions(NamedTuple):
    """How to copy; the defaults are those of a plain `COPY`.

    `mode` is octal or the text of `--chmod`. `include` selects beneath the source (`--parents`),
    `required` are paths that must exist, `mtime_ns` overrides all modification times
    (SOURCE_DATE_EPOCH), `ignore` hides paths of the build context, whose owners `reset_owner`
    turns into 0:0 where `owner` is not given. `replace_existing` lets an entry take the place of
    whatever is in its way (`--link`), `unpack` extracts local archives (ADD).
    """

    owner: tuple[int, int] | None = None
    mode: int | str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    copy_dir_contents: bool = True
    follow_symlinks: bool = True
    allow_wildcard: bool = True
    allow_empty_wildcard: bool = True
    create_dest: bool = True
    replace_existing: bool = False
    unpack: bool = False
    mtime_ns: int | None = None
    ignore: Matcher | None = None
    reset_owner: bool = False


class CopyStats(NamedTuple):
    """What a copy wrote: the number of entries, and the bytes of their regular files."""

    entries: int
    size_bytes: int


def selection(options: CopyOptions) -> Selection | None:
    """What `--parents` and `--exclude` select; None where they are not given. Raises: ContextError."""
    if not options.include and not options.exclude:
        return None
    from builder.frontend.ignorefile import IgnoreMatcher  # only builds with such flags pay for it

    include = IgnoreMatcher.from_patterns(options.include, "--parents") if options.include else None
    exclude = IgnoreMatcher.from_patterns(options.exclude, "--exclude") if options.exclude else None
    heads = tuple(split_wildcards(rootpath.clean(pattern.strip()))[0] for pattern in options.include)
    return Selection(include, exclude, heads)


def resolve_sources(source_fd: int, pattern: str, options: CopyOptions) -> list[str]:
    """The paths that one source of COPY names, in the order in which they are copied.

    Raises: ContextError where it names nothing and must, or a `required` path is not there.
    """
    return resolve_in(SourceTree(source_fd, options.ignore), pattern, options)


def resolve_in(tree: SourceTree, pattern: str, options: CopyOptions) -> list[str]:
    """The same for a tree at hand."""
    for path in options.required:
        if tree.lstat(rootpath.resolve(tree.root_fd, path)) is None:
            raise rootpath.not_found(path)
    found = tree.resolve(pattern, wildcards=options.allow_wildcard, follow=options.follow_symlinks)
    if not found and not options.allow_empty_wildcard:
        raise rootpath.not_found(pattern)
    return found


def copy(
    source_fd: int,
    source: str,
    dest_fd: int,
    dest: str,
    options: CopyOptions,
    *,
    cancelled: Callable[[], bool] = never_cancelled,
) -> CopyStats:
    """Copy what `source` names in one tree to `dest` in another.

    A trailing slash of `dest` says that it is a directory. `cancelled` is asked once a directory.
    Not atomic: after an error the destination is unspecified, and to be thrown away.
    Raises: ContextError; Cancelled.
    """
    tree = SourceTree(source_fd, options.ignore)
    if not options.create_dest:
        parent = os.path.dirname(rootpath.resolve(dest_fd, dest))
        if rootpath.lstat(dest_fd, parent) is None:
            raise ContextError(f"{rootpath.shown(dest)}: its directory does not exist")
    entries = size = 0
    for path in resolve_in(tree, source, options):
        if cancelled():
            raise Cancelled
        if options.unpack:
            from builder.solve import unpack  # ADD alone needs it

            unpacked = unpack.unpack(tree, path, dest_fd, dest, options, cancelled=cancelled)
            if unpacked is not None:
                entries += unpacked.entries
                size += unpacked.size_bytes
                continue
        copier = _Copier(tree, dest_fd, options, cancelled)
        copier.copy(path, dest)
        entries += copier.entries
        size += copier.size_bytes
    return CopyStats(entries, size)


def copy_data(dest_fd: int, name: str, data: bytes, dest: str, options: CopyOptions) -> CopyStats:
    """Copy an inline document: as `copy` would a file `name` of mode 0644 that holds `data`. Raises: ContextError."""
    copier = _Copier(SourceTree(dest_fd), dest_fd, options, never_cancelled)
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
        _stamp(root_fd, created, mtime_ns)
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
                    os.fchown(fd, *owner)
                os.fchmod(fd, mode)
                if mtime_ns is not None:
                    os.utime(fd, ns=(mtime_ns, mtime_ns))
            finally:
                os.close(fd)
        finally:
            os.close(parent)
    except OSError as e:
        raise ContextError(f"cannot write {rootpath.shown(path)}: {e.strerror}") from e


def _stamp(root_fd: int, created: list[str], mtime_ns: int | None) -> None:
    """Give directories their time, children first, since making a child changed its parent's."""
    if mtime_ns is None:
        return
    for path in reversed(created):
        fd = rootpath.open_directory(root_fd, path)
        try:
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(fd)


class _Target:
    """A directory of the destination. `fd` is None until something is to be put into it."""

    __slots__ = ("created", "fd", "plain")

    def __init__(self) -> None:
        self.fd: int | None = None
        self.created = False
        self.plain = False


class _Copier:
    """One source path on its way; hard links are kept among what it holds."""

    def __init__(self, tree: SourceTree, dest_fd: int, options: CopyOptions, cancelled: Callable[[], bool]) -> None:
        self.tree = tree
        self.dest_fd = dest_fd
        self.options = options
        self.cancelled = cancelled
        self.entries = 0
        self.size_bytes = 0
        self.owner = options.owner or ((0, 0) if options.reset_owner else None)
        self.chmod = chmod_function(options.mode)
        self.links: dict[tuple[int, int], str] = {}
        self.made: list[str] = []
        self.targets: list[_Target] = []
        self.top = ""
        self.data = filedata.DataCopier()
        self.umask = filedata.current_umask()
        self.ids = (os.geteuid(), os.getegid())

    # The top: where the copy goes

    def copy(self, source: str, dest: str) -> None:
        followed = rootpath.resolve(self.tree.root_fd, source, follow_last=self.options.follow_symlinks)
        status = self.tree.lstat(followed)
        if status is None:
            raise rootpath.not_found(source)
        try:
            target = self._prepare(os.path.basename(source), status, dest)
            if stat_.S_ISDIR(status.st_mode):
                self._copy_tree(followed, target)
            else:
                self._copy_single(followed, status, target)
            _stamp(self.dest_fd, self.made, self.options.mtime_ns)
        except OSError as e:
            raise ContextError(f"cannot copy {rootpath.shown(source)} to {rootpath.shown(dest)}: {e.strerror}") from e

    def _make(self, path: str) -> None:
        """Make the directories that lead to the target. A numeric `--chmod` is for them too, as BuildKit has it."""
        mode = self.options.mode
        if isinstance(mode, str):
            mode = int(mode, 8) if mode.isdigit() else None
        bits = 0o755 if mode is None else mode & 0o777
        rootpath.make_directories(self.dest_fd, path, bits, self.options.owner, created=self.made)

    def _prepare(self, basename: str, status: os.stat_result, dest: str) -> str:
        """Make the directories that the target needs; its canonical path."""
        head, last = os.path.split(dest)
        self._make(rootpath.resolve(self.dest_fd, head if last not in ("", ".") else dest))
        target = rootpath.resolve(self.dest_fd, dest)
        existing = rootpath.lstat(self.dest_fd, target)
        is_directory = stat_.S_ISDIR(status.st_mode)
        contents = is_directory and self.options.copy_dir_contents
        if existing is not None and not contents and (is_directory or stat_.S_ISDIR(existing.st_mode)):
            target = rootpath.clean(f"{target}/{basename}")
        if contents and existing is None:
            self._make(target)
        else:
            self._make(os.path.dirname(target))
        return target

    def copy_data(self, name: str, data: bytes, dest: str) -> None:
        now = time.time_ns()
        # mode, inode, device, links, uid, gid, size, atime, mtime, ctime
        fields = (stat_.S_IFREG | 0o644, 0, 0, 1, 0, 0, len(data), *[now // 1_000_000_000] * 3)
        status = os.stat_result(fields, {"st_atime_ns": now, "st_mtime_ns": now, "st_ctime_ns": now})

        def fill(fd: int) -> int:
            filedata.write_all(fd, data)
            return len(data)

        def put(into: _Target, target: str) -> None:
            try:
                self._create(into, target, status, fill)
            except FileExistsError:
                self._clear(into, target, "")
                self._create(into, target, status, fill)

        self.entries += 1
        try:
            self._in_parent(self._prepare(os.path.basename(name), status, dest), put)
            _stamp(self.dest_fd, self.made, self.options.mtime_ns)
        except OSError as e:
            raise ContextError(f"cannot write {rootpath.shown(dest)}: {e.strerror}") from e

    def _copy_single(self, source: str, status: os.stat_result, target: str) -> None:
        directory, name = os.path.split(source)
        source_parent = rootpath.open_directory(self.tree.root_fd, directory)
        try:
            self._in_parent(target, lambda into, base: self._put(source_parent, name, into, base, status, ""))
        finally:
            os.close(source_parent)

    def _in_parent(self, target: str, put: Callable[[_Target, str], None]) -> None:
        """Call `put` with the open directory that holds canonical `target`, and the name in it."""
        self.top, name = os.path.split(target)
        if not name:
            raise ContextError("cannot replace directory / with a file")
        into = _Target()
        into.fd = rootpath.open_directory(self.dest_fd, self.top)
        try:
            into.plain = filedata.is_plain(into.fd)
            put(into, name)
        finally:
            os.close(into.fd)

    # Below the top: directory by directory

    def _copy_tree(self, source: str, target: str) -> None:
        self.top = target
        walk = self.tree.walk(source, selection(self.options), cancelled=self.cancelled)
        try:
            for directory, leaving in walk:
                if leaving:
                    self._leave(directory)
                else:
                    self._enter(directory)
        finally:
            walk.close()
            for target_directory in self.targets:
                if target_directory.fd is not None:
                    os.close(target_directory.fd)
            self.targets.clear()

    def _enter(self, directory: Directory) -> None:
        into = _Target()
        self.targets.append(into)
        if directory.parent is None:
            self._open_top(directory, into)
        elif directory.included:
            self._ensure(directory)
        if not directory.entries:
            return
        if into.fd is None:
            self._ensure(directory)
        prefix = f"{directory.path}/" if directory.path else ""
        for name, status in directory.entries:
            try:
                self._put(directory.fd, name, into, name, status, prefix)
            except OSError as e:
                raise self._failed(f"{prefix}{name}", e) from e

    def _failed(self, path: str, error: OSError) -> ContextError:
        return ContextError(f"cannot copy to {rootpath.shown(f'{self.top}/{path}')}: {error.strerror}")

    def _open_top(self, directory: Directory, into: _Target) -> None:
        """Open the target of the walk's top, or make it; one that is already there keeps its metadata."""
        parent, name = os.path.split(self.top)
        if name:
            parent_fd = rootpath.open_directory(self.dest_fd, parent)
            try:
                self._open_target(parent_fd, name, directory, into)
            finally:
                os.close(parent_fd)
        else:
            into.fd = rootpath.open_directory(self.dest_fd, "")
            into.plain = filedata.is_plain(into.fd)

    def _ensure(self, directory: Directory) -> None:
        """Open, or make, the target of `directory` and of those above it that were not needed so far."""
        chain: list[Directory] = []
        here: Directory | None = directory
        depth = len(self.targets) - 1
        while here is not None and self.targets[depth - len(chain)].fd is None:
            chain.append(here)
            here = here.parent
        for index, item in enumerate(reversed(chain)):
            level = depth - len(chain) + 1 + index
            parent_fd = self.targets[level - 1].fd
            assert parent_fd is not None
            try:
                self._open_target(parent_fd, item.name, item, self.targets[level])
            except OSError as e:
                raise self._failed(item.path, e) from e

    def _open_target(self, parent_fd: int, name: str, directory: Directory, into: _Target) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent_fd)
            into.created = True
            self.entries += 1
        except FileExistsError:
            status = os.lstat(name, dir_fd=parent_fd)
            if not stat_.S_ISDIR(status.st_mode):
                if not self.options.replace_existing:
                    shown = rootpath.shown(f"{self.top}/{directory.path}")
                    raise ContextError(
                        f"cannot copy to non-directory: {shown[1:-1]}",
                        hint="a file or symlink of the image is where the source has a directory",
                    ) from None
                os.unlink(name, dir_fd=parent_fd)
                os.mkdir(name, 0o700, dir_fd=parent_fd)
                into.created = True
                self.entries += 1
        into.fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_fd)
        into.plain = filedata.is_plain(into.fd)
        if not into.created and directory.parent is not None and not directory.included:
            # A parent made for what is below it: of one that exists, only the mode is taken over.
            os.fchmod(into.fd, stat_.S_IMODE(directory.stat.st_mode))

    def _leave(self, directory: Directory) -> None:
        into = self.targets.pop()
        if into.fd is None:
            return
        try:
            if into.created or (directory.included and directory.parent is not None):
                status = directory.stat
                os.fchown(into.fd, *(self.owner or (status.st_uid, status.st_gid)))
                os.fchmod(into.fd, self._mode(status))
                filedata.copy_xattrs(directory.fd, into.fd)
            if into.created or directory.included:
                self._time(into.fd, directory.stat)
        except OSError as e:
            raise self._failed(directory.path, e) from e
        finally:
            os.close(into.fd)

    # One entry

    def _mode(self, status: os.stat_result) -> int:
        mode = status.st_mode
        return self.chmod(mode, stat_.S_ISDIR(mode)) if self.chmod is not None else stat_.S_IMODE(mode)

    def _time(self, fd: int, status: os.stat_result) -> None:
        stamp = self.options.mtime_ns
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns) if stamp is None else (stamp, stamp))

    def _put(self, source_fd: int, name: str, into: _Target, target: str, status: os.stat_result, prefix: str) -> None:
        """Copy one non-directory to `target` in the directory `into`, in place of a file that is there."""
        self.entries += 1
        regular = stat_.S_ISREG(status.st_mode)
        if regular and status.st_nlink > 1:
            key = (status.st_dev, status.st_ino)
            first = self.links.get(key)
            if first is not None:
                self._link(first, into, target)
                return
            self.links[key] = f"{self.top}/{prefix}{target}"
        try:
            if regular:
                self._put_file(source_fd, name, into, target, status)
            else:
                self._put_special(source_fd, name, into, target, status)
        except FileExistsError:
            self._clear(into, target, prefix)
            if regular:
                self._put_file(source_fd, name, into, target, status)
            else:
                self._put_special(source_fd, name, into, target, status)

    def _link(self, first: str, into: _Target, target: str) -> None:
        directory, name = os.path.split(first)
        fd = rootpath.open_directory(self.dest_fd, directory)
        try:
            try:
                os.link(name, target, src_dir_fd=fd, dst_dir_fd=into.fd, follow_symlinks=False)
            except FileExistsError:
                self._clear(into, target, "")
                os.link(name, target, src_dir_fd=fd, dst_dir_fd=into.fd, follow_symlinks=False)
        finally:
            os.close(fd)

    def _clear(self, into: _Target, target: str, prefix: str) -> None:
        """Remove what is in the way. Raises: ContextError where that is a directory that has to stay."""
        try:
            os.unlink(target, dir_fd=into.fd)
        except OSError as e:
            if e.errno not in (errno.EISDIR, errno.EPERM):
                raise
            if not self.options.replace_existing:
                shown = rootpath.shown(f"{self.top}/{prefix}{target}")
                raise ContextError(f"cannot replace to directory {shown[1:-1]} with file") from None
            import shutil

            shutil.rmtree(target, dir_fd=into.fd)

    def _put_file(self, source_fd: int, name: str, into: _Target, target: str, status: os.stat_result) -> None:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=source_fd)
        try:

            def fill(out: int) -> int:
                size = self.data.copy(fd, out, status)
                filedata.copy_xattrs(fd, out)
                return size

            self._create(into, target, status, fill)
        finally:
            os.close(fd)

    def _create(self, into: _Target, target: str, status: os.stat_result, fill: Callable[[int], int]) -> None:
        """Make a regular file of the metadata of `status`, its data written by `fill`."""
        mode = self._mode(status)
        # What the kernel gives a new file anyhow is not set again: each call is a journal entry.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        out = os.open(target, flags, mode & 0o777, dir_fd=into.fd)
        try:
            owner = self.owner or (status.st_uid, status.st_gid)
            if owner != self.ids or not into.plain:
                os.fchown(out, *owner)
            self.size_bytes += fill(out)
            # After the data: writing to it takes the set-id bits off a file.
            if owner != self.ids or not into.plain or mode & (self.umask | 0o7000):
                os.fchmod(out, mode)
            self._time(out, status)
        finally:
            os.close(out)

    def _put_special(self, source_fd: int, name: str, into: _Target, target: str, status: os.stat_result) -> None:
        """A symlink, device, fifo or socket. Sockets of a build context are left out: nobody listens."""
        assert into.fd is not None
        if stat_.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source_fd), target, dir_fd=into.fd)
        elif stat_.S_ISSOCK(status.st_mode) and self.options.reset_owner:
            self.entries -= 1
            return
        else:
            os.mknod(target, status.st_mode, status.st_rdev, dir_fd=into.fd)
        uid, gid = self.owner or (status.st_uid, status.st_gid)
        os.chown(target, uid, gid, dir_fd=into.fd, follow_symlinks=False)
        if not stat_.S_ISLNK(status.st_mode):
            os.chmod(target, self._mode(status), dir_fd=into.fd)
        filedata.copy_link_xattrs(source_fd, name, into.fd, target)
        stamp = self.options.mtime_ns
        times = (status.st_atime_ns, status.st_mtime_ns) if stamp is None else (stamp, stamp)
        os.utime(target, ns=times, dir_fd=into.fd, follow_symlinks=False)


def chmod_function(mode: int | str | None) -> Callable[[int, bool], int] | None:
    """The function that gives an entry (mode, is a directory) its permission bits; None keeps the source's.

    Raises: ContextError.
    """
    if mode is None:
        return None
    if isinstance(mode, int):
        return lambda _mode, _is_directory: mode
    from builder.frontend.filemode import parse_mode

    try:
        parsed = parse_mode(mode)
    except ValueError as e:
        raise ContextError(str(e)) from e
    return lambda old, is_directory: parsed.apply(old, is_directory=is_directory)
