"""Images of the store to archives and back: `docker save` and `docker load`, of several images at once.

The formats themselves are `registry.transports`; here names are chosen, and what an archive holds is
listed. Callers: `builder.cli.archives`, Python programs.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from layers.errors import ImageError, StoreError
from layers.oci import MAX_MANIFEST_BYTES, MEDIA_OCI_INDEX, Descriptor, Index, Manifest, parse_manifest
from layers.values import NamedTuple
from registry.errors import InvalidReference
from registry.reference import Reference

if TYPE_CHECKING:
    from layers.events import EventSink
    from layers.store import Store
    from registry.copy import CopyOptions
    from registry.transport import ImageLocation, ImageSource, TransportContext

ArchiveFormat = Literal["docker-archive", "oci-archive", "docker-dir", "oci-dir"]
_CHUNK_BYTES = 1 << 20
_CONTAINERD_NAME = "io.containerd.image.name"
_REF_NAME = "org.opencontainers.image.ref.name"


class LoadedImage(NamedTuple):
    """An image that was loaded: its names in the store, none if the archive had none for it."""

    names: tuple[str, ...]
    image_id: str
    descriptor: Descriptor


def save_images(
    store: Store,
    images: Sequence[str],
    path: str,
    *,
    format: ArchiveFormat = "docker-archive",
    options: CopyOptions | None = None,
    events: EventSink | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> None:
    """Write images, named or by id, to one archive at `path` ("-": stdout), or to a directory.

    Layers that they share are written once. A name that is given twice counts once.
    Raises: NameNotFound; InvalidReference for several images in a `docker-dir`; StoreError.
    """
    from registry.copy import copy_location
    from registry.several import copy_several
    from registry.transport import TransportContext, parse_location

    context = TransportContext(store=lambda: store)
    named = list(dict.fromkeys(name for text in images for name in _names_for(store, text)))
    transport = {"docker-dir": "dir", "oci-dir": "oci"}.get(format, format)
    if ":" in path:
        raise InvalidReference(f"cannot save to {path!r}: archives' names may have no colon")
    destination = parse_location(f"{transport}:{path}")
    sources = [parse_location(f"storage:{text}") for text, _ in named]
    if len(named) == 1 and (named[0][1] is None or format == "docker-dir"):
        copy_location(sources[0], destination, context, options=options, events=events, cancelled=cancelled)
        return
    nameless = next((text for text, name in named if name is None), None)
    if nameless is not None:
        raise InvalidReference(
            f"image {nameless} has no name, which several images in one archive need", hint="`pybuild tag` gives it one"
        )
    copy_several(sources, destination, context, options=options, events=events, cancelled=cancelled)


def _names_for(store: Store, text: str) -> list[tuple[str, str | None]]:
    """What to read an image by and its name; an id's are those that the image has, None if there are none."""
    from registry.stored import find_image, store_name

    try:
        name = store_name(text)
    except InvalidReference:
        name = ""
    if name and store.names.get(name) is not None:
        return [(name, name)]
    descriptor = find_image(store, text)
    known = [n for n in store.names.of(descriptor.digest) if not n.startswith("@") and "#" not in n]
    return [(n, n) for n in known] or [(text, None)]


def load_images(
    store: Store,
    path: str,
    *,
    options: CopyOptions | None = None,
    events: EventSink | None = None,
    cancelled: Callable[[], bool] | None = None,
    scratch_dir: Path = Path("/var/tmp"),  # noqa: S108 - an anonymous file
) -> list[LoadedImage]:
    """Take in all images of an archive at `path` ("-": stdin), or of a layout's or `dir:` directory.

    What the file is is found out: docker-archive or OCI archive, plain or compressed. The names that the
    archive gives are the names in the store; an image without one is known by its id alone.
    Raises: ImageError (no archive, damaged), StoreError, DigestMismatch.
    """
    from registry.transport import TransportContext

    context = TransportContext(store=lambda: store, scratch_dir=scratch_dir)
    if os.path.isdir(path):
        return [
            _load(store, context, location, names, options, events, cancelled)
            for location, names in _in_directory(Path(path))
        ]
    with _plain_file(path, scratch_dir) as file:
        # A descriptor's own path can be opened as often as there are images, and is gone with it.
        place = Path(path) if path != "-" and _is_plain(file) else Path(f"/proc/self/fd/{file.fileno()}")
        return [
            _load(store, context, location, names, options, events, cancelled)
            for location, names in _in_archive(place, path, scratch_dir)
        ]


def _is_plain(file: BinaryIO) -> bool:
    return isinstance(file.name, str)


