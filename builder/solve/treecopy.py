"""One source path on its way from one tree into another.

The rules of merging, renaming and replacing are those of BuildKit's fsutil: a directory's contents
go into the target, which is made with mode 0755 or that of `--chmod`; what exists keeps its
metadata at the top and takes the source's below; a file never replaces a directory unless
`replace_existing`. What is copied is decided by `builder.solve.sourcetree`.
"""

from __future__ import annotations

import errno
import os
import stat as stat_
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from builder.errors import ContextError
from builder.solve import filedata, rootpath
from builder.solve.copyoptions import CopyOptions, chmod_function, selection
from builder.solve.crew import Crew
from builder.solve.sourcetree import Directory, SourceTree
from layers import ownership

if TYPE_CHECKING:
    from builder.solve.treepack import LeftOut

# Files that a task takes: enough to be worth handing over, few enough for a directory to be shared out.
_TASK_FILES_MIN = 4
_TASK_FILES_MAX = 64


class _Target:
    """A directory of the destination. `fd` is None until something is to be put into it.

    `pending` counts the tasks that still put files into it; `left` is set when the walk has left
    the directory before they were done: who does the last one then finishes it. `direct`: `fd` is
    beneath the overlay, see `TreeCopier`.
    """

    __slots__ = ("created", "direct", "fd", "left", "pending", "plain")

    def __init__(self) -> None:
        self.fd: int | None = None
        self.created = False
        self.direct = False
        self.plain = False
        self.pending = 0
        self.left: tuple[int, Directory] | None = None

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class _Batch:
    """Some plain files of one directory, copied by whoever has the time."""

    def __init__(
        self,
        copier: TreeCopier,
        directory: Directory,
        into: _Target,
        files: list[tuple[str, os.stat_result]],
        prefix: str,
    ) -> None:
        self._copier = copier
        self._source_fd = os.dup(directory.fd)
        self._into = into
        self._files = files
        self._prefix = prefix

    def run(self) -> None:
        try:
            self._copier.put_files(self._source_fd, self._into, self._files, self._prefix)
        except BaseException:
            self.drop()
            raise
        os.close(self._source_fd)
        self._copier.batch_done(self._into, finish=True)

    def drop(self) -> None:
        os.close(self._source_fd)
        self._copier.batch_done(self._into, finish=False)


