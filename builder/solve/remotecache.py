"""The step cache in a registry or a directory: written after a build, read by another machine's.

A cache is one OCI artifact: a manifest whose layers are the steps' layers (and tars of cache mounts), so
that registries keep them, and whose config says which key has which layer. The config also lies in
the manifest, as its descriptor's `data`: a build resolves all of its steps by one request, and
fetches layers only where a later step or the output needs their files. With `type=inline` the same
document is a field of the image's config.

Spec: image-spec manifest.md (artifacts), descriptor.md (`data`).
"""

from __future__ import annotations

import json
import os
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.errors import CacheLostError
from builder.plan.graph import BuildGraph, RunOp
from builder.plan.request import BuildRequest, CacheRef
from layers.errors import Cancelled, ImageError, PybuildError
from layers.events import EventSink, Vertex, VertexWarning
from layers.oci import MAX_CONFIG_BYTES, Descriptor, Digest, ImageConfig, Index, Manifest, encode_json, parse_manifest
from layers.records import LayerRecord
from layers.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from builder.building import Parts
    from builder.export import ExportedImage
    from builder.solve.results import StepResult
    from builder.solve.solver import Solver
    from layers.store import Store
    from registry.transport import ImageDestination, ImageSource

ARTIFACT_TYPE = "application/vnd.pybuild.cache.v1"
CONFIG_TYPE = "application/vnd.pybuild.cache.config.v1+json"
MOUNT_TYPE = "application/vnd.pybuild.cache-mount.v1.tar+zstd"
INLINE_FIELD = "pybuild.cache.v1"
_MAX_INLINE_BYTES = 2 << 20
"""Of a config carried in its descriptor: the manifest must stay below 4 MiB, and base64 takes a third more."""
_MAX_STEPS = 100_000
_MAX_TRIES = 3


class RemoteStep(NamedTuple):
    """A step's result elsewhere: its content key, and the layer that it adds to its parent."""

    key: str
    created_ns: int
    layer: LayerRecord


class RemoteMount(NamedTuple):
    """The contents of a cache mount: a tar, and when it was last used (ns since the epoch)."""

    id: str
    descriptor: Descriptor
    used_ns: int


class CacheIndex(NamedTuple):
    """What a cache holds: steps by definition and by content key, and cache mounts."""

    steps: Mapping[str, RemoteStep]
    mounts: tuple[RemoteMount, ...] = ()


def encode_index(steps: Iterable[tuple[str, RemoteStep]], mounts: Sequence[RemoteMount] = ()) -> bytes:
    """The document; equal arguments give equal bytes."""
    layers: dict[Digest, int] = {}
    described: list[dict[str, Any]] = []
    rows: list[list[object]] = []
    for definition, step in steps:
        record = step.layer
        at = layers.setdefault(record.descriptor.digest, len(layers))
        if at == len(described):
            described.append(
                {**record.descriptor.to_json(), "diff": record.diff_id, "uncompressed": record.uncompressed_size}
            )
        rows.append([definition, step.key, step.created_ns, at])
    doc = {
        "version": 1,
        "layers": described,
        "steps": rows,
        "mounts": [{"id": m.id, "used_ns": m.used_ns, "blob": m.descriptor.to_json()} for m in mounts],
    }
    return encode_json(doc)


def decode_index(raw: bytes) -> CacheIndex:
    """Raises: ImageError for anything but a cache document of this version."""
    try:
        doc = json.loads(raw)
        if doc["version"] != 1 or len(doc["steps"]) > _MAX_STEPS:
            raise ImageError(f"a cache of version {doc['version']!r} is not known here")
        layers = [
            LayerRecord(Digest(entry["diff"]), Descriptor.from_json(_plain(entry)), int(entry["uncompressed"]))
            for entry in doc["layers"]
        ]
        steps: dict[str, RemoteStep] = {}
        for definition, key, created_ns, at in doc["steps"]:
            step = RemoteStep(str(key), int(created_ns), layers[at])
            steps[str(definition)] = steps[step.key] = step
        mounts = [
            RemoteMount(str(m["id"]), Descriptor.from_json(m["blob"]), int(m["used_ns"])) for m in doc.get("mounts", ())
        ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
        raise ImageError(f"a cache's document is malformed: {type(e).__name__}: {e}") from e
    return CacheIndex(steps, tuple(mounts))


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k not in {"diff", "uncompressed"}}


