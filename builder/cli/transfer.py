"""`pybuild push`, `pull`, `copy` and `unpack`: images between the store, registries, layouts, archives."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli.options import add_registry_options, registry_options, store_root
from builder.errors import UsageError

if TYPE_CHECKING:
    from layers.oci import Platform

_TRANSPORTS = (
    "docker://HOST/REPO:TAG, oci:DIR:TAG, oci-archive:FILE:TAG, docker-archive:FILE:TAG, dir:DIR, storage:NAME"
)


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    parser.epilog = f"Transports: {_TRANSPORTS}."
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
            add("source", metavar="NAME", help="an image; docker:// may be left out")
        case "copy":
            add("source", metavar="SRC", help="an image")
            add("destination", metavar="DST", help="where to")
        case "unpack":
            add("source", metavar="NAME", help="an image")
            add("directory", metavar="DIR", help="an empty or missing directory")
    if verb == "copy":
        add_registry_options(parser, "source", "destination")
    else:
        add_registry_options(parser)
    add("--platform", metavar="OS/ARCH", help="the image of an index for this platform")
    add("--progress", default="auto", choices=["auto", "tty", "plain", "quiet", "rawjson"])
    add("-q", "--quiet", action="store_true", help="no progress")
    if verb == "unpack":
        return
    add("--all", "-a", dest="all_platforms", action="store_true", help="every platform of an index")
    add("--preserve-digests", action="store_true", help="fail rather than change a digest")
    add("--format", "-f", choices=["oci", "docker"], help="convert to these media types")
    add("--compression", "--dest-compress-format", choices=["gzip", "zstd", "none"], help="convert layers to this")
    add("--compression-level", type=int, metavar="N")
    add("--force-compression", action="store_true", help="compress also layers that are compressed so already")
    add("--digestfile", metavar="FILE", help="write the digest of the copy there")
    add("-j", "--jobs", type=int, default=6, metavar="N", help="blobs at once")


def run(verb: str, options: Namespace) -> int:
    from builder.cli.progress import make_progress

    mode = "quiet" if options.quiet else options.progress
    if verb == "unpack":
        return _unpack(options, mode)
    from builder import api
    from registry.copy import CopyOptions

    choices = CopyOptions(
        all_platforms=options.all_platforms,
        platform=_platform(options.platform),
        preserve_digests=options.preserve_digests,
        format=options.format,
        compression=options.compression,
        compression_level=options.compression_level,
        force_compression=options.force_compression,
    )
    if options.jobs < 1:
        raise UsageError(f"--jobs {options.jobs}: expected a positive number")
    root = store_root(options)
    with make_progress(mode, sys.stderr, os.environ) as progress:
        common = {"root": root, "options": choices, "events": progress, "jobs": options.jobs}
        if verb == "pull":
            result = api.pull(options.source, source_registry=registry_options(options), **common)
        elif verb == "push":
            destination = options.destination or options.source
            result = api.push(options.source, destination, destination_registry=registry_options(options), **common)
        else:
            result = api.copy(
                options.source,
                options.destination,
                source_registry=registry_options(options, "source"),
                destination_registry=registry_options(options, "destination"),
                default_source="storage",
                default_destination="storage",
                **common,
            )
    if options.digestfile:
        Path(options.digestfile).write_text(result.descriptor.digest)
    print(result.descriptor.digest)
    return 0


def _unpack(options: Namespace, mode: str) -> int:
    from builder import api
    from builder.cli.progress import make_progress

    root = store_root(options)
    api.prepare_namespaces()  # an ordinary user's owners are those of the user namespace
    with make_progress(mode, sys.stderr, os.environ) as progress:
        api.unpack(
            options.source,
            Path(options.directory),
            root=root,
            registry=registry_options(options),
            platform=_platform(options.platform),
            events=progress,
        )
    return 0


def _platform(text: str | None) -> Platform | None:
    if text is None:
        return None
    from layers.oci import Platform

    return Platform.parse(text)
