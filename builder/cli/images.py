"""`pybuild images`, `tag`, `untag`, `rmi`, `inspect`, `history`: the images of the local store."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from builder.cli.options import add_registry_options, registry_options, store_root

if TYPE_CHECKING:
    from layers.oci import Descriptor
    from layers.store import Store


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    match verb:
        case "images":
            add("name", nargs="?", metavar="NAME", help="only images of this repository or name")
            add("-q", "--quiet", action="store_true", help="image ids alone")
            add("--no-trunc", action="store_true", help="whole ids")
            add("--digests", action="store_true", help="manifest digests, too")
            add("--json", action="store_true", help="print JSON")
        case "tag":
            add("source", metavar="NAME", help="an image of the store")
            add("names", nargs="+", metavar="NEW", help="further names")
        case "untag" | "rmi":
            add("names", nargs="*" if verb == "rmi" else "+", metavar="NAME", help="images of the store")
            if verb == "rmi":
                add("-a", "--all", action="store_true", help="all images")
                add("-f", "--force", action="store_true", help="a missing image is no error")
        case "inspect":
            add("name", metavar="NAME", help="an image, of any transport")
            add("--raw", action="store_true", help="the manifest's own bytes")
            add("--config", action="store_true", help="the image's config")
            add("--platform", metavar="OS/ARCH", help="the image of an index for this platform")
            add_registry_options(parser)
        case "history":
            add("name", metavar="NAME", help="an image of the store")
            add("--json", action="store_true", help="print JSON")
            add("--no-trunc", action="store_true", help="whole commands")


def run(verb: str, options: Namespace) -> int:
    from builder.api import open_store

    if verb == "inspect":
        return _inspect(options)
    with open_store(store_root(options)) as store:
        match verb:
            case "images":
                return _list(store, options)
            case "tag":
                return _tag(store, options)
            case "history":
                return _history(store, options)
            case _:
                return _remove(store, verb, options)


def _list(store: Store, options: Namespace) -> int:
    from registry.reference import Reference

    rows: list[dict[str, Any]] = []
    for image in store.names.list():
        name, _, platform = image.name.partition("#")
        repository, tag = "<none>", "<none>"
        if not name.startswith("@"):
            reference = Reference.parse(name)
            familiar = reference.familiar()
            tag = reference.tag or "<none>"
            repository = familiar.partition("@")[0].removesuffix(f":{tag}")
            if options.name and options.name not in {familiar, repository, reference.canonical()}:
                continue
        elif options.name:
            continue
        id, created, size = _summary(store, image.descriptor)
        rows.append(
            {
                "name": repository,
                "tag": tag,
                "digest": str(image.descriptor.digest),
                "id": id,
                "created": created,
                "size": size,
                **({"platform": platform} if platform else {}),
            }
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    if options.quiet:
        for id in dict.fromkeys(str(row["id"]) for row in rows):
            print(id if options.no_trunc else id[:12])
        return 0
    heads = ["REPOSITORY", "TAG", *(["DIGEST"] if options.digests else []), "IMAGE ID", "CREATED", "SIZE"]
    table = [
        [
            row["name"],
            row["tag"],
            *([row["digest"]] if options.digests else []),
            row["id"] if options.no_trunc else row["id"][:12],
            ago(row["created"]),
            human_size(row["size"]),
        ]
        for row in rows
    ]
    print_table([heads, *table])
    return 0


def _summary(store: Store, descriptor: Descriptor) -> tuple[str, str, int]:
    """An image's id, time and compressed size in bytes."""
    from layers.oci import MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, ImageConfig, Manifest, parse_manifest

    document = parse_manifest(store.read(descriptor.digest, MAX_MANIFEST_BYTES), descriptor.media_type)
    if not isinstance(document, Manifest):
        sizes = [_summary(store, d)[2] for d in document.manifests if store.stat(d.digest) is not None]
        return descriptor.digest.encoded, "", sum(sizes)
    config = ImageConfig.parse(store.read(document.config.digest, MAX_CONFIG_BYTES))
    size = sum(d.size_bytes for d in document.layers) + document.config.size_bytes + len(document.raw)
    return document.config.digest.encoded, str(config.document.get("created") or ""), size


