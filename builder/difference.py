"""How two images, layers or directories differ: content, mode, owner, config; and whether a build reproduces.

Operands are named as on the command line: an image of any transport, a layer (a tar file, or a blob of the
store), a directory. Nothing is unpacked: trees are compared in memory (`layers.compare`). Callers:
`builder.cli.differ`, Python programs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from layers.compare import FileChange, Node, Tree, compare, read_directory, read_tar
from layers.errors import BlobNotFound, DigestMismatch, ImageError, LayerError, NameNotFound, StoreError
from layers.oci import (
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Digest,
    ImageConfig,
    Index,
    Manifest,
    Platform,
    parse_manifest,
)
from layers.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from registry.transport import ImageSource, TransportContext

_MAX_INDEX_DEPTH = 4


class ConfigChange(NamedTuple):
    """One value of the config or the manifest that differs; `field` is its path in the document, None is absent."""

    field: str
    old: Any
    new: Any


class Difference(NamedTuple):
    """All that differs. `same_layers` of the old and new numbers of layers are the same, from the base up."""

    files: tuple[FileChange, ...]
    config: tuple[ConfigChange, ...]
    same_layers: int = 0
    old_layers: int = 0
    new_layers: int = 0

    @property
    def empty(self) -> bool:
        return not self.files and not self.config


class _Operand(NamedTuple):
    kind: Literal["image", "layer", "directory"]
    config: Mapping[str, Any]
    layers: tuple[tuple[Descriptor, Digest], ...]
    source: ImageSource | None
    path: Path | None

    def tree(self, warn: Callable[[str], None] | None) -> dict[bytes, Node]:
        if self.kind == "directory":
            assert self.path is not None
            return read_directory(self.path, warn=warn)
        if self.path is not None:
            return _read_layer(self.path)
        assert self.source is not None
        if self.kind == "layer":
            descriptor = self.layers[0][0]
            with cast(BinaryIO, self.source.open_blob(descriptor)) as stream:
                return _plain(stream, str(descriptor.digest))
        return flatten(self.source, self.layers)


def differ(
    old: str,
    new: str,
    context: TransportContext,
    *,
    platform: Platform | None = None,
    times: bool = False,
    warn: Callable[[str], None] | None = None,
) -> Difference:
    """What makes `new` out of `old`. `times`: modification times and `created` count.

    Raises: NameNotFound, ImageError, LayerError, StoreError, RegistryError.
    """
    opened: list[ImageSource] = []
    try:
        first = _open(old, context, platform, opened)
        second = _open(new, context, platform, opened)
        config = tuple(config_changes(first.config, second.config, times=times))
        same = _same_layers(first.layers, second.layers)
        counts = (same, len(first.layers), len(second.layers))
        if first.kind == second.kind == "image" and same == len(first.layers) == len(second.layers):
            return Difference((), config, *counts)
        files = tuple(compare(first.tree(warn), second.tree(warn), times=times))
        return Difference(files, config, *counts)
    finally:
        for source in opened:
            source.close()


def _same_layers(old: tuple[tuple[Descriptor, Digest], ...], new: tuple[tuple[Descriptor, Digest], ...]) -> int:
    same = 0
    for (_, first), (_, second) in zip(old, new, strict=False):
        if first != second:
            break
        same += 1
    return same


def _open(text: str, context: TransportContext, platform: Platform | None, opened: list[ImageSource]) -> _Operand:
    """Find out what an operand is: a transport's name first, then a path, then an image, then a layer's digest."""
    from registry.transport import parse_location, split_transport

    transport, _ = split_transport(text)
    if transport is None and (text.startswith(("/", "./", "../")) or text in {".", ".."} or os.path.exists(text)):
        path = Path(text)
        if path.is_dir():
            return _Operand("directory", {}, (), None, path)
        if path.is_file():
            return _Operand("layer", {}, (), None, path)
        raise StoreError(f"{text}: there is no such directory or layer")
    try:
        source = parse_location(text, "storage").source(context)
    except NameNotFound:
        layer = _layer_operand(text, context)
        if layer is None:
            raise
        return layer
    opened.append(source)
    manifest = _manifest(source, platform or Platform.host())
    from registry.transport import read_blob

    config = ImageConfig.parse(read_blob(source, manifest.config, MAX_CONFIG_BYTES))
    if len(config.diff_ids) != len(manifest.layers):
        raise ImageError(f"{text}: {len(manifest.layers)} layers, but {len(config.diff_ids)} diff IDs")
    document = dict(config.document)
    if manifest.annotations:
        document["annotations"] = dict(manifest.annotations)
    return _Operand("image", document, tuple(zip(manifest.layers, config.diff_ids, strict=True)), source, None)


def _layer_operand(text: str, context: TransportContext) -> _Operand | None:
    """A blob of the store by its digest, or the beginning of it."""
    if not context.has_store:
        return None
    prefix = text.removeprefix("sha256:")
    if len(prefix) < 7 or any(c not in "0123456789abcdef" for c in prefix):
        return None
    fits = [info.digest for info in context.store.walk() if info.digest.encoded.startswith(prefix)]
    if len(fits) != 1:
        return None
    path = context.store.path(fits[0])
    return None if path is None else _Operand("layer", {}, (), None, path)


def _manifest(source: ImageSource, platform: Platform) -> Manifest:
    from registry.transport import check_manifest

    digest: Digest | None = None
    for _ in range(_MAX_INDEX_DEPTH):
        raw = check_manifest(source.get_manifest(digest), digest)
        if len(raw.raw) > MAX_MANIFEST_BYTES:
            break
        document = parse_manifest(raw.raw, raw.media_type)
        if not isinstance(document, Index):
            return document
        digest = document.select(platform).digest
    raise ImageError(f"{source.name}: indexes are nested more than {_MAX_INDEX_DEPTH} deep")


def flatten(source: ImageSource, layers: tuple[tuple[Descriptor, Digest], ...]) -> dict[bytes, Node]:
    """The tree that an image's layers come to. Raises: LayerError, DigestMismatch, BlobNotFound."""
    from layers.compression import decompressor
    from registry.transport import VerifyingStream

    tree = Tree()
    for descriptor, diff_id in layers:
        with VerifyingStream(source.open_blob(descriptor), descriptor) as stream:
            hashing = _Hashing(decompressor(cast(BinaryIO, stream)), diff_id)
            try:
                tree.apply(cast(BinaryIO, hashing))
            except LayerError as e:
                raise LayerError(f"layer {descriptor.digest}: {e.message}", hint=e.hint) from e
            hashing.finish()
    return tree.flat()


