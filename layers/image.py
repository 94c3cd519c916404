"""An image: a manifest and its config in a content store, its unpacked form, and how to write a new one.

    load_image      a descriptor (index, manifest list or manifest) -> Image of one platform
    unpack_image    its layers -> the snapshot of the whole
    write_image     config document and layer descriptors -> manifest, stored

Unpacked base layers are snapshots called by their chain ID (config.md, "Layer ChainID"), so images
share them. With overlayfs the layers unpack side by side, each into a directory of its own, since
most of them depend on nothing beneath; those that do are unpacked again once their parent is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from layers.content import ContentStore
from layers.errors import BlobNotFound, Cancelled, DigestMismatch, ImageError, LayerError
from layers.oci import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    MEDIA_DOCKER_CONFIG,
    MEDIA_DOCKER_LAYER,
    MEDIA_DOCKER_LAYER_GZIP,
    MEDIA_DOCKER_LAYER_ZSTD,
    MEDIA_DOCKER_MANIFEST,
    MEDIA_OCI_CONFIG,
    MEDIA_OCI_LAYER,
    MEDIA_OCI_LAYER_GZIP,
    MEDIA_OCI_LAYER_ZSTD,
    MEDIA_OCI_MANIFEST,
    Descriptor,
    Digest,
    ImageConfig,
    Manifest,
    Platform,
    chain_id,
    encode_json,
    parse_manifest,
)
from layers.records import LayerRecord, compression_of
from layers.snapshot import ActiveSnapshot, Snapshot
from layers.values import NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO, Literal

    from layers.apply import ApplyResult
    from layers.snapshotters.native import NativeSnapshotter
    from layers.snapshotters.overlay import OverlaySnapshotter
    from layers.store import Store

_MAX_LAYERS = 10_000
_MAX_INDEX_DEPTH = 3
_ROOT_UNTOUCHED = 0o1751
"""A mode that no layer gives its root: still there after unpacking, the layer did not mention it."""
_DOCKER_MEDIA = {
    MEDIA_OCI_LAYER: MEDIA_DOCKER_LAYER,
    MEDIA_OCI_LAYER_GZIP: MEDIA_DOCKER_LAYER_GZIP,
    MEDIA_OCI_LAYER_ZSTD: MEDIA_DOCKER_LAYER_ZSTD,
}
_OCI_MEDIA = {docker: oci for oci, docker in _DOCKER_MEDIA.items()}


class Image(NamedTuple):
    """One platform's image. `descriptor` is its manifest's."""

    descriptor: Descriptor
    manifest: Manifest
    config: ImageConfig

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        return self.manifest.layers

    @property
    def diff_ids(self) -> tuple[Digest, ...]:
        return self.config.diff_ids

    @property
    def image_id(self) -> Digest:
        """The config's digest, which docker and podman call the image's ID."""
        return self.manifest.config.digest


def load_image(store: ContentStore, descriptor: Descriptor, platform: Platform) -> Image:
    """Read the image that `descriptor` leads to; from an index, the one that `platform` runs best.

    Raises: BlobNotFound, DigestMismatch, SizeMismatch; ImageError (no such platform, not an image).
    """
    for _ in range(_MAX_INDEX_DEPTH):
        raw = store.read(descriptor.digest, MAX_MANIFEST_BYTES)
        document = parse_manifest(raw, descriptor.media_type)
        if isinstance(document, Manifest):
            config = ImageConfig.parse(store.read(document.config.digest, MAX_CONFIG_BYTES))
            _check_layers(document, config)
            return Image(descriptor, document, config)
        descriptor = document.select(platform)
    raise ImageError(f"{descriptor.digest}: indexes are nested more than {_MAX_INDEX_DEPTH} deep")


def _check_layers(manifest: Manifest, config: ImageConfig) -> None:
    if manifest.config.media_type not in {MEDIA_OCI_CONFIG, MEDIA_DOCKER_CONFIG}:
        raise ImageError(f"not a container image: its config is of the type {manifest.config.media_type!r}")
    if len(manifest.layers) != len(config.diff_ids):
        raise ImageError(
            f"the manifest has {len(manifest.layers)} layers, its config names {len(config.diff_ids)} diff IDs"
        )
    if len(manifest.layers) > _MAX_LAYERS:
        raise ImageError(f"the image has {len(manifest.layers)} layers; more than {_MAX_LAYERS} are refused")


def chain_ids(diff_ids: Sequence[Digest]) -> list[Digest]:
    """The chain ID of each layer with all that lie beneath it, base first."""
    chain: list[Digest] = []
    for diff_id in diff_ids:
        chain.append(chain_id([chain[-1], diff_id] if chain else [diff_id]))
    return chain


class LayerApply(Protocol):
    """What `layers.apply.apply_layer` is."""

    def __call__(
        self,
        stream: BinaryIO,
        target: Path,
        *,
        whiteouts: Literal["delete", "overlay"],
        dialect: Literal["trusted", "user"],
        lower: Sequence[Path] | None,
        media_type: str | None,
        cancelled: Callable[[], bool] | None,
    ) -> ApplyResult: ...


class UnpackOptions(NamedTuple):
    """How `unpack_image` works. All callables may be called from several threads at once.

    `fetch` makes a layer's blob be in the store (it may wait for a download: unpacking of others goes
    on). `done` is told of each layer that has been unpacked, or was there. `threads` None: one per CPU.
    """

    fetch: Callable[[Descriptor], None] | None = None
    done: Callable[[Descriptor], None] | None = None
    cancelled: Callable[[], bool] | None = None
    threads: int | None = None
    apply: LayerApply | None = None


def unpack_image(store: Store, image: Image, options: UnpackOptions | None = None) -> str | None:
    """Unpack the layers that have no snapshot yet; the ID of the snapshot of all, None without layers.

    Every layer's content is checked against the config's diff ID. Idempotent; two processes that
    unpack the same layer do it once. No gc removes the snapshot while this process lives.
    Raises: LayerError, DigestMismatch, BlobNotFound, StoreError, Cancelled, and what `fetch` raises.
    """
    _check_layers(image.manifest, image.config)
    if not image.layers:
        return None
    chain = chain_ids(image.diff_ids)
    snapshots = store.snapshots
    if _there(store, chain[-1]):
        return chain[-1]
    chosen = options or UnpackOptions()
    from layers.snapshotters.overlay import OverlaySnapshotter

    if isinstance(snapshots, OverlaySnapshotter):
        return _Unpacking(store, snapshots, image, chain, chosen).run()
    return _unpack_native(store, snapshots, image, chain, chosen)


def _there(store: Store, snapshot: str) -> bool:
    """Whether a snapshot is there for this driver; if so, it stays until this process ends."""
    return store.snapshots.get(snapshot) is not None and snapshot in store.claim(snapshots=[snapshot])


def _open_layer(store: Store, descriptor: Descriptor, options: UnpackOptions) -> BinaryIO:
    """The blob as a plain file: what comes out of it is hashed anyway."""
    if options.fetch is not None:
        options.fetch(descriptor)
    path = store.path(descriptor.digest)
    if path is None:
        raise BlobNotFound(f"layer {descriptor.digest} is not in the store", hint="pull the image again")
    return open(path, "rb", buffering=0)


def _apply(
    store: Store,
    descriptor: Descriptor,
    diff_id: Digest,
    target: Path,
    lower: Sequence[Path] | None,
    options: UnpackOptions,
) -> ApplyResult:
    """Apply one layer. Raises: DigestMismatch if its content is not what the config says."""
    from layers.apply import apply_layer

    apply: LayerApply = options.apply or apply_layer
    whiteouts: Literal["delete", "overlay"] = "overlay" if store.snapshots.driver == "overlay" else "delete"
    with _open_layer(store, descriptor, options) as stream:
        try:
            result = apply(
                stream,
                target,
                whiteouts=whiteouts,
                dialect=store.snapshots.dialect,
                lower=lower,
                media_type=_layer_type(descriptor.media_type),
                cancelled=options.cancelled,
            )
        except LayerError as e:
            raise LayerError(f"layer {descriptor.digest}: {e.message}", hint=e.hint) from e
    if result.diff_id != diff_id:
        raise DigestMismatch(
            f"layer {descriptor.digest} unpacks to {result.diff_id}, but the image's config says {diff_id}"
        )
    return result


def unpack_layer(store: Store, layer: LayerRecord, active: ActiveSnapshot) -> None:
    """Unpack one layer into an active snapshot that was prepared on what it lies on.

    Raises: BlobNotFound, DigestMismatch, LayerError.
    """
    lower = active.mount.lower if active.mount.type == "overlay" else ()
    _apply(store, layer.descriptor, layer.diff_id, active.path, lower, UnpackOptions())


def _layer_type(media_type: str) -> str | None:
    """None, which has the compression found out, for the types that some tools write by mistake."""
    return media_type if media_type in _DOCKER_MEDIA or media_type in _OCI_MEDIA else None


class _Unpacking:
    """Unpacks an image's layers into overlay snapshots, several at once."""

    def __init__(
        self,
        store: Store,
        snapshots: OverlaySnapshotter,
        image: Image,
        chain: Sequence[Digest],
        options: UnpackOptions,
    ) -> None:
        import threading

        self._store = store
        self._snapshots = snapshots
        self._image = image
        self._chain = chain
        self._failed = threading.Event()
        outer = options.cancelled
        self._options = options._replace(
            cancelled=lambda: self._failed.is_set() or (outer is not None and outer()),
        )
        self._committed = [threading.Event() for _ in chain]

    def run(self) -> str:
        threads = self._options.threads or len(os.sched_getaffinity(0))
        if threads <= 1 or len(self._chain) == 1:
            for index in range(len(self._chain)):
                self._layer(index)
            return self._chain[-1]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(threads, len(self._chain)), thread_name_prefix="unpack") as pool:
            try:
                # Base first: a layer waits only for those that were begun before it.
                futures = [pool.submit(self._guarded, index) for index in range(len(self._chain))]
                errors = [e for e in (future.exception() for future in futures) if e is not None]
            except BaseException:
                self._failed.set()  # interrupted: the pool waits for its threads
                raise
        if errors:
            # The first failure makes the others stop: they are cancelled, not to blame.
            raise next((e for e in errors if not isinstance(e, Cancelled)), errors[0])
        return self._chain[-1]

    def _guarded(self, index: int) -> None:
        try:
            self._layer(index)
        except BaseException:
            self._failed.set()
            for event in self._committed:
                event.set()
            raise

    def _layer(self, index: int) -> None:
        descriptor, name = self._image.layers[index], self._chain[index]
        with self._store.flight(f"unpack:{self._snapshots.label}:{name}"):
            if not _there(self._store, name):
                self._unpack(index)
        self._committed[index].set()
        if self._options.done is not None:
            self._options.done(descriptor)

    def _unpack(self, index: int) -> None:
        diff_id = self._image.diff_ids[index]
        parent = self._chain[index - 1] if index else None
        active, result = self._alone(index) if index else self._on_parent(index, None)
        if active is None:
            self._await(index - 1)
            active, result = self._on_parent(index, parent)
        assert result is not None
        try:
            if parent is not None:
                self._await(index - 1)
                self._inherit_root(active, parent)
                if result.whiteouts:
                    from layers.apply import settle_whiteouts

                    lower = self._snapshots.view(parent).lower
                    settle_whiteouts(active.path, result.whiteouts, lower, self._snapshots.dialect)
            self._snapshots.adopt(active, self._chain[index], parent)
        except BaseException:
            self._snapshots.discard(active)
            raise
        descriptor = self._image.layers[index]
        self._store.layers.record(
            self._chain[index],
            LayerRecord(diff_id, descriptor, result.size_bytes),
            compression=compression_of(descriptor.media_type),
        )

    def _alone(self, index: int) -> tuple[ActiveSnapshot | None, ApplyResult | None]:
        """Unpack without looking at the layers beneath; nothing if that will not do."""
        if self._committed[index - 1].is_set():
            return None, None  # no need for guesses
        active = self._snapshots.prepare(None)
        try:
            os.chmod(active.path, _ROOT_UNTOUCHED)
            result = _apply(
                self._store, self._image.layers[index], self._image.diff_ids[index], active.path, None, self._options
            )
        except LayerError:
            # It may link to a file of a lower layer; if it is bad, the second attempt will say so.
            self._snapshots.discard(active)
            return None, None
        except BaseException:
            self._snapshots.discard(active)
            raise
        if not result.independent:
            self._snapshots.discard(active)
            return None, None
        return active, result

    def _on_parent(self, index: int, parent: str | None) -> tuple[ActiveSnapshot, ApplyResult]:
        active = self._snapshots.prepare(parent)
        lower = active.mount.lower if parent is not None else ()
        try:
            return active, _apply(
                self._store, self._image.layers[index], self._image.diff_ids[index], active.path, lower, self._options
            )
        except BaseException:
            self._snapshots.discard(active)
            raise

    def _await(self, index: int) -> None:
        """Wait for a layer beneath. Raises: Cancelled."""
        while not self._committed[index].wait(0.2):
            if self._options.cancelled is not None and self._options.cancelled():
                raise Cancelled
        if self._failed.is_set():
            raise Cancelled

    def _inherit_root(self, active: ActiveSnapshot, parent: str) -> None:
        """Give `/` the lower layer's attributes where the layer has none of its own."""
        if os.stat(active.path).st_mode & 0o7777 == _ROOT_UNTOUCHED:
            from layers.snapshotters.overlay import copy_root

            below = self._snapshots.get(parent)
            assert below is not None
            copy_root(below.path, active.path)