# Reading


class RemoteCache:
    """The caches that a build reads. `find` is pure; `fetch` moves a layer. Thread-safe."""

    def __init__(self, store: Store, fetch: Callable[[ImageSource, Descriptor, str], None]) -> None:
        self._store = store
        self._fetch = fetch
        self._sources: list[tuple[ImageSource, CacheIndex]] = []

    def add(self, source: ImageSource, index: CacheIndex) -> None:
        self._sources.append((source, index))

    def find(self, key: str, *, not_before_ns: int = 0) -> RemoteStep | None:
        """The result of a definition or content key."""
        for _, index in self._sources:
            step = index.steps.get(key)
            if step is not None and step.created_ns >= not_before_ns:
                return step
        return None

    def fetch(self, layer: Descriptor, vertex: str = "cache") -> None:
        """Make a layer's blob be in the store. Raises: CacheLostError if no cache has it any more; Cancelled."""
        if self._store.stat(layer.digest) is not None:
            return None
        why = ""
        for source, _ in self._sources:
            try:
                return self._fetch(source, layer, vertex)
            except Cancelled:
                raise
            except PybuildError as e:
                why = f": {e.message}"
        raise CacheLostError(f"no cache has layer {layer.digest} any more{why}")

    def materialise(self, layer: LayerRecord, parent: str | None, vertex: str) -> str:
        """The snapshot of a layer on `parent`: fetched, unpacked and remembered. Raises: PybuildError."""
        from layers.image import unpack_layer

        self.fetch(layer.descriptor, vertex)
        snapshots = self._store.snapshots
        active = snapshots.prepare(parent)
        try:
            unpack_layer(self._store, layer, active)
        except BaseException:
            snapshots.discard(active)
            raise
        snapshot = snapshots.commit(active).id
        self._store.layers.record(snapshot, layer)
        return snapshot

    def close(self) -> None:
        for source, _ in self._sources:
            source.close()


def import_caches(parts: Parts, request: BuildRequest, events: EventSink) -> None:
    """Read the indexes of `--cache-from` and hand them to the solver. One that cannot be read is a warning."""
    remote = RemoteCache(parts.store, parts.sources.fetch_blob)
    for ref in request.cache_from:
        name = ref.ref or (request.tags[0] if request.tags else "")
        with _told(events, f"[internal] importing cache from {name}", f"import:{name}", optional=True):
            source = _location(ref, name).source(parts.transports())
            try:
                index = _read(source)
            except BaseException:
                source.close()
                raise
            remote.add(source, index)
            if request.cache_mounts:
                _restore_mounts(parts, request, source, index.mounts)
    parts.solver.use_remote(remote)


def _location(ref: CacheRef, name: str) -> Any:
    from registry.transport import parse_location

    if ref.type == "registry":
        return parse_location(f"docker://{name}")
    place = Path(ref.ref).expanduser()
    return parse_location(f"{'oci-archive' if place.is_file() else 'oci'}:{place}:cache")


def _read(source: ImageSource) -> CacheIndex:
    """The index behind a reference: of a cache, or of an image with an inline one. Raises: PybuildError."""
    from registry.transport import check_manifest, read_blob

    raw = check_manifest(source.get_manifest(), None)
    document = parse_manifest(raw.raw, raw.media_type)
    if isinstance(document, Index):
        indexes = [_read_manifest(source, check_manifest(source.get_manifest(d.digest), d.digest).raw) for d in
                   document.manifests]  # fmt: skip
        return CacheIndex({k: s for index in indexes for k, s in index.steps.items()})
    config = document.config
    if config.media_type == CONFIG_TYPE and config.data is not None:
        data = b64decode(config.data)
        if Digest.of(data) != config.digest:
            raise ImageError("the cache's document does not have the digest that its manifest says")
        return decode_index(data)
    if config.media_type == CONFIG_TYPE:
        return decode_index(read_blob(source, config, MAX_CONFIG_BYTES))
    return _read_manifest(source, raw.raw)


