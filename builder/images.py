"""What is done with the images of a local store: listing, naming, saving, loading, importing, exporting, mounting.

Functions take an open store; whoever calls those that touch snapshots has entered the user namespace
(`builder.api.prepare_namespaces`) before it was opened. Moving images is `registry.copy`'s work, layers
and snapshots are `layers`'. Callers: `builder.cli`, Python programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from layers.errors import ContentError, ImageError
from layers.oci import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    MEDIA_DOCKER_INDEX,
    MEDIA_OCI_INDEX,
    Descriptor,
    Digest,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    parse_manifest,
)
from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.prune import UsageReport
    from layers.records import NamedImage
    from layers.store import Store

NAMELESS = "@"
"""With an image's id, the name of one that was built without a tag (`builder.building`)."""


class ListedImage(NamedTuple):
    """An image under one of its names. `repository` and `tag` are empty for an image without a name.

    `id` is the config's digest, of an index its own. `size_bytes` is that of the compressed blobs.
    """

    name: str
    repository: str
    tag: str
    platform: str
    descriptor: Descriptor
    id: str
    created: str
    size_bytes: int
    labels: dict[str, str]
    named_ns: int

    @property
    def dangling(self) -> bool:
        return not self.repository


def list_images(store: Store) -> list[ListedImage]:
    """All images of the store, by name. One whose manifest or config is damaged or missing is passed over.

    So is one without a tag that is a part of an index with one: so an index is pushed to `serve`, part by part.
    """
    found: list[ListedImage] = []
    parts: set[Digest] = set()
    for named in store.names.list():
        try:
            found.append(_listed(store, named))
            if not named.name.startswith(NAMELESS):
                parts |= _parts(store, named.descriptor)
        except (ContentError, ImageError):
            continue
    return [image for image in found if image.repository or image.descriptor.digest not in parts]


def _parts(store: Store, descriptor: Descriptor) -> set[Digest]:
    """The digests of an index's entries; none for an image."""
    if descriptor.media_type not in {MEDIA_OCI_INDEX, MEDIA_DOCKER_INDEX}:
        return set()
    document = parse_manifest(store.read(descriptor.digest, MAX_MANIFEST_BYTES), descriptor.media_type)
    return {entry.digest for entry in document.manifests} if isinstance(document, Index) else set()


def _listed(store: Store, named: NamedImage) -> ListedImage:
    from registry.reference import Reference

    name, _, platform = named.name.partition("#")
    repository = tag = ""
    if not name.startswith(NAMELESS):
        reference = Reference.parse(name)
        tag = reference.tag or ""
        repository = reference.familiar().partition("@")[0].removesuffix(f":{tag}")
    id, created, size, labels = _summary(store, named.descriptor)
    return ListedImage(
        named.name, repository, tag, platform, named.descriptor, id, created, size, labels, named.created_ns
    )


def _summary(store: Store, descriptor: Descriptor) -> tuple[str, str, int, dict[str, str]]:
    """Id, time, compressed size in bytes and labels."""
    document = parse_manifest(store.read(descriptor.digest, MAX_MANIFEST_BYTES), descriptor.media_type)
    if isinstance(document, Index):
        parts = [_summary(store, d) for d in document.manifests if store.stat(d.digest) is not None]
        latest = max((created for _, created, _, _ in parts), default="")
        return str(descriptor.digest), latest, sum(size for _, _, size, _ in parts), {}
    config = ImageConfig.parse(store.read(document.config.digest, MAX_CONFIG_BYTES))
    size = sum(d.size_bytes for d in document.layers) + document.config.size_bytes + len(document.raw)
    labels = config.config.get("Labels")
    known = {str(k): str(v) for k, v in labels.items()} if isinstance(labels, dict) else {}
    return str(document.config.digest), str(config.document.get("created") or ""), size, known


def manifests_of(store: Store, descriptor: Descriptor) -> Iterator[Manifest]:
    """The image manifests that a name stands for, of those platforms that are in the store."""
    document = parse_manifest(store.read(descriptor.digest, MAX_MANIFEST_BYTES), descriptor.media_type)
    if isinstance(document, Manifest):
        yield document
        return
    for entry in document.manifests:
        if store.stat(entry.digest) is not None:
            yield from manifests_of(store, entry)


