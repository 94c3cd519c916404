"""Images changed where they are: config and annotations, layers appended, another base, one layer.

An editor turns one image's manifest and config into new ones; of an index it is applied to every
image. The result is a `ComposedSource`, which `registry.copy` moves to any destination: within a
registry only what is new is uploaded. Nothing here unpacks a layer but `flatten`.

Spec: image-spec config.md, annotations.md (base.name, base.digest), manifest.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layers.errors import ImageError
from layers.events import EventSink, NullSink, VertexWarning
from layers.oci import (
    MAX_CONFIG_BYTES,
    MEDIA_DOCKER_CONFIG,
    MEDIA_OCI_CONFIG,
    Descriptor,
    Digest,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    encode_json,
    parse_manifest,
)
from layers.trees import remove_tree
from layers.values import NamedTuple
from registry.composed import ComposedSource
from registry.convert import convert_descriptor, format_of
from registry.index import ATTESTED
from registry.newlayer import NewLayer, layer_of_directory
from registry.transport import ImageSource, check_manifest, read_blob
from registry.unpack import unpack_image

BASE_NAME = "org.opencontainers.image.base.name"
BASE_DIGEST = "org.opencontainers.image.base.digest"
_CONFIGS = frozenset({MEDIA_OCI_CONFIG, MEDIA_DOCKER_CONFIG})
_MAX_INDEX_DEPTH = 4


class EditedImage:
    """One image while it is being changed: `document` is its config, `layers` its layers, in place."""

    def __init__(self, source: ImageSource, parts: ComposedSource, manifest: Manifest, config: ImageConfig) -> None:
        self.source = source
        self.parts = parts
        self.manifest = manifest
        self.config = config
        self.document: dict[str, Any] = json.loads(config.raw)
        self.layers: list[Descriptor] = list(manifest.layers)
        self.annotations: dict[str, str] = dict(manifest.annotations)

    @property
    def execution(self) -> dict[str, Any]:
        """The config's `config`, to be changed."""
        value = self.document.get("config")
        if not isinstance(value, dict):
            value = self.document["config"] = {}
        return value

    @property
    def docker(self) -> bool:
        return format_of(self.manifest.media_type) == "docker"

    def add_layer(self, layer: NewLayer, *, created_by: str, created: str | None) -> None:
        """Put a layer on top, with its line of history. The parts own it from now on."""
        descriptor = self.parts.add_spool(layer.blob)
        self.layers.append(convert_descriptor(descriptor, "docker") if self.docker else descriptor)
        rootfs = self.document.setdefault("rootfs", {"type": "layers", "diff_ids": []})
        rootfs["diff_ids"] = [*(rootfs.get("diff_ids") or []), str(layer.diff_id)]
        entry = {"created": created} if created else {}
        self.document["history"] = [*(self.document.get("history") or []), {**entry, "created_by": created_by}]

    def finish(self) -> Descriptor:
        """The descriptor of the new manifest, which keeps the fields of the old that nobody changed."""
        raw = self.config.raw if self.document == json.loads(self.config.raw) else encode_json(self.document)
        config = self.manifest.config
        if raw is not self.config.raw:
            ImageConfig.parse(raw)
            config = self.parts.add_bytes(raw, self.manifest.config.media_type)
        old = json.loads(self.manifest.raw)
        known = {entry["digest"]: entry for entry in old["layers"]}
        document = {**old, "config": {**old["config"], **config.to_json()}}
        document["layers"] = [known.get(d.digest) or d.to_json() for d in self.layers]
        document.pop("annotations", None)
        if self.annotations:
            if self.docker:
                raise ImageError(
                    "Docker's image format has no annotations", hint="convert the image first: copy --format oci"
                )
            document["annotations"] = dict(sorted(self.annotations.items()))
        if document == old:
            manifest = self.manifest
        else:
            manifest = Manifest.parse(encode_json(document), self.manifest.media_type)
        if raw is self.config.raw:
            self.parts.refer(self.source, [config.digest])
        self.parts.refer(self.source, [d.digest for d in self.manifest.layers])
        return self.parts.add_manifest(manifest)