def _read_manifest(source: ImageSource, raw: bytes) -> CacheIndex:
    """The inline cache of one image; an empty one if it has none."""
    from registry.transport import read_blob

    manifest = Manifest.parse(raw)
    config = ImageConfig.parse(read_blob(source, manifest.config, MAX_CONFIG_BYTES))
    field = config.document.get(INLINE_FIELD)
    if not isinstance(field, list) or len(manifest.layers) != len(config.diff_ids):
        return CacheIndex({})
    steps: dict[str, RemoteStep] = {}
    for row in field:
        try:
            definition, key, created_ns, at = row
            record = LayerRecord(config.diff_ids[at], manifest.layers[at], 0)
            steps[str(definition)] = steps[str(key)] = RemoteStep(str(key), int(created_ns), record)
        except (ValueError, TypeError, IndexError):
            continue
    return CacheIndex(steps)


@contextmanager
def _told(events: EventSink, title: str, vertex: str, *, optional: bool) -> Iterator[None]:
    """An event for the work in the block; where it is `optional`, its failure is a warning."""
    started = time.time_ns()
    events.emit(Vertex(vertex, title, (), started))
    try:
        yield
    except PybuildError as e:
        events.emit(Vertex(vertex, title, (), started, time.time_ns(), error=e.message))
        if not optional:
            raise
        events.emit(VertexWarning(vertex, f"{title.removeprefix('[internal] ')}: {e.message}"))
    else:
        events.emit(Vertex(vertex, title, (), started, time.time_ns()))


# Writing


def export_caches(parts: Parts, request: BuildRequest, image: ExportedImage, events: EventSink) -> None:
    """Write `--cache-to`. Raises: RegistryError, StoreError, unless the reference says to ignore errors."""
    for ref in request.cache_to:
        if ref.type == "inline":
            continue  # it went into the image's config
        with _told(events, f"[internal] exporting cache to {ref.ref}", f"export:{ref.ref}", optional=ref.ignore_error):
            mounts = _pack_mounts(parts, request) if request.cache_mounts else []
            _write(parts, ref, list(step_rows(parts, ref.mode)), mounts)


def step_rows(parts: Parts, mode: str) -> Iterator[tuple[str, RemoteStep]]:
    """The results to keep, by definition key: those of the images (min), or of all steps that are known (max)."""
    graph, solver = parts.graph, parts.solver
    wanted: set[int] = set()
    for plan in graph.images:
        wanted.update(step.number for step in graph.chain(plan.top))
    for step in graph.steps:
        if mode == "min" and step.number not in wanted:
            continue
        found: tuple[StepResult, LayerRecord] | None = solver.layer_of(step)
        if found is not None:
            result, layer = found
            yield solver.definition(step), RemoteStep(result.key, result.created_ns, layer)


def inline_rows(graph: BuildGraph, solver: Solver, top: int | None, base_count: int) -> list[list[object]]:
    """The inline form, for the image of step `top`: definition, content key, time, and the layer's place."""
    rows: list[list[object]] = []
    at = base_count
    for step in graph.chain(top):
        found = solver.layer_of(step)
        if found is not None:
            rows.append([solver.definition(step), found[0].key, found[0].created_ns, at])
            at += 1
    return rows


