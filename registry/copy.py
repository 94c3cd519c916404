"""The copy engine: moves an image from any source to any destination, and nothing twice.

Blobs first, in parallel; then manifests, instances before their index; then the name. A blob that
the destination has is not moved, one that it can mount or link is not moved either; the rest
streams from source to destination, checked against its digest on the way, touching no disk in
between unless a layer is compressed anew (`registry.recompress`). What the destination cannot hold,
or the caller wants otherwise, is converted (`registry.convert`), unless digests are to be preserved.

Threads live here and nowhere else in `registry`; `HostSlots` bounds them per host over any number
of copies. Callers: `builder.api`, `registry.sync`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from layers.errors import Cancelled, ImageError
from layers.events import EventSink, NullSink, Vertex, VertexStatus, VertexWarning
from layers.oci import (
    INDEX_MEDIA_TYPES,
    MANIFEST_MEDIA_TYPES,
    MAX_CONFIG_BYTES,
    MEDIA_DOCKER_CONFIG,
    MEDIA_OCI_CONFIG,
    MEDIA_OCI_MANIFEST,
    Descriptor,
    Digest,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    parse_manifest,
)
from layers.values import NamedTuple, replace
from registry.convert import (
    Format,
    LayerFormat,
    convert_index,
    convert_manifest,
    format_of,
    is_foreign,
    layer_compression,
    layer_format,
)
from registry.transport import (
    BlobInput,
    ImageDestination,
    ImageLocation,
    ImageSource,
    RawManifest,
    TransportContext,
    check_manifest,
    read_blob,
)

DEFAULT_JOBS = 6
"""Blobs in flight per copy, and per host over all copies."""
_MAX_INDEX_DEPTH = 4
_GRACE_S = 3.0
"""How long an interrupted copy waits for its threads; they end with the process anyway."""
_CONFIGS = frozenset({MEDIA_OCI_CONFIG, MEDIA_DOCKER_CONFIG})


class CopyOptions(NamedTuple):
    """How the copy may differ from the original.

    `platform` narrows an index to one image; `all_platforms` keeps it whole; with neither the
    destination's kind decides (the store and docker-archives take this machine's platform, others
    everything). `format` and `compression` convert; with `preserve_digests` whatever would change a
    digest is refused instead. `compression_level` is the codec's own scale; `force_compression`
    compresses also those layers anew that have the wanted compression already.
    """

    all_platforms: bool = False
    platform: Platform | None = None
    preserve_digests: bool = False
    format: Format | None = None
    compression: LayerFormat | None = None
    compression_level: int | None = None
    force_compression: bool = False


class CopyResult(NamedTuple):
    """What was done: `descriptor` is the copy's manifest or index, `source_digest` the original's.

    `written` False: all of it was there, under that name.
    """

    descriptor: Descriptor
    source_digest: Digest
    moved_bytes: int = 0
    copied_blobs: int = 0
    reused_blobs: int = 0
    present_blobs: int = 0
    written: bool = True


class HostSlots:
    """Bounds the transfers that use a host at once, and keeps them apart. Thread-safe; shared by a command's copies."""

    def __init__(self, per_host: int = DEFAULT_JOBS) -> None:
        self._per_host = per_host
        self._lock = threading.Lock()
        self._slots: dict[str, threading.Semaphore] = {}
        self._busy: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def hold(self, *hosts: str) -> Iterator[None]:
        """Take one slot of each host (local places, named "", have no bound), always in one order."""
        taken: list[threading.Semaphore] = []
        try:
            for host in sorted(set(hosts) - {""}):
                with self._lock:
                    slot = self._slots.setdefault(host, threading.Semaphore(self._per_host))
                slot.acquire()
                taken.append(slot)
            yield
        finally:
            for slot in taken:
                slot.release()

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Be the only one at work on `key`, so that copies which share a blob do not both move it."""
        with self._lock:
            lock, users = self._busy.get(key, (threading.Lock(), 0))
            self._busy[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._busy[key]
                if users == 1:
                    del self._busy[key]
                else:
                    self._busy[key] = (lock, users - 1)


def copy_location(
    source: ImageLocation,
    destination: ImageLocation,
    context: TransportContext,
    *,
    destination_context: TransportContext | None = None,
    options: CopyOptions | None = None,
    events: EventSink | None = None,
    jobs: int = DEFAULT_JOBS,
    cancelled: Callable[[], bool] | None = None,
    slots: HostSlots | None = None,
) -> CopyResult:
    """Open both ends, `copy_image` and commit.

    Raises: PybuildError; the destination's name is then unchanged.
    """
    opened = source.source(context)
    try:
        target = destination.destination(destination_context or context)
        try:
            result = copy_image(
                opened, target, options=options, events=events, jobs=jobs, cancelled=cancelled, slots=slots,
                scratch_dir=context.scratch_dir,
            )  # fmt: skip
            if result.written:
                target.commit()
            return result
        finally:
            target.close()
    finally:
        opened.close()


def copy_image(
    source: ImageSource,
    destination: ImageDestination,
    *,
    options: CopyOptions | None = None,
    events: EventSink | None = None,
    jobs: int = DEFAULT_JOBS,
    cancelled: Callable[[], bool] | None = None,
    slots: HostSlots | None = None,
    scratch_dir: Path = Path("/var/tmp"),  # noqa: S108  # spools there are anonymous files
) -> CopyResult:
    """Copy the image; the caller commits the destination, if the result says that something was written.

    Raises: ImageError, ContentError, RegistryError, StoreError, Cancelled.
    """
    work = _Copy(
        source, destination, options or CopyOptions(), events or NullSink(), jobs, cancelled, slots, scratch_dir
    )
    name = f"copying {source.name} to {destination.name}"
    started = time.time_ns()
    work.events.emit(Vertex(work.vertex, name, started_ns=started))
    try:
        result = work.run()
    except BaseException as e:
        said = "cancelled" if isinstance(e, Cancelled | KeyboardInterrupt) else str(e)
        work.events.emit(Vertex(work.vertex, name, started_ns=started, completed_ns=time.time_ns(), error=said))
        raise
    work.events.emit(Vertex(work.vertex, name, started_ns=started, completed_ns=time.time_ns()))
    return result


class _Node:
    """A manifest or index of the image, and what it becomes at the destination."""

    __slots__ = ("children", "document", "manifest", "present", "target")

    def __init__(self, manifest: RawManifest, document: Manifest | Index) -> None:
        self.manifest = manifest
        self.document = document
        self.children: list[_Node] = []
        self.target: Format | None = None
        self.present = False

    def walk(self) -> Iterator[_Node]:
        """Itself last: a manifest may be written when all that it refers to is."""
        for child in self.children:
            yield from child.walk()
        yield self


class _Copy:
    """The state of one copy."""

    def __init__(
        self,
        source: ImageSource,
        destination: ImageDestination,
        options: CopyOptions,
        events: EventSink,
        jobs: int,
        cancelled: Callable[[], bool] | None,
        slots: HostSlots | None,
        scratch_dir: Path,
    ) -> None:
        self.source = source
        self.destination = destination
        self.options = options
        self.events = events
        self.vertex = f"copy {source.name} {destination.name}"
        self._jobs = max(1, jobs)
        self._caller_cancelled = cancelled
        self._slots = slots or HostSlots()
        self._scratch_dir = scratch_dir
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._recompressed: dict[Digest, Descriptor] = {}
        self._lazy = self.options.compression in {"estargz", "zstd:chunked"}
        self._diff_ids: dict[Digest, Digest] = {}  # of layers whose tar became another
        self._counts = {"moved": 0, "copied": 0, "reused": 0, "present": 0}

    def run(self) -> CopyResult:
        top, there = self._look()
        node = self._load(top)
        if node.manifest.digest == top.digest:
            self._check_platform(node)
        self._decide(node)
        final = node.manifest
        if not self._changes(node) and there() == final.digest:
            self._count("present", len(_blobs(node)))
            return self._result(final, top)._replace(written=False)
        self._load_children(node, 0)
        for each in node.walk():
            self._decide(each)
        if node.children and not any(self._changes(n) for n in node.walk()):
            self._in_parallel([partial(self._find_present, n) for n in node.walk() if n is not node])
        goals: dict[Digest, tuple[Descriptor, LayerFormat | None]] = {}
        for each in node.walk():
            if not each.present:
                found = {d.digest: (d, self._goal(d, each)) for d in _blobs(each)}
                if isinstance(each.document, Manifest) and any(goal == "estargz" for _, goal in found.values()):
                    del found[each.document.config.digest]  # it will be another
                goals.update(found)
        # Largest first: the long transfers are not left to the end, when there is nothing to run beside them.
        ordered = sorted(goals.values(), key=lambda g: -g[0].size_bytes)
        self._in_parallel([partial(self._transfer, d, goal) for d, goal in ordered])
        final = self._put_manifests(node)
        return self._result(final, top)

    def _look(self) -> tuple[RawManifest, Callable[[], Digest | None]]:
        """The image to copy, and what tells the digest of what is there; two registries are asked at once."""
        source, destination = self.source, self.destination
        if not (source.host and destination.host):
            return check_manifest(source.get_manifest(), None), destination.head_manifest
        found: list[RawManifest] = []
        there: list[Digest | None] = []
        self._in_parallel(
            [
                lambda: found.append(check_manifest(source.get_manifest(), None)),
                lambda: there.append(destination.head_manifest()),
            ]
        )
        return found[0], lambda: there[0]

    def _result(self, final: RawManifest, top: RawManifest) -> CopyResult:
        return CopyResult(
            descriptor=final.descriptor,
            source_digest=top.digest,
            moved_bytes=self._counts["moved"],
            copied_blobs=self._counts["copied"],
            reused_blobs=self._counts["reused"],
            present_blobs=self._counts["present"],
        )

    # What is to be copied

    def _load(self, manifest: RawManifest) -> _Node:
        """The node of `manifest`, or of the one image in it if it is to be narrowed to a platform."""
        document = parse_manifest(manifest.raw, manifest.media_type)
        node = _Node(manifest._replace(media_type=document.media_type), document)
        for _ in range(_MAX_INDEX_DEPTH):
            if not isinstance(node.document, Index) or self._keeps_index():
                return node
            chosen = node.document.select(self.options.platform or Platform.host())
            inner = check_manifest(self.source.get_manifest(chosen.digest), chosen.digest)
            document = parse_manifest(inner.raw, chosen.media_type or inner.media_type)
            node = _Node(inner._replace(media_type=document.media_type), document)
        raise ImageError(f"{self.source.name}: indexes are nested more than {_MAX_INDEX_DEPTH} deep")

    def _check_platform(self, node: _Node) -> None:
        """Warn of a single image that is not for the platform that was asked for."""
        wanted, document = self.options.platform, node.document
        if wanted is None or isinstance(document, Index) or document.config.media_type not in _CONFIGS:
            return
        found = ImageConfig.parse(read_blob(self.source, document.config, MAX_CONFIG_BYTES)).platform
        if not wanted.runs(found):
            message = f"{self.source.name} is one image for {found}, not for {wanted}"
            self.events.emit(VertexWarning(self.vertex, message))

    def _keeps_index(self) -> bool:
        if self.options.platform is not None:
            return False
        if self.options.all_platforms and not self.destination.holds_indexes:
            raise ImageError(f"{self.destination.name} can hold one platform only", hint="choose one with --platform")
        return self.options.all_platforms or not self.destination.single_platform

    def _load_children(self, node: _Node, depth: int) -> None:
        if not isinstance(node.document, Index):
            return
        if depth >= _MAX_INDEX_DEPTH:
            raise ImageError(f"{self.source.name}: indexes are nested more than {_MAX_INDEX_DEPTH} deep")
        children: dict[Digest, _Node] = {}

        def load(descriptor: Descriptor) -> None:
            if descriptor.media_type not in INDEX_MEDIA_TYPES | MANIFEST_MEDIA_TYPES:
                raise ImageError(
                    f"{self.source.name}: its index refers to {descriptor.media_type!r}, which is no image"
                )
            with self._slots.hold(self.source.host):
                raw = check_manifest(self.source.get_manifest(descriptor.digest), descriptor.digest)
            document = parse_manifest(raw.raw, descriptor.media_type)
            children[descriptor.digest] = _Node(raw._replace(media_type=document.media_type), document)

        unique = {d.digest: d for d in node.document.manifests}
        self._in_parallel([partial(load, d) for d in unique.values()])
        node.children = [children[digest] for digest in unique]
        for child in node.children:
            self._load_children(child, depth + 1)

    # What is to change on the way

    def _decide(self, node: _Node) -> None:
        """Set the format that the node is to have; None for the one that it has."""
        have = format_of(node.document.media_type)
        target = self.options.format
        if target is None and not self.options.preserve_digests:
            accepted = self.destination.manifest_types
            if accepted is not None and node.document.media_type not in accepted:
                target = "docker" if have == "oci" else "oci"
            if (
                target is None
                and have == "docker"
                and self._lazy
                and (accepted is None or MEDIA_OCI_MANIFEST in accepted)
            ):
                target = "oci"
        node.target = None if target == have else target

    def _goal(self, descriptor: Descriptor, node: _Node) -> LayerFormat | None:
        """The compression that a layer is to have; None to leave it."""
        have = layer_compression(descriptor)
        if have is None:
            return None
        want: LayerFormat | None = self.options.compression
        if want is None and have == "none" and self.source.synthetic and self.destination.compresses:
            want = "gzip"
        if want is None and have == "zstd" and (node.target or format_of(node.document.media_type)) == "docker":
            # Docker's format has no zstd layers that any but the newest clients read.
            want = "gzip" if node.target else None
        forced = self.options.force_compression and self.options.compression
        if want is None or (want in {have, layer_format(descriptor)} and not forced):
            return None
        return want

    def _changes(self, node: _Node) -> bool:
        """Whether the node's digest will be another. Raises: ImageError if digests are to be preserved."""
        if self._lazy and (node.target or format_of(node.document.media_type)) == "docker":
            raise ImageError(
                f"{self.options.compression} needs annotations, which Docker's manifests do not have",
                hint="use --format oci, and a destination that takes it",
            )
        changes = node.target is not None or (
            isinstance(node.document, Manifest) and any(self._goal(d, node) is not None for d in node.document.layers)
        )
        if changes and self.options.preserve_digests and not self.source.synthetic:
            raise ImageError(
                f"copying {self.source.name} as asked would change its digest",
                hint="leave out --preserve-digests, or the conversion",
            )
        return changes

    def _find_present(self, node: _Node) -> None:
        with self._slots.hold(self.destination.host):
            node.present = self.destination.head_manifest(node.manifest.digest) == node.manifest.digest
        if node.present:
            self._count("present", len(_blobs(node)))

    # Blobs

    def _transfer(self, descriptor: Descriptor, goal: LayerFormat | None) -> None:
        if goal is None:
            # Before the slots: who waits for another copy's transfer must not keep that from its slot.
            with (
                self._slots.alone(f"{self.destination.room} {descriptor.digest}"),
                self._slots.hold(self.source.host, self.destination.host),
            ):
                self._move(descriptor, self.source)
            return
        with self._slots.hold(self.source.host, self.destination.host):
            from registry.recompress import recompress

            report = _Report(self, descriptor, f"{goal} {descriptor.digest.short}")
            blob = BlobInput(descriptor, self.source, progress=report.progress, cancelled=self._cancelled)
            spool = recompress(blob, goal, self.options.compression_level, self._scratch_dir)
            report.done()
        try:
            with self._slots.hold(self.destination.host):
                self._move(spool.descriptor, spool)
            with self._lock:
                self._recompressed[descriptor.digest] = spool.descriptor
                if spool.diff_id is not None:
                    self._diff_ids[descriptor.digest] = spool.diff_id
        finally:
            spool.close()

    def _move(self, descriptor: Descriptor, source: ImageSource) -> None:
        report = _Report(self, descriptor, f"{_kind(descriptor)} {descriptor.digest.short}")
        if self.destination.has_blob(descriptor):
            self._count("present")
            report.done(" exists")
            return
        reuse = self.destination.reuse_blob(descriptor, source)
        if reuse is not None:
            self._count("reused")
            report.done(f" {reuse}")
            return
        blob = BlobInput(descriptor, source, progress=report.progress, cancelled=self._cancelled)
        try:
            self.destination.put_blob(blob)
        finally:
            self._count("moved", blob.moved_bytes)
        self._count("copied")
        report.done()

    def _count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self._counts[what] += number

    # Manifests

    def _put_manifests(self, top: _Node) -> RawManifest:
        written: dict[Digest, RawManifest] = {}
        final = top.manifest
        for node in top.walk():
            manifest = self._converted(node, written)
            written[node.manifest.digest] = manifest
            if node is top:
                final = manifest
            elif node.present:
                continue
            self._check_cancelled()
            self.destination.put_manifest(manifest, top=node is top)
        return final

    def _converted(self, node: _Node, written: Mapping[Digest, RawManifest]) -> RawManifest:
        document = node.document
        target = node.target or format_of(document.media_type)
        if isinstance(document, Index):
            moved = [_moved(d, written[d.digest]) for d in document.manifests]
            if node.target is None and all(
                a.digest == b.digest for a, b in zip(moved, document.manifests, strict=True)
            ):
                return node.manifest
            if self.options.preserve_digests:
                self._changes(node)
            index = convert_index(document, moved, target)
            return RawManifest(index.raw, index.media_type, index.descriptor.digest)
        layers = [self._recompressed.get(d.digest, d) for d in document.layers]
        if node.target is None and layers == list(document.layers):
            return node.manifest
        manifest = convert_manifest(replace(document, config=self._config(document)), layers, target)
        return RawManifest(manifest.raw, manifest.media_type, manifest.descriptor.digest)

    def _config(self, document: Manifest) -> Descriptor:
        """The config with the DiffIDs that the layers have now; put, if that is another one."""
        if not any(d.digest in self._diff_ids for d in document.layers):
            return document.config
        from registry.recompress import spool_bytes

        config = ImageConfig.parse(read_blob(self.source, document.config, MAX_CONFIG_BYTES))
        if len(config.diff_ids) != len(document.layers):
            raise ImageError(f"{self.source.name}: its config has not as many DiffIDs as the manifest has layers")
        pairs = zip(document.layers, config.diff_ids, strict=True)
        rootfs = {"type": "layers", "diff_ids": [self._diff_ids.get(d.digest, old) for d, old in pairs]}
        made = ImageConfig.build({**config.document, "rootfs": rootfs})
        spool = spool_bytes(made.raw, document.config.media_type, self._scratch_dir)
        try:
            self._move(spool.descriptor, spool)
            return spool.descriptor
        finally:
            spool.close()

    # Threads

    def _cancelled(self) -> bool:
        return self._stop.is_set() or (self._caller_cancelled is not None and self._caller_cancelled())

    def _check_cancelled(self) -> None:
        if self._cancelled():
            raise Cancelled()

    def _in_parallel(self, tasks: Sequence[Callable[[], None]]) -> None:
        run_parallel(tasks, self._jobs, self._stop, self._caller_cancelled)