Editor = Callable[[EditedImage], None]


def edit(
    source: ImageSource, editor: Editor, *, platform: Platform | None = None, events: EventSink | None = None
) -> ComposedSource:
    """The image of `source` after `editor`; with `platform` one image, else every image of an index.

    Attestations are left out of the index, since they are about what was before. The sources must
    stay open, and the result be closed, by the caller.
    Raises: ImageError if there is no image; what the editor and reading raise.
    """
    parts = ComposedSource(f"{source.name} (edited)")
    try:
        raw = check_manifest(source.get_manifest(), None)
        document = parse_manifest(raw.raw, raw.media_type)
        for _ in range(_MAX_INDEX_DEPTH):
            if platform is None or not isinstance(document, Index):
                break
            digest = document.select(platform).digest
            raw = check_manifest(source.get_manifest(digest), digest)
            document = parse_manifest(raw.raw, raw.media_type)
        top = _edited(source, parts, document, editor, events or NullSink(), 0)
        parts.finish(top.digest)
    except BaseException:
        parts.close()
        raise
    return parts


def _edited(
    source: ImageSource,
    parts: ComposedSource,
    document: Manifest | Index,
    editor: Editor,
    events: EventSink,
    depth: int,
) -> Descriptor:
    if isinstance(document, Manifest):
        if document.config.media_type not in _CONFIGS:
            raise ImageError(f"{source.name} is an artifact of {document.config.media_type!r}, not an image")
        config = ImageConfig.parse(read_blob(source, document.config, MAX_CONFIG_BYTES))
        if len(config.diff_ids) != len(document.layers):
            raise ImageError(f"{source.name} has {len(document.layers)} layers, but {len(config.diff_ids)} DiffIDs")
        image = EditedImage(source, parts, document, config)
        editor(image)
        return image.finish()
    if depth >= _MAX_INDEX_DEPTH:
        raise ImageError(f"{source.name}: indexes are nested more than {_MAX_INDEX_DEPTH} deep")
    whole = json.loads(document.raw)
    entries = []
    for entry, raw_entry in zip(document.manifests, whole["manifests"], strict=True):
        if ATTESTED in entry.annotations:
            message = f"the attestation {entry.digest.short} is left out: it is about the image before"
            events.emit(VertexWarning(f"edit {source.name}", message))
            continue
        raw = check_manifest(source.get_manifest(entry.digest), entry.digest)
        child = parse_manifest(raw.raw, entry.media_type or raw.media_type)
        if isinstance(child, Manifest) and child.config.media_type not in _CONFIGS:
            parts.add_tree(source, raw)
            entries.append(raw_entry)
            continue
        new = _edited(source, parts, child, editor, events, depth + 1)
        platform = _platform_of(parts, new)
        more = {"platform": platform.to_json()} if platform is not None else {}
        entries.append({**raw_entry, "digest": str(new.digest), "size": new.size_bytes, **more})
    return parts.add_manifest(Index.parse(encode_json({**whole, "manifests": entries}), document.media_type))


def _platform_of(parts: ComposedSource, descriptor: Descriptor) -> Platform | None:
    raw = parts.get_manifest(descriptor.digest)
    document = parse_manifest(raw.raw, raw.media_type)
    if isinstance(document, Index):
        return None
    return ImageConfig.parse(read_blob(parts, document.config, MAX_CONFIG_BYTES)).platform