class _Hashing:
    """A stream whose digest is checked at its end."""

    def __init__(self, stream: BinaryIO, expected: Digest) -> None:
        self._stream = stream
        self._expected = expected
        self._hasher = expected.hasher()

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size if size > 0 else 1 << 20)
        self._hasher.update(data)
        return data

    def finish(self) -> None:
        """Raises: DigestMismatch."""
        while self.read(1 << 20):
            pass
        found = Digest.from_hasher(self._hasher)
        if found != self._expected:
            raise DigestMismatch(f"a layer unpacks to {found}, but the image's config says {self._expected}")


def _read_layer(path: Path) -> dict[bytes, Node]:
    try:
        with path.open("rb", buffering=0) as stream:
            return _plain(cast(BinaryIO, stream), str(path))
    except OSError as e:
        raise BlobNotFound(f"cannot read {path}: {e.strerror}") from e


def _plain(stream: BinaryIO, shown: str) -> dict[bytes, Node]:
    from layers.compression import decompressor

    try:
        return read_tar(decompressor(stream))
    except LayerError as e:
        raise LayerError(f"{shown}: {e.message}", hint=e.hint) from e


# Documents


_TIMES = frozenset({"created"})


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any], *, times: bool) -> Iterator[ConfigChange]:
    """The values in which two configs differ, by their paths. Diff IDs are the files' business."""
    first, second = dict(_leaves(old, "")), dict(_leaves(new, ""))
    for field in sorted({*first, *second}):
        if field.startswith("rootfs.") or (not times and field.rpartition(".")[2] in _TIMES):
            continue
        if first.get(field) != second.get(field):
            yield ConfigChange(field, first.get(field), second.get(field))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, member in value.items():
            name = key if key.replace("_", "").isalnum() else json.dumps(key)
            yield from _leaves(member, f"{path}.{name}" if path else name)
    elif path == "config.Env" and isinstance(value, list):
        for entry in value:
            key, _, text = str(entry).partition("=")
            yield f"{path}.{key}", text
    elif isinstance(value, list) and any(isinstance(member, Mapping) for member in value):
        for number, member in enumerate(value):
            yield from _leaves(member, f"{path}[{number}]")
    else:
        yield path, value
