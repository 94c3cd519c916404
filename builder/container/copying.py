"""`cp`: files between the host and a container, running or not, and tar streams of a container's files.

The container's tree is hostile, and a running one changes under our hands: every path in it is
resolved with its root as the root (`builder.solve.rootpath`), and what comes out of it brings no
privileges along: no devices, no set-id bits, no extended attributes, unless it is asked for.
Callers have entered the container's user namespace, or that of snapshots (`enter`).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from builder.container import codec, events
from builder.container.inside import first_process
from builder.container.records import ContainerError, Record
from builder.errors import ContextError
from builder.solve import fileops, rootpath
from layers.values import NamedTuple


class Place(NamedTuple):
    """A path in a tree that is known by its root's descriptor."""

    root_fd: int
    path: str
    readonly: bool = False


def enter(record: Record) -> None:
    """Become what may look into a container: for a process of one thread. Raises: SandboxError, ContainerError."""
    if record.running:
        from builder.sandbox import enter as entering

        with first_process(record) as (pid, _pidfd):
            entering.join_user_namespace(pid)
        return
    from builder.sandbox.tiers import prepare

    prepare("auto")


@contextlib.contextmanager
def located(record: Record, path: str) -> Iterator[Place]:
    """Where a path of a container is: in the mounts that its processes see, or, of one that does not run, will see.

    Nothing starts the latter meanwhile. Raises: ContainerError, OSError.
    """
    with contextlib.ExitStack() as stack:
        if record.running:
            pid, _pidfd = stack.enter_context(first_process(record))
            root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, root)
            yield Place(root, path)
            return
        lock = record.lock()
        if lock is None:
            raise ContainerError(f"container {record.name} has just been started")
        stack.callback(os.close, lock)
        yield _in_volumes(stack, record, path)


def _in_volumes(stack: contextlib.ExitStack, record: Record, path: str) -> Place:
    """The path in the container's root, or in the volume that will be mounted over it."""
    from builder.sandbox import rootfs

    sandbox = record.settings["sandbox"]
    mount = codec.decode_mount(sandbox["root"])
    lower = [os.fspath(each) for each in mount.lower]
    upper, work = (None if each is None else os.fspath(each) for each in (mount.upper, mount.work))
    root = rootfs.detached(type=mount.type, lower=lower, upper=upper, work=work, userxattr=mount.dialect == "user")
    stack.callback(os.close, root)
    # Its last part may be missing, or a link that is meant itself.
    head, tail = os.path.split(path.rstrip("/") or "/")
    parent = rootpath.resolve(root, head)
    inside = (
        f"/{parent}/{tail}".replace("//", "/") if tail not in {"", ".", ".."} else f"/{rootpath.resolve(root, path)}"
    )
    for row in sorted(sandbox["mounts"], key=lambda row: -len(row["target"])):
        target = "/" + rootpath.resolve(root, row["target"])
        if row["kind"] != "bind" or (inside != target and not inside.startswith(f"{target}/")):
            continue
        source = os.fspath(row["source"])
        rest = inside[len(target) :]
        if row["is_file"]:
            source, rest = os.path.split(source)
        fd = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        ending = "/." if path.endswith("/.") else "/" if path.endswith("/") else ""
        return Place(fd, f"{rest}{ending}" or "/", bool(row["readonly"]))
    return Place(root, path, bool(sandbox["readonly_root"]))


def copy_in(record: Record, source: str, target: str, *, archive: bool = False, follow: bool = False) -> None:
    """Copy the host's `source` to `target` in a container, with docker's rules for directories.

    It is root's there, unless `archive` keeps its owners. `follow`: what a link names, in its place.
    Raises: ContextError, ContainerError.
    """
    owner = None if archive else (0, 0)
    options = fileops.CopyOptions(owner=owner, follow_symlinks=follow, allow_wildcard=False)
    with _spoken(record), located(record, target) as place, _on_host("/") as host:
        _refuse_readonly(record, place)
        absolute = os.path.join(os.getcwd(), source)
        _copy(Place(host, absolute), place, options, (source, f"{record.name}:{target}"))
    events.of_container(record, "copy", source=source, target=target)


def copy_out(record: Record, source: str, target: str, *, archive: bool = False, follow: bool = False) -> None:
    """Copy `source` of a container to the host's `target`, with docker's rules for directories.

    It is the caller's there; `archive` keeps owners, set-id bits, devices and attributes.
    Raises: ContextError, ContainerError.
    """
    owner = None if archive else (os.geteuid(), os.getegid())
    options = fileops.CopyOptions(owner=owner, follow_symlinks=follow, allow_wildcard=False, unprivileged=not archive)
    with _spoken(record), located(record, source) as place:
        # A link that was copied before leads no further than the directory that is written to.
        top, name = (target, "/") if os.path.isdir(target) else os.path.split(target.rstrip("/"))
        with _on_host(top or ".") as host:
            ending = "/" if target.endswith("/") else ""
            _copy(place, Place(host, f"/{name}{ending}"), options, (f"{record.name}:{source}", target))