def _tag(store: Store, options: Namespace) -> int:
    from registry.transports.storage import find_image, store_name

    descriptor = find_image(store, options.source)
    store.publish({store_name(name): descriptor for name in options.names})
    return 0


def _remove(store: Store, verb: str, options: Namespace) -> int:
    from layers.errors import NameNotFound

    names = [name for text in options.names for name in _names_of(store, text, force=getattr(options, "force", False))]
    if getattr(options, "all", False):
        names = [image.name for image in store.names.list()]
    elif not names and not options.names:
        raise NameNotFound("no image was named")
    for name in dict.fromkeys(names):
        store.names.delete(name)
        print(name)
    if verb == "rmi":
        store.gc()
    return 0


def _names_of(store: Store, text: str, *, force: bool) -> list[str]:
    """The names that `text` stands for: itself, or all names of the image with that id."""
    from layers.errors import NameNotFound
    from registry.errors import InvalidReference
    from registry.transports.storage import find_image, store_name

    try:
        if store.names.get(store_name(text)) is not None:
            return [store_name(text)]
    except InvalidReference:
        pass
    try:
        return list(store.names.of(find_image(store, text).digest))
    except NameNotFound:
        if force:
            return []
        raise


def _history(store: Store, options: Namespace) -> int:
    from layers.image import load_image

    from layers.oci import Platform
    from registry.transports.storage import find_image

    image = load_image(store, find_image(store, options.name), Platform.host())
    sizes = iter([d.size_bytes for d in image.manifest.layers])
    rows = []
    for entry in image.config.history:
        size = 0 if entry.get("empty_layer") else next(sizes, 0)
        rows.append({"created": entry.get("created", ""), "created_by": entry.get("created_by", ""), "size": size})
    rows.reverse()
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = 10_000 if options.no_trunc else 60
    table = [[ago(str(r["created"])), str(r["created_by"])[:width], human_size(int(r["size"]))] for r in rows]
    print_table([["CREATED", "CREATED BY", "SIZE"], *table])
    return 0


def _inspect(options: Namespace) -> int:
    from builder import api
    from layers.oci import Platform

    platform = Platform.parse(options.platform) if options.platform else None
    found = api.inspect(
        options.name, root=store_root(options), registry=registry_options(options), platform=platform, raw=options.raw
    )
    if options.raw:
        sys.stdout.buffer.write(found.manifest.raw)
        return 0
    if found.config is None:
        print(json.dumps(json.loads(found.manifest.raw), indent=2))
        return 0
    document: dict[str, Any] = dict(found.config.document)
    if not options.config:
        document = {
            "Name": found.name,
            "Digest": found.manifest.descriptor.digest,
            "MediaType": found.manifest.media_type,
            "Created": document.get("created"),
            "Platform": str(found.config.platform),
            "Config": document.get("config"),
            "Layers": [d.to_json() for d in found.layers],
            "DiffIDs": list(found.config.diff_ids),
            "History": document.get("history"),
        }
    print(json.dumps(document, indent=2))
    return 0


def print_table(rows: list[list[str]]) -> None:
    """Columns aligned; the last is not padded."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("   ".join(f"{cell!s:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def human_size(size_bytes: float) -> str:
    """As docker prints sizes: decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g}{unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g}TB"


def ago(text: str) -> str:
    """How long since a time in RFC 3339, in the words of docker."""
    import calendar

    try:
        then = calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return "N/A"
    seconds = max(0, int(time.time()) - then)
    for unit, length in (
        ("years", 31_536_000),
        ("months", 2_592_000),
        ("days", 86_400),
        ("hours", 3600),
        ("minutes", 60),
    ):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} seconds ago"
