"""`pybuild push`, `pull`, `copy` and `unpack`: images between the store, registries, layouts, archives."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli.options import (
    add_registry_options,
    add_retry_options,
    media_types,
    registry_options,
    retry_policy,
    store_root,
)
from builder.errors import UsageError

if TYPE_CHECKING:
    from builder.places import Places
    from layers.events import EventSink
    from layers.oci import Platform
    from registry.copy import CopyOptions, CopyResult
    from registry.reference import Reference
    from registry.transport import ImageLocation

_TRANSPORTS = """transports:
docker://HOST/REPO:TAG  an image in a registry
oci:DIR:TAG  an OCI image layout
oci-archive:FILE:TAG  the same as a tar file
docker-archive:FILE:NAME:TAG  what `docker save` writes
dir:DIR  manifest and blobs as plain files
storage:NAME  the local store
containers-storage:NAME  podman's store, by the command skopeo
docker-daemon:NAME  docker's images, by the command docker"""
_DIGEST_TAG = re.compile(r"sha(?:256|384|512)-[0-9a-f]{64}")


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    parser.epilog = _TRANSPORTS
    match verb:
        case "push":
            add("source", metavar="NAME", help="an image of the store")
            add(
                "destination",
                metavar="DEST",
                nargs="?",
                help="where to; docker:// may be left out (default: NAME itself)",
            )
        case "pull":
            add("sources", metavar="NAME", nargs="+", help="images; docker:// may be left out")
        case "copy":
            parser.epilog += "\n\nInto a working container made by `from`: copy CONTAINER SRC… [DST]; see `add --help`."
            add("sources", metavar="SRC", nargs="+", help="images; several go into one archive, layout or the store")
            add("destination", metavar="DST", help="where to: an image by its transport, or a name of the store")
        case "unpack":
            add("source", metavar="NAME", help="an image")
            add("directory", metavar="DIR", help="an empty or missing directory")
    if verb == "copy":
        add_registry_options(parser, "source", "destination")
    else:
        add_registry_options(parser)
    add(
        "--platform",
        metavar="OS/ARCH",
        help="the image of an index for this platform" + "; several, by commas" * (verb == "copy"),
    )
    add("--progress", default="auto", choices=["auto", "tty", "plain", "quiet", "rawjson"],
        help="how it is shown (default: auto: tty on a terminal, plain elsewhere)")  # fmt: skip
    add("-q", "--quiet", action="store_true", help="no progress")
    if verb == "unpack":
        return
    add(
        "--all", "-a", dest="all_platforms", action="store_true", help="every platform of an index, into the store, too"
    )
    add(
        "--multi-arch",
        choices=["system", "all"],
        help="of an index this machine's platform, or all of them (default: all; into the store: system)",
    )
    if verb in {"push", "pull"}:
        add("--all-tags", action="store_true", help="every tag of the repository")
    if verb == "copy":
        add("--referrers", "--include-referrers", dest="referrers", action="store_true",
            help="between registries: also what refers to the image (signatures, SBOMs)")  # fmt: skip
        add("--digest-tags", action="store_true", help="between registries: also tags like sha256-….sig")
    add("--preserve-digests", action="store_true", help="fail rather than change a digest")
    add("--format", "-f", type=media_types, choices=["oci", "docker"], help="convert to these media types")
    add("--compression", "--compression-format", "--dest-compress-format",
        choices=["gzip", "zstd", "none", "estargz", "zstd:chunked"], help="convert layers to this")  # fmt: skip
    add("--compression-level", "--dest-compress-level", type=int, metavar="N",
        help="gzip 1 to 9, zstd 1 to 22 (default: fast)")  # fmt: skip
    add("--force-compression", "--dest-force-compress-format", action="store_true",
        help="compress also layers that are compressed so already")  # fmt: skip
    add("--digestfile", metavar="FILE", help="write the digest of the copy there")
    add("-j", "--jobs", "--image-parallel-copies", type=int, default=6, metavar="N",
        help="blobs at once (default: 6)")  # fmt: skip
    add_retry_options(parser)


