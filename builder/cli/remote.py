"""`pybuild tags`, `catalog`, `digest`, `delete`, `blob`, `ratelimit` and `validate`: asking registries."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, BinaryIO

from builder.cli.actions import Action, add_actions, check_action, end_actions
from builder.cli.options import add_registry_options, registry_options, store_root
from builder.cli.written import written
from builder.errors import UsageError

if TYPE_CHECKING:
    from builder.places import Places
    from registry.client import RegistryClient
    from registry.reference import Reference
    from registry.transport import ImageSource

_COMMON = frozenset({"tls_verify", "creds", "cert_dir", "authfile", "no_creds", "registries_conf", "signature_policy"})
_TAGS = {
    "ls": Action(
        "REPOSITORY", "list its tags",
        frozenset({"sort", "reverse", "include", "exclude", "limit", "digests", "json"}),
    ),
    "rm": Action("NAME…", "remove tags, not what they name", frozenset(), 1, None),
}  # fmt: skip
_BLOB = {
    "get": Action("REPOSITORY DIGEST", "write a blob to stdout or a file", frozenset({"output"}), 1, 2),
    "head": Action("REPOSITORY DIGEST", "print a blob's size in bytes", frozenset(), 1, 2),
    "put": Action("REPOSITORY [FILE]", "upload a file or stdin, print its digest", frozenset({"mount_from"}), 1, 2),
    "rm": Action("REPOSITORY DIGEST", "delete a blob from a repository", frozenset(), 1, 2),
}
_COPY_BYTES = 1 << 20


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    match verb:
        case "tags":
            add_actions(parser, _TAGS)
            add(
                "--sort",
                choices=["name", "version", "none"],
                default="name",
                help="order (default: name; none: as the registry has them)",
            )
            add("--reverse", action="store_true", help="the last first")
            add("--include", action="append", default=[], metavar="PATTERN", help="only these: a glob, or /regex/")
            add("--exclude", action="append", default=[], metavar="PATTERN", help="not these")
            add("--limit", type=int, metavar="N", help="at most so many")
            add("--digests", action="store_true", help="with the digest of each, by HEAD")
            add("--json", action="store_true", help="print JSON")
        case "blob":
            add_actions(parser, _BLOB)
            add("-o", "--output", metavar="FILE", help="write the blob there (default: stdout)")
            add(
                "--mount-from",
                metavar="REPOSITORY",
                help="another repository of the registry: take the blob from there, if it has it",
            )
        case "catalog":
            add("registry", metavar="REGISTRY", help="a registry's host")
            add("--include", action="append", default=[], metavar="PATTERN", help="only these: a glob, or /regex/")
            add("--exclude", action="append", default=[], metavar="PATTERN", help="not these")
            add("--limit", type=int, metavar="N", help="at most so many")
            add("--json", action="store_true", help="print JSON")
        case "delete":
            add("names", nargs="+", metavar="NAME", help="a manifest, by digest or tag; docker:// may be left out")
            add("--tag-only", action="store_true", help="remove the tag, leave the manifest and its other tags")
        case "digest":
            add("name", metavar="NAME", help="an image; docker:// may be left out")
            add("--platform", metavar="OS/ARCH", help="of an index the image for this platform")
            add("--full-ref", action="store_true", help="print the name with the digest")
        case "ratelimit":
            add("name", metavar="NAME", help="an image of the registry, such as docker.io/library/alpine", nargs="?",
                default="docker.io/library/alpine:latest")  # fmt: skip
            add("--json", action="store_true", help="print JSON")
        case "validate":
            add("name", metavar="NAME", help="an image, of any transport")
            add("--fast", action="store_true", help="only look whether the layers are there")
            add("--json", action="store_true", help="print JSON")
            add("-q", "--quiet", action="store_true", help="no more than what is wrong")
    add_registry_options(parser)
    end_actions(parser, {"tags": _TAGS, "blob": _BLOB}.get(verb))


def run(verb: str, options: Namespace) -> int:
    from builder.places import open_places

    if verb in {"tags", "blob"}:
        check_action(verb, options, _TAGS if verb == "tags" else _BLOB, _COMMON)
    with open_places(store_root(options), registry_options(options)) as places:
        match verb:
            case "tags":
                return _tags(options, places.source.client)
            case "catalog":
                return _catalog(options, places.source.client)
            case "blob":
                return _blob(options, places.source.client)
            case "delete":
                return _delete(options, places.source.client)
            case "digest":
                return _digest(options, places)
            case "ratelimit":
                return _ratelimit(options, places.source.client)
            case _:
                return _validate(options, places)


def reference_of(text: str) -> Reference:
    from registry.reference import Reference
    from registry.transport import split_transport

    transport, rest = split_transport(text)
    if transport not in {None, "docker"}:
        raise UsageError(f"{text!r} is not in a registry", hint="write docker://HOST/REPOSITORY")
    return Reference.parse(rest)


def _repository(text: str) -> Reference:
    ref = reference_of(text)
    if ref.tag is not None or ref.digest is not None:
        raise UsageError(f"{text!r} names an image; a repository is wanted here", hint=f"write {ref.repository}")
    return ref


def _tags(options: Namespace, client: RegistryClient) -> int:
    from registry.tags import delete_tag, select, to_json, version_key

    if options.action == "rm":
        for text in options.names:
            ref = reference_of(text)
            if ref.digest is not None:
                raise UsageError(f"{text!r} is not a tag", hint="delete manifests with `pybuild delete`")
            delete_tag(client, _with_tag(ref))
            print(ref)
        return 0
    repository = _repository(options.names[0])
    found = select(client.list_tags(repository), options.include, options.exclude)
    if options.sort != "none":
        found.sort(key=version_key if options.sort == "version" else None)
    if options.reverse:
        found.reverse()
    found = found[: _limit(options)]
    if options.digests:
        digests = _digests(client, repository, found)
        if options.json:
            print(json.dumps({"Repository": repository.repository, "Tags": digests}, indent=4))
        else:
            print("".join(f"{digests.get(tag, '-'):<72}{tag}\n" for tag in found), end="")
    elif options.json:
        print(to_json(repository, found))
    else:
        print("".join(f"{tag}\n" for tag in found), end="")
    return 0


def _digests(client: RegistryClient, repository: Reference, tags: list[str]) -> dict[str, str]:
    """The digest of each tag that there still is, in the tags' order."""
    import threading
    from functools import partial

    from registry.copy import DEFAULT_JOBS, run_parallel

    found: dict[str, str] = {}

    def ask(tag: str) -> None:
        head = client.head_manifest(repository.with_tag(tag))
        if head is not None:
            found[tag] = str(head.digest)

    run_parallel([partial(ask, tag) for tag in tags], DEFAULT_JOBS, threading.Event())
    return {tag: found[tag] for tag in tags if tag in found}


