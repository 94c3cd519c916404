"""`pybuild manifest`: manifests read and written, indexes made, changed and pushed."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli.actions import Action, add_actions, check_action, end_actions
from builder.cli.options import add_registry_options, key_value, media_types, registry_options, store_root
from builder.errors import UsageError

if TYPE_CHECKING:
    from builder.places import Places
    from layers.oci import Platform
    from registry.copy import CopyResult
    from registry.index import EntryChange, IndexDraft

_ENTRY = frozenset({"os", "arch", "variant", "os_version", "os_features", "features", "annotation"})
_WRITES = frozenset({"digestfile", "quiet"})
_COMMON = frozenset({"tls_verify", "creds", "cert_dir", "authfile", "no_creds", "registries_conf", "signature_policy"})
_ACTIONS = {
    "get": Action("NAME", "print a manifest's own bytes", frozenset({"platform"})),
    "inspect": Action("NAME", "print a manifest, indented", frozenset({"platform"})),
    "put": Action("NAME [FILE]", "write a manifest from a file or stdin", frozenset({"media_type", "quiet"}), 1, 2),
    "create": Action(
        "LIST [IMAGE…]", "make an index of images",
        _WRITES | {"platform", "all", "annotation", "nested", "amend", "format"}, 1, None,
    ),
    "add": Action("LIST IMAGE…", "add images to an index", _ENTRY | _WRITES | {"platform", "all", "nested"}, 2, None),
    "annotate": Action(
        "LIST ENTRY…", "change entries, or with --index the index", _ENTRY | _WRITES | {"index"}, 1, None
    ),
    "remove": Action("LIST ENTRY…", "remove entries by digest, platform or image", _WRITES, 2, None),
    "push": Action("LIST [DEST]", "copy an index with all its images", _WRITES | {"all", "rm", "format"}, 1, 2),
    "exists": Action("NAME", "end with 0 if there is such an image or index, with 1 if not"),
    "rm": Action("LIST…", "remove indexes from the store", frozenset(), 1, None),
}  # fmt: skip


def configure(verb: str, parser: ArgumentParser) -> None:
    add_actions(parser, _ACTIONS)
    add = parser.add_argument
    add("--platform", action="append", default=[], metavar="OS/ARCH",
        help="of an index only the image for this platform; may be given again")  # fmt: skip
    add("--all", action="store_true", help="all images of an index, as without this flag; for scripts of podman's")
    add("--annotation", action="append", default=[], metavar="KEY=VALUE", help="an annotation of the entry")
    add("--index", action="store_true", help="the annotations are the index's own")
    add("--os", metavar="OS", help="the entry's operating system")
    add("--arch", metavar="ARCH", help="the entry's architecture")
    add("--variant", metavar="VARIANT", help="the entry's CPU variant")
    add("--os-version", metavar="VERSION", help="the entry's version of the operating system")
    add("--os-features", action="append", metavar="FEATURE", help="a feature that the entry needs of the system")
    add("--features", action="append", metavar="FEATURE", help="a feature that the entry needs of the CPU")
    add("--nested", action="store_true", help="add an index as one entry, not its images")
    add("--amend", "-a", action="store_true", help="go on with an index of that name")
    add(
        "--format",
        "-f",
        type=media_types,
        choices=["oci", "docker"],
        help="the media types to write (default: those of the images)",
    )
    add("--media-type", metavar="TYPE", help="the manifest's media type (default: as it says itself)")
    add("--rm", "-p", "--purge", dest="rm", action="store_true", help="remove the index from the store after it")
    add("--digestfile", metavar="FILE", help="write the index's digest there")
    add("-q", "--quiet", action="store_true", help="no progress")
    add_registry_options(parser)
    end_actions(parser, _ACTIONS)


def run(verb: str, options: Namespace) -> int:
    from builder.places import open_places

    check_action(verb, options, _ACTIONS, _COMMON)
    root = store_root(options)
    with open_places(root, registry_options(options)) as places:
        match options.action:
            case "get" | "inspect":
                return _get(options, places)
            case "put":
                return _put(options, places)
            case "exists":
                return _exists(options, places)
            case "rm":
                return _rm(options, places)
            case _:
                return _change(options, places)


def _get(options: Namespace, places: Places) -> int:
    from layers.oci import Index, Manifest, parse_manifest
    from registry.transport import check_manifest, parse_location

    if len(options.platform) > 1:
        raise UsageError(f"manifest {options.action} takes one --platform")
    source = parse_location(options.names[0]).source(places.source)
    try:
        raw = check_manifest(source.get_manifest(), None)
        document: Manifest | Index = parse_manifest(raw.raw, raw.media_type)
        for platform in _platforms(options):
            while isinstance(document, Index):
                digest = document.select(platform).digest
                raw = check_manifest(source.get_manifest(digest), digest)
                document = parse_manifest(raw.raw, raw.media_type)
    finally:
        source.close()
    if options.action == "get":
        sys.stdout.buffer.write(raw.raw)
    else:
        print(json.dumps(json.loads(raw.raw), indent=2, ensure_ascii=False))
    return 0


def _put(options: Namespace, places: Places) -> int:
    from layers.oci import MAX_MANIFEST_BYTES, Digest, parse_manifest
    from registry.transport import RawManifest, parse_location

    if len(options.names) == 2 and options.names[1] != "-":
        with open(options.names[1], "rb") as f:
            data = f.read(MAX_MANIFEST_BYTES + 1)
    else:
        data = sys.stdin.buffer.read(MAX_MANIFEST_BYTES + 1)
    document = parse_manifest(data, options.media_type or "")
    media_type = options.media_type or document.media_type
    digest = Digest.of(data)
    destination = parse_location(options.names[0]).destination(places.destination)
    try:
        destination.put_manifest(RawManifest(data, media_type, digest), top=True)
        destination.commit()
    finally:
        destination.close()
    print(digest)
    return 0


def _exists(options: Namespace, places: Places) -> int:
    from layers.errors import NameNotFound
    from registry.errors import NotFoundError
    from registry.transport import parse_location

    try:
        source = parse_location(options.names[0]).source(places.source)
        try:
            source.get_manifest()
        finally:
            source.close()
    except (NotFoundError, NameNotFound):
        return 1
    return 0


def _rm(options: Namespace, places: Places) -> int:
    from layers.oci import INDEX_MEDIA_TYPES
    from registry.stored import find_image, store_name

    store = places.source.store
    names = [store_name(name) for name in options.names]
    for name in names:
        if find_image(store, name).media_type not in INDEX_MEDIA_TYPES:
            raise UsageError(f"{name} is one image, not an index", hint="remove images with `pybuild rmi`")
    for name in names:
        store.names.delete(name)
        print(name)
    return 0


def _change(options: Namespace, places: Places) -> int:
    """Everything that ends with an index being written."""
    from builder.cli.progress import make_progress
    from layers.errors import ImageError, NameNotFound
    from registry.copy import CopyOptions
    from registry.errors import NotFoundError
    from registry.index import IndexDraft
    from registry.transport import parse_location

    name = options.names[0]
    location = parse_location(name)
    with ExitStack() as opened:
        if options.action == "create":
            draft = IndexDraft(name, docker=options.format == "docker")
        if options.action != "create" or options.amend:
            try:
                source = location.source(places.source)
                opened.callback(source.close)
                draft = IndexDraft.of(source)
            except (NotFoundError, NameNotFound):
                if options.action != "create":
                    raise
        elif location.transport == "storage" and places.source.store.names.get(_canonical(name)) is not None:
            raise ImageError(f"{name} exists already", hint="add to it with --amend, or remove it first")
        _edit(options, draft, places, opened)
        end = location
        if options.action == "push":
            from registry.transport import split_transport

            wanted = options.names[-1]
            end = parse_location(wanted, "docker")
            if len(options.names) == 1 and split_transport(wanted)[0] == "storage":
                raise UsageError("where should it be pushed to?", hint="name the destination after the index")
        destination = end.destination(places.destination)
        opened.callback(destination.close)
        mode = "quiet" if options.quiet else "auto"
        with make_progress(mode, sys.stderr, os.environ) as progress:
            result = draft.write(destination, options=CopyOptions(format=options.format), events=progress)
    if options.action == "push" and options.rm:
        places.source.store.names.delete(_canonical(name))
    return _print(options, result)


def _edit(options: Namespace, draft: IndexDraft, places: Places, opened: ExitStack) -> None:
    from registry.transport import parse_location

    if options.all and (options.platform or options.nested):
        raise UsageError("--all excludes --platform and --nested")
    match options.action:
        case "create" | "add":
            change = _entry_change(options) if options.action == "add" else None
            for text in options.names[1:]:
                member = parse_location(text).source(places.source)
                opened.callback(member.close)
                draft.add(member, platforms=_platforms(options), nested=options.nested, change=change)
            if options.action == "create":
                draft.annotate_index(dict(key_value(a, "--annotation") for a in options.annotation))
        case "annotate":
            change = _entry_change(options)
            if options.index:
                if len(options.names) > 1:
                    raise UsageError("--index annotates the index: name no entry")
                draft.annotate_index(change.annotations)
            elif len(options.names) < 2:
                raise UsageError("which entry?", hint="name a digest or a platform, or annotate the index with --index")
            for text in options.names[1:]:
                draft.annotate(_entry(draft, text, places), change)
        case "remove":
            for text in options.names[1:]:
                draft.remove(_entry(draft, text, places))


def _entry(draft: IndexDraft, text: str, places: Places) -> str:
    """What names an entry to the draft; an image stands for the entry that has its digest. Raises: ImageError."""
    from layers.errors import ImageError, PybuildError
    from registry.transport import check_manifest, parse_location

    try:
        draft.find(text)
        return text
    except ImageError as e:
        try:
            source = parse_location(text).source(places.source)
        except PybuildError:
            raise e from None
    try:
        return check_manifest(source.get_manifest(), None).digest
    finally:
        source.close()


def _entry_change(options: Namespace) -> EntryChange:
    from registry.index import EntryChange

    return EntryChange(
        os=options.os,
        architecture=options.arch,
        variant=options.variant,
        os_version=options.os_version,
        os_features=tuple(options.os_features) if options.os_features else None,
        features=tuple(options.features) if options.features else None,
        annotations=dict(key_value(a, "--annotation") for a in options.annotation),
    )


def _platforms(options: Namespace) -> list[Platform]:
    from layers.oci import Platform

    return [Platform.parse(part) for text in options.platform for part in text.split(",")]


def _canonical(name: str) -> str:
    from registry.stored import store_name

    return store_name(name.removeprefix("storage:"))


def _print(options: Namespace, result: CopyResult) -> int:
    if options.digestfile:
        Path(options.digestfile).write_text(result.descriptor.digest)
    print(result.descriptor.digest)
    return 0
