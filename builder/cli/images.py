"""`pybuild images`, `tag`, `untag`, `rmi`, `inspect`, `history`: the images of the local store."""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from builder.cli.options import add_registry_options, boolean, duration, registry_options, store_root
from builder.errors import UsageError

if TYPE_CHECKING:
    from builder.api import InspectedImage
    from builder.images import ListedImage
    from layers.oci import Index
    from layers.store import Store


def configure(verb: str, parser: ArgumentParser) -> None:
    add = parser.add_argument
    match verb:
        case "images":
            add("name", nargs="?", metavar="NAME", help="only images of this repository or name; * and ? match")
            add("-q", "--quiet", action="store_true", help="image ids alone")
            add("--no-trunc", action="store_true", help="whole ids")
            add("--digests", action="store_true", help="manifest digests, too")
            add("-f", "--filter", action="append", default=[], metavar="KEY=VALUE",
                help="reference=PATTERN, label=KEY[=VALUE], dangling=BOOL, before=IMAGE, since=IMAGE, id=PREFIX,"
                " until=TIME; several of one key: any of them; keys: all of them")  # fmt: skip
            add("--format", metavar="TEMPLATE", help="a Go template, `table TEMPLATE` or `json`")
            add("--sort", choices=["name", "created", "size"], default="name", help="the order (default: name)")
            add("--json", action="store_true", help="print JSON")
        case "tag":
            add("source", metavar="NAME", help="an image of the store")
            add("names", nargs="+", metavar="NEW", help="further names")
        case "untag" | "rmi":
            add("names", nargs="*" if verb == "rmi" else "+", metavar="NAME", help="images of the store")
            if verb == "rmi":
                add("-a", "--all", action="store_true", help="all images")
                add("-f", "--force", action="store_true", help="a missing image is no error")
                add("-p", "--prune", action="store_true", help="all images that have no tag")
        case "inspect":
            add("name", nargs="+", metavar="NAME", help="an image, of any transport")
            add("--raw", action="store_true", help="the manifest's own bytes")
            add("--config", action="store_true", help="the image's config")
            add("--format", metavar="TEMPLATE", help="a Go template over what is printed otherwise")
            add("--platform", metavar="OS/ARCH", help="the image of an index for this platform")
            add_registry_options(parser)
        case "history":
            add("name", metavar="NAME", help="an image of the store")
            add("--json", action="store_true", help="print JSON")
            add("--format", metavar="TEMPLATE", help="a Go template, `table TEMPLATE` or `json`")
            add("--no-trunc", action="store_true", help="whole commands")
            add("-q", "--quiet", action="store_true", help="layers' digests alone")
            add("-H", "--human", nargs="?", const=True, default=True, type=boolean, metavar="BOOL",
                help="sizes and times for people (default: true)")  # fmt: skip


def run(verb: str, options: Namespace) -> int:
    from builder import api

    if verb == "inspect":
        return _inspect(options)
    root = store_root(options)
    if verb == "rmi":
        api.prepare_namespaces()  # an ordinary user's snapshots belong to subordinate ids
    with api.open_store(root) as store:
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
    from builder.images import image_document, list_images

    listed = list_images(store)
    chosen = _chosen(listed, options)
    keys: dict[str, Callable[[ListedImage], Any]] = {
        "name": lambda i: (i.dangling, i.repository, i.tag),
        "created": lambda i: i.created,
        "size": lambda i: i.size_bytes,
    }
    chosen.sort(key=keys[options.sort], reverse=options.sort != "name")
    if options.json:
        print(json.dumps([image_document(image) for image in chosen], indent=2))
        return 0
    ids = {image.id: image.id if options.no_trunc else image.id.partition(":")[2][:12] for image in chosen}
    if options.quiet:
        print("".join(f"{id}\n" for id in dict.fromkeys(ids[image.id] for image in chosen)), end="")
        return 0
    if options.format is not None:
        from builder.cli.template import print_formatted

        print_formatted(options.format, [_fields(image, ids[image.id]) for image in chosen])
        return 0
    heads = ["REPOSITORY", "TAG", *(["DIGEST"] if options.digests else []), "IMAGE ID", "CREATED", "SIZE"]
    table = [
        [
            image.repository or "<none>",
            image.tag or "<none>",
            *([str(image.descriptor.digest)] if options.digests else []),
            ids[image.id],
            ago(image.created),
            human_size(image.size_bytes),
        ]
        for image in chosen
    ]
    print_table([heads, *table])
    return 0


