"""Root file systems and images: a tar becomes an image, an image a tar, an image a mounted directory.

The callers of what touches snapshots have entered the user namespace before the store was opened.
Callers: `builder.cli.archives`, Python programs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from layers.errors import Cancelled, LayerError, NameNotFound, StoreError
from layers.oci import Descriptor, Digest, Platform
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO, Literal

    from layers.changeset import Sink
    from layers.compression import Compression
    from layers.image import Image
    from layers.snapshot import Mount
    from layers.store import Store

_CHUNK_BYTES = 1 << 18
_MAX_TAR_BYTES = 1 << 42


class ImportedImage(NamedTuple):
    """An image made of a root file system. `names` is empty if it was given none."""

    descriptor: Descriptor
    image_id: Digest
    names: tuple[str, ...]


def import_rootfs(
    store: Store,
    stream: BinaryIO,
    *,
    name: str | None = None,
    changes: Sequence[str] = (),
    message: str = "",
    platform: Platform | None = None,
    compression: Compression = "gzip",
    epoch_s: int | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> ImportedImage:
    """Make an image of one layer from a tar of a root file system, in whatever compression it comes.

    The tar's bytes become the layer as they are, so that equal tars give equal layers; they are read once.
    `epoch_s` is the time of the image, the clock's if None. `changes` as in `builder.changes`.
    Raises: LayerError (no tar, or a malformed one), UsageError, InvalidReference, StoreError, Cancelled.
    """
    from builder.changes import changed_config
    from builder.export import format_time
    from layers.image import describe_image
    from registry.reference import Reference

    names = (Reference.parse(name).with_default_tag().canonical(),) if name is not None else ()
    target = platform or Platform.host()
    document = changed_config(changes, platform=target)
    layer, diff_id = _import_layer(store, stream, compression, cancelled)
    created = format_time(epoch_s * 10**9 if epoch_s is not None else time.time_ns())
    history = {"created": created, "created_by": "pybuild import", **({"comment": message} if message else {})}
    document = {
        "created": created,
        **document,
        "rootfs": {"type": "layers", "diff_ids": [str(diff_id)]},
        "history": [history],
    }
    config, manifest = describe_image(document, [layer])
    store.put(config, manifest.config.media_type)
    descriptor = store.put(manifest.raw, manifest.media_type)
    image_id = manifest.config.digest
    store.publish(dict.fromkeys(names or (f"@{image_id}",), descriptor))
    return ImportedImage(descriptor, image_id, names)


def _import_layer(
    store: Store, stream: BinaryIO, compression: Compression, cancelled: Callable[[], bool] | None
) -> tuple[Descriptor, Digest]:
    """Store a tar stream as a layer; each of its headers is checked on the way."""

    from typing import cast

    from layers.compression import compressor, decompressor, media_type
    from layers.tarreader import TarReader

    with store.ingest(media_type=media_type(compression)) as ingest:
        packer = compressor(compression, threads=len(os.sched_getaffinity(0)))
        try:
            tee = _Tee(decompressor(stream), lambda data: _put(ingest.write, packer.write(data)), cancelled)
            for _ in TarReader(cast("BinaryIO", tee)):
                pass  # it raises for a malformed header
            while tee.read(_CHUNK_BYTES):
                pass
            if not tee.size_bytes:
                raise LayerError("the root file system's tar is empty: there is nothing to import")
            _put(ingest.write, packer.finish())
        finally:
            packer.close()
        stored = ingest.commit()
    layer = Descriptor(media_type=media_type(compression), digest=stored.digest, size_bytes=stored.size_bytes)
    return layer, Digest.from_hasher(tee.hasher)


def _put(write: Callable[[bytes], int], data: bytes) -> None:
    if data:
        write(data)


class _Tee:
    """A stream whose bytes are hashed and handed on as they are read."""

    def __init__(
        self, stream: BinaryIO, hand_on: Callable[[bytes], None], cancelled: Callable[[], bool] | None
    ) -> None:
        self._stream = stream
        self._hand_on = hand_on
        self._cancelled = cancelled
        from hashlib import sha256  # here: `run` does without

        self.hasher = sha256()
        self.size_bytes = 0

    def read(self, _size: int = -1) -> bytes:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled
        data = self._stream.read(_CHUNK_BYTES)
        self.size_bytes += len(data)
        if self.size_bytes > _MAX_TAR_BYTES:
            raise LayerError(f"the root file system's tar has more than the {_MAX_TAR_BYTES} bytes allowed")
        self.hasher.update(data)
        self._hand_on(data)
        return data


# Images as trees


def find(store: Store, name: str, platform: Platform | None = None) -> Image:
    """An image of the store by its name or id. Raises: NameNotFound, ImageError."""
    from layers.image import load_image
    from registry.stored import find_image

    return load_image(store, find_image(store, name), platform or Platform.host())


def image_mount(store: Store, image: Image, cancelled: Callable[[], bool] | None = None) -> tuple[str | None, Mount]:
    """The snapshot of an image's tree, unpacked if need be, and how to mount it read-only."""
    from layers.image import UnpackOptions, unpack_image

    top = unpack_image(store, image, UnpackOptions(cancelled=cancelled))
    return top, store.snapshots.view(top)


@contextmanager
def opened(mount: Mount) -> Iterator[int]:
    """A mounted tree's root, as a descriptor, for the block."""
    from layers.snapshotters.overlay import open_tree

    fd = open_tree(mount)
    try:
        yield fd
    finally:
        os.close(fd)