def run_parallel(
    tasks: Sequence[Callable[[], None]],
    jobs: int,
    stop: threading.Event,
    cancelled: Callable[[], bool] | None = None,
) -> None:
    """Run the tasks, `jobs` at a time; the first failure sets `stop`, for the others to end, and is raised.

    Raises: what a task raises; Cancelled.
    """

    def over() -> bool:
        return stop.is_set() or (cancelled is not None and cancelled())

    if len(tasks) <= 1 or jobs == 1:
        for task in tasks:
            if over():
                raise Cancelled()
            task()
        return
    queue = iter(tasks)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        while not over():
            with lock:
                task = next(queue, None)
            if task is None:
                return
            try:
                task()
            except BaseException as e:  # noqa: BLE001  # a thread's boundary: raised again below
                with lock:
                    failures.append(e)
                stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(tasks)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        # KeyboardInterrupt: the transfers see it at their next chunk.
        stop.set()
        deadline = time.monotonic() + _GRACE_S
        for thread in threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        raise
    if failures:
        raise next((e for e in failures if not isinstance(e, Cancelled)), failures[0])
    if over():
        raise Cancelled()


class _Report:
    """Tells the progress of one blob."""

    __slots__ = ("_copy", "_descriptor", "_name", "_position", "_started")

    def __init__(self, copy: _Copy, descriptor: Descriptor, name: str) -> None:
        self._copy = copy
        self._descriptor = descriptor
        self._name = name
        self._position = 0
        self._started = time.time_ns()

    def progress(self, position: int) -> None:
        self._position = position
        self._emit(self._name, position, None)

    def done(self, how: str = "") -> None:
        self._emit(self._name + how, self._descriptor.size_bytes, time.time_ns())

    def _emit(self, name: str, current: int, completed_ns: int | None) -> None:
        digest, size = self._descriptor.digest, self._descriptor.size_bytes
        self._copy.events.emit(
            VertexStatus(self._copy.vertex, digest, name, current, size, self._started, completed_ns)
        )


def _blobs(node: _Node) -> list[Descriptor]:
    """The config and the layers that are to be at the destination; foreign layers stay where their URLs say."""
    if isinstance(node.document, Index):
        return []
    return [node.document.config, *(d for d in node.document.layers if not (d.urls and is_foreign(d)))]


def _moved(descriptor: Descriptor, manifest: RawManifest) -> Descriptor:
    """An index's entry for a manifest that may have been converted."""
    return replace(
        descriptor, media_type=manifest.media_type, digest=manifest.digest, size_bytes=len(manifest.raw), data=None
    )


def _kind(descriptor: Descriptor) -> str:
    return (
        "config" if descriptor.media_type in _CONFIGS else "blob" if layer_compression(descriptor) is None else "layer"
    )