def _fields(image: ListedImage, id: str) -> dict[str, Any]:
    """What a --format sees of an image: docker's names."""
    return {
        "Repository": image.repository or "<none>",
        "Tag": image.tag or "<none>",
        "ID": id,
        "Digest": str(image.descriptor.digest),
        "CreatedSince": ago(image.created),
        "CreatedAt": image.created,
        "Created": image.created,
        "Size": human_size(image.size_bytes),
        "VirtualSize": human_size(image.size_bytes),
        "Bytes": image.size_bytes,
        "Labels": image.labels,
        "Platform": image.platform,
        "Dangling": image.dangling,
    }


def _chosen(listed: Sequence[ListedImage], options: Namespace) -> list[ListedImage]:
    """Those of the images that NAME and the filters are for. Raises: UsageError, NameNotFound."""
    tests: dict[str, list[Callable[[ListedImage], bool]]] = {}
    for text in options.filter:
        key, separator, value = text.partition("=")
        if not separator or not value:
            raise UsageError(f"--filter {text!r}: expected KEY=VALUE")
        tests.setdefault(key, []).append(_test(key, value, text, listed))
    if options.name:
        tests["NAME"] = [lambda image: _named_so(image, options.name)]
    every = {"label"}  # several labels: an image has them all, as docker means it
    return [
        image
        for image in listed
        if all((all if key in every else any)(test(image) for test in group) for key, group in tests.items())
    ]


