"""Lists of tags put in order and filtered, and tags removed without their manifests."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from layers.oci import MEDIA_OCI_CONFIG, Descriptor, Manifest, encode_json
from layers.regex import Pattern, compile_pattern
from registry.client import RegistryClient
from registry.errors import ConfigError, NotFoundError, RegistryError
from registry.reference import Reference

_MAX_PATTERN_CHARS = 500
_PIECES = re.compile(r"(\d+)")


def matcher(pattern: str) -> Pattern | str:
    """A pattern of tags: `/…/` is a regular expression that is searched for, all else a glob.

    Raises: ConfigError.
    """
    if len(pattern) > _MAX_PATTERN_CHARS:
        raise ConfigError(f"a pattern of tags is longer than {_MAX_PATTERN_CHARS} characters")
    if len(pattern) > 2 and pattern.startswith("/") and pattern.endswith("/"):
        try:
            return compile_pattern(pattern[1:-1])
        except ValueError as e:
            raise ConfigError(f"{pattern!r} is not a regular expression: {e}") from e
    return pattern


def select(tags: Iterable[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The tags that some pattern of `include` fits (all if there is none) and none of `exclude`.

    Raises: ConfigError.
    """
    wanted, unwanted = [matcher(p) for p in include], [matcher(p) for p in exclude]

    def fits(pattern: Pattern | str, tag: str) -> bool:
        return pattern.search(tag) is not None if isinstance(pattern, Pattern) else fnmatchcase(tag, pattern)

    return [
        tag
        for tag in tags
        if (not wanted or any(fits(p, tag) for p in wanted)) and not any(fits(p, tag) for p in unwanted)
    ]


def version_key(tag: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts 1.9 before 1.10, and 2.0-rc1 before 2.0."""
    main, dash, rest = tag.removeprefix("v").partition("-")
    # The end of a version comes after a pre-release's and before a further number.
    end = [(0, ""), *_pieces(rest)] if dash else [(1, "")]
    return (*_pieces(main), *end)


def _pieces(text: str) -> list[tuple[int, str]]:
    """Numbers, comparable as texts of a tag's greatest length, and words; no dots."""
    found = [(2, t.zfill(128)) if t.isdigit() else (3, t.strip("._+-")) for t in _PIECES.split(text)]
    return [piece for piece in found if piece[1]]


def delete_tag(client: RegistryClient, ref: Reference) -> bool:
    """Remove a tag and leave its manifest and other tags; whether the registry could do so itself.

    Where it cannot, the tag is moved to a manifest made for the purpose, which is then deleted.
    Raises: NotFoundError; RegistryError if the registry deletes nothing at all.
    """
    ref = ref.with_default_tag()
    if client.head_manifest(ref, for_push=True) is None:
        raise NotFoundError(f"cannot delete tag {ref}: there is no such tag", status=404)
    try:
        client.delete_tag(ref)
        return True
    except RegistryError as e:
        if e.status not in {400, 404, 405, 501} or isinstance(e, NotFoundError):
            raise
    document = {"architecture": "none", "os": "none", "rootfs": {"type": "layers", "diff_ids": []}}
    document["author"] = f"pybuild delete --tag-only {os.urandom(16).hex()}"  # no other manifest may have its digest
    raw = encode_json(document)
    config = Descriptor.of(raw, MEDIA_OCI_CONFIG)
    client.upload_blob(ref, lambda offset: iter((raw[offset:],)), config)
    manifest = Manifest.build(config=config, layers=[])
    put = client.put_manifest(ref, manifest.raw, manifest.media_type)
    client.delete_manifest(ref.with_digest(put.digest))
    return False


def to_json(ref: Reference, tags: Sequence[str]) -> str:
    """The form of skopeo's `list-tags`."""
    return json.dumps({"Repository": ref.repository, "Tags": list(tags)}, indent=4)