class TreeCopier:
    """One source path on its way; hard links are kept among what it holds.

    `upper_fd` is the upper directory of the overlay that `dest_fd` shows, if it is one. What goes into
    directories that are new in it is written there directly: through overlayfs a file costs half as much
    again. New directories hide all beneath them, so that nothing there has to be marked; but nobody may
    look into them through this mount any more. With `left_out` nothing is written there at all.
    """

    def __init__(
        self,
        tree: SourceTree,
        dest_fd: int,
        options: CopyOptions,
        cancelled: Callable[[], bool],
        upper_fd: int | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        self.tree = tree
        self.dest_fd = dest_fd
        self.upper_fd = upper_fd
        self.left_out = left_out
        self.source = ""
        self.options = options
        self.cancelled = cancelled
        self.entries = 0
        self.size_bytes = 0
        self.owner = options.owner or ((0, 0) if options.reset_owner else None)
        self.chmod = chmod_function(options.mode)
        self.links: dict[tuple[int, int], str] = {}
        self.made: list[str] = []
        self.top_is_new = False
        self.targets: list[_Target] = []
        self.top = ""
        self.data = filedata.DataCopier()
        self.umask = filedata.current_umask()
        self.ids = (os.geteuid(), os.getegid())
        self.crew = Crew()
        self.lock = threading.Lock()

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
            rootpath.stamp(self.dest_fd, self.made, self.options.mtime_ns)
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
            self.top_is_new = True
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
            self.size_bytes += self._create(into, target, status, fill, "")

        self.entries += 1
        try:
            self._in_parent(self._prepare(os.path.basename(name), status, dest), put)
            rootpath.stamp(self.dest_fd, self.made, self.options.mtime_ns)
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
        self.source, self.top = source, target
        selected = selection(self.options)
        if selected is not None:
            self.left_out = None  # a directory's contents then depend on where the walk began
        walk = self.tree.walk(source, selected, cancelled=self.cancelled)
        try:
            with self.crew:
                for directory, leaving in walk:
                    if leaving:
                        self._leave(directory)
                    else:
                        self._enter(directory)
        finally:
            walk.close()
            for target_directory in self.targets:
                target_directory.close()
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
        files = [item for item in directory.entries if item[1].st_nlink == 1 and stat_.S_ISREG(item[1].st_mode)]
        if len(files) < len(directory.entries):
            # Of hard links the first has to be there before the others: they are not handed out.
            rest = [item for item in directory.entries if item[1].st_nlink != 1 or not stat_.S_ISREG(item[1].st_mode)]
            self._put_all(directory.fd, into, rest, prefix)
        if len(files) < _TASK_FILES_MIN:
            self._put_all(directory.fd, into, files, prefix)
            return
        for start in range(0, len(files), _TASK_FILES_MAX):
            with self.lock:
                into.pending += 1
            self.crew.submit(_Batch(self, directory, into, files[start : start + _TASK_FILES_MAX], prefix))

    def _put_all(self, source_fd: int, into: _Target, entries: list[tuple[str, os.stat_result]], prefix: str) -> None:
        for name, status in entries:
            try:
                self._put(source_fd, name, into, name, status, prefix)
            except OSError as e:
                raise self._failed(f"{prefix}{name}", e) from e

    def put_files(self, source_fd: int, into: _Target, files: list[tuple[str, os.stat_result]], prefix: str) -> None:
        """Copy plain files into an open directory; called from any thread. Raises: ContextError."""
        size = 0
        for name, status in files:
            try:
                size += self._put_file(source_fd, name, into, name, status, prefix)
            except OSError as e:
                raise self._failed(f"{prefix}{name}", e) from e
        with self.lock:
            self.entries += len(files)
            self.size_bytes += size

    def batch_done(self, into: _Target, *, finish: bool) -> None:
        """Note that a batch is no more; finish the directory, or but close it, if it was the last to wait for."""
        with self.lock:
            into.pending -= 1
            left = into.left if into.pending == 0 else None
        if left is not None:
            source_fd, directory = left
            try:
                if finish:
                    self._finish(into, source_fd, directory)
            finally:
                os.close(source_fd)
                into.close()

    def _failed(self, path: str, error: OSError) -> ContextError:
        return ContextError(f"cannot copy to {rootpath.shown(f'{self.top}/{path}')}: {error.strerror}")

    def _open_top(self, directory: Directory, into: _Target) -> None:
        """Open the target of the walk's top, or make it; one that is already there keeps its metadata."""
        parent, name = os.path.split(self.top)
        if name:
            parent_fd = rootpath.open_directory(self.dest_fd, parent)
            try:
                self._open_target(parent_fd, name, directory, into, direct=False)
            finally:
                os.close(parent_fd)
            if self.top_is_new and not into.direct:
                self._go_beneath(directory, into)
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
            above = self.targets[level - 1]
            assert above.fd is not None
            try:
                self._open_target(above.fd, item.name, item, self.targets[level], direct=above.direct)
            except OSError as e:
                raise self._failed(item.path, e) from e

    def _open_target(self, parent_fd: int, name: str, directory: Directory, into: _Target, *, direct: bool) -> None:
        into.direct = direct
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
        if into.created and not direct:
            self._go_beneath(directory, into)
        into.plain = filedata.is_plain(into.fd)
        if not into.created and directory.parent is not None and not directory.included:
            # A parent made for what is below it: of one that exists, only the mode is taken over.
            os.fchmod(into.fd, stat_.S_IMODE(directory.stat.st_mode))

    def _go_beneath(self, directory: Directory, into: _Target) -> None:
        """Work in a new directory where it lies in the overlay's upper one; or leave out what it is to hold."""
        if self.left_out is not None:
            assert into.fd is not None
            source, target = (f"{top}/{directory.path}".strip("/") for top in (self.source, self.top))
            if self.left_out.take(self, source, target, into.fd):
                directory.entries = []
                directory.subdirectories.clear()
                return
        if self.upper_fd is not None:
            into.close()
            into.fd = rootpath.open_directory(self.upper_fd, f"{self.top}/{directory.path}".strip("/"))
            into.direct = True

    def _leave(self, directory: Directory) -> None:
        into = self.targets.pop()
        if into.fd is None:
            return
        with self.lock:
            if into.pending:
                into.left = (os.dup(directory.fd), directory)
                return
        try:
            self._finish(into, directory.fd, directory)
        finally:
            into.close()

    def _finish(self, into: _Target, source_fd: int, directory: Directory) -> None:
        """Give a directory its metadata, after the last entry was made in it."""
        assert into.fd is not None
        try:
            if into.created or (directory.included and directory.parent is not None):
                status = directory.stat
                filedata.own(into.fd, *(self.owner or (status.st_uid, status.st_gid)))
                os.fchmod(into.fd, self.mode_of(status))
                if not self.options.unprivileged:
                    filedata.copy_xattrs(source_fd, into.fd)
            if into.created or directory.included:
                self._time(into.fd, directory.stat)
        except OSError as e:
            raise self._failed(directory.path, e) from e

    # One entry

    def mode_of(self, status: os.stat_result) -> int:
        """The permission bits that the copy of an entry gets."""
        mode = status.st_mode
        if self.options.unprivileged:
            mode &= ~(stat_.S_ISUID | stat_.S_ISGID)
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
            self.links[key] = f"{self.top}/{prefix}{target}" if self.top else f"{prefix}{target}"
        if regular:
            self.size_bytes += self._put_file(source_fd, name, into, target, status, prefix)
            return
        try:
            self._put_special(source_fd, name, into, target, status)
        except FileExistsError:
            self._clear(into, target, prefix)
            self._put_special(source_fd, name, into, target, status)

    def _link(self, first: str, into: _Target, target: str) -> None:
        directory, name = os.path.split(first)
        fd = rootpath.open_directory(self._root_of(into), directory)
        try:
            try:
                os.link(name, target, src_dir_fd=fd, dst_dir_fd=into.fd, follow_symlinks=False)
            except FileExistsError:
                self._clear(into, target, "")
                os.link(name, target, src_dir_fd=fd, dst_dir_fd=into.fd, follow_symlinks=False)
        finally:
            os.close(fd)

    def _root_of(self, into: _Target) -> int:
        return self.upper_fd if into.direct and self.upper_fd is not None else self.dest_fd

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

    def _put_file(
        self, source_fd: int, name: str, into: _Target, target: str, status: os.stat_result, prefix: str
    ) -> int:
        """Copy a regular file, in place of one that is there; its size. Thread-safe."""
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=source_fd)
        try:

            def fill(out: int) -> int:
                size = self.data.copy(fd, out, status)
                if not self.options.unprivileged:
                    filedata.copy_xattrs(fd, out)
                return size

            return self._create(into, target, status, fill, prefix)
        finally:
            os.close(fd)

    def _create(
        self, into: _Target, target: str, status: os.stat_result, fill: Callable[[int], int], prefix: str
    ) -> int:
        """Make a regular file of the metadata of `status`, its data written by `fill`; its size. Thread-safe."""
        mode = self.mode_of(status)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            out = os.open(target, flags, mode & 0o777, dir_fd=into.fd)
        except FileExistsError:
            self._clear(into, target, prefix)
            out = os.open(target, flags, mode & 0o777, dir_fd=into.fd)
        try:
            # What the kernel gives a new file anyhow is not set again: each call is a journal entry.
            owner = self.owner or (status.st_uid, status.st_gid)
            if owner != self.ids or not into.plain:
                filedata.own(out, *owner)
            size = fill(out)
            # After the data: writing to it takes the set-id bits off a file.
            if owner != self.ids or not into.plain or mode & (self.umask | 0o7000):
                os.fchmod(out, mode)
            self._time(out, status)
            return size
        finally:
            os.close(out)

    def _put_special(self, source_fd: int, name: str, into: _Target, target: str, status: os.stat_result) -> None:
        """A symlink, device, fifo or socket. One of a build context is an empty file: nobody listens."""
        assert into.fd is not None
        if stat_.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source_fd), target, dir_fd=into.fd)
        elif self.options.unprivileged and (stat_.S_ISCHR(status.st_mode) or stat_.S_ISBLK(status.st_mode)):
            self.entries -= 1
            return
        elif into.direct and stat_.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))  # a whiteout, as overlayfs itself refuses to make
        elif stat_.S_ISSOCK(status.st_mode) and self.options.reset_owner:
            os.mknod(target, stat_.S_IFREG | 0o600, dir_fd=into.fd)
        else:
            ownership.here().mknod(target, status.st_mode, status.st_rdev, dir_fd=into.fd)
        uid, gid = self.owner or (status.st_uid, status.st_gid)
        filedata.own_entry(into.fd, target, uid, gid)
        if not stat_.S_ISLNK(status.st_mode):
            filedata.set_mode(into.fd, target, self.mode_of(status))
        if not self.options.unprivileged:
            filedata.copy_link_xattrs(source_fd, name, into.fd, target)
        stamp = self.options.mtime_ns
        times = (status.st_atime_ns, status.st_mtime_ns) if stamp is None else (stamp, stamp)
        os.utime(target, ns=times, dir_fd=into.fd, follow_symlinks=False)
