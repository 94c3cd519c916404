"""An image's flattened root file system, from any source straight into a directory.

Layers are applied one over the other as they stream in, each checked against its digest and its
DiffID; nothing is kept in the store. `layers.apply` confines what they say to the directory.
Caller: `builder.api.unpack`.

Spec: image-spec layer.md, "Applying Changesets"; config.md, `rootfs.diff_ids`
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from layers import ownership
from layers.apply import apply_layer
from layers.errors import DigestMismatch, ImageError, LayerError, StoreError
from layers.events import EventSink, NullSink, Vertex, VertexStatus, VertexWarning
from layers.oci import MAX_CONFIG_BYTES, Descriptor, Digest, ImageConfig, Index, Manifest, Platform, parse_manifest
from registry.convert import layer_compression
from registry.transport import (
    CHUNK_BYTES,
    BlobInput,
    ImageLocation,
    ImageSource,
    TransportContext,
    VerifyingStream,
    check_manifest,
    read_blob,
)

_MAX_INDEX_DEPTH = 4


def unpack_location(
    location: ImageLocation,
    context: TransportContext,
    target: Path,
    *,
    platform: Platform | None = None,
    keep_owners: bool = True,
    events: EventSink | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> ImageConfig:
    """Unpack the image for `platform` (this machine's if None) into `target`, missing or empty; its config.

    Owners are those of the image, which needs root (or a user namespace that has them), unless
    `keep_owners` is False: then all is the caller's. After a failure `target` is empty, or gone if
    it was missing.
    Raises: LayerError, ImageError, DigestMismatch, StoreError, RegistryError, Cancelled.
    """
    source = location.source(context)
    try:
        return unpack_image(
            source, target, platform=platform, keep_owners=keep_owners, events=events, cancelled=cancelled
        )
    finally:
        source.close()


def unpack_image(
    source: ImageSource,
    target: Path,
    *,
    platform: Platform | None = None,
    keep_owners: bool = True,
    events: EventSink | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> ImageConfig:
    """As `unpack_location`, from an open source."""
    manifest = find_manifest(source, platform or Platform.host())
    config = ImageConfig.parse(read_blob(source, manifest.config, MAX_CONFIG_BYTES))
    if len(config.diff_ids) != len(manifest.layers):
        raise ImageError(
            f"{source.name} has {len(manifest.layers)} layers, but its config has {len(config.diff_ids)} DiffIDs"
        )
    for layer in manifest.layers:
        if layer_compression(layer) is None and not layer.urls:
            raise ImageError(f"{source.name} has a layer of media type {layer.media_type!r}, which is none")
    made = _prepare(target)
    work = _Unpacking(source, target, keep_owners, events or NullSink(), cancelled)
    try:
        for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
            work.apply(layer, diff_id)
    except BaseException as e:
        _clear(target, whole=made)
        work.end(str(e))
        raise
    work.end(None)
    return config


def find_manifest(source: ImageSource, platform: Platform) -> Manifest:
    """The image that the source's name stands for on `platform`. Raises: ImageError, DigestMismatch."""
    digest: Digest | None = None
    media_type = ""
    for _ in range(_MAX_INDEX_DEPTH):
        raw = check_manifest(source.get_manifest(digest), digest)
        document = parse_manifest(raw.raw, media_type or raw.media_type)
        if isinstance(document, Manifest):
            return document
        assert isinstance(document, Index)
        chosen = document.select(platform)
        digest, media_type = chosen.digest, chosen.media_type
    raise ImageError(f"{source.name}: indexes are nested more than {_MAX_INDEX_DEPTH} deep")


class _Unpacking:
    """Applies layers to one target and tells of it."""

    def __init__(
        self,
        source: ImageSource,
        target: Path,
        keep_owners: bool,
        events: EventSink,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._source = source
        self._target = target
        self._keep_owners = keep_owners
        self._events = events
        self._cancelled = cancelled
        self._vertex = f"unpack {source.name} {target}"
        self._name = f"unpacking {source.name} to {target}"
        self._started = time.time_ns()
        events.emit(Vertex(self._vertex, self._name, started_ns=self._started))
        self._told = keep_owners and ownership.here().recording
        if self._told:
            words = f"other owners than this user, and devices, are in the attribute {ownership.ATTRIBUTE} alone"
            self._warn(f"{words}: there are no subordinate ids")

    def _warn(self, words: str) -> None:
        self._events.emit(VertexWarning(self._vertex, words))

    def end(self, error: str | None) -> None:
        self._events.emit(
            Vertex(self._vertex, self._name, started_ns=self._started, completed_ns=time.time_ns(), error=error)
        )

    def apply(self, layer: Descriptor, diff_id: Digest) -> None:
        started = time.time_ns()

        def tell(position: int, completed_ns: int | None = None) -> None:
            name = f"layer {layer.digest.short}"
            self._events.emit(
                VertexStatus(self._vertex, layer.digest, name, position, layer.size_bytes, started, completed_ns)
            )

        blob = BlobInput(layer, self._source, progress=tell, cancelled=self._cancelled)
        with blob.open_verified() as stream:
            try:
                applied = apply_layer(
                    cast(BinaryIO, stream),
                    self._target,
                    media_type=layer.media_type,
                    keep_owners=self._keep_owners,
                    warn=self._warn,
                    cancelled=self._cancelled,
                )
            except LayerError:
                # Bytes that were damaged on the way are not the layer's fault: say so if it is that.
                _drain(stream)
                raise
            _drain(stream)
        if applied.diff_id != diff_id:
            raise DigestMismatch(f"layer {layer.digest} unpacks to {applied.diff_id}, not to the DiffID {diff_id}")
        if applied.recorded_devices and not self._told:
            self._told = True
            self._warn(f"empty files with the attribute {ownership.ATTRIBUTE} stand for devices: only root makes those")
        tell(layer.size_bytes, time.time_ns())


def _drain(stream: VerifyingStream) -> None:
    while stream.read(CHUNK_BYTES):
        pass


def _prepare(target: Path) -> bool:
    """Make sure that `target` is an empty directory; whether it was made."""
    try:
        try:
            os.makedirs(target.parent, exist_ok=True)
            os.mkdir(target, 0o755)
            return True
        except FileExistsError:
            if not target.is_dir():
                raise StoreError(f"cannot unpack into {target}: it is not a directory") from None
            if os.listdir(target):
                raise StoreError(
                    f"cannot unpack into {target}: it is not empty", hint="name a directory that does not exist yet"
                ) from None
            return False
    except OSError as e:
        raise StoreError(f"cannot unpack into {target}: {e.strerror}") from e


def _clear(target: Path, *, whole: bool) -> None:
    """Remove what a failed unpacking left; never through a symlink."""
    if whole:
        shutil.rmtree(target, ignore_errors=True)
        return
    for entry in list(os.scandir(target)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)
