"""The trees behind `RUN --mount=type=bind|cache`: where they are on the host, and who may share them.

A cache mount is a directory of the store, named by its id's digest, with a lock file beside it:
`shared` takes none, `locked` waits for the lock, `private` takes the next directory that is free.
The mounts of one RUN that have the same id are the same directory, taken once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from builder.errors import ContextError
from builder.plan.graph import MountOp
from layers import linux, ownership
from layers.errors import Cancelled
from layers.snapshot import Mount

if TYPE_CHECKING:
    from builder.sandbox.spec import SandboxMount
    from builder.solve.steps import StepContext

_PRIVATE_COPIES = 64
_LOCK_POLL_S = 0.1
_STRICTNESS = ("shared", "private", "locked")


def bind_mount(
    ctx: StepContext, mount: MountOp, trees: Mapping[int, Mount], cleanup: list[Callable[[], None]]
) -> SandboxMount:
    """A tree or a part of one, read-only, or writable with what is written thrown away.

    Raises: ContextError if the source is not in the tree.
    """
    from builder.sandbox.spec import SandboxMount
    from builder.solve.steps import open_mount
    from layers.snapshotters.overlay import copy_root

    tree = trees[mount.input] if mount.input is not None else ctx.store.snapshots.view(None)
    with open_mount(tree) as root:
        try:
            fd = linux.openat2(root, mount.source, os.O_PATH)
        except OSError as e:
            raise ContextError(f'"{mount.source}": not found: {e.strerror}') from e
        is_file = not stat.S_ISDIR(os.fstat(fd).st_mode)
        os.close(fd)
    if not mount.readonly:
        active = ctx.store.snapshots.prepare(None)
        cleanup.append(lambda: ctx.store.snapshots.discard(active))
        copy_root(tree.lower[0], active.path)
        work = active.path.with_name("work")
        work.mkdir(mode=0o700, exist_ok=True)
        tree = Mount("overlay", tree.lower, active.path, work, False, tree.dialect, tree.program)
    return SandboxMount(
        "tree", mount.target, source=tree, subpath=mount.source, readonly=mount.readonly, is_file=is_file
    )


def acquire_caches(
    ctx: StepContext,
    mounts: Sequence[MountOp],
    trees: Mapping[int, Mount],
    cleanup: list[Callable[[], None]],
    *,
    alone: bool,
) -> dict[str, Path]:
    """The directories of a RUN's cache mounts by `cache_id`; `alone` shares none with another RUN.

    Locks are waited for in the order of the ids, so that two RUNs never wait for each other. Where mounts
    of one id disagree, the strictest of them holds. Raises: Cancelled while waiting, ContextError.
    """
    wanted: dict[str, MountOp] = {}
    for mount in mounts:
        if mount.type == "cache":
            first = wanted.setdefault(cache_id(mount), mount)
            sharing = "locked" if alone else max(first.sharing, mount.sharing, key=_STRICTNESS.index)
            wanted[cache_id(mount)] = first._replace(sharing=sharing)
    directories: dict[str, Path] = {}
    for id, mount in sorted(wanted.items()):
        directories[id], release = _acquire(ctx, mount, trees)
        cleanup.append(release)
    return directories


def cache_id(mount: MountOp) -> str:
    """What names the directory of a cache mount."""
    return mount.id or mount.target


def _acquire(ctx: StepContext, mount: MountOp, trees: Mapping[int, Mount]) -> tuple[Path, Callable[[], None]]:
    """The directory of a cache mount and how to give it back."""
    from builder.solve.steps import cache_directory

    base = cache_directory(ctx.store.root, cache_id(mount))
    # Set-id programs of a RUN are not for other users of this machine, whatever the store's own directory allows.
    base.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if mount.sharing == "shared":
        _populate(ctx, base, mount, trees)
        return base, lambda: None
    if mount.sharing == "locked":
        lock = os.open(f"{base}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while not _try_lock(lock):
            if ctx.cancelled():
                os.close(lock)
                raise Cancelled
            time.sleep(_LOCK_POLL_S)
        _populate(ctx, base, mount, trees)
        return base, partial(os.close, lock)
    for number in range(_PRIVATE_COPIES):
        path = base if number == 0 else base.with_name(f"{base.name}.{number}")
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _try_lock(lock):
            _populate(ctx, path, mount, trees)
            return path, partial(os.close, lock)
        os.close(lock)
    raise ContextError(f"more than {_PRIVATE_COPIES} builds use the private cache mount {cache_id(mount)!r}")


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _populate(ctx: StepContext, path: Path, mount: MountOp, trees: Mapping[int, Mount]) -> None:
    """Make the directory on first use, with its owner, mode and, with `from=`, first contents."""
    if path.exists():
        return
    fresh = path.with_name(f"{path.name}.new-{os.getpid()}-{time.monotonic_ns()}")
    fresh.mkdir(mode=0o700)
    if mount.input is not None:
        from builder.solve import fileops
        from builder.solve.steps import open_mount

        dest = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with open_mount(trees[mount.input]) as source:
                options = fileops.CopyOptions(copy_dir_contents=True, follow_symlinks=True, create_dest=True)
                fileops.copy(source, mount.source, dest, "/", options, cancelled=ctx.cancelled)
        finally:
            os.close(dest)
    fd = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        ownership.here().fchown(fd, mount.uid or 0, mount.gid or 0)
    finally:
        os.close(fd)
    fresh.chmod(0o755 if mount.mode is None else mount.mode)
    place_unless_there(fresh, path)


def place_unless_there(fresh: Path, path: Path) -> None:
    """Move a new directory to its place, or drop it: what another build was first to put there serves as well.

    Raises: OSError if it can be neither moved nor replaced by what is there.
    """
    try:
        try:
            # rename(2) would take the place of an empty one, which the other build's RUN may be using.
            linux.renameat2(linux.AT_FDCWD, os.fspath(fresh), linux.AT_FDCWD, os.fspath(path), linux.RENAME_NOREPLACE)
        except OSError as e:
            if e.errno != errno.EINVAL:  # a file system that knows no flags
                raise
            fresh.rename(path)
    except OSError:
        import shutil

        shutil.rmtree(fresh, ignore_errors=True)
        if not path.is_dir():
            raise
