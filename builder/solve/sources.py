"""Base images: found in the store or a registry, fetched and unpacked only when a step needs files.

Implements `builder.plan.planner.Resolver`. Resolving fetches a manifest and a config, no layer. The
name of an image is written to the store once all of its layers are there, never before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from builder.plan.graph import ResolvedImage
from layers.errors import BlobNotFound, Cancelled, ImageError, NameNotFound, PybuildError
from layers.events import EventSink, Vertex, VertexStatus
from layers.oci import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    ImageConfig,
    Index,
    Platform,
    chain_id,
    parse_manifest,
)
from registry.reference import Reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.plan.request import PullPolicy
    from layers.store import Store
    from registry.transport import ImageLocation, ImageSource, RawManifest, TransportContext
    from registry.wire import RateLimit

_PARALLEL_LAYERS = 4


class ImageSources:
    """One build's base images. Thread-safe once resolving is done."""

    def __init__(
        self,
        store: Store,
        context: Callable[[], TransportContext],
        *,
        policy: PullPolicy,
        events: EventSink,
        cancelled: Callable[[], bool],
        additional: Sequence[Path] = (),
    ) -> None:
        self._store = store
        self._additional = additional
        self._open_context = context
        self._opened: list[TransportContext] = []
        self._guard = threading.Lock()
        self.fetched_bytes = 0
        """Of layers, by this build; a figure for people, not quite exact where threads collide."""
        self._policy = policy
        self._events = events
        self._cancelled = cancelled
        self._locations: dict[str, ImageLocation] = {}
        self._names: dict[str, str] = {}

    @property
    def _context(self) -> TransportContext:
        with self._guard:
            if not self._opened:
                self._opened.append(self._open_context())
            return self._opened[0]

    # Resolver

    def resolve_image(self, name: str, platform: Platform) -> ResolvedImage:
        """Manifest and config of an image for a platform.

        Raises: NameNotFound (policy `never`), ImageError (no such platform), RegistryError.
        """
        reference = Reference.parse(name).with_default_tag()
        local = None if self._policy == "always" else self._local(reference, platform)
        if local is not None and self._policy != "newer":
            return local
        if local is None:
            reference, local = self._meaning(name, reference, platform)
            if local is not None and self._policy != "newer":
                return local
        if self._additional and local is None and self._policy != "always":
            from registry.additional import find_additional

            place = find_additional(self._additional, reference)
            if place is not None:
                return self._load(place, reference.canonical(), platform)
        if self._policy == "never":
            there = self._store.names.get(reference.canonical()) is not None
            lack = f"in the store for {platform}" if there else "in the store"
            raise NameNotFound(
                f"image {reference.familiar()} is not {lack}, and pulling is off", hint="pull it, or use --pull"
            )
        from registry.transport import parse_location

        try:
            return self._load(parse_location(f"docker://{reference.canonical()}"), reference.canonical(), platform)
        except PybuildError:
            if local is not None and self._policy == "newer":
                return local
            raise

    def _meaning(self, name: str, plain: Reference, platform: Platform) -> tuple[Reference, ResolvedImage | None]:
        """What a short name means by registries.conf, and the image if the store has it under that name.

        Raises: ConfigError; RegistryError if it may mean several and none is there.
        """
        from registry.hosts import HostConfig
        from registry.reference import is_short_name

        if not is_short_name(name):
            return plain, None
        # Without pulling there is no need of a client, nor of what its flags say of the network.
        hosts = HostConfig() if self._policy == "never" else self._context.client.hosts
        candidates = [ref.with_default_tag() for ref in hosts.resolve_name(name)]
        for ref in candidates if self._policy != "always" else ():
            local = self._local(ref, platform)
            if local is not None:
                return ref, local
        if len(candidates) == 1 or self._policy == "never":
            return candidates[0], None
        from registry.shortnames import find

        return find(self._context.client, name), None

    def resolve_layout(self, location: str, platform: Platform) -> ResolvedImage:
        """The same from an OCI layout, `DIR[:TAG]` or `DIR@DIGEST`."""
        from registry.transport import parse_location

        return self._load(parse_location(f"oci:{location}"), f"oci-layout://{location}", platform)

    def _local(self, reference: Reference, platform: Platform) -> ResolvedImage | None:
        names = (_platform_name(reference.canonical(), platform), reference.canonical())
        descriptors = [self._store.names.get(name) for name in names]
        if reference.digest is not None:
            # Whatever it is called: bytes of that digest can only be these.
            descriptors.append(Descriptor(media_type="", digest=reference.digest, size_bytes=0))
        for descriptor in descriptors:
            if descriptor is None:
                continue
            try:
                found = self._from_store(descriptor, reference.canonical(), platform)
            except (BlobNotFound, ImageError):
                continue
            if platform.runs(found.config.platform) or found.config.platform == platform:
                return found
        return None

    def _from_store(self, descriptor: Descriptor, name: str, platform: Platform) -> ResolvedImage:
        document = parse_manifest(self._store.read(descriptor.digest, MAX_MANIFEST_BYTES), descriptor.media_type)
        if isinstance(document, Index):
            descriptor = document.select(platform)
            return self._from_store(descriptor, name, platform)
        config = ImageConfig.parse(self._store.read(document.config.digest, MAX_CONFIG_BYTES))
        return ResolvedImage(f"{name}", descriptor.digest, document, config)

    def _load(self, location: ImageLocation, name: str, platform: Platform) -> ResolvedImage:
        from registry.transport import check_manifest, read_blob

        vertex, title = f"resolve:{name}:{platform}", f"[internal] load metadata for {name}"
        started = time.time_ns()
        self._events.emit(Vertex(vertex, title, (), started))
        source = location.source(self._context)
        try:
            raw = self._stored(self._asked(location)) or check_manifest(source.get_manifest(), None)
            document = parse_manifest(raw.raw, raw.media_type)
            while isinstance(document, Index):
                self._write(raw.raw, raw.descriptor)
                chosen = document.select(platform)
                raw = self._stored(chosen) or check_manifest(source.get_manifest(chosen.digest), chosen.digest)
                document = parse_manifest(raw.raw, raw.media_type)
            self._write(raw.raw, raw.descriptor)
            if self._store.stat(document.config.digest) is None:
                self._write(read_blob(source, document.config, MAX_CONFIG_BYTES), document.config)
            config = ImageConfig.parse(self._store.read(document.config.digest, MAX_CONFIG_BYTES))
        except PybuildError as e:
            self._events.emit(Vertex(vertex, title, (), started, time.time_ns(), error=e.message))
            raise
        finally:
            source.close()
        if len(config.diff_ids) != len(document.layers):
            raise ImageError(
                f"image {name} has {len(document.layers)} layers but its config names {len(config.diff_ids)}"
            )
        self._events.emit(Vertex(vertex, title, (), started, time.time_ns()))
        self._locations[raw.digest] = location
        self._names[raw.digest] = _platform_name(name, platform)
        return ResolvedImage(name, raw.digest, document, config)

    def _asked(self, location: ImageLocation) -> Descriptor | None:
        """What a tag means now, by a HEAD: that is no pull to a registry which counts them, a GET is."""
        from registry.transports.docker import DockerLocation

        if self._policy not in {"always", "newer"} or not isinstance(location, DockerLocation):
            return None
        client = self._context.client
        client.hosts.policy.check_docker(location.ref)
        return client.head_manifest(location.ref)

    def _stored(self, descriptor: Descriptor | None) -> RawManifest | None:
        """The manifest if the store has it."""
        from registry.transport import RawManifest

        if descriptor is None or self._store.stat(descriptor.digest) is None:
            return None
        raw = self._store.read(descriptor.digest, MAX_MANIFEST_BYTES)
        return RawManifest(raw, descriptor.media_type or parse_manifest(raw).media_type, descriptor.digest)

    def pulls_left(self) -> tuple[tuple[str, RateLimit], ...]:
        """What registries told, of their own accord, of the pulls that they still allow."""
        with self._guard:
            opened = list(self._opened)
        return tuple(sorted(item for context in opened for item in context.known_ratelimits().items()))

    def _write(self, data: bytes, descriptor: Descriptor) -> None:
        with self._store.ingest(expected=descriptor, media_type=descriptor.media_type) as ingest:
            ingest.write(data)
            ingest.commit()

    # Layers

    def ensure_layers(self, image: ResolvedImage, vertex: str = "", title: str = "") -> None:
        """Fetch the layers that are not here, and name the image.

        Raises: RegistryError, ContentError, StoreError, Cancelled; BlobNotFound if it came from the
        store and a layer is gone.
        """
        missing = [d for d in dict.fromkeys(image.manifest.layers) if self._store.stat(d.digest) is None]
        if missing:
            self._fetch(image, vertex, title)
        self._publish(image)

    def _fetch(self, image: ResolvedImage, vertex: str, title: str) -> None:
        from concurrent.futures import ThreadPoolExecutor

        layers = [d for d in dict.fromkeys(image.manifest.layers) if self._store.stat(d.digest) is None]
        with self.source(image) as source, ThreadPoolExecutor(_PARALLEL_LAYERS, thread_name_prefix="pull") as pool:
            list(pool.map(lambda d: self._fetch_layer(source, d, vertex), layers))

    @contextmanager
    def source(self, image: ResolvedImage) -> Iterator[ImageSource]:
        """Where an image comes from, open for the block."""
        source = self._location(image).source(self._context)
        try:
            yield source
        finally:
            source.close()

    def fetch_blob(self, source: ImageSource, blob: Descriptor, vertex: str) -> None:
        """One blob into the store. Raises: RegistryError, ContentError, Cancelled."""
        self._fetch_layer(source, blob, vertex)

    def _fetch_layer(self, source: ImageSource, layer: Descriptor, vertex: str) -> None:
        """One blob into the store, verified, continued where an earlier process stopped."""
        if self._store.stat(layer.digest) is not None:
            return
        name = layer.digest
        started = time.time_ns()
        self._events.emit(VertexStatus(vertex, name, name, 0, layer.size_bytes, started))
        with self._store.flight(f"layer-{layer.digest}"):
            if self._store.stat(layer.digest) is None:
                self._transfer(source, layer, vertex, started)
        size = layer.size_bytes
        self._events.emit(VertexStatus(vertex, name, name, size, size, started, time.time_ns()))

    def _transfer(self, source: ImageSource, layer: Descriptor, vertex: str, started: int) -> None:
        name = layer.digest
        with self._store.ingest(expected=layer, media_type=layer.media_type, ref=f"layer-{layer.digest}") as ingest:
            stream = source.open_blob(layer, ingest.offset)
            try:
                while data := stream.read(1 << 20):
                    if self._cancelled():
                        raise Cancelled
                    ingest.write(data)
                    self.fetched_bytes += len(data)
                    self._events.emit(VertexStatus(vertex, name, name, ingest.offset, layer.size_bytes, started))
            finally:
                stream.close()
            ingest.commit()

    def _location(self, image: ResolvedImage) -> ImageLocation:
        from registry.transport import parse_location

        location = self._locations.get(image.digest)
        if location is not None:
            return location
        return parse_location(f"docker://{Reference.parse(image.reference).with_digest(image.digest)}")

    def _publish(self, image: ResolvedImage) -> None:
        name = self._names.pop(image.digest, None)
        if name is None or name.startswith("oci-layout:"):
            return
        self._store.publish({name: _descriptor(image)})

    def unpack(self, image: ResolvedImage, vertex: str, title: str) -> str | None:
        """Fetch what is missing and unpack all layers; the snapshot of the whole, None for an empty image.

        Raises: what `ensure_layers` raises; LayerError; DigestMismatch if a layer is not the config's.
        """
        from layers.image import Image, UnpackOptions, unpack_image

        if not image.manifest.layers:
            return None
        top = chain_id(image.config.diff_ids)
        if self._store.snapshots.get(top) is not None:
            return top
        started = time.time_ns()
        self._events.emit(Vertex(vertex, title, (), started))
        descriptor = _descriptor(image)
        try:
            with self.source(image) as source:
                unpack_image(
                    self._store,
                    Image(descriptor, image.manifest, image.config),
                    UnpackOptions(fetch=lambda d: self._fetch_layer(source, d, vertex), cancelled=self._cancelled),
                )
        except PybuildError as e:
            self._events.emit(Vertex(vertex, title, (), started, time.time_ns(), error=e.message))
            raise
        self._events.emit(Vertex(vertex, title, (), started, time.time_ns()))
        return top


def _descriptor(image: ResolvedImage) -> Descriptor:
    return Descriptor(media_type=image.manifest.media_type, digest=image.digest, size_bytes=len(image.manifest.raw))


def _platform_name(name: str, platform: Platform) -> str:
    """The store's name of an image: a foreign platform's is kept beside the host's."""
    return name if platform == Platform.host() else f"{name}#{platform}"