def _write(parts: Parts, ref: CacheRef, rows: Sequence[tuple[str, RemoteStep]], mounts: Sequence[RemoteMount]) -> None:
    manifest = cache_manifest(parts, rows, mounts)
    place = Path(ref.ref).expanduser() if ref.type == "local" else None
    before = None if place is None else _earlier(place)
    for _ in range(_MAX_TRIES):
        destination = _location(ref, ref.ref).destination(parts.transports())
        try:
            send_manifest(parts, destination, manifest)
            destination.commit()
            if place is None:
                return
            if before is not None:
                _sweep_layout(place, before)
            # Another export to the same directory may have swept what we found there: once more, then.
            if all(destination.has_blob(blob) for blob in (manifest.config, *manifest.layers)):
                return
        finally:
            destination.close()


def _earlier(place: Path) -> Manifest | None:
    """The cache that a directory has already; None if there is none that can be read."""
    from registry.transports.oci import LayoutDir, find_entry

    if not (place / "index.json").exists():
        return None
    try:
        layout = LayoutDir(place)
        try:
            entry = find_entry(layout.read_index().manifests, "cache", None, str(place))
            raw = layout.read_manifest(entry)
        finally:
            layout.close()
        return Manifest.parse(raw.raw, raw.media_type)
    except PybuildError:
        return None


def _sweep_layout(place: Path, before: Manifest) -> None:
    """Remove what an earlier cache of a directory had, and what nothing there refers to any more."""
    from registry.transports.oci import LayoutDir

    layout = LayoutDir(place)
    try:
        kept: set[Digest] = set()
        waiting = list(layout.read_index().manifests)
        while waiting:
            entry = waiting.pop()
            kept.add(entry.digest)
            raw = layout.read_manifest(entry)
            document = parse_manifest(raw.raw, raw.media_type)
            if isinstance(document, Index):
                waiting += document.manifests
            else:
                kept |= {document.config.digest, *(d.digest for d in document.layers)}
    except PybuildError:
        return  # somebody else's image there is not whole: nothing is safe to remove
    finally:
        layout.close()
    for digest in {before.descriptor.digest, before.config.digest, *(d.digest for d in before.layers)} - kept:
        (place / "blobs" / digest.algorithm / digest.encoded).unlink(missing_ok=True)


def cache_manifest(
    parts: Parts, rows: Sequence[tuple[str, RemoteStep]], mounts: Sequence[RemoteMount] = ()
) -> Manifest:
    """A cache of these steps; its config and layers are in the store then. Raises: PybuildError."""
    config = encode_index(rows, mounts)
    blobs = {step.layer.descriptor.digest: step.layer.descriptor for _, step in rows}
    blobs |= {m.descriptor.digest: m.descriptor for m in mounts}
    lost = _fetch(parts, blobs.values())
    if lost:
        return cache_manifest(parts, [row for row in rows if row[1].layer.descriptor.digest not in lost], mounts)
    parts.store.put(config, CONFIG_TYPE)
    described = Descriptor(
        media_type=CONFIG_TYPE,
        digest=Digest.of(config),
        size_bytes=len(config),
        data=b64encode(config).decode() if len(config) <= _MAX_INLINE_BYTES else None,
    )
    return Manifest.build(config=described, layers=blobs.values(), artifact_type=ARTIFACT_TYPE)


def _fetch(parts: Parts, layers: Iterable[Descriptor]) -> set[Digest]:
    """Get the layers that other caches have; those that they have no more. Raises: PybuildError."""
    lost: set[Digest] = set()
    for layer in layers:
        if parts.store.stat(layer.digest) is None:
            try:
                parts.solver.fetch_remote([layer])
            except CacheLostError:
                lost.add(layer.digest)
    return lost


def send_manifest(parts: Parts, destination: ImageDestination, manifest: Manifest) -> None:
    """Write a manifest and its blobs, which the store has; the caller commits. Raises: PybuildError."""
    from registry.copy import run_parallel
    from registry.transport import BlobInput, RawManifest

    source = StoreBlobs(parts.store)

    def send(blob: Descriptor) -> None:
        plain = Descriptor(media_type=blob.media_type, digest=blob.digest, size_bytes=blob.size_bytes)
        if not destination.has_blob(plain):
            destination.put_blob(BlobInput(plain, source))

    run_parallel([partial(send, blob) for blob in (manifest.config, *manifest.layers)], 4, threading.Event())
    top = manifest.descriptor
    destination.put_manifest(RawManifest(manifest.raw, manifest.media_type, top.digest), top=True)