def run(verb: str, options: Namespace) -> int:
    from builder.cli.progress import make_progress

    mode = "quiet" if options.quiet else options.progress
    if verb == "unpack":
        return _unpack(options, mode)
    from builder.places import open_places

    choices = _choices(options)
    first = registry_options(options, "source") if verb == "copy" else registry_options(options)
    second = registry_options(options, "destination") if verb == "copy" else first
    with (
        open_places(store_root(options), first, second, policy=retry_policy(options)) as places,
        make_progress(mode, sys.stderr, os.environ) as progress,
    ):
        work = _Transfer(options, places, choices, progress)
        results = work.run(verb)
        notes = work.notes
    for note in () if mode == "quiet" else notes:
        print(note, file=sys.stderr)
    if options.digestfile:
        Path(options.digestfile).write_text("\n".join(r.descriptor.digest for r in results))
    for result in results:
        print(result.descriptor.digest)
    return 0


def _choices(options: Namespace) -> CopyOptions:
    """The flags as `CopyOptions`. Raises: UsageError."""
    from registry.copy import CopyOptions

    platforms = _platforms(options.platform)
    if options.multi_arch == "system":
        from layers.oci import Platform

        platforms = platforms or [Platform.host()]
    every = options.all_platforms or options.multi_arch == "all"
    if every and platforms:
        raise UsageError("all platforms and one platform exclude each other")
    if options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: expected a positive number")
    return CopyOptions(
        all_platforms=every,
        platform=platforms[0] if platforms else None,
        preserve_digests=options.preserve_digests,
        format=options.format,
        compression=options.compression,
        compression_level=options.compression_level,
        force_compression=options.force_compression,
    )


