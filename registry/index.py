"""Indexes made and changed: members gathered from anywhere, entries annotated, removed, selected.

An index is written with everything beneath it to one place, so that what it names is there: a
registry mounts or streams, the store keeps. Fields that we do not know survive a change.
Callers: `pybuild manifest`, and Python programs that merge what was built elsewhere.

Spec: image-spec image-index.md; https://distribution.github.io/distribution/spec/manifest-v2-2/
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from layers.errors import ImageError
from layers.events import EventSink
from layers.oci import (
    MAX_CONFIG_BYTES,
    MEDIA_DOCKER_CONFIG,
    MEDIA_DOCKER_INDEX,
    MEDIA_DOCKER_MANIFEST,
    MEDIA_OCI_CONFIG,
    MEDIA_OCI_INDEX,
    Descriptor,
    Digest,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    encode_json,
    parse_manifest,
)
from layers.values import NamedTuple
from registry.composed import ComposedSource
from registry.copy import DEFAULT_JOBS, CopyOptions, CopyResult, copy_image
from registry.transport import ImageDestination, ImageSource, check_manifest, read_blob

ATTESTED = "vnd.docker.reference.digest"
"""BuildKit's annotation of an attestation's entry: the digest of the image that it is about."""


class EntryChange(NamedTuple):
    """What to set in an index's entry; None leaves a field, annotations are added to those there."""

    os: str | None = None
    architecture: str | None = None
    variant: str | None = None
    os_version: str | None = None
    os_features: tuple[str, ...] | None = None
    features: tuple[str, ...] | None = None
    annotations: Mapping[str, str] = {}


class IndexDraft:
    """An index being put together. `entries` are descriptors as JSON objects, in order.

    The sources that members come from must stay open until `write` is done.
    """

    def __init__(self, name: str, document: Mapping[str, Any] | None = None, *, docker: bool = False) -> None:
        media_type = MEDIA_DOCKER_INDEX if docker else MEDIA_OCI_INDEX
        self.document: dict[str, Any] = dict(document or {"schemaVersion": 2, "mediaType": media_type})
        self.entries: list[dict[str, Any]] = list(self.document.get("manifests") or [])
        self.parts = ComposedSource(name)

    @classmethod
    def of(cls, source: ImageSource, *, lenient: bool = False) -> IndexDraft:
        """The index that `source` names, to be changed; with `lenient`, one image becomes an index of one.

        Raises: ImageError if it is an image; what reading it raises.
        """
        raw = check_manifest(source.get_manifest(), None)
        document = parse_manifest(raw.raw, raw.media_type)
        if isinstance(document, Manifest):
            if not lenient:
                raise ImageError(f"{source.name} is one image, not an index", hint="make one with `manifest create`")
            draft = cls(source.name)
            draft.add(source)
            return draft
        draft = cls(source.name, {"mediaType": document.media_type, **json.loads(document.raw)})
        for entry in document.manifests:
            child = check_manifest(source.get_manifest(entry.digest), entry.digest)
            draft.parts.add_tree(source, child._replace(media_type=entry.media_type or child.media_type))
        return draft

    @property
    def docker(self) -> bool:
        return self.document.get("mediaType") == MEDIA_DOCKER_INDEX

    def add(
        self,
        source: ImageSource,
        *,
        platforms: Sequence[Platform] = (),
        nested: bool = False,
        change: EntryChange | None = None,
    ) -> list[Digest]:
        """Add what `source` names; of an index its entries (those for `platforms`), or with `nested` itself.

        An entry whose digest is there already is replaced. Returns the digests added.
        Raises: ImageError if no entry is for a platform; what reading raises.
        """
        raw = check_manifest(source.get_manifest(), None)
        document = parse_manifest(raw.raw, raw.media_type)
        if isinstance(document, Index) and not nested:
            objects = [dict(e) for e in json.loads(document.raw)["manifests"]]
            found = _only(objects, document, platforms, source.name)
            for entry in found:
                digest = Digest(entry["digest"])
                child = check_manifest(source.get_manifest(digest), digest)
                self.parts.add_tree(source, child._replace(media_type=entry.get("mediaType") or child.media_type))
        else:
            found = [_entry_of(source, document, raw.descriptor)]
            self.parts.add_tree(source, raw)
        for entry in found:
            self._put(_changed(entry, change or EntryChange()))
        return [Digest(entry["digest"]) for entry in found]

    def _put(self, entry: dict[str, Any]) -> None:
        for at, old in enumerate(self.entries):
            if old["digest"] == entry["digest"]:
                self.entries[at] = entry
                return
        self.entries.append(entry)

    def find(self, text: str) -> list[int]:
        """The positions of the entries that `text` names: a digest, its first hex digits, or a platform.

        Raises: ImageError if there is none.
        """
        encoded = text.removeprefix("sha256:")
        found = [
            i
            for i, e in enumerate(self.entries)
            if e["digest"] == text or (len(encoded) >= 6 and e["digest"].partition(":")[2].startswith(encoded))
        ]
        if not found:
            try:
                wanted = Platform.parse(text)
            except ImageError:
                wanted = None
            found = [
                i
                for i, e in enumerate(self.entries)
                if wanted is not None and e.get("platform") and _is_meant(wanted, Platform.from_json(e["platform"]))
            ]
        if not found:
            have = ", ".join(str(Platform.from_json(e["platform"])) for e in self.entries if e.get("platform"))
            raise ImageError(
                f"the index has no entry {text!r}", hint=f"name a digest or a platform: it has {have or 'no platform'}"
            )
        return found

    def remove(self, text: str) -> list[Digest]:
        """Remove the entries that `text` names, and the attestations about them; the digests removed."""
        gone = {self.entries[i]["digest"] for i in self.find(text)}
        gone |= {e["digest"] for e in self.entries if (e.get("annotations") or {}).get(ATTESTED) in gone}
        self.entries = [e for e in self.entries if e["digest"] not in gone]
        return [Digest(d) for d in sorted(gone)]

    def annotate(self, text: str, change: EntryChange) -> None:
        """Change the entries that `text` names. Raises: ImageError."""
        for i in self.find(text):
            self.entries[i] = _changed(self.entries[i], change)

    def annotate_index(self, annotations: Mapping[str, str]) -> None:
        """Add annotations to the index itself. Raises: ImageError for a Docker manifest list, which has none."""
        if annotations and self.docker:
            raise ImageError("a Docker manifest list has no annotations", hint="make it with --format oci")
        if annotations:
            self.document["annotations"] = dict(
                sorted({**(self.document.get("annotations") or {}), **annotations}.items())
            )

    def build(self) -> Index:
        """The index as it stands. Raises: ImageError."""
        document = {k: v for k, v in self.document.items() if k != "manifests"}
        annotations = document.pop("annotations", None)
        document["manifests"] = self.entries
        if annotations:
            document["annotations"] = annotations
        return Index.parse(encode_json(document), str(document.get("mediaType") or ""))

    def write(
        self,
        destination: ImageDestination,
        *,
        options: CopyOptions | None = None,
        events: EventSink | None = None,
        jobs: int = DEFAULT_JOBS,
        cancelled: Callable[[], bool] | None = None,
    ) -> CopyResult:
        """Write the index and all that it names, and commit. Raises: what `copy_image` raises."""
        index = self.build()
        self.parts.add_manifest(index)
        self.parts.finish(index.descriptor.digest)
        chosen = (options or CopyOptions())._replace(all_platforms=True, platform=None)
        result = copy_image(self.parts, destination, options=chosen, events=events, jobs=jobs, cancelled=cancelled)
        if result.written:
            destination.commit()
        return result