class StoreBlobs:
    """The store's blobs as an image source, which has no image. Thread-safe."""

    name = "storage:"
    host = ""
    synthetic = False

    def __init__(self, store: Store) -> None:
        self._store = store

    def get_manifest(self, digest: Digest | None = None) -> Any:
        raise ImageError(f"there is no manifest {digest}")

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> Any:
        stream = self._store.open(descriptor.digest)
        stream.seek(offset)
        return stream

    def blob_path(self, digest: Digest) -> Path | None:
        return self._store.path(digest)

    def mount_candidates(self, digest: Digest, host: str) -> Sequence[str]:
        return ()

    def close(self) -> None:
        return


# Cache mounts


def _mount_ids(graph: BuildGraph) -> list[str]:
    return list(
        dict.fromkeys(
            mount.id or mount.target
            for step in graph.steps
            if isinstance(step.op, RunOp)
            for mount in step.op.mounts
            if mount.type == "cache"
        )
    )


def _pack_mounts(parts: Parts, request: BuildRequest) -> list[RemoteMount]:
    """The cache mounts of this Containerfile as blobs of the store: newest first, within the limits."""
    from builder.solve.steps import cache_directory
    from layers.changeset import write_layer
    from layers.layerdiff import diff_trees

    now = time.time_ns()
    found: list[tuple[int, str, Path]] = []
    for id in _mount_ids(parts.graph):
        path = cache_directory(parts.store.root, id)
        used_ns = last_used_ns(path)
        if used_ns and now - used_ns <= request.cache_mounts_max_age_s * 1e9:
            found.append((used_ns, id, path))
    packed: list[RemoteMount] = []
    left = request.cache_mounts_max_bytes
    for used_ns, id, path in sorted(found, reverse=True):
        with parts.store.ingest(media_type=MOUNT_TYPE) as ingest:
            result = write_layer(diff_trees(None, path), path, ingest, compression="zstd")
            if result.size_bytes > left:
                ingest.abort()
                continue
            ingest.commit()
        left -= result.size_bytes
        packed.append(
            RemoteMount(
                id, Descriptor(media_type=MOUNT_TYPE, digest=result.digest, size_bytes=result.size_bytes), used_ns
            )
        )
    return packed


def last_used_ns(path: Path) -> int:
    """The newest time of anything at the top of a cache mount; 0 if it is not there."""
    try:
        times = [os.stat(path).st_mtime_ns]
        with os.scandir(path) as entries:
            times += [entry.stat(follow_symlinks=False).st_mtime_ns for entry in entries]
    except OSError:
        return 0
    return max(times)


def _restore_mounts(parts: Parts, request: BuildRequest, source: ImageSource, mounts: Sequence[RemoteMount]) -> None:
    """Unpack the cache mounts that this machine does not have and this Containerfile uses."""
    from builder.solve.steps import cache_directory
    from layers.apply import apply_layer

    wanted = set(_mount_ids(parts.graph))
    oldest = time.time_ns() - request.cache_mounts_max_age_s * 1e9
    for mount in mounts:
        path = cache_directory(parts.store.root, mount.id)
        too_large = mount.descriptor.size_bytes > request.cache_mounts_max_bytes
        if mount.id not in wanted or path.exists() or mount.used_ns < oldest or too_large:
            continue
        parts.sources.fetch_blob(source, mount.descriptor, "cache")
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.new-{os.getpid()}-{time.monotonic_ns()}")
        fresh.mkdir(mode=0o755)
        try:
            with parts.store.open(mount.descriptor.digest) as stream:
                apply_layer(stream, fresh, whiteouts="keep")
            fresh.rename(path)
        except BaseException as e:
            from layers.trees import remove_tree

            remove_tree(str(fresh))
            if not isinstance(e, OSError):
                raise