class Mutation(NamedTuple):
    """What to set in an image; None leaves it. `unset_*` name keys to remove; `env` and the like are added to."""

    annotations: Mapping[str, str] = {}
    unset_annotations: Sequence[str] = ()
    labels: Mapping[str, str] = {}
    unset_labels: Sequence[str] = ()
    env: Mapping[str, str] = {}
    unset_env: Sequence[str] = ()
    entrypoint: Sequence[str] | None = None
    cmd: Sequence[str] | None = None
    user: str | None = None
    workdir: str | None = None
    stop_signal: str | None = None
    author: str | None = None
    ports: Sequence[str] = ()
    volumes: Sequence[str] = ()
    platform: Platform | None = None
    created: str | None = None

    def apply(self, image: EditedImage) -> None:
        """Be an `Editor`."""
        execution = image.execution
        image.annotations = _merged(image.annotations, self.annotations, self.unset_annotations)
        if self.labels or self.unset_labels:
            execution["Labels"] = _merged(execution.get("Labels") or {}, self.labels, self.unset_labels)
        if self.env or self.unset_env:
            env = dict(text.partition("=")[::2] for text in execution.get("Env") or [])
            execution["Env"] = [f"{k}={v}" for k, v in _merged(env, self.env, self.unset_env).items()]
        if self.entrypoint is not None:
            execution["Entrypoint"] = list(self.entrypoint)
            if self.cmd is None:
                # As ENTRYPOINT does: the old arguments were for the old program.
                execution.pop("Cmd", None)
        if self.cmd is not None:
            execution["Cmd"] = list(self.cmd)
        for key, value in (("User", self.user), ("WorkingDir", self.workdir), ("StopSignal", self.stop_signal)):
            if value is not None:
                execution[key] = value
        for key, names in (("ExposedPorts", self.ports), ("Volumes", self.volumes)):
            if names:
                execution[key] = {**(execution.get(key) or {}), **{name: {} for name in names}}
        if self.author is not None:
            image.document["author"] = self.author
        if self.created is not None:
            image.document["created"] = self.created
        if self.platform is not None:
            for key in ("os", "architecture", "variant", "os.version", "os.features"):
                image.document.pop(key, None)
            image.document.update(self.platform.to_json())


def _merged(old: Mapping[str, str], new: Mapping[str, str], unset: Sequence[str]) -> dict[str, str]:
    return {k: v for k, v in {**old, **new}.items() if k not in set(unset)}


def appending(
    make: Callable[[], Sequence[NewLayer]], *, created_by: str = "pybuild append", created: str | None = None
) -> Editor:
    """An editor that puts layers on top; `make` gives them anew for each image."""

    def editor(image: EditedImage) -> None:
        for layer in make():
            when = created or image.document.get("created")
            image.add_layer(layer, created_by=created_by, created=when if isinstance(when, str) else None)

    return editor


def empty_image(name: str, platform: Platform) -> ComposedSource:
    """An image without layers, to append to."""
    parts = ComposedSource(name)
    document = {**platform.to_json(), "config": {}, "rootfs": {"type": "layers", "diff_ids": []}, "history": []}
    config = parts.add_bytes(encode_json(document), MEDIA_OCI_CONFIG)
    parts.finish(parts.add_manifest(Manifest.build(config=config, layers=[])).digest)
    return parts


class BaseImage(NamedTuple):
    """An open base image: what an image was, or is to be, built upon. `name` goes into the annotations."""

    source: ImageSource
    name: str

    def load(self, platform: Platform) -> tuple[Manifest, ImageConfig, Digest]:
        """Its manifest and config for a platform, and the digest that its name stands for.

        Raises: ImageError, and what reading raises.
        """
        raw = check_manifest(self.source.get_manifest(), None)
        top = raw.digest
        document = parse_manifest(raw.raw, raw.media_type)
        for _ in range(_MAX_INDEX_DEPTH):
            if isinstance(document, Manifest):
                break
            digest = document.select(platform).digest
            raw = check_manifest(self.source.get_manifest(digest), digest)
            document = parse_manifest(raw.raw, raw.media_type)
        if isinstance(document, Index):
            raise ImageError(f"{self.name}: indexes are nested more than {_MAX_INDEX_DEPTH} deep")
        return document, ImageConfig.parse(read_blob(self.source, document.config, MAX_CONFIG_BYTES)), top