def _is_meant(wanted: Platform, has: Platform) -> bool:
    """Whether a platform as a user writes it means an entry's: what it leaves out may be anything."""
    named = (wanted.os, wanted.architecture, wanted.variant) == (has.os, has.architecture, has.variant)
    return named and wanted.os_version in {"", has.os_version} and {*wanted.os_features} <= {*has.os_features}


def _entry_of(source: ImageSource, document: Manifest | Index, descriptor: Descriptor) -> dict[str, Any]:
    """An index's entry for what a source names, its platform taken from the config."""
    entry = descriptor.to_json()
    if isinstance(document, Index):
        return entry
    if document.config.media_type in {MEDIA_OCI_CONFIG, MEDIA_DOCKER_CONFIG}:
        config = ImageConfig.parse(read_blob(source, document.config, MAX_CONFIG_BYTES))
        entry["platform"] = config.platform.to_json()
    elif document.media_type != MEDIA_DOCKER_MANIFEST:
        entry["artifactType"] = document.artifact_type or document.config.media_type
    return entry


def _only(
    entries: Iterable[dict[str, Any]], index: Index, platforms: Sequence[Platform], name: str
) -> list[dict[str, Any]]:
    """The entries for these platforms, with the attestations about them; all if none is given."""
    if not platforms:
        return list(entries)
    kept: set[str] = set()
    for platform in platforms:
        try:
            kept.add(index.select(platform).digest)
        except ImageError as e:
            raise ImageError(f"{name}: {e.message}", hint=e.hint) from e
    return [e for e in entries if e["digest"] in kept or (e.get("annotations") or {}).get(ATTESTED) in kept]


def _changed(entry: Mapping[str, Any], change: EntryChange) -> dict[str, Any]:
    result = dict(entry)
    platform = dict(result.get("platform") or {})
    values = {
        "os": change.os,
        "architecture": change.architecture,
        "variant": change.variant,
        "os.version": change.os_version,
        "os.features": list(change.os_features) if change.os_features is not None else None,
        "features": list(change.features) if change.features is not None else None,
    }
    platform.update({k: v for k, v in values.items() if v is not None})
    if platform:
        # A platform needs both; what is missing is this machine's kind.
        platform.setdefault("os", "linux")
        platform.setdefault("architecture", Platform.host().architecture)
        result["platform"] = platform
    if change.annotations:
        result["annotations"] = dict(sorted({**(result.get("annotations") or {}), **change.annotations}.items()))
    return result
