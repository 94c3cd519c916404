"""`pybuild cat`: files of an image, without unpacking or pulling it."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli.options import add_registry_options, registry_options, store_root

if TYPE_CHECKING:
    from registry.onefile import FileFinder


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="an image, of any transport")
    add("paths", metavar="PATH", nargs="+", help="a file's path in the image; links are followed within it")
    add("-o", "--output", metavar="FILE", help="write there, whole or not at all (default: stdout)")
    add("--platform", metavar="OS/ARCH", help="of an index the image for this platform (default: this machine's)")
    add_registry_options(parser)


def run(verb: str, options: Namespace) -> int:
    from builder.places import open_places
    from layers.oci import Platform
    from registry.onefile import FileFinder
    from registry.transport import parse_location
    from registry.unpack import find_manifest

    platform = Platform.parse(options.platform) if options.platform else Platform.host()
    with open_places(store_root(options), registry_options(options)) as places:
        source = parse_location(options.name).source(places.source)
        finder = FileFinder(source, find_manifest(source, platform), places.source.scratch_dir)
        try:
            _write(finder, options)
        finally:
            finder.close()
            source.close()
    return 0


def _write(finder: FileFinder, options: Namespace) -> None:
    if options.output is None or options.output == "-":
        for piece in _data(finder, options.paths):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    temporary = f"{options.output}.{os.getpid()}.part"
    try:
        with open(temporary, "xb") as out:
            for piece in _data(finder, options.paths):
                out.write(piece)
        os.replace(temporary, options.output)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _data(finder: FileFinder, paths: list[str]) -> Iterator[bytes]:
    for path in paths:
        yield from finder.find(path).data