# Space


def prune_images(
    store: Store, *, until_ns: int | None = None, matches: Callable[[dict[str, str]], bool] | None = None
) -> list[str]:
    """Take away the names of images that have no tag, those named before `until_ns`; which. No gc yet."""
    gone = []
    for named in store.names.list():
        if not named.name.startswith(NAMELESS) or (until_ns is not None and named.created_ns >= until_ns):
            continue
        if matches is not None:
            try:
                labels = _summary(store, named.descriptor)[3]
            except (ContentError, ImageError):
                labels = {}
            if not matches(labels):
                continue
        store.names.delete(named.name)
        gone.append(named.name)
    return gone


class ImageUsage(NamedTuple):
    """What an image's blobs take, in allocated blocks; what of it other names share, and what goes with it."""

    name: str
    bytes: int
    shared_bytes: int
    unique_bytes: int


def image_usage(store: Store, report: UsageReport) -> list[ImageUsage]:
    """How much each image takes, and how much of that it shares. Names of one image count as one."""
    sizes = {item.id: item.bytes for item in report.items if item.kind == "blob"}
    blobs: dict[str, set[str]] = {}
    names: dict[str, str] = {}
    for named in store.names.list():
        digest = str(named.descriptor.digest)
        if digest not in blobs:
            try:
                blobs[digest] = {str(d) for d in store.closure(named.descriptor)}
            except (ContentError, ImageError):
                continue
            names[digest] = named.name
    users: dict[str, int] = {}
    for each in blobs.values():
        for blob in each:
            users[blob] = users.get(blob, 0) + 1
    found = []
    for digest, each in blobs.items():
        total = sum(sizes.get(blob, 0) for blob in each)
        shared = sum(sizes.get(blob, 0) for blob in each if users[blob] > 1)
        found.append(ImageUsage(_shown(names[digest]), total, shared, total - shared))
    return sorted(found)


def _shown(name: str) -> str:
    if name.startswith(NAMELESS):
        return name[1:]
    from registry.reference import Reference

    base, separator, platform = name.partition("#")
    return Reference.parse(base).familiar() + separator + platform


def image_document(listed: ListedImage) -> dict[str, Any]:
    """An image of a list as JSON."""
    return {
        "name": listed.repository or "<none>",
        "tag": listed.tag or "<none>",
        "digest": str(listed.descriptor.digest),
        "id": listed.id.partition(":")[2],
        "created": listed.created,
        "size": listed.size_bytes,
        "labels": listed.labels,
        **({"platform": listed.platform} if listed.platform else {}),
    }


class TreeLayer(NamedTuple):
    """A layer of an image, base first. `tops` are the names of images that end with it."""

    digest: str
    diff_id: str
    size_bytes: int
    created_by: str
    tops: tuple[str, ...]


def layer_tree(store: Store, name: str, platform: Platform | None = None) -> list[TreeLayer]:
    """An image's layers, and which images of the store have each of them on top.

    Raises: NameNotFound, ImageError.
    """
    from layers.image import chain_ids, load_image
    from registry.stored import find_image

    chosen = platform or Platform.host()
    image = load_image(store, find_image(store, name), chosen)
    tops: dict[str, list[str]] = {}
    for named in store.names.list():
        try:
            other = load_image(store, named.descriptor, chosen)
        except (ContentError, ImageError):
            continue
        if other.diff_ids:
            tops.setdefault(chain_ids(other.diff_ids)[-1], []).append(_shown(named.name))
    steps = [str(entry.get("created_by") or "") for entry in image.config.history if not entry.get("empty_layer")]
    steps += [""] * (len(image.layers) - len(steps))
    return [
        TreeLayer(str(layer.digest), str(diff_id), layer.size_bytes, step, tuple(tops.get(chain, ())))
        for layer, diff_id, chain, step in zip(
            image.layers, image.diff_ids, chain_ids(image.diff_ids), steps, strict=False
        )
    ]
