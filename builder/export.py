"""Assembles what a build made into images: config, manifest, index, names.

Times come from the steps, not from the clock, so that building again from the cache gives the very
same image. Spec: image-spec config.md and manifest.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from builder.plan.graph import BuildGraph, HistoryEntry, ImagePlan, ResolvedImage
from builder.plan.request import BuildRequest
from builder.solve.layering import LayerBook
from builder.solve.sources import ImageSources
from layers.image import describe_image
from layers.oci import Descriptor, Digest, ImageConfig, Index, Platform
from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from builder.solve.results import StepResult
    from builder.solve.solver import Solver
    from layers.store import Store

HISTORY_COMMENT = "buildkit.dockerfile.v0"


class ExportedImage(NamedTuple):
    """An image in the store. `image_id` is the config's digest, as `docker images` shows it."""

    descriptor: Descriptor
    image_id: Digest
    layers: tuple[Descriptor, ...]
    documents: tuple[bytes, ...] = ()
    """The configs, for who looks for something in them."""


class Exporter:
    """Writes a solved graph's images to the store."""

    def __init__(
        self, store: Store, request: BuildRequest, sources: ImageSources, layers: LayerBook, solver: Solver
    ) -> None:
        self._solver = solver
        self._store = store
        self._request = request
        self._sources = sources
        self._layers = layers

    def export(self, graph: BuildGraph, results: Mapping[int, StepResult], made_ns: Mapping[int, int]) -> ExportedImage:
        """The image, or for several platforms the index over them; not named yet."""
        images = [self._image(graph, image, results, made_ns) for image in graph.images]
        if len(images) == 1:
            return images[0]
        manifests = []
        for plan, image in zip(graph.images, images, strict=True):
            d = image.descriptor
            manifests.append(
                Descriptor(
                    media_type=d.media_type,
                    digest=d.digest,
                    size_bytes=d.size_bytes,
                    annotations=self._annotations("manifest-descriptor", plan.platform),
                    platform=plan.platform,
                )
            )
        index = Index.build(manifests, annotations=self._annotations("index"))
        descriptor = self._store.put(index.raw, index.media_type)
        documents = tuple(document for image in images for document in image.documents)
        return ExportedImage(descriptor, descriptor.digest, (), documents)

    def _image(
        self, graph: BuildGraph, plan: ImagePlan, results: Mapping[int, StepResult], made_ns: Mapping[int, int]
    ) -> ExportedImage:
        base = plan.base
        chain = graph.chain(plan.top)
        built: list[tuple[Digest, Descriptor]] = []
        snapshot = None if plan.top is None else results[plan.top].snapshot
        base_count = len(base.config.diff_ids) if base is not None else 0
        made = sum(1 for step in chain if step.parent is not None or base is None or not base.manifest.layers)
        ends: list[int] | None = None
        squash = self._request.squash or self._request.squash_all
        if squash and plan.top is not None and (made or self._request.squash_all):
            built = [self._squashed(plan.top, made)]
            base_count = 0 if self._request.squash_all else base_count
        elif self._request.fold and plan.top is not None and made:
            ends, built = self._folded(plan.top, made)
        elif snapshot is not None and made:
            for part in list(self._store.snapshots.chain(snapshot))[-made:]:
                record = self._layers.get(part.id)
                built.append((record.diff_id, record.descriptor))
        elif made and plan.top is not None:
            # The result lies in a remote cache: the image needs its layers, not its files.
            for step in chain:
                found = self._solver.layer_of(step)
                if found is not None:
                    built.append((found[1].diff_id, found[1].descriptor))
            self._solver.fetch_remote([d for _, d in built])
        if base is not None and base_count:
            self._sources.ensure_layers(base)
        below = base if base_count else None
        diff_ids = [*(below.config.diff_ids if below else ()), *(d for d, _ in built)]
        inherited = below.manifest.layers if below else ()
        if self._request.force_compression:
            inherited = tuple(map(self._layers.recompressed, inherited))
        layers = [*inherited, *(d for _, d in built)]
        document = dict(plan.document)
        history, created = image_history(plan.base, plan.history, made_ns, self._request.source_date_epoch)
        if squash:
            merge_history(history, len(diff_ids), keep=base_count)
        elif ends is not None:
            _fold_history(history, base_count, ends)
        document = {"created": created, **document}
        document["rootfs"] = {"type": "layers", "diff_ids": [str(d) for d in diff_ids]}
        if not self._request.omit_history:
            document["history"] = history
        if any(ref.type == "inline" for ref in self._request.cache_to):
            from builder.solve.remotecache import INLINE_FIELD, inline_rows

            document[INLINE_FIELD] = inline_rows(graph, self._solver, plan.top, base_count)
        return self._write_image(document, layers, plan.platform)

    def _squashed(self, top: int, made: int) -> tuple[Digest, Descriptor]:
        """The new layers as one, or all layers. A result that lies in a remote cache is fetched for it."""
        snapshot = self._solver.snapshot(top)
        assert snapshot is not None
        base: str | None = None
        if not self._request.squash_all:
            names = [part.id for part in self._store.snapshots.chain(snapshot)]
            base = names[-made - 1] if len(names) > made else None
        record = self._layers.squashed(snapshot, base)
        return record.diff_id, record.descriptor

    def _folded(self, top: int, made: int) -> tuple[list[int], list[tuple[Digest, Descriptor]]]:
        """The new layers without repeated data, and the numbers of the steps that end them."""
        snapshot = self._solver.snapshot(top)
        assert snapshot is not None
        names = [part.id for part in self._store.snapshots.chain(snapshot)]
        base = names[-made - 1] if len(names) > made else None
        ends, records = self._layers.folded(names[-made:], base)
        return ends, [(record.diff_id, record.descriptor) for record in records]

    def _annotations(self, level: str, platform: Platform | None = None) -> dict[str, str]:
        everywhere = self._request.annotations if level == "manifest" else {}
        return dict(everywhere) | {
            a.key: a.value for a in self._request.annotations_at if a.level == level and a.platform in {None, platform}
        }

    def _write_image(
        self, document: Mapping[str, Any], layers: Sequence[Descriptor], platform: Platform
    ) -> ExportedImage:
        docker = self._request.format == "docker"
        annotations = None if docker else self._annotations("manifest", platform)
        config, manifest = describe_image(document, layers, annotations=annotations, format=self._request.format)
        if not self._store.names.of(manifest.descriptor.digest):
            # One that has a name is whole and stays: a cached build writes nothing.
            self._store.put(config, manifest.config.media_type)
            self._store.put(manifest.raw, manifest.media_type)
        return ExportedImage(manifest.descriptor, manifest.config.digest, manifest.layers, (config, manifest.raw))


