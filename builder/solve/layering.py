"""Snapshots into layers, in the background: a child step needs its parent's files, not its blob.

A layer is made once per snapshot and compression and remembered in the store; a snapshot whose
layer was lost (the process died in between) gets it when it is next asked for. The other way round, a
snapshot whose files nobody asked for yet may have its layer alone (`pack`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from builder.plan.request import BuildRequest
from builder.solve.scheduler import Task, Workers
from layers.errors import Cancelled
from layers.oci import Descriptor, Digest
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.changeset import LayerResult
    from layers.layerdiff import Change
    from layers.lazylayer import LazyLayer
    from layers.records import LayerRecord
    from layers.snapshot import ActiveSnapshot
    from layers.snapshotters.native import NativeSnapshotter
    from layers.snapshotters.overlay import OverlaySnapshotter
    from layers.store import Store


_CHUNK_BYTES = 1 << 20
_MANY_CHANGES = 1000
"""From so many files on, writing them out is begun before their layer is made, and not waited for after it."""


class LayerReport(NamedTuple):
    """How long a layer took to make, by phase in seconds, and its size."""

    phases: Mapping[str, float] = {}
    size_bytes: int = 0


class LayerBook:
    """Makes and remembers layers. Thread-safe; close it to wait for the work under way."""

    def __init__(self, store: Store, request: BuildRequest, cancelled: Callable[[], bool]) -> None:
        self._store = store
        self._compression = request.compression
        self._level = request.compression_level
        self._reproducible = request.source_date_epoch is not None
        self._clamp_s = request.source_date_epoch if request.rewrite_timestamp else None
        self._verify = request.verify_layers
        self._squash = request.squash or request.squash_all
        self.packs = not wants_files(request)
        """Whether layers may be made of files that no snapshot holds."""
        # A snapshot's layer differs with these; a cached RUN may have one from a build that had others.
        self._variant: str = self._compression
        if self._level is not None:
            self._variant += f";level={self._level}"
        if self._clamp_s is not None:
            self._variant += f";epoch={self._clamp_s}"
        self._cancelled = cancelled
        self._lock = threading.Lock()
        self._pool: Workers | None = None
        self.made: Callable[[str, Descriptor], None] | None = None
        """Told of the layers that an image will have (snapshot, blob), in the thread that made them."""
        self.saved_bytes = 0
        """Of files that `folded` did not store twice."""
        self._made: dict[str, Task[LayerRecord]] = {}
        self._reports: dict[str, LayerReport] = {}
        self._others: list[Task[None]] = []

    def start(self, snapshot: str, *, wanted: bool = True) -> None:
        """Begin to make a snapshot's layer, unless it is known or under way; nothing if all will be squashed.

        `made` is told of it when it is there, if it is `wanted` in an image.
        """
        if self._squash:
            return
        with self._lock:
            task = self._made.get(snapshot)
            if task is None:
                self._made[snapshot] = self._workers().submit(partial(self._make_and_tell, snapshot, wanted))

    def _make_and_tell(self, snapshot: str, wanted: bool) -> LayerRecord:
        record = self._make(snapshot)
        if wanted and self.made is not None:
            self.made(snapshot, record.descriptor)
        return record

    def add_phase(self, snapshot: str, name: str, seconds: float) -> None:
        """Account for what else was done with a layer."""
        with self._lock:
            known = self._reports.get(snapshot, LayerReport())
            phases = {**known.phases, name: known.phases.get(name, 0.0) + seconds}
            self._reports[snapshot] = known._replace(phases=phases)

    def submit(self, work: Callable[[], None]) -> None:
        """Do something else in the background, which `finish` waits for."""
        with self._lock:
            self._others.append(self._workers().submit(work))

    def _workers(self) -> Workers:
        if self._pool is None:
            self._pool = Workers(max(1, (os.cpu_count() or 2) // 2), "layer")
        return self._pool

    def finish(self) -> None:
        """Wait for what `submit` was given. Raises: what that raised."""
        with self._lock:
            others, self._others = self._others, []
        for task in others:
            task.result()

    def get(self, snapshot: str) -> LayerRecord:
        """The layer of a snapshot, made now if need be. Raises: LayerError, StoreError, Cancelled."""
        with self._lock:
            task = self._made.get(snapshot)
        if task is not None:
            return task.result()
        return self._known(snapshot) or self._make(snapshot)

    def squashed(self, snapshot: str, base: str | None) -> LayerRecord:
        """One layer of all that `snapshot` and those beneath it, up to `base`, change. Raises: as `get`."""
        known = self._known(snapshot, f";squash={base or ''}")
        if known is not None:
            return known
        with ExitStack() as stack:
            return self._write(
                snapshot, partial(squashed_changes, self._store, snapshot, base, stack), f";squash={base or ''}"
            )

    def folded(self, snapshots: Sequence[str], base: str | None) -> tuple[list[int], list[LayerRecord]]:
        """Layers of a build's new `snapshots`, oldest first: those that repeat another's data made one with it.

        The numbers are of the snapshots that end a layer. `saved_bytes` grows by what is not stored twice.
        """
        from layers.fold import fold_groups

        changes = [snapshot_changes(self._store, id) for id in snapshots]
        folding = fold_groups([(stream, os.fspath(root)) for stream, root in changes])
        self.saved_bytes += folding.saved_bytes
        records = []
        for group in folding.groups:
            below = snapshots[group[0] - 1] if group[0] else base
            top = snapshots[group[-1]]
            records.append(self.get(top) if len(group) == 1 else self.squashed(top, below))
        return [group[-1] for group in folding.groups], records

    def recompressed(self, layer: Descriptor) -> Descriptor:
        """A base image's layer in this build's compression; the layer itself if it is in it and no level is asked for.

        Raises: BlobNotFound, DigestMismatch, LayerError, StoreError, Cancelled.
        """
        from layers.compression import compressor, decompressor, kind_of_media_type, media_type

        if self._compression == "zstd:chunked":
            return self._made_lazy(layer)
        # An eStargz layer has another DiffID, and the base's config is not this build's to change.
        wanted = "gzip" if self._compression == "estargz" else self._compression
        have = kind_of_media_type(layer.media_type)
        if have is None or layer.urls or (have == wanted and self._level is None):
            return layer
        engine = compressor(wanted, self._level, os.cpu_count() or 1, reproducible=self._reproducible)
        try:
            with self._store.blobs.open(layer.digest) as stream, self._store.ingest() as ingest:
                plain = decompressor(stream, kind=have)
                while data := plain.read(_CHUNK_BYTES):
                    if self._cancelled():
                        raise Cancelled
                    ingest.write(engine.write(data))
                ingest.write(engine.finish())
                stored = ingest.commit()
        finally:
            engine.close()
        return Descriptor(media_type=media_type(wanted), digest=stored.digest, size_bytes=stored.size_bytes)

    def _made_lazy(self, layer: Descriptor) -> Descriptor:
        """A base image's layer as zstd:chunked, unless it is that already."""
        from layers.compression import decompressor, kind_of_media_type
        from layers.lazylayer import convert_to_lazy
        from layers.zstdchunked import MANIFEST_CHECKSUM

        have = kind_of_media_type(layer.media_type)
        if have is None or layer.urls or (MANIFEST_CHECKSUM in layer.annotations and self._level is None):
            return layer
        with self._store.blobs.open(layer.digest) as stream, self._store.ingest() as ingest:
            made = convert_to_lazy("zstd:chunked", decompressor(stream, kind=have), ingest, level=self._level)
            stored = ingest.commit()
        return Descriptor(
            media_type=made.media_type,
            digest=stored.digest,
            size_bytes=stored.size_bytes,
            annotations=made.annotations,
        )

    def _known(self, snapshot: str, suffix: str = "") -> LayerRecord | None:
        record = self._store.layers.lookup(snapshot, self._variant + suffix)
        if record is not None and self._store.stat(record.descriptor.digest) is not None:
            return record
        return None

    def _make(self, snapshot: str) -> LayerRecord:
        known = self._known(snapshot)
        if known is not None:
            return known
        return self._write(snapshot, partial(snapshot_changes, self._store, snapshot))

    def _write(
        self, snapshot: str, find: Callable[[], tuple[Iterator[Change], Path | str]], suffix: str = ""
    ) -> LayerRecord:
        began = time.perf_counter()
        changes, root = find()
        timed = _Timed(changes, self._store.flush_ahead)
        record = self._encode(timed, root)
        if self._verify and self._compression != "estargz":
            self._check(record.descriptor, record.diff_id, *find())
        self._store.layers.record(snapshot, record, compression=self._variant + suffix)
        phases = {"diff": timed.spent_s, "compress": time.perf_counter() - began - timed.spent_s}
        self._reports[snapshot] = LayerReport(phases, record.descriptor.size_bytes)
        return record

    def pack(self, changes: Iterable[Change], root: Path, parent: str | None) -> str:
        """A snapshot on `parent` of which there is the layer of `changes`, and no files until they are needed.

        Nothing of it is left where this fails. Raises: LayerError, StoreError, Cancelled, and what `changes` raises.
        """
        snapshots = self._store.snapshots
        assert snapshots.driver == "overlay"
        began = time.perf_counter()
        record = self._encode(changes, root)
        snapshot = snapshots.defer(parent, record, compression=self._variant).id
        self._reports[snapshot] = LayerReport({"pack": time.perf_counter() - began}, record.descriptor.size_bytes)
        return snapshot

    def _encode(self, changes: Iterable[Change], root: Path | str) -> LayerRecord:
        """Write the layer of the changes to the store, in this build's compression."""
        from layers.changeset import write_layer
        from layers.records import LayerRecord

        write = partial(
            write_layer,
            changes,
            root,
            clamp_mtime=self._clamp_s,
            cancelled=self._cancelled,
        )
        annotations: Mapping[str, str] = {}
        with self._store.ingest() as ingest:
            result: LayerResult | LazyLayer
            if self._compression == "estargz" or self._compression == "zstd:chunked":
                from layers.lazylayer import write_lazy

                result = write_lazy(
                    self._compression,
                    partial(write, compression="none"),
                    ingest,
                    level=self._level,
                    reproducible=self._reproducible,
                )
                annotations = result.annotations
            else:
                result = write(
                    ingest, compression=self._compression, level=self._level, reproducible=self._reproducible
                )
            ingest.commit()
        descriptor = Descriptor(
            media_type=result.media_type,
            digest=result.digest,
            size_bytes=result.size_bytes,
            annotations=dict(annotations),
        )
        return LayerRecord(result.diff_id, descriptor, result.uncompressed_bytes)

    def _check(self, layer: Descriptor, diff_id: Digest, changes: Iterator[Change], root: Path | str) -> None:
        """`--verify-layers`. Raises: LayerError naming the first thing in which layer and tree differ."""
        from layers.errors import LayerError
        from layers.verify import verify_layer

        with self._store.blobs.open(layer.digest) as stream:
            try:
                verify_layer(stream, changes, root, diff_id=diff_id, clamp_mtime=self._clamp_s)
            except LayerError as e:
                hint = "the disk, the memory or pybuild is at fault: please report it"
                raise LayerError(f"layer {layer.digest} is not what its step made: {e.message}", hint=hint) from e

    def report(self, snapshot: str | None) -> LayerReport:
        """What this build's making of a layer took; nothing if it was known."""
        return self._reports.get(snapshot or "", LayerReport())

    def close(self) -> None:
        """Wait for the layers under way; those not begun are dropped."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


class _Timed:
    """Counts the time that an iterator takes of its own, and calls `many` once it has given many changes."""

    def __init__(self, changes: Iterator[Change], many: Callable[[], None]) -> None:
        self._changes = changes
        self._many = many
        self._left = _MANY_CHANGES
        self.spent_s = 0.0

    def __iter__(self) -> Iterator[Change]:
        return self

    def __next__(self) -> Change:
        began = time.perf_counter()
        self._left -= 1
        if self._left == 0:
            self._many()
        try:
            return next(self._changes)
        finally:
            self.spent_s += time.perf_counter() - began


def wants_files(request: BuildRequest) -> bool:
    """Whether a build needs the files of its result for more than their layer."""
    if request.squash or request.squash_all or request.fold or request.verify_layers:
        return True
    if request.secrets and request.secret_gate:
        return True
    return any(output.type in {"local", "tar", "squashfs"} for output in request.outputs)


def snapshot_changes(store: Store, snapshot: str) -> tuple[Iterator[Change], Path]:
    """What a snapshot changes in its parent, and the directory that holds its files."""
    from layers.layerdiff import diff_overlay, diff_trees

    snapshots = store.snapshots
    snapshots.view(snapshot)  # has a packed one unpacked
    *below, top = snapshots.chain(snapshot)
    if top.driver == "native":
        return diff_trees(below[-1].path if below else None, top.path), top.path
    lower = snapshots.view(below[-1].id).lower if below else ()
    return diff_overlay(top.path, lower, snapshots.dialect), top.path


def active_changes(snapshots: OverlaySnapshotter | NativeSnapshotter, active: ActiveSnapshot) -> Iterator[Change]:
    """What a snapshot that is being written changes in its parent; it is mounted nowhere."""
    from layers.layerdiff import diff_overlay

    lower = active.mount.lower if active.mount.type == "overlay" else ()
    return diff_overlay(active.path, lower, snapshots.dialect)


def squashed_changes(store: Store, snapshot: str, base: str | None, stack: ExitStack) -> tuple[Iterator[Change], str]:
    """What makes a snapshot's tree out of `base`'s, and where its files are while `stack` is open."""
    from layers.layerdiff import diff_trees
    from layers.squash import squash_changes

    def opened(id: str) -> str:
        from builder.solve.steps import open_mount

        return f"/proc/self/fd/{stack.enter_context(open_mount(store.snapshots.view(id)))}/."

    merged = opened(snapshot)
    beneath = None if base is None else opened(base)
    if base is None or store.snapshots.driver == "native":
        return diff_trees(beneath, merged), merged
    names = [part.id for part in store.snapshots.chain(snapshot)]
    steps = (snapshot_changes(store, id)[0] for id in names[names.index(base) + 1 :])
    return squash_changes(steps, beneath, merged), merged