class _Transfer:
    """The copies of one command; `notes` is what is to be told when they are done."""

    def __init__(self, options: Namespace, places: Places, choices: CopyOptions, events: EventSink) -> None:
        self.options = options
        self.places = places
        self.choices = choices
        self.events = events
        self.notes: list[str] = []

    def run(self, verb: str) -> list[CopyResult]:
        match verb:
            case "pull":
                return [result for name in self.options.sources for result in self._pull(name)]
            case "push":
                return self._push()
            case _:
                return self._copy_all()

    def _pull(self, name: str) -> list[CopyResult]:
        from builder.places import pull_name
        from registry.shortnames import find
        from registry.transport import parse_location, split_transport
        from registry.transports.docker import DockerLocation

        transport, rest = split_transport(name)
        if transport not in {None, "docker"}:
            if self.options.all_tags:
                raise UsageError("--all-tags is for repositories in registries")
            return [self._copy(parse_location(name), parse_location(f"storage:{pull_name(name)}"))]
        client = self.places.source.client
        if self.options.all_tags:
            repository = self._bare(rest)
            # Tags named by a digest are signatures and lists of referrers, not images.
            refs = [repository.with_tag(t) for t in client.list_tags(repository) if not _DIGEST_TAG.match(t)]
        else:
            # Only a name without docker:// may be short for another registry's.
            refs = [find(client, rest) if transport is None else DockerLocation(_parsed(rest)).ref]
        return [self._copy(DockerLocation(ref), parse_location(f"storage:{ref.canonical()}")) for ref in refs]

    def _bare(self, text: str) -> Reference:
        from registry.reference import Reference

        ref = Reference.parse(text)
        if ref.tag is not None or ref.digest is not None:
            raise UsageError(f"--all-tags takes a repository, not the image {text!r}")
        return ref

    def _note(self, ref: Reference) -> None:
        """Tell which mirror served a pull, and how many more the registry allows."""
        client = self.places.source.client
        served, limit = client.parts_served(ref), client.known_ratelimit(ref.domain)
        for endpoint, parts in served.items() if any(e.mirror for e in served) else ():
            what = str(ref) if len(served) == 1 else f"{ref}: {', '.join(parts)}"
            kind = "mirror" if endpoint.mirror else "registry"
            self.notes.append(f"{what} came from the {kind} {endpoint.host} ({endpoint.origin})")
        if limit is not None:
            self.notes.append(f"{ref.domain}: {limit.remaining} of {limit.limit} pulls left")

    def _push(self) -> list[CopyResult]:
        from registry.transport import parse_location

        source, destination = self.options.source, self.options.destination
        if not self.options.all_tags:
            end = parse_location(destination or source, "docker")
            return [self._copy(parse_location(source, "storage"), end)]
        from registry.transports.docker import DockerLocation

        repository = self._bare(source)
        end_repository = self._bare((destination or source).removeprefix("docker://"))
        results = []
        for named in self.places.source.store.names.list():
            name, _, platform = named.name.partition("#")
            if platform or not name.startswith(repository.repository + ":"):
                continue
            ref = end_repository.with_tag(name[len(repository.repository) + 1 :])
            results.append(self._copy(parse_location(f"storage:{name}"), DockerLocation(ref)))
        if not results:
            from layers.errors import NameNotFound

            raise NameNotFound(f"the store has no tag of {repository.familiar()}")
        return results

    def _copy_all(self) -> list[CopyResult]:
        from registry.transport import parse_location

        sources = [parse_location(text, "storage") for text in self.options.sources]
        end = parse_location(self.options.destination, "storage") if self.options.destination != "storage:" else None
        if len(sources) == 1 and end is not None:
            return [self._copy(sources[0], end)]
        if self.options.referrers or self.options.digest_tags or len(_platforms(self.options.platform)) > 1:
            raise UsageError("several images cannot be copied with --referrers, --digest-tags or several platforms")
        if end is None:
            from registry.several import name_of
            from registry.transports.storage import StorageLocation

            return [self._copy(s, StorageLocation(name_of(s).canonical())) for s in sources]
        from registry.several import copy_several

        return copy_several(
            sources, end, self.places.source, destination_context=self.places.destination, options=self.choices,
            events=self.events, jobs=self.options.jobs,
        )  # fmt: skip

    def _copy(self, source: ImageLocation, end: ImageLocation) -> CopyResult:
        from registry.transports.docker import DockerLocation

        platforms = _platforms(self.options.platform)
        if len(platforms) > 1:
            return self._copy_platforms(source, end, platforms)
        result = self._one(source, end)
        if isinstance(source, DockerLocation):
            self._note(source.ref)
        if not (getattr(self.options, "referrers", False) or getattr(self.options, "digest_tags", False)):
            return result
        if not isinstance(source, DockerLocation) or not isinstance(end, DockerLocation):
            raise UsageError("--referrers and --digest-tags are for copies from a registry to a registry")
        if result.descriptor.digest != result.source_digest:
            raise UsageError(
                "the copy has another digest: what refers to the original does not refer to it",
                hint="copy with --all and without conversions, or leave out --referrers and --digest-tags",
            )
        from registry.related import copy_related

        same = self.choices._replace(preserve_digests=True, all_platforms=True, platform=None)
        related = copy_related(
            self.places.source.client, source.ref, end.ref.without_target(), result.source_digest,
            partial(self._one, choices=same),
            referrers=self.options.referrers, digest_tags=self.options.digest_tags,
        )  # fmt: skip
        self.notes.append(f"{len(related)} related artifacts were copied, too")
        return result

    def _one(self, source: ImageLocation, end: ImageLocation, choices: CopyOptions | None = None) -> CopyResult:
        from registry.copy import copy_location

        return copy_location(
            source, end, self.places.source, destination_context=self.places.destination,
            options=choices or self.choices, events=self.events, jobs=self.options.jobs,
        )  # fmt: skip

    def _copy_platforms(self, source: ImageLocation, end: ImageLocation, platforms: Sequence[Platform]) -> CopyResult:
        """An index of some of the platforms of another."""
        from registry.index import IndexDraft

        opened = source.source(self.places.source)
        try:
            destination = end.destination(self.places.destination)
            try:
                draft = IndexDraft(opened.name)
                draft.add(opened, platforms=platforms)
                return draft.write(
                    destination, options=self.choices._replace(platform=None), events=self.events,
                    jobs=self.options.jobs,
                )  # fmt: skip
            finally:
                destination.close()
        finally:
            opened.close()


def _parsed(text: str) -> Reference:
    from registry.reference import Reference

    return Reference.parse(text).with_default_tag()


def _unpack(options: Namespace, mode: str) -> int:
    from builder import api
    from builder.cli.progress import make_progress

    platforms = _platforms(options.platform)
    if len(platforms) > 1:
        raise UsageError("unpack takes one platform")
    root = store_root(options)
    api.prepare_namespaces()  # an ordinary user's owners are those of the user namespace
    with make_progress(mode, sys.stderr, os.environ) as progress:
        api.unpack(
            options.source,
            Path(options.directory),
            root=root,
            registry=registry_options(options),
            platform=platforms[0] if platforms else None,
            events=progress,
        )
    return 0


def _platforms(text: str | None) -> list[Platform]:
    if text is None:
        return []
    from layers.oci import Platform

    return [Platform.parse(part) for part in text.split(",")]