def _catalog(options: Namespace, client: RegistryClient) -> int:
    from itertools import islice

    from registry.reference import DEFAULT_DOMAIN
    from registry.tags import select

    host = options.registry.removeprefix("docker://").removeprefix("https://").removeprefix("http://").rstrip("/")
    if "/" in host:
        raise UsageError(f"{options.registry!r} is not a registry's host")
    names = client.catalog(DEFAULT_DOMAIN if host == "index.docker.io" else host)
    limit = _limit(options)
    if options.include or options.exclude:
        found = select(names, options.include, options.exclude)[:limit]
    else:
        found = list(islice(names, limit))
    print(json.dumps(found, indent=4) if options.json else "".join(f"{n}\n" for n in found), end="")
    if options.json:
        print()
    return 0


def _limit(options: Namespace) -> int | None:
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit {options.limit}: expected a positive number")
    limit: int | None = options.limit
    return limit


def _blob(options: Namespace, client: RegistryClient) -> int:
    from layers.errors import ImageError
    from layers.oci import Digest
    from registry.errors import NotFoundError

    if options.action == "put":
        return _blob_put(options, client)
    ref = reference_of(options.names[0])
    try:
        digest = Digest(options.names[1]) if len(options.names) == 2 else ref.digest
    except ImageError as e:
        raise UsageError(e.message) from e
    if digest is None:
        raise UsageError("which blob?", hint="write REPOSITORY DIGEST, or REPOSITORY@DIGEST")
    ref = ref.without_target()
    if options.action == "rm":
        client.delete_blob(ref, digest)
        return 0
    found = client.stat_blob(ref, digest)
    if found is None:
        raise NotFoundError(f"{ref.repository} has no blob {digest}", status=404)
    if options.action == "head":
        print(found.size_bytes)
        return 0
    # What stands under the name has been verified.
    with client.open_blob(ref, found) as reader, written(options.output) as out:
        while data := reader.read(_COPY_BYTES):
            out.write(data)
    return 0