def _unpack_native(
    store: Store, snapshots: NativeSnapshotter, image: Image, chain: Sequence[Digest], options: UnpackOptions
) -> str:
    """One tree for all layers on top of the highest that is there: copies of each stage would cost too much."""
    name = chain[-1]
    with store.flight(f"unpack:{snapshots.label}:{name}"):
        if _there(store, name):
            return name
        have = max((i + 1 for i, c in enumerate(chain) if _there(store, c)), default=0)
        active = snapshots.prepare(chain[have - 1] if have else None)
        records: list[tuple[Digest, LayerRecord]] = []
        try:
            for index in range(have, len(chain)):
                descriptor, diff_id = image.layers[index], image.diff_ids[index]
                result = _apply(store, descriptor, diff_id, active.path, (), options)
                records.append((chain[index], LayerRecord(diff_id, descriptor, result.size_bytes)))
                if options.done is not None:
                    options.done(descriptor)
        except BaseException:
            snapshots.discard(active)
            raise
        committed: Snapshot = snapshots.commit(active, id=name)
    for snapshot, record in records:
        store.layers.record(snapshot, record)
    return committed.id


def write_image(
    store: ContentStore,
    config: ImageConfig | Mapping[str, Any],
    layers: Sequence[Descriptor],
    *,
    annotations: Mapping[str, str] | None = None,
    format: Literal["oci", "docker"] = "oci",
    subject: Descriptor | None = None,
) -> Descriptor:
    """Store config and manifest of an image whose layers are there; the manifest's descriptor.

    See `describe_image`. Raises: ImageError, StoreError.
    """
    raw, manifest = describe_image(config, layers, annotations=annotations, format=format, subject=subject)
    for data, descriptor in ((raw, manifest.config), (manifest.raw, manifest.descriptor)):
        with store.ingest(expected=descriptor) as ingest:
            ingest.write(data)
            ingest.commit()
    return manifest.descriptor


