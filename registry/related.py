"""What belongs to an image without being part of it, copied along: referrers, and tags named by digest.

Signatures, SBOMs and attestations are manifests whose `subject` is the image's, or one of its
platforms'; older tools (cosign) tag them `sha256-<hex>.sig` and the like instead.

Spec: distribution-spec, Listing Referrers
"""

from __future__ import annotations

from collections.abc import Callable

from layers.errors import ImageError
from layers.oci import Digest, Index, parse_manifest
from registry.client import RegistryClient, fallback_tag
from registry.copy import CopyResult
from registry.errors import NotFoundError
from registry.reference import Reference
from registry.transports.docker import DockerLocation

MAX_RELATED = 1000
Copy = Callable[[DockerLocation, DockerLocation], CopyResult]


def copy_related(
    client: RegistryClient,
    source: Reference,
    target: Reference,
    digest: Digest,
    copy: Copy,
    *,
    referrers: bool = True,
    digest_tags: bool = False,
) -> list[str]:
    """Copy what refers to the image `digest` of `source`, and to that in turn; the names of the copies.

    `copy` copies one image, digests preserved. Raises: ImageError beyond MAX_RELATED; RegistryError.
    """
    subjects = _family(client, source, digest, 0)
    done: list[str] = []
    seen: set[Digest] = set()
    pending = list(subjects) if referrers else []
    while pending:
        subject = pending.pop(0)
        for found in client.referrers(source, subject):
            if found.digest in seen:
                continue
            seen.add(found.digest)
            if len(seen) > MAX_RELATED:
                raise ImageError(f"{source} has more than {MAX_RELATED} referrers")
            end = DockerLocation(target.with_digest(found.digest))
            copy(DockerLocation(source.with_digest(found.digest)), end)
            done.append(str(end))
            pending.append(found.digest)
    if digest_tags:
        done += _digest_tags(client, source, target, [*subjects, *seen], copy)
    return done


def _family(client: RegistryClient, source: Reference, digest: Digest, depth: int) -> list[Digest]:
    """The digest of an image or index, and those of its platforms."""
    try:
        fetched = client.get_manifest(source.with_digest(digest))
    except NotFoundError:
        return []
    document = parse_manifest(fetched.raw, fetched.media_type)
    children = document.manifests if isinstance(document, Index) and depth < 3 else ()
    return [digest, *(d for child in children for d in _family(client, source, child.digest, depth + 1))]


def _digest_tags(
    client: RegistryClient, source: Reference, target: Reference, subjects: list[Digest], copy: Copy
) -> list[str]:
    heads = {fallback_tag(subject) for subject in subjects}
    done = []
    for tag in client.list_tags(source):
        # The bare tag is the list of referrers, which the destination keeps for itself.
        head, dot, _ = tag.partition(".")
        if dot and head in heads:
            end = DockerLocation(target.with_tag(tag))
            copy(DockerLocation(source.with_tag(tag)), end)
            done.append(str(end))
    return done
