"""`pybuild verify`: build twice under different conditions, and name the first thing that came out differently.

What is changed for the second build: the time (it runs later, in another second), how long the machine has been
up (where time namespaces are allowed), the times of those files of the context that are newer than the epoch, as
another checkout has them, the umask, the host's name, the time zone, where the context lies, on which file system,
and in which order its directories list. The wall clock cannot be another for some processes alone: the kernel's
time namespaces do not have it. Caller: `builder.cli.verify`.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from builder.difference import ConfigChange, config_changes
from layers.compare import FileChange, compare, read_tar
from layers.compression import decompressor
from layers.errors import StoreError
from layers.image import Image, load_image
from layers.oci import Descriptor, Platform
from layers.values import NamedTuple, replace

if TYPE_CHECKING:
    from builder.plan.request import BuildRequest
    from layers.store import Store

_SMALL_BYTES = 64 << 20
_DAY_S = 86400
_MEMORY = Path("/dev/shm")  # noqa: S108 - a private directory is made in it


class Built(Protocol):
    """What a build gives back, as far as it matters here."""

    @property
    def descriptor(self) -> Descriptor: ...


class Verdict(NamedTuple):
    """Whether a build reproduces; if not, the first difference, in words and as data.

    `layer` counts from 1; `step` is the history's line of it. With neither `file` nor `config` nor words, the
    two manifests are the same.
    """

    first: Descriptor
    second: Descriptor
    words: str = ""
    layer: int = 0
    step: str = ""
    file: FileChange | None = None
    config: ConfigChange | None = None

    @property
    def reproducible(self) -> bool:
        return self.first.digest == self.second.digest


def build_twice(request: BuildRequest, build: Callable[[BuildRequest], Built]) -> tuple[Descriptor, Descriptor]:
    """Build a request two times without cache, the second time under other conditions; both manifests.

    Without `source_date_epoch`, the present is taken for both. To be called in a process that may change
    its umask and its host's name: they are set back, the latter with the process's end.
    Raises: what `build` raises.
    """
    epoch = request.source_date_epoch if request.source_date_epoch is not None else int(time.time())
    plain = replace(request, source_date_epoch=epoch, no_cache=True, tags=(), outputs=(), cache_from=(), cache_to=())
    first = build(plain).descriptor
    while int(time.time()) <= epoch + 1:
        time.sleep(0.1)
    with _other_conditions(plain) as changed:
        second = build(changed).descriptor
    return first, second


@contextmanager
def _other_conditions(request: BuildRequest) -> Iterator[BuildRequest]:
    zone, umask = os.environ.get("TZ"), os.umask(0o077)
    _other_hostname()
    _other_uptime()
    os.environ["TZ"] = "XXX-13:45"
    time.tzset()
    try:
        epoch = request.source_date_epoch
        with _other_place(request.context, epoch if request.rewrite_timestamp else None) as context:
            environ = {**request.environ, "TZ": os.environ["TZ"]}
            ignore = request.ignore_file
            if ignore is not None and request.context is not None and context is not None:
                # Only its content counts; it may lie in the context or not.
                inner = Path(os.path.relpath(ignore, request.context))
                ignore = ignore if str(inner).startswith("..") else context / inner
            yield replace(request, context=context, environ=environ, ignore_file=ignore)
    finally:
        os.umask(umask)
        if zone is None:
            del os.environ["TZ"]
        else:
            os.environ["TZ"] = zone
        time.tzset()


def _other_hostname() -> None:
    from layers import linux

    try:
        linux.unshare(linux.CLONE_NEWUTS)
        socket.sethostname("elsewhere")
    except OSError:
        pass  # RUN has a name of its own anyway


def _other_uptime() -> None:
    """What processes started from now on are told of the time since the machine's start."""
    from layers import linux

    try:
        linux.unshare(linux.CLONE_NEWTIME)
        with open("/proc/self/timens_offsets", "w", encoding="ascii") as f:
            f.write(f"monotonic {_DAY_S} 0\nboottime {_DAY_S} 0\n")
    except OSError:
        pass  # not allowed here