def _test(key: str, value: str, text: str, listed: Sequence[ListedImage]) -> Callable[[ListedImage], bool]:
    match key:
        case "reference":
            return lambda image: _named_so(image, value)
        case "label":
            name, separator, wanted = value.partition("=")
            return lambda image: name in image.labels and (not separator or image.labels[name] == wanted)
        case "dangling":
            try:
                wants = boolean(value)
            except ArgumentTypeError as e:
                raise UsageError(f"--filter {text!r}: {e}") from e
            return lambda image: image.dangling is wants
        case "id":
            prefix = value.removeprefix("sha256:")
            return lambda image: image.id.partition(":")[2].startswith(prefix)
        case "until":
            moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(parse_time(value, f"--filter {text}") // 10**9))
            return lambda image: image.created[:19] < moment
        case "before" | "since":
            other = next((i for i in listed if _named_so(i, value) or i.id.partition(":")[2].startswith(value)), None)
            if other is None:
                from layers.errors import NameNotFound

                raise NameNotFound(f"--filter {text!r}: no image {value!r} in the store")
            created = other.created
            return lambda image: image.created < created if key == "before" else image.created > created
    raise UsageError(
        f"--filter {text!r}: unknown filter",
        hint="there are reference=, label=, dangling=, before=, since=, id= and until=",
    )


def _named_so(image: ListedImage, pattern: str) -> bool:
    """Whether an image's name is `pattern`: in full or short, with or without its tag, or by shell pattern."""
    import fnmatch

    if image.dangling:
        return False
    names = {f"{image.repository}:{image.tag}", image.repository, image.name, image.name.rpartition(":")[0]}
    if not any(c in pattern for c in "*?["):
        return pattern in names
    # docker matches a pattern against the last part of the path as well.
    names |= {name.rpartition("/")[2] for name in names}
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _tag(store: Store, options: Namespace) -> int:
    from registry.stored import find_image, store_name

    descriptor = find_image(store, options.source)
    store.publish({store_name(name): descriptor for name in options.names})
    return 0


def _remove(store: Store, verb: str, options: Namespace) -> int:
    from layers.errors import NameNotFound

    names = [name for text in options.names for name in _names_of(store, text, force=getattr(options, "force", False))]
    if getattr(options, "all", False):
        names = [image.name for image in store.names.list()]
    elif getattr(options, "prune", False):
        names += [image.name for image in store.names.list() if image.name.startswith("@")]
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
    from registry.stored import find_image, store_name

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
    from registry.stored import find_image

    image = load_image(store, find_image(store, options.name), Platform.host())
    layers = iter(zip(image.manifest.layers, image.diff_ids, strict=True))
    rows: list[dict[str, Any]] = []
    for entry in image.config.history:
        layer = None if entry.get("empty_layer") else next(layers, None)
        rows.append(
            {
                "created": str(entry.get("created") or ""),
                "created_by": str(entry.get("created_by") or ""),
                "comment": str(entry.get("comment") or ""),
                "empty_layer": bool(entry.get("empty_layer")),
                "size": layer[0].size_bytes if layer else 0,
                **({"digest": str(layer[0].digest), "diff_id": str(layer[1])} if layer else {}),
            }
        )
    rows.reverse()
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    if options.quiet:
        print("".join(f"{row.get('digest', '<empty>')}\n" for row in rows), end="")
        return 0
    width = 10_000 if options.no_trunc else 60
    shown = [
        {
            "ID": row.get("digest", "<empty>") if options.no_trunc else row.get("digest", "<empty>")[:19],
            "CreatedSince": ago(row["created"]) if options.human else row["created"],
            "CreatedAt": row["created"],
            "CreatedBy": " ".join(row["created_by"].split())[:width],
            "Size": human_size(row["size"]) if options.human else str(row["size"]),
            "Comment": row["comment"],
        }
        for row in rows
    ]
    if options.format is not None:
        from builder.cli.template import print_formatted

        print_formatted(options.format, shown)
        return 0
    print_table([["CREATED", "CREATED BY", "SIZE"], *[[r["CreatedSince"], r["CreatedBy"], r["Size"]] for r in shown]])
    return 0


def _inspect(options: Namespace) -> int:
    from builder import api
    from layers.oci import Platform

    platform = Platform.parse(options.platform) if options.platform else None
    documents: list[dict[str, Any]] = []
    for name in options.name:
        found = api.inspect(
            name, root=store_root(options), registry=registry_options(options), platform=platform, raw=options.raw
        )
        if options.raw and options.format is None:
            sys.stdout.buffer.write(found.manifest.raw)
            sys.stdout.flush()
            continue
        documents.append(_document(found, config=options.config))
    if options.format is not None:
        from builder.cli.template import print_formatted

        print_formatted(options.format, documents)
    elif documents:
        # One image is an object, as skopeo prints it; several are a list, as docker does.
        print(json.dumps(documents[0] if len(options.name) == 1 else documents, indent=2))
    return 0


def _index(index: Index | None) -> dict[str, Any] | None:
    """What an image was chosen from, and for which platforms there are others; None if from nothing."""
    if index is None:
        return None
    platforms = [str(entry.platform) for entry in index.manifests if entry.platform]
    return {"Digest": index.descriptor.digest, "MediaType": index.media_type, "Platforms": platforms}


def _document(found: InspectedImage, *, config: bool) -> dict[str, Any]:
    if found.config is None:
        document: dict[str, Any] = json.loads(found.manifest.raw)
        return document
    document = dict(found.config.document)
    if config:
        return document
    return {
        "Name": found.name,
        "Id": json.loads(found.manifest.raw)["config"]["digest"],
        "Digest": found.manifest.descriptor.digest,
        "MediaType": found.manifest.media_type,
        "Created": document.get("created"),
        "Index": _index(found.chosen_from),
        "Platform": str(found.config.platform),
        "Architecture": document.get("architecture"),
        "Os": document.get("os"),
        "Annotations": json.loads(found.manifest.raw).get("annotations"),
        "Size": sum(d.size_bytes for d in found.layers),
        "Config": document.get("config"),
        "Layers": [d.to_json() for d in found.layers],
        "DiffIDs": list(found.config.diff_ids),
        "History": document.get("history"),
    }


def print_table(rows: list[list[str]]) -> None:
    """Columns aligned; the last is not padded. What images say of themselves sends nothing to the terminal."""
    from builder.cli.progress import sanitise

    rows = [[sanitise(" ".join(str(cell).splitlines())).strip() for cell in row] for row in rows]
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
    return f"{seconds} second{'' if seconds == 1 else 's'} ago"


def parse_time(text: str, flag: str) -> int:
    """A moment in nanoseconds since the epoch: how long ago (`24h`), a date, a time, or seconds since the epoch.

    Raises: UsageError.
    """
    from datetime import datetime

    if text.isdigit() and len(text) > 8:
        return int(text) * 10**9
    try:
        return time.time_ns() - int(duration(text) * 10**9)
    except ArgumentTypeError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as e:
        raise UsageError(f"{flag}: {text!r} is neither a duration nor a time", hint="24h, 2026-01-31") from e
    return int(moment.timestamp() * 10**9)
