"""What a registry's answers say: manifests with their digests, descriptors by headers, pages of lists.

Spec: distribution-spec, "Pulling manifests", "Content Discovery".
"""

from __future__ import annotations

import json
from typing import Any

from layers.errors import DigestMismatch, ImageError
from layers.oci import INDEX_MEDIA_TYPES, MANIFEST_MEDIA_TYPES, Descriptor, Digest
from registry.errors import ServerError
from registry.hosts import Endpoint
from registry.http import join_url
from registry.reference import Reference
from registry.transport import RawManifest
from registry.wire import Reply


def next_link(reply: Reply) -> str | None:
    """The absolute URL of `rel="next"` in the Link header (RFC 8288).

    Raises: ServerError for one that is no URL.
    """
    for part in reply.headers.get("Link", "").split(","):
        target, _, params = part.strip().partition(">")
        if target.startswith("<") and 'rel="next"' in params.replace("rel=next", 'rel="next"').replace(" ", ""):
            return join_url(reply.url, target[1:])
    return None


def verified_manifest(ref: Reference, reply: Reply, endpoint: Endpoint) -> RawManifest:
    """The manifest of an answer, which the reference's digest and the header's agree with.

    Raises: ServerError for nothing at all; DigestMismatch.
    """
    raw = reply.body
    if not raw:
        # http.client also takes a connection that ends within the headers for a whole answer.
        raise ServerError(f"the manifest of {ref} from {endpoint.host} is empty", url=reply.url, retryable=True)
    digest = Digest.of(raw)
    for promised in (ref.digest, _digest_header(reply)):
        if promised is None:
            continue
        hasher = promised.hasher()
        hasher.update(raw)
        actual = Digest.from_hasher(hasher)
        if actual != promised:
            raise DigestMismatch(
                f"the manifest of {ref} from {endpoint.host} has the wrong content: {actual} instead of {promised}",
                hint="the registry, or something between, damaged it",
            )
    return RawManifest(raw, _media_type(reply, raw), ref.digest or digest)


def described(ref: Reference, reply: Reply) -> Descriptor | None:
    """The descriptor in the headers of a HEAD; None if they do not say enough."""
    digest = ref.digest or _digest_header(reply)
    length = reply.headers.get("Content-Length", "")
    media_type = reply.headers.get("Content-Type", "").partition(";")[0].strip()
    if digest is None or not length.isascii() or not length.isdigit() or not media_type:
        return None
    return Descriptor(media_type=media_type, digest=digest, size_bytes=int(length[:18]))


def _digest_header(reply: Reply) -> Digest | None:
    text = reply.headers.get("Docker-Content-Digest", "").strip()
    if not text:
        return None
    try:
        return Digest(text)
    except ImageError:
        # An algorithm that we do not know promises nothing that we could check.
        return None


def _media_type(reply: Reply, raw: bytes) -> str:
    """The Content-Type, unless it is a generic one and the document knows better."""
    said = reply.headers.get("Content-Type", "").partition(";")[0].strip()
    if said in MANIFEST_MEDIA_TYPES or said in INDEX_MEDIA_TYPES:
        return said
    try:
        declared = json.loads(raw).get("mediaType")
    except (ValueError, AttributeError, RecursionError):
        declared = None
    return declared if isinstance(declared, str) and declared else said


def json_object(reply: Reply, what: str) -> dict[str, Any]:
    """The answer as a JSON object. Raises: ServerError."""
    try:
        doc = json.loads(reply.body)
    except (ValueError, RecursionError):
        doc = None
    if not isinstance(doc, dict):
        raise ServerError(f"{what}: the answer is not a JSON object", url=reply.url)
    return doc