@contextmanager
def _other_place(context: Path | None, epoch_s: int | None) -> Iterator[Path | None]:
    """A copy of a context at a path of another length, its directories filled in the opposite order.

    Files newer than `epoch_s`, whose times no layer has, become newer still.
    """
    if context is None:
        yield None
        return
    small = _size(context) <= _SMALL_BYTES
    # A file system in memory lists the newest first, others by hash.
    parent = _MEMORY if small and os.access(_MEMORY, os.W_OK) else None
    place = Path(tempfile.mkdtemp(prefix="pybuild-verify-elsewhere-", dir=parent))
    try:
        target = place / "another" / "context"
        target.parent.mkdir()
        _copy_backwards(context, target, epoch_s)
        yield target
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _size(directory: Path) -> int:
    total = 0
    for root, _, files in os.walk(directory):
        total += sum(os.lstat(os.path.join(root, name)).st_size for name in files)
        if total > _SMALL_BYTES:
            break
    return total


def _copy_backwards(source: Path, target: Path, epoch_s: int | None) -> None:
    """Copy a tree with modes, times and hard links. Raises: StoreError if something cannot be read."""
    links: dict[tuple[int, int], Path] = {}

    def copy(old: Path, new: Path) -> None:
        status = old.lstat()
        if stat.S_ISDIR(status.st_mode):
            new.mkdir(0o700)
            for name in sorted(os.listdir(old), reverse=True):
                copy(old / name, new / name)
        elif stat.S_ISLNK(status.st_mode):
            new.symlink_to(old.readlink())
        elif stat.S_ISREG(status.st_mode):
            known = links.setdefault((status.st_dev, status.st_ino), new)
            if known is not new:
                os.link(known, new)
                return
            shutil.copyfile(old, new)
        elif stat.S_ISFIFO(status.st_mode):
            os.mkfifo(new)
        else:
            return  # sockets and devices are in no context
        shutil.copystat(old, new, follow_symlinks=False)
        if epoch_s is not None and status.st_mtime_ns > epoch_s * 10**9:
            later_ns = status.st_mtime_ns + _DAY_S * 10**9
            os.utime(new, ns=(later_ns, later_ns), follow_symlinks=False)

    try:
        copy(source, target)
    except OSError as e:
        raise StoreError(f"cannot copy the context: {e.filename or source}: {e.strerror}") from e


# What differs


def judge(store: Store, first: Descriptor, second: Descriptor, platforms: Sequence[Platform]) -> Verdict:
    """Compare two builds of a request: layer by layer, then the configs, then the manifests."""
    if first.digest == second.digest:
        return Verdict(first, second)
    for platform in platforms or (Platform.host(),):
        one, other = load_image(store, first, platform), load_image(store, second, platform)
        found = _first_difference(store, one, other)
        if found is not None:
            return found._replace(first=first, second=second)
    return Verdict(first, second, "the manifests differ in nothing that an image is made of")


def _first_difference(store: Store, one: Image, other: Image) -> Verdict | None:
    blank = Verdict(one.descriptor, other.descriptor)
    steps = [str(entry.get("created_by") or "") for entry in one.config.history if not entry.get("empty_layer")]
    for index, (old, new) in enumerate(zip(one.diff_ids, other.diff_ids, strict=False)):
        if old == new and one.layers[index].digest == other.layers[index].digest:
            continue
        step = steps[index] if index < len(steps) else ""
        at = blank._replace(layer=index + 1, step=step)
        if old == new:
            return at._replace(words="the same content is compressed differently")
        with _layer(store, one.layers[index]) as a, _layer(store, other.layers[index]) as b:
            change = next(compare(read_tar(a), read_tar(b), times=True), None)
        if change is None:
            return at._replace(words="the same files are in another order")
        return at._replace(file=change)
    if len(one.diff_ids) != len(other.diff_ids):
        return blank._replace(words=f"{len(one.diff_ids)} layers became {len(other.diff_ids)}")
    config = next(config_changes(one.config.document, other.config.document, times=True), None)
    return None if config is None else blank._replace(config=config)


@contextmanager
def _layer(store: Store, descriptor: Descriptor) -> Iterator[BinaryIO]:
    with store.blobs.open(descriptor.digest) as stream:
        yield decompressor(stream)