def _blob_put(options: Namespace, client: RegistryClient) -> int:
    import hashlib

    from layers.oci import Descriptor, Digest

    ref = _repository(options.names[0])
    mount = _repository(options.mount_from).path if options.mount_from else None
    if len(options.names) < 2 or options.names[1] == "-":
        if mount:
            raise UsageError("--mount-from needs a file, whose digest is known beforehand")
        done = client.upload_blob(ref, _once, None)
        print(done.digest)
        return 0
    path = options.names[1]
    with open(path, "rb") as f:
        digest = Digest(f"sha256:{hashlib.file_digest(f, 'sha256').hexdigest()}")
        size = f.tell()
    described = Descriptor(media_type="application/octet-stream", digest=digest, size_bytes=size)

    def source(offset: int) -> BinaryIO:
        f = open(path, "rb")  # noqa: SIM115  # the uploader closes it
        f.seek(offset)
        return f

    if not client.has_blob(ref, digest):
        client.upload_blob(ref, source, described, mount_from=mount)
    print(digest)
    return 0


def _once(offset: int) -> BinaryIO:
    if offset:
        raise UsageError("the upload broke, and stdin cannot be read again", hint="name a file")
    return sys.stdin.buffer


def _delete(options: Namespace, client: RegistryClient) -> int:
    from registry.tags import delete_tag

    for text in options.names:
        ref = reference_of(text)
        if options.tag_only:
            if ref.digest is not None:
                raise UsageError(f"{text!r} is not a tag")
            delete_tag(client, _with_tag(ref))
        else:
            client.delete_manifest(_with_tag(ref) if ref.digest is None else ref._replace(tag=None))
        print(ref)
    return 0


def _with_tag(ref: Reference) -> Reference:
    """What is to be deleted must be named: `latest` is nobody's default there. Raises: UsageError."""
    if ref.tag is None:
        raise UsageError(f"{str(ref)!r} names a repository", hint=f"say which tag: {ref}:latest")
    return ref


def _digest(options: Namespace, places: Places) -> int:
    from registry.errors import NotFoundError
    from registry.transport import check_manifest, parse_location
    from registry.transports.docker import DockerLocation

    location = parse_location(options.name, "docker")
    if isinstance(location, DockerLocation) and options.platform is None:
        found = places.source.client.head_manifest(location.ref)
        if found is None:
            raise NotFoundError(f"there is no {location.ref}", status=404)
        digest = str(found.digest)
    else:
        source = location.source(places.source)
        try:
            digest = str(
                _of_platform(source, options.platform)
                if options.platform
                else check_manifest(source.get_manifest(), None).digest
            )
        finally:
            source.close()
    if options.full_ref:
        if not isinstance(location, DockerLocation):
            raise UsageError("--full-ref is for images in registries")
        print(f"{location.ref.repository}@{digest}")
    else:
        print(digest)
    return 0


def _of_platform(source: ImageSource, platform: str) -> str:
    from layers.oci import Platform
    from registry.unpack import find_manifest

    return find_manifest(source, Platform.parse(platform)).descriptor.digest


def _ratelimit(options: Namespace, client: RegistryClient) -> int:
    ref = reference_of(options.name)
    limit = client.ratelimit(ref)
    if options.json:
        document = (
            None if limit is None else {"Limit": limit.limit, "Remain": limit.remaining, "Window": limit.window_s}
        )
        print(json.dumps(document, indent=2))
    elif limit is None:
        print(f"{ref.domain} tells of no limit")
    else:
        hours = limit.window_s / 3600
        print(f"{limit.remaining} of {limit.limit} pulls left, per {hours:g} hours ({limit.source or ref.domain})")
    return 0


def _validate(options: Namespace, places: Places) -> int:
    from registry.transport import parse_location
    from registry.transports.docker import DockerLocation
    from registry.validate import validate

    location = parse_location(options.name)
    source = location.source(places.source)
    has_blob = None
    if isinstance(location, DockerLocation):
        client, ref = places.source.client, location.ref

        def has_blob(descriptor):  # type: ignore[no-untyped-def]
            found = client.stat_blob(ref, descriptor.digest)
            return found is not None and found.size_bytes == descriptor.size_bytes

    try:
        report = validate(source, fast=options.fast, has_blob=has_blob)
    finally:
        source.close()
    if options.json:
        document = report._asdict() | {"problems": [p._asdict() for p in report.problems]}
        print(json.dumps(document, indent=2))
    else:
        for problem in report.problems:
            print(f"{problem.where}: {problem.what}")
        if not options.quiet:
            verdict = f"{len(report.problems)} problems" if report.problems else "all is right"
            print(f"{report.manifests} manifests, {report.blobs} blobs, {report.checked_bytes} bytes read: {verdict}")
    return 1 if report.problems else 0