def image_history(
    base: ResolvedImage | None, history: Sequence[HistoryEntry], made_ns: Mapping[int, int], epoch_s: int | None
) -> tuple[list[dict[str, Any]], str]:
    """The base's history and ours, and the time of the whole: that of the last step that made something."""
    entries: list[dict[str, Any]] = []
    latest: str | None = None
    if base is not None:
        entries = _normalised(base.config)
        created = base.config.document.get("created")
        latest = created if isinstance(created, str) and created else None
    # A step whose record is gone was made no later than the ones found above it.
    times = [made_ns[e.step] for e in history if e.step is not None and e.step in made_ns]
    fallback = format_time(min(times)) if times else latest or format_time(0)
    for entry in history:
        made = None if entry.step is None else made_ns.get(entry.step)
        if epoch_s is not None:
            latest = format_time(epoch_s * 1_000_000_000)
        elif made:
            latest = format_time(made)
        elif entry.step is not None and latest is None:
            latest = fallback
        line: dict[str, Any] = {"created": latest or fallback, "created_by": entry.created_by}
        line["comment"] = HISTORY_COMMENT
        if entry.step is None:
            line["empty_layer"] = True
        entries.append(line)
    return entries, latest or fallback


def merge_history(history: list[dict[str, Any]], layers: int, *, keep: int) -> None:
    """Have `history` tell of `layers` layers, of which the first `keep` are as they were: the rest have become one."""
    made = [entry for entry in history if not entry.get("empty_layer")]
    for entry in made[keep:-1] if layers > keep else made[keep:]:
        entry["empty_layer"] = True


def _fold_history(history: list[dict[str, Any]], keep: int, ends: Sequence[int]) -> None:
    """The same where the new layers have become those that end with the steps of these numbers."""
    made = [entry for entry in history if not entry.get("empty_layer")][keep:]
    for number, entry in enumerate(made):
        if number not in ends:
            entry["empty_layer"] = True


def _normalised(config: ImageConfig) -> list[dict[str, Any]]:
    """The base's history, with as many non-empty entries as it has layers."""
    entries = [dict(h) for h in config.history]
    layers = [h for h in entries if not h.get("empty_layer")]
    missing = len(config.diff_ids) - len(layers)
    entries += [{"created_by": "", "comment": "history of the base image is incomplete"}] * max(0, missing)
    for extra in layers[len(config.diff_ids) :]:
        extra["empty_layer"] = True
    return entries


def format_time(time_ns: int) -> str:
    """RFC 3339 in UTC; whole seconds where there are no nanoseconds."""
    seconds, nanos = divmod(time_ns, 1_000_000_000)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{text}.{nanos:09d}Z" if nanos else f"{text}Z"