def unpack_in(record: Record, stream: BinaryIO, target: str) -> None:
    """Extract a tar stream, compressed or not, in a directory of a container. Raises: ContextError, ContainerError."""
    from builder.solve.unpack import unpack_stream

    with _spoken(record), located(record, target) as place:
        _refuse_readonly(record, place)
        path = rootpath.resolve(place.root_fd, place.path)
        fd = rootpath.open_directory(place.root_fd, path)
        try:
            if not unpack_stream(stream, fd, what="stdin"):
                raise ContextError("cp: what comes on stdin is no tar archive")
        finally:
            os.close(fd)
    events.of_container(record, "extract-to-dir", target=target)


def write_tar(record: Record, source: str, fd: int) -> None:
    """Write a tar of a file or directory of a container to a descriptor. Raises: ContextError, ContainerError."""
    from builder.container.treetar import TreeTar

    with _spoken(record), located(record, source) as place:
        path = rootpath.resolve(place.root_fd, place.path, follow_last=source.endswith("/"))
        status = rootpath.lstat(place.root_fd, path)
        if status is None:
            raise ContextError(f"{record.name}:{source}: there is no such file or directory")
        contents = stat.S_ISDIR(status.st_mode) and (source.endswith("/.") or not path)
        top, name = (path, "") if contents else os.path.split(path)
        directory = rootpath.open_directory(place.root_fd, top)
        try:
            tar = TreeTar(lambda data: _write_all(fd, data))
            if contents:
                tar.add_contents(directory)
            else:
                tar.add(directory, name, os.fsencode(name))
            tar.finish()
        finally:
            os.close(directory)


def export(record: Record, fd: int) -> None:
    """Write a tar of a container's whole root file system, without its volumes, to a descriptor.

    A running one is paused meanwhile, where it can be. Raises: ContainerError, LayerError, StoreError.
    """
    from builder.container.commit import readable, still
    from builder.container.treetar import TreeTar
    from builder.rootfs import opened

    with _spoken(record), opened(readable(record)) as root, still(record, wanted=True):
        directory = rootpath.open_directory(root, "")
        try:
            tar = TreeTar(lambda data: _write_all(fd, data))
            tar.add_contents(directory)
            tar.finish()
        finally:
            os.close(directory)
    events.of_container(record, "export")


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


@contextlib.contextmanager
def _on_host(path: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise ContextError(f"{path}: {e.strerror}") from e
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _spoken(record: Record) -> Iterator[None]:
    """Errors of the system about the container's files in words."""
    try:
        yield
    except BrokenPipeError:
        raise  # of who reads the tar
    except OSError as e:
        raise ContainerError(f"container {record.name}: {e.filename or 'its files'}: {e.strerror}") from e


def _refuse_readonly(record: Record, place: Place) -> None:
    if place.readonly:
        raise ContainerError(f"container {record.name}: the file system there is read-only")


def _copy(source: Place, target: Place, options: fileops.CopyOptions, shown: tuple[str, str]) -> None:
    """Copy by docker's rules. https://docs.docker.com/reference/cli/docker/container/cp/ Raises: ContextError."""
    found = rootpath.resolve(source.root_fd, source.path, follow_last=options.follow_symlinks)
    status = rootpath.lstat(source.root_fd, found)
    if status is None:
        raise ContextError(f"{shown[0]}: there is no such file or directory")
    is_directory = stat.S_ISDIR(status.st_mode)
    if source.path.endswith("/") and not is_directory:
        raise ContextError(f"{shown[0]}: it is no directory")
    there = _status(target)
    contents = True
    if there is None:
        parent = _status(target._replace(path=os.path.dirname(target.path.rstrip("/")) or "/"))
        if parent is None or not stat.S_ISDIR(parent.st_mode):
            raise ContextError(f"{shown[1]}: its directory does not exist")
        if target.path.endswith("/") and not is_directory:
            raise ContextError(f"{shown[1]}: there is no such directory")
    elif stat.S_ISDIR(there.st_mode):
        contents = is_directory and (source.path.endswith("/.") or not found)
    elif is_directory:
        raise ContextError(f"{shown[1]}: a directory cannot be copied over a file")
    elif target.path.endswith("/"):
        raise ContextError(f"{shown[1]}: it is no directory")
    name = "/" + found
    fileops.copy(source.root_fd, name, target.root_fd, target.path, options._replace(copy_dir_contents=contents))


def _status(place: Place) -> os.stat_result | None:
    return rootpath.lstat(place.root_fd, rootpath.resolve(place.root_fd, place.path))