def describe_image(
    config: ImageConfig | Mapping[str, Any],
    layers: Sequence[Descriptor],
    *,
    annotations: Mapping[str, str] | None = None,
    format: Literal["oci", "docker"] = "oci",
    subject: Descriptor | None = None,
) -> tuple[bytes, Manifest]:
    """The config's bytes and the manifest of an image. Pure.

    Equal arguments give equal bytes. Media types of config and layers follow `format`; annotations and
    a subject exist in OCI manifests only. Raises: ImageError.
    """
    raw = config.raw if isinstance(config, ImageConfig) else encode_json(config)
    parsed = ImageConfig.parse(raw)
    docker = format == "docker"
    if docker and (annotations or subject is not None):
        raise ImageError("a Docker manifest has neither annotations nor a subject", hint="write an OCI manifest")
    described = Descriptor.of(raw, MEDIA_DOCKER_CONFIG if docker else MEDIA_OCI_CONFIG)
    media = _DOCKER_MEDIA if docker else _OCI_MEDIA
    plain = [
        Descriptor(
            media_type=media.get(d.media_type, d.media_type),
            digest=d.digest,
            size_bytes=d.size_bytes,
            urls=d.urls,
            annotations={} if docker else d.annotations,
        )
        for d in layers
    ]
    manifest = Manifest.build(
        config=described,
        layers=plain,
        annotations=annotations,
        media_type=MEDIA_DOCKER_MANIFEST if docker else MEDIA_OCI_MANIFEST,
        subject=subject,
    )
    _check_layers(manifest, parsed)
    return raw, manifest