def _plain_file(path: str, scratch_dir: Path) -> BinaryIO:
    """The archive as a file that can be read from its beginning again: spooled if it is a pipe or compressed."""
    from layers.compression import decompressor, detect
    from registry.recompress import open_scratch

    try:
        file = cast(BinaryIO, sys.stdin.buffer) if path == "-" else open(path, "rb", buffering=0)  # noqa: SIM115
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        if path != "-" and regular and detect(os.pread(file.fileno(), 16, 0)) is None:
            return file
        spool = open_scratch(scratch_dir)
        try:
            plain = decompressor(file)
            while data := plain.read(_CHUNK_BYTES):
                view = memoryview(data)
                while view:
                    view = view[spool.write(view) :]  # unbuffered: it may write less
        except BaseException:
            spool.close()
            raise
        return spool
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror}") from e


def _in_archive(place: Path, shown: str, scratch_dir: Path) -> list[tuple[ImageLocation, list[str]]]:
    """Each image of an archive and its names."""
    from registry.transports.archive import OciArchiveLocation
    from registry.transports.dockerarchive import DockerArchiveLocation
    from registry.transports.tarball import TarReader

    tar = TarReader(place, scratch_dir)
    try:
        listing = tar.read("manifest.json", MAX_MANIFEST_BYTES)
        index = tar.read("index.json", MAX_MANIFEST_BYTES)
    finally:
        tar.close()
    if listing is not None:
        # Newer docker writes both; the names are all here.
        return [
            (DockerArchiveLocation(place, None, position), names)
            for position, names in enumerate(_docker_names(listing, shown))
        ]
    if index is not None:
        return [
            (OciArchiveLocation(place, None, d.digest), names)
            for d, names in _oci_names(Index.parse(index, MEDIA_OCI_INDEX))
        ]
    raise ImageError(
        f"{shown} is neither a docker-archive nor an OCI archive",
        hint="`pybuild import` makes an image of a root file system's tar",
    )


def _in_directory(path: Path) -> list[tuple[ImageLocation, list[str]]]:
    from registry.transports.directory import DirLocation
    from registry.transports.oci import LayoutDir, OciLocation

    if (path / "index.json").exists():
        layout = LayoutDir(path)
        try:
            index = layout.read_index()
        finally:
            layout.close()
        return [(OciLocation(path, None, d.digest), names) for d, names in _oci_names(index)]
    return [(DirLocation(path), [])]


def _docker_names(listing: bytes, shown: str) -> list[list[str]]:
    try:
        images = json.loads(listing)
        return [_valid_names(image.get("RepoTags") or []) for image in images]
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ImageError(f"manifest.json in {shown} is malformed: {e}") from e


def _oci_names(index: Index) -> list[tuple[Descriptor, list[str]]]:
    """The images of an index, each once, with its names; a tag alone is no name."""
    found: dict[Descriptor, list[str]] = {}
    plain: dict[str, Descriptor] = {}
    for entry in index.manifests:
        key = plain.setdefault(str(entry.digest), entry)
        name = entry.annotations.get(_CONTAINERD_NAME) or entry.annotations.get(_REF_NAME, "")
        names = _valid_names([name] if "/" in name or ":" in name else [])
        found[key] = list(dict.fromkeys([*found.get(key, []), *names]))
    return list(found.items())


def _valid_names(texts: Sequence[object]) -> list[str]:
    names = []
    for text in texts:
        try:
            reference = Reference.parse(str(text)).with_default_tag()
        except InvalidReference:
            continue  # an archive of another tool may say what is no name here
        if reference.digest is None:
            names.append(reference.canonical())
    return names


def _load(
    store: Store,
    context: TransportContext,
    location: ImageLocation,
    names: list[str],
    options: CopyOptions | None,
    events: EventSink | None,
    cancelled: Callable[[], bool] | None,
) -> LoadedImage:
    from registry.copy import CopyOptions, copy_image
    from registry.transports.storage import StorageDestination

    source = location.source(context)
    try:
        image_id = _image_id(source)
        target = StorageDestination(names[0] if names else f"@{image_id}", store)
        try:
            copied = copy_image(
                source, target, options=options or CopyOptions(all_platforms=True), events=events,
                cancelled=cancelled, scratch_dir=context.scratch_dir,
            )  # fmt: skip
            if copied.written:
                target.commit()
        finally:
            target.close()
    finally:
        source.close()
    if len(names) > 1:
        store.publish(dict.fromkeys(names[1:], copied.descriptor))
    return LoadedImage(tuple(names), image_id, copied.descriptor)


def _image_id(source: ImageSource) -> str:
    raw = source.get_manifest()
    document = parse_manifest(raw.raw, raw.media_type)
    return str(document.config.digest if isinstance(document, Manifest) else raw.digest)