def export_rootfs(
    store: Store,
    name: str,
    sink: Sink,
    *,
    platform: Platform | None = None,
    compression: Literal["none", "gzip", "zstd"] = "none",
    clamp_mtime_s: int | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> None:
    """Write an image's whole root file system as a tar, in the order of names.

    Raises: NameNotFound, ImageError, LayerError, StoreError, what `sink.write` raises.
    """
    _, mount = image_mount(store, find(store, name, platform), cancelled)
    export_tree(mount, sink, compression=compression, clamp_mtime_s=clamp_mtime_s, cancelled=cancelled)


def export_tree(
    mount: Mount,
    sink: Sink,
    *,
    compression: Literal["none", "gzip", "zstd"] = "none",
    clamp_mtime_s: int | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> None:
    """Write a whole tree as a tar, in the order of names. Raises: LayerError, StoreError, what `sink.write` raises."""
    from layers.changeset import write_layer
    from layers.layerdiff import diff_trees

    with opened(mount) as fd:
        place = f"/proc/self/fd/{fd}/."  # the dot has the link followed
        write_layer(
            diff_trees(None, place), place, sink, compression=compression, clamp_mtime=clamp_mtime_s,
            nanoseconds=True, cancelled=cancelled,
        )  # fmt: skip


class MountedImage(NamedTuple):
    """An image that is mounted read-only at `path`."""

    image_id: str
    path: Path


def mount_image(store: Store, name: str, *, platform: Platform | None = None) -> MountedImage:
    """Mount an image's tree read-only, in this mount namespace, until `unmount_image`. Idempotent.

    No gc takes its snapshot meanwhile. Raises: NameNotFound, ImageError, StoreError (not allowed to mount).
    """
    image = find(store, name, platform)
    path = _place(store, image.image_id)
    if is_mounted(path):
        return MountedImage(str(image.image_id), path)
    need_overlay(store)
    top, mount = image_mount(store, image)
    attach(mount, path, f"image {name}")
    if top is not None:
        store.snapshots.pin(_pin_name(image.image_id), top)
    return MountedImage(str(image.image_id), path)


def attach(mount: Mount, path: Path, what: str) -> None:
    """Mount a tree at a directory, made if it is missing, in this mount namespace. Raises: StoreError."""
    from layers import linux

    try:
        # Whoever may not look into the store shall not come to an image's set-id programs by a mount of it.
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        with opened(mount) as fd:
            if mount.type == "bind":
                clone = linux.open_tree(fd, ".", linux.OPEN_TREE_CLONE | linux.OPEN_TREE_CLOEXEC)
                try:
                    if mount.readonly:
                        linux.mount_setattr(clone, "", linux.AT_EMPTY_PATH, attr_set=linux.MOUNT_ATTR_RDONLY)
                    linux.move_mount(clone, "", -1, str(path), linux.MOVE_MOUNT_F_EMPTY_PATH)
                finally:
                    os.close(clone)
            else:
                linux.move_mount(fd, "", -1, str(path), linux.MOVE_MOUNT_F_EMPTY_PATH)
    except OSError as e:
        raise StoreError(
            f"cannot mount {what}: {e.strerror or e}", hint="as an ordinary user, work in `pybuild unshare`"
        ) from e


def detach(path: Path) -> None:
    """Undo `attach`; the directory goes, too. Without effect where nothing is mounted. Raises: StoreError (in use)."""
    from layers import linux

    try:
        if is_mounted(path):  # no longer, after a restart of the machine
            linux.umount2(str(path))
        path.rmdir()
    except FileNotFoundError:
        pass
    except OSError as e:
        raise StoreError(f"cannot unmount {path}: {e.strerror}", hint="is something still using it?") from e


def unmount_image(store: Store, name: str) -> MountedImage:
    """Undo `mount_image`. Raises: NameNotFound if it is not mounted, StoreError if it is in use."""
    known = _places(store)
    try:
        id = str(find(store, name).image_id)
    except NameNotFound:
        matches = [i for i in known if i.partition(":")[2].startswith(name.removeprefix("sha256:"))]
        id = matches[0] if len(matches) == 1 else ""
    if id not in known:
        raise NameNotFound(f"image {name} is not mounted", hint="`pybuild image mount` lists what is")
    path = known[id]
    detach(path)
    store.snapshots.unpin(_pin_name(Digest(id)))
    return MountedImage(id, path)


def mounted_images(store: Store) -> list[MountedImage]:
    """What is mounted in this mount namespace."""
    return [MountedImage(id, path) for id, path in _places(store).items() if is_mounted(path)]


def _places(store: Store) -> dict[str, Path]:
    """The mount points that there are, by image id, mounted or not."""
    top = store.root / "mounts"
    return {f"sha256:{name}": top / name for name in sorted(os.listdir(top))} if top.exists() else {}


def is_mounted(path: Path, process: str = "self") -> bool:
    """Whether a process has something mounted there: `os.path.ismount` sees no bind mount of the same file system."""
    wanted = os.fsencode(os.path.realpath(path))
    for old, new in ((b"\\", b"\\134"), (b" ", b"\\040"), (b"\t", b"\\011"), (b"\n", b"\\012")):
        wanted = wanted.replace(old, new)
    with open(f"/proc/{process}/mountinfo", "rb") as table:
        return any(line.split(b" ", 5)[4] == wanted for line in table)


def _place(store: Store, image_id: Digest) -> Path:
    return store.root / "mounts" / image_id.encoded


def _pin_name(image_id: Digest) -> str:
    return f"mounted-{image_id.encoded[:32]}"


def need_overlay(store: Store) -> None:
    """Raises: StoreError where trees cannot be mounted."""
    if store.snapshots.driver != "overlay":
        raise StoreError(
            "images can be mounted only where overlayfs works", hint="`pybuild unpack` writes one to a directory"
        )