def rebasing(old_base: BaseImage, new_base: BaseImage) -> Editor:
    """An editor that exchanges the base's layers for those of a newer one.

    What the image inherited from its base unchanged (environment, labels, …) is taken from the new
    base; what it set itself stays. Raises, when used: ImageError if the image does not begin with the
    old base's layers.
    """

    def editor(image: EditedImage) -> None:
        platform = image.config.platform
        _, old, _ = old_base.load(platform)
        new_manifest, new, new_top = new_base.load(platform)
        count = len(old.diff_ids)
        if image.config.diff_ids[:count] != old.diff_ids:
            raise ImageError(
                f"{image.source.name} ({platform}) is not built upon {old_base.name}: its first layers are others",
                hint="name the base that it was built upon by its digest",
            )
        if format_of(new_manifest.media_type) != format_of(image.manifest.media_type):
            target = format_of(image.manifest.media_type)
            base_layers = [convert_descriptor(d, target) for d in new_manifest.layers]
        else:
            base_layers = list(new_manifest.layers)
        image.parts.refer(new_base.source, [d.digest for d in base_layers])
        image.layers = [*base_layers, *image.layers[count:]]
        document = image.document
        document["rootfs"] = {
            "type": "layers",
            "diff_ids": [str(d) for d in (*new.diff_ids, *image.config.diff_ids[count:])],
        }
        document["history"] = [*map(dict, new.history), *_own_history(image.config, old)]
        document["config"] = _inherited(dict(image.config.config), old.config, new.config)
        if not image.docker:
            image.annotations |= {BASE_NAME: new_base.name, BASE_DIGEST: str(new_top)}

    return editor


def _own_history(image: ImageConfig, base: ImageConfig) -> list[dict[str, Any]]:
    """The lines of history after those of the base: by number of layers, since builders rewrite lines."""
    left = len(base.diff_ids)
    if list(map(dict, image.history[: len(base.history)])) == list(map(dict, base.history)):
        return [dict(h) for h in image.history[len(base.history) :]]
    for at, entry in enumerate(image.history):
        if left == 0:
            return [dict(h) for h in image.history[at:]]
        left -= not entry.get("empty_layer")
    return []


def _inherited(image: dict[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A three-way merge of execution parameters: what the image left as the old base had it follows the new base."""
    result = dict(image)
    for key in {*image, *old, *new}:
        mine, was, now = image.get(key), old.get(key), new.get(key)
        if key == "Env" and mine != was:
            merged = _merge_maps(_env(mine), _env(was), _env(now))
            result[key] = [f"{k}={v}" for k, v in merged.items()]
        elif key != "Env" and all(isinstance(v, dict) or v is None for v in (mine, was, now)) and mine != was:
            result[key] = _merge_maps(mine or {}, was or {}, now or {})
        elif mine == was:
            if now is None:
                result.pop(key, None)
            else:
                result[key] = now
    return result


def _env(value: Any) -> dict[str, str]:
    return dict(str(text).partition("=")[::2] for text in value or [])


def _merge_maps(mine: Mapping[str, Any], was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: now.get(k, v) if mine.get(k) == was.get(k) else v for k, v in mine.items()}
    kept = {k: v for k, v in kept.items() if not (k in was and k not in now and mine[k] == was[k])}
    return kept | {k: v for k, v in now.items() if k not in mine and k not in was}


def flattening(scratch_dir: Path, *, epoch_s: int | None = None) -> Editor:
    """An editor that makes all layers one, by unpacking them into a directory below `scratch_dir`.

    Needs the right to give files their owners, as `unpack` does. Times are clamped to `epoch_s`.
    """

    def editor(image: EditedImage) -> None:
        one = ComposedSource(image.source.name)
        one.refer(image.source, [image.manifest.config.digest, *(d.digest for d in image.manifest.layers)])
        one.finish(one.add_manifest(image.manifest).digest)
        with _scratch(scratch_dir) as directory:
            target = directory / "rootfs"
            unpack_image(one, target, platform=image.config.platform)
            layer = layer_of_directory(target, scratch_dir, epoch_s=epoch_s)
        image.layers = []
        image.document["rootfs"] = {"type": "layers", "diff_ids": []}
        image.document["history"] = []
        created = image.document.get("created")
        image.add_layer(layer, created_by="pybuild flatten", created=created if isinstance(created, str) else None)
        image.annotations.pop(BASE_NAME, None)
        image.annotations.pop(BASE_DIGEST, None)

    return editor


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    import tempfile

    made = Path(tempfile.mkdtemp(prefix="pybuild-flatten-", dir=directory))
    try:
        yield made
    finally:
        remove_tree(str(made))
