"""Which image of the local store a name means: a reference, a digest, an ID, or the first digits of one.

The names that the store itself keeps are canonical references (`layers.records.Names`); what people write
for them is told here. `registry.transports.storage` reads and writes the images; `run` needs only this.
"""

from __future__ import annotations

import re

from layers.errors import BlobNotFound, ImageError, NameNotFound, SizeMismatch
from layers.oci import MAX_MANIFEST_BYTES, Descriptor, Digest, Index, Manifest, parse_manifest
from registry.errors import InvalidReference
from registry.reference import Reference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.store import Store


def is_id(text: str) -> bool:
    """Whether it may be an image's ID, or the beginning of one."""
    return re.match(r"(?:sha256:)?[0-9a-f]{7,64}\Z", text) is not None


def store_name(text: str) -> str:
    """The name under which the store keeps the image that people call `text`. Raises: InvalidReference."""
    return Reference.parse(text).with_default_tag().canonical()


def find_image(store: Store, text: str) -> Descriptor:
    """The descriptor of the image that `text` names: a name, a digest, an ID, or the beginning of one.

    Raises: NameNotFound; ImageError if the beginning fits several.
    """
    ref: Reference | None = None
    try:
        ref = Reference.parse(text).with_default_tag()
    except InvalidReference:
        if not is_id(text):
            raise
    if ref is not None:
        found = store.names.get(ref.canonical())
        if found is None and ref.digest is not None:
            found = _by_digest(store, ref.digest)
        if found is not None:
            return found
    if is_id(text):
        fits = _by_prefix(store, text.removeprefix("sha256:"))
        if len(fits) == 1:
            return next(iter(fits.values()))
        if fits:
            raise ImageError(f"{text!r} is the beginning of {len(fits)} images' IDs", hint="give more digits")
    elsewhere = "" if ref is None or not text.startswith(f"{ref.domain}/") else f"; docker://{text} is the registry's"
    raise NameNotFound(f"no image {text!r} in the store", hint=f"`pybuild images` lists what there is{elsewhere}")


def _by_digest(store: Store, digest: Digest) -> Descriptor | None:
    info = store.blobs.stat(digest)
    if info is None or info.size_bytes > MAX_MANIFEST_BYTES:
        return None
    media_type = parse_manifest(store.blobs.read(digest, MAX_MANIFEST_BYTES)).media_type
    return Descriptor(media_type=media_type, digest=digest, size_bytes=info.size_bytes)


def _by_prefix(store: Store, prefix: str) -> dict[Digest, Descriptor]:
    """The images by those of their digests and IDs that begin so; of several under one ID, the newest."""
    found: dict[Digest, Descriptor] = {}
    for named in sorted(store.names.list(), key=lambda n: n.created_ns):
        ids = [named.descriptor.digest, *(m.config.digest for m in manifests(store, named.descriptor))]
        found.update((id_, named.descriptor) for id_ in ids if id_.encoded.startswith(prefix))
    return found


def manifests(store: Store, descriptor: Descriptor) -> list[Manifest]:
    """The image manifests that the store has under a name; a damaged or missing one is passed over."""
    try:
        document = parse_manifest(store.blobs.read(descriptor.digest, MAX_MANIFEST_BYTES), descriptor.media_type)
    except (BlobNotFound, SizeMismatch, ImageError):
        return []
    if isinstance(document, Index):
        return [m for d in document.manifests if store.blobs.stat(d.digest) for m in manifests(store, d)]
    return [document]
