"""The root of a sandbox: mounting it, resolving its paths, and mount points that leave no trace.

An image often lacks /proc, /etc/resolv.conf or the target of a cache mount. In an overlay such a mount
point is put into a directory of *stubs*: the lowest layer, which runs share, or where that one is
hidden (a whiteout, a link), the topmost lower layer, made for this run, in which its parents carry
the attributes that the image gives them. It is seen, yet nothing of it is in the upper. Only where an
upper hides it all the same (a container's whiteout), or the root is no overlay, it is made in place;
then `undo` removes it after the end and gives its parents their times back.

`setup` calls this in the sandbox's first process, the zygote calls `undo`. Only `layers.linux` and
cheap parts of the stdlib are imported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from layers import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Target = list[Any]
    """`[path, is_file]`."""

IN_IMAGE = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
_MAX_LINKS = 40

FUSE = "fuse-overlayfs"


class Root:
    """An attached root: its descriptor, and what `undo` needs to know."""

    def __init__(self, fd: int, undo: list[dict[str, Any]]) -> None:
        self.fd = fd
        self.undo = undo


def mount_root(*, tree: int | None = None, undo: list[dict[str, Any]] | None = None, **arguments: Any) -> Root:
    """Mount the root in this process's mount namespace, with every target present.

    `tree` and `undo` are what `grow` returned elsewhere; without them it is done here. Raises: OSError.
    """
    if tree is None:
        tree, undo = grow(**arguments)
    # Any directory serves as the place: nobody else sees this namespace, and the layers are held open.
    place = arguments["upper"] or arguments["lower"][0]
    linux.move_mount(tree, "", linux.AT_FDCWD, place, linux.MOVE_MOUNT_F_EMPTY_PATH)
    return Root(tree, undo or [])


def grow(
    *,
    type: str,
    lower: list[str],
    upper: str | None,
    work: str | None,
    userxattr: bool,
    targets: list[Target],
    scratch: str | None,
    stubs: str | None = None,
    kept: list[Target] | None = None,
    program: str | None = None,
) -> tuple[int, list[dict[str, Any]]]:
    """A root, attached nowhere, with every target present; and what `undo` needs to know.

    `stubs` is a directory that holds the `kept` targets, or is made to: as the lowest layer of all it
    gives most images all that they lack, by one mount. Raises: OSError.
    """
    undo: list[dict[str, Any]] = []
    if stubs is not None:
        _keep_stubs(stubs, kept or [])
        lower = [*lower, stubs]
    tree = detached(type=type, lower=lower, upper=upper, work=work, userxattr=userxattr, program=program)
    if type == "overlay":
        absent = missing(tree, targets)
        if absent and scratch is not None:
            own = f"{scratch}/stubs-{os.urandom(6).hex()}"
            undo.append({"stubs": own})
            build_stubs(own, tree, absent)
            os.close(tree)
            tree = _overlay([own, *lower], upper, work, userxattr, program)
    absent = missing(tree, targets)
    if absent:
        undo.extend(_make_in_place(tree, lower[0] if type == "bind" else upper, absent))
    return tree, undo


def detached(
    *,
    type: str,
    lower: list[str],
    upper: str | None,
    work: str | None,
    userxattr: bool,
    program: str | None = None,
    tree: int | None = None,
) -> int:
    """A tree as a mount that is attached nowhere yet, devices in it shut; `tree` is one already. Raises: OSError."""
    if tree is not None:
        return tree
    if type == "overlay":
        return _overlay(lower, upper, work, userxattr, program)
    flags = linux.OPEN_TREE_CLOEXEC | linux.OPEN_TREE_CLONE
    try:
        tree = linux.open_tree(linux.AT_FDCWD, lower[0], flags)
    except OSError as e:
        if e.errno != errno.EINVAL:  # a user namespace may not look beneath mounts that it was given
            raise
        tree = linux.open_tree(linux.AT_FDCWD, lower[0], flags | linux.AT_RECURSIVE)
    linux.mount_setattr(tree, "", linux.AT_EMPTY_PATH, attr_set=linux.MOUNT_ATTR_NODEV)
    return tree


def fuse_program() -> str | None:
    """The program that mounts an overlay where the kernel does not, if it is to be had."""
    from layers import fusemount

    return fusemount.find_program()


def _overlay(lower: list[str], upper: str | None, work: str | None, userxattr: bool, program: str | None) -> int:
    if work is not None:
        # The mark of an earlier volatile mount in this boot; after a crash the store drops the upper.
        with contextlib.suppress(OSError):
            mark = os.path.join(work, "work", "incompat", "volatile")
            os.unlink(os.path.join(mark, "dirty"))
            os.rmdir(mark)
    if upper is None and len(lower) == 1:
        # Overlayfs wants two layers where there is no upper: one is seen as well by a bind.
        tree = linux.open_tree(linux.AT_FDCWD, lower[0], linux.OPEN_TREE_CLOEXEC | linux.OPEN_TREE_CLONE)
        linux.mount_setattr(tree, "", linux.AT_EMPTY_PATH, attr_set=linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_RDONLY)
        return tree
    if program is not None:
        from layers import fusemount

        return fusemount.mount(program, lower, upper, work, linux.MOUNT_ATTR_NODEV)
    try:
        return linux.fsmount_overlay(
            list(lower), upper=upper, work=work, userxattr=userxattr, attributes=linux.MOUNT_ATTR_NODEV
        )
    except OSError as e:
        # Before Linux 6.5 the new interface has room for some ten layers; a real EINVAL comes again below.
        if e.errno not in {errno.EINVAL, errno.ENAMETOOLONG}:
            raise
        return overlay_by_mount(lower, upper, work, userxattr)


def overlay_by_mount(lower: list[str], upper: str | None, work: str | None, userxattr: bool) -> int:
    """The same by mount(2), whose options fit one page: 500 layers, named by descriptor from /proc/self/fd.

    Changes the working directory for a moment, and uses a layer's directory as a place for the mount:
    only for a process of one thread with a mount namespace of its own. Raises: OSError.
    """
    place = upper or lower[0]
    home = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    handles: list[int] = []
    try:
        paths = [*lower, *([upper, work] if upper and work else [])]
        handles.extend(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in paths)
        options = "lowerdir=" + ":".join(str(fd) for fd in handles[: len(lower)])
        if upper and work:
            options += f",upperdir={handles[-2]},workdir={handles[-1]},volatile"
        options += ",userxattr" if userxattr else ""
        os.chdir("/proc/self/fd")
        linux.mount("overlay", place, "overlay", linux.MS_NODEV, options)
        try:
            return linux.open_tree(linux.AT_FDCWD, place, linux.OPEN_TREE_CLONE | linux.OPEN_TREE_CLOEXEC)
        finally:
            linux.umount2(place, linux.MNT_DETACH)
    finally:
        os.fchdir(home)
        for fd in [home, *handles]:
            os.close(fd)


def open_in(root_fd: int, path: str, flags: int = os.O_PATH) -> int:
    """Open a path of the image; no link of it leads out. Raises: OSError."""
    try:
        return linux.openat2(root_fd, path.lstrip("/") or ".", flags, 0, IN_IMAGE)
    except OSError as e:
        e.filename = path
        raise


def walk(root_fd: int, path: str) -> tuple[list[str], bool]:
    """Resolve `path` inside the root by hand: (its components without links, whether it exists).

    For paths that may be missing in part, which openat2 cannot tell; a dangling link is followed to
    what it names. Nothing else may change the tree meanwhile. Raises: OSError (ELOOP; ENOTDIR).
    """
    todo = [part for part in path.split("/") if part not in {"", "."}][::-1]
    done: list[str] = []
    links = 0
    exists = True
    while todo:
        part = todo.pop()
        if part == "..":
            del done[-1:]
            continue
        name = "/".join([*done, part])
        try:
            status = os.stat(name, dir_fd=root_fd, follow_symlinks=False)
        except FileNotFoundError:
            exists = False
        else:
            exists = True
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                link = os.readlink(name, dir_fd=root_fd)
                if link.startswith("/"):
                    done = []
                todo.extend(piece for piece in reversed(link.split("/")) if piece not in {"", "."})
                continue
        done.append(part)
    return done, exists


def missing(root_fd: int, targets: list[Target]) -> list[tuple[list[str], bool]]:
    """The targets that the tree lacks, as components without links; those beneath another target are not ours."""
    absent: list[Target] = []
    for target in targets:
        try:
            os.close(open_in(root_fd, target[0]))
        except FileNotFoundError:
            absent.append(target)
    if not absent:
        return []
    found: list[tuple[list[str], bool]] = []
    covered: list[list[str]] = []
    for path, is_file in targets:
        parts, exists = walk(root_fd, path)
        under = any(parts[: len(other)] == other for other in covered)
        covered.append(parts)
        if not exists and not under:
            found.append((parts, is_file))
    return found


def _keep_stubs(path: str, kept: list[Target]) -> None:
    """Make the directory of kept stubs unless it is there; whoever renames first wins. Raises: OSError."""
    if os.path.isdir(path):
        return
    fresh = f"{path}.{os.urandom(6).hex()}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(os.path.dirname(fresh), 0o700)
    os.mkdir(fresh, 0o755)
    fd = os.open(fresh, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for target, is_file in kept:
        make_in(fd, target.split("/"), is_file=is_file)
    os.close(fd)
    try:
        os.rename(fresh, path)
    except OSError:
        _remove_stubs(fresh)


def build_stubs(stubs: str, root_fd: int, absent: list[tuple[list[str], bool]]) -> None:
    """Make a layer of the absent mount points, whose existing parents look as they do in the tree. Raises: OSError."""
    os.mkdir(stubs, 0o755)
    alike: dict[str, os.stat_result] = {"": os.stat(".", dir_fd=root_fd)}
    for parts, is_file in absent:
        for depth in range(1, len(parts) + 1):
            name = "/".join(parts[:depth])
            path = f"{stubs}/{name}"
            with contextlib.suppress(FileNotFoundError):
                if name not in alike and depth < len(parts):
                    alike[name] = os.stat(name, dir_fd=root_fd, follow_symlinks=False)
            with contextlib.suppress(FileExistsError):
                if is_file and depth == len(parts):
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
                else:
                    os.mkdir(path, 0o755)
    for name, status in reversed(alike.items()):
        path = f"{stubs}/{name}" if name else stubs
        original = f"/proc/self/fd/{root_fd}/{name}"
        os.chown(path, status.st_uid, status.st_gid)
        os.chmod(path, stat.S_IMODE(status.st_mode))
        for attribute in os.listxattr(original, follow_symlinks=False):
            if ".overlay." not in attribute:
                os.setxattr(path, attribute, os.getxattr(original, attribute, follow_symlinks=False))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def make_in(root_fd: int, parts: list[str], *, is_file: bool) -> list[str]:
    """Make a mount point and its parents; returns the paths that were made, topmost first. Raises: OSError."""
    made: list[str] = []
    for depth in range(1, len(parts) + 1):
        name = "/".join(parts[:depth])
        try:
            if is_file and depth == len(parts):
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=root_fd))
            else:
                os.mkdir(name, 0o755, dir_fd=root_fd)
        except FileExistsError:
            continue
        made.append(name)
    return made


def make_workdir(root_fd: int, path: str, owner: list[int] | None) -> None:
    """Make what is missing of a working directory, for its user; a part before `..`, too. Raises: OSError.

    As BuildKit and OCI runtimes do. The owner None is whoever calls.
    """
    pieces = path.split("/")
    for number in range(len(pieces)):
        parts, exists = walk(root_fd, "/".join(pieces[: number + 1]))
        for made in [] if exists else make_in(root_fd, parts, is_file=False):
            os.chmod(made, 0o755, dir_fd=root_fd)  # noqa: S103 - whatever the umask, as WORKDIR makes it
            if owner is not None:
                os.chown(made, *owner, dir_fd=root_fd)


def _make_in_place(root_fd: int, base: str | None, absent: list[tuple[list[str], bool]]) -> list[dict[str, Any]]:
    """Make the mount points in the tree itself; returns what `undo` needs to know about `base`."""
    if base is None:
        path = "/" + "/".join(absent[0][0])
        raise OSError(errno.EROFS, "the image lacks this mount point, and its root is read-only", path)
    base_fd = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    before: dict[str, os.stat_result | None] = {}
    whiteouts: dict[str, os.stat_result] = {}
    made: list[str] = []
    for parts, is_file in absent:
        for depth in range(len(parts) + 1):
            name = "/".join(parts[:depth]) or "."
            status = _lstat(base_fd, name)
            if status is not None and stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                whiteouts[name] = status
            elif name not in before and name not in made and depth < len(parts):
                before[name] = status
        made.extend(make_in(root_fd, parts, is_file=is_file))
    parents = []
    for name, status in before.items():
        now = None if name in made else _lstat(base_fd, name)
        if now is not None:
            times = None if status is None else [status.st_atime_ns, status.st_mtime_ns]
            parents.append([name, times, now.st_ctime_ns])
    entries = []
    for name in made:
        now = _lstat(base_fd, name)
        old = whiteouts.get(name)
        times = None if old is None else [old.st_atime_ns, old.st_mtime_ns]
        entries.append([name, 0 if now is None else now.st_ino, times])
    os.close(base_fd)
    return [{"base": base, "made": entries, "parents": parents}]


def _lstat(dirfd: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


def undo(steps: list[dict[str, Any]]) -> None:
    """Remove what `mount_root` left on disk, as far as the sandbox left it alone. Never raises OSError.

    The tree may have been changed by the command, a hostile one: no link in it is followed.
    """
    for step in steps:
        with contextlib.suppress(OSError):
            if "stubs" in step:
                _remove_stubs(step["stubs"])
            else:
                _undo_in_place(step)


def _remove_stubs(path: str) -> None:
    """The stubs were a read-only lower layer: they are as they were made, empty files and directories."""
    with os.scandir(path) as entries:
        names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in names:
        if is_directory:
            _remove_stubs(f"{path}/{name}")
        else:
            os.unlink(f"{path}/{name}")
    os.rmdir(path)


def _undo_in_place(step: dict[str, Any]) -> None:
    base_fd = os.open(step["base"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    handles: dict[str, int] = {}

    def directory(name: str) -> int:
        if name not in handles:
            flags = os.O_RDONLY | os.O_DIRECTORY
            handles[name] = linux.openat2(base_fd, name, flags, 0, linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS)
        return handles[name]

    try:
        untouched = []
        for name, times, ctime_ns in step["parents"]:
            with contextlib.suppress(OSError):
                if os.fstat(directory(name)).st_ctime_ns == ctime_ns:
                    untouched.append((name, times))
        for name, inode, whiteout in reversed(step["made"]):
            with contextlib.suppress(OSError):
                _remove_made(directory(os.path.dirname(name) or "."), os.path.basename(name), inode, whiteout)
        for name, times in sorted(untouched, reverse=True):
            with contextlib.suppress(OSError):
                if times is not None:
                    os.utime(directory(name), ns=(times[0], times[1]))
                elif name != ".":
                    # Copied up for our sake alone; one that is not empty stays.
                    os.rmdir(os.path.basename(name), dir_fd=directory(os.path.dirname(name) or "."))
    finally:
        for fd in [base_fd, *handles.values()]:
            os.close(fd)


def _remove_made(parent_fd: int, name: str, inode: int, whiteout: list[int] | None) -> None:
    """Remove one mount point that is still ours; a whiteout that it replaced comes back."""
    status = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    if status.st_ino != inode:
        return
    if stat.S_ISDIR(status.st_mode):
        os.rmdir(name, dir_fd=parent_fd)
    elif status.st_size == 0:
        os.unlink(name, dir_fd=parent_fd)
    else:
        return
    if whiteout is not None:
        os.mknod(name, stat.S_IFCHR, 0, dir_fd=parent_fd)
        os.utime(name, ns=(whiteout[0], whiteout[1]), dir_fd=parent_fd, follow_symlinks=False)
