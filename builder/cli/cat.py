"""`pybuild cat`: files of an image, without unpacking or pulling it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from builder.cli.options import add_registry_options, registry_options, store_root
from builder.cli.written import written


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
            with written(options.output) as out:
                for path in options.paths:
                    for data in finder.find(path).data:
                        out.write(data)
        finally:
            finder.close()
            source.close()
    return 0
