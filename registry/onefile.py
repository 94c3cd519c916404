"""One file out of an image, wherever the image is: found as its layers, one over the other, have it.

The uppermost layer is asked first, and no more layers are read than it takes. A layer is read to its end,
so that its digest is known to be right before anything of it is handed out; of an eStargz layer in a
registry only its table of contents and the file's own chunks are fetched, and checked by their digests.
Symbolic links are followed within the image. Caller: `pybuild cat`.

Specs: image-spec layer.md, "Applying Changesets"; stargz-snapshotter, docs/estargz.md
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from layers.compression import decompressor
from layers.errors import DigestMismatch, ImageError, LayerError
from layers.estargz import TOC_DIGEST, read_footer
from layers.layerdiff import OPAQUE_WHITEOUT, WHITEOUT_PREFIX
from layers.oci import Descriptor, Digest, Manifest
from layers.tarreader import DIRECTORY, HARDLINK, REGULAR, SYMLINK, TarReader, normal_name
from layers.values import NamedTuple
from registry.convert import layer_compression
from registry.recompress import FileSpan, open_scratch
from registry.transport import CHUNK_BYTES, BlobInput, ImageSource
from registry.transports.docker import DockerSource

_MAX_LINKS = 40
_MAX_PATH_BYTES = 4096
"""As in the kernel: each of the directories on a path is looked up by its whole name."""
_MAX_NAME_BYTES = 256 << 20
"""Of all names in one layer together: what an index of it takes in memory at most, about."""
_FOOTER_BYTES = 51
_MAX_PART_BYTES = 32 << 20
"""Of a table, and of a chunk: each is held in memory."""
_TABLE_KINDS = {"reg": REGULAR, "dir": DIRECTORY, "symlink": SYMLINK, "hardlink": HARDLINK}


class Entry(NamedTuple):
    """What a layer has under a name: a tar type, the target of a link, and where a table says the data are."""

    kind: bytes
    link: bytes = b""
    size_bytes: int = 0
    chunks: Sequence[dict[str, Any]] = ()


class _Piece:
    """A part of a layer, fetched and being unpacked: where it begins, and how much of it was taken."""

    def __init__(self, start: int, plain: Any) -> None:
        self.start = start
        self.position = 0
        self._plain = plain

    def take(self, size: int) -> bytes:
        """The next bytes. Raises: LayerError if there are fewer."""
        self.position += size
        return _exactly(self._plain, size)


class _Layer:
    """A layer's entries and whiteouts by name, read when first asked for; `wanted` is kept as it goes by."""

    def __init__(self, source: ImageSource, descriptor: Descriptor, scratch_dir: Path, moved: Callable[[int], None]):
        self._source = source
        self._descriptor = descriptor
        self._scratch_dir = scratch_dir
        self._moved = moved
        self._kept: dict[bytes, BinaryIO] = {}
        # Ranges are worth a request only where bytes come from afar.
        self._ranged = source if isinstance(source, DockerSource) and TOC_DIGEST in descriptor.annotations else None
        self._in_table = False
        self._offsets: list[int] = []
        self._names_bytes = 0
        self.entries: dict[bytes, Entry] = {}
        self.hidden: set[bytes] = set()
        """Names that the layers beneath no longer have."""
        self.opaque: set[bytes] = set()
        """Directories of which the layers beneath have nothing that counts."""
        self._read = False

    def read(self, wanted: bytes) -> None:
        """Fill `entries`, once. Raises: DigestMismatch, SizeMismatch, LayerError, RegistryError."""
        if self._read:
            return
        self._read = True
        table = self._table()
        if table is not None:
            self._in_table = True
            self._take_table(table)
        else:
            self._scan(wanted)

    def open(self, name: bytes) -> Iterator[bytes]:
        """The data of a regular file of the layer."""
        if self._in_table:
            yield from self._chunks(name)
            return
        if name not in self._kept:
            self._scan(name)
        span = FileSpan(self._kept[name].fileno(), 0, self.entries[name].size_bytes)
        while data := span.read(CHUNK_BYTES):
            yield data

    def close(self) -> None:
        for file in self._kept.values():
            file.close()

    # A whole layer

    def _scan(self, wanted: bytes) -> None:
        blob = BlobInput(self._descriptor, self._source)
        with blob.open_verified() as stream:
            try:
                kind = layer_compression(self._descriptor)
                for name, entry, reader in self._entries(decompressor(cast(BinaryIO, stream), kind=kind)):
                    self._note(name, entry)
                    if name == wanted and entry.kind == REGULAR:
                        self._keep(name, reader)
            finally:
                # To the end: only then are the bytes known to be right; damage on the way is said as such.
                while stream.read(CHUNK_BYTES):
                    pass
        self._moved(blob.moved_bytes)

    def _entries(self, plain: BinaryIO) -> Iterator[tuple[bytes, Entry, TarReader]]:
        reader = TarReader(plain)
        for found in reader:
            link = found.linkname if found.type == SYMLINK else normal_name(found.linkname)
            kind = REGULAR if found.type in {b"\0", b"7"} else found.type
            yield normal_name(found.name), Entry(kind, link, found.size), reader

    def _keep(self, name: bytes, reader: TarReader) -> None:
        file = open_scratch(self._scratch_dir)
        old = self._kept.get(name)
        self._kept[name] = file
        if old is not None:
            old.close()
        buffer = bytearray(CHUNK_BYTES)
        while count := reader.readinto(buffer):
            view = memoryview(buffer)[:count]
            while view:
                view = view[file.write(view) :]

    def _note(self, name: bytes, entry: Entry) -> None:
        self._names_bytes += len(name) + len(entry.link) + 100
        if self._names_bytes > _MAX_NAME_BYTES:
            raise LayerError(f"layer {self._descriptor.digest} has more names than can be held")
        parent, _, last = name.rpartition(b"/")
        if last == OPAQUE_WHITEOUT:
            self.opaque.add(parent)
        elif last.startswith(WHITEOUT_PREFIX):
            self.hidden.add((parent + b"/" if parent else b"") + last[len(WHITEOUT_PREFIX) :])
        else:
            self.entries[name] = entry

    # An eStargz layer

    def _table(self) -> list[Any] | None:
        """The entries of the table of contents, checked by its digest; None where the layer must be read whole."""
        size = self._descriptor.size_bytes
        footer = self._range(size - _FOOTER_BYTES, _FOOTER_BYTES) if size > _FOOTER_BYTES else None
        offset = read_footer(footer) if footer is not None else None
        if offset is None or not 0 <= offset < size - _FOOTER_BYTES:
            return None
        packed = self._range(offset, size - offset)
        if packed is None:
            return None
        plain = decompressor(io.BytesIO(packed), kind="gzip")
        _name, entry, reader = next(self._entries(plain), (b"", Entry(b""), None))
        if reader is None or entry.size_bytes > _MAX_PART_BYTES:
            return None
        text = bytearray(entry.size_bytes)
        reader.readinto(text)
        self._check(bytes(text), self._descriptor.annotations[TOC_DIGEST], "table of contents")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        found = document.get("entries") if isinstance(document, dict) else None
        if not isinstance(found, list):
            raise self._malformed()
        starts = {_whole(item.get("offset")) for item in found if isinstance(item, dict)}
        self._offsets = sorted({*starts, offset})
        return found

    def _take_table(self, table: list[Any]) -> None:
        last = b""
        chunks: list[dict[str, Any]] = []
        for item in table:
            if not isinstance(item, dict) or not isinstance(item.get("name"), str):
                raise self._malformed()
            name = normal_name(item["name"].encode("utf-8", "surrogateescape"))
            if item.get("type") == "chunk":
                if name != last or name not in self.entries:
                    raise self._malformed()
                chunks.append(item)
                continue
            last = name
            kind = _TABLE_KINDS.get(str(item.get("type")), b"?")
            link = str(item.get("linkName") or "").encode("utf-8", "surrogateescape")
            size = item.get("size")
            chunks = [item] if kind == REGULAR else []
            self._note(name, Entry(kind, link if kind == SYMLINK else normal_name(link), _whole(size), chunks))

    def _chunks(self, name: bytes) -> Iterator[bytes]:
        entry = self.entries[name]
        done = 0
        piece: _Piece | None = None
        for chunk in entry.chunks if entry.size_bytes else ():
            size = _whole(chunk.get("chunkSize")) or entry.size_bytes - done
            most = min(entry.size_bytes - done, _MAX_PART_BYTES)
            start, inner = _whole(chunk.get("offset")), _whole(chunk.get("innerOffset"))
            if _whole(chunk.get("chunkOffset")) != done or size > most or inner > _MAX_PART_BYTES:
                raise self._malformed()
            if piece is None or start != piece.start:
                # Forwards alone: a table of a thousand chunks in one piece would have it fetched as often.
                if piece is not None and start < piece.start:
                    raise self._malformed()
                piece = _Piece(start, decompressor(io.BytesIO(self._packed(start)), kind="gzip"))
            if inner < piece.position:
                raise self._malformed()
            piece.take(inner - piece.position)
            data = piece.take(size)
            self._check(data, str(chunk.get("chunkDigest") or chunk.get("digest")), "chunk")
            yield data
            done += size
        if done != entry.size_bytes:
            raise self._malformed()

    def _packed(self, start: int) -> bytes:
        """What is stored from an offset to the next one; what follows a file's data in it is another file's."""
        following = bisect_right(self._offsets, start)
        end = self._offsets[following] if following < len(self._offsets) else self._descriptor.size_bytes
        packed = self._range(start, end - start)
        if packed is None:
            raise self._malformed()
        return packed

    def _range(self, offset: int, size: int) -> bytes | None:
        """A part of the layer as it is stored; None where it cannot be had by itself."""
        if self._ranged is None or not (0 < size <= _MAX_PART_BYTES and offset + size <= self._descriptor.size_bytes):
            return None
        data = self._ranged.read_range(self._descriptor, offset, size)
        self._moved(len(data or b""))
        return data

    def _malformed(self) -> LayerError:
        return LayerError(f"layer {self._descriptor.digest} has a malformed table of contents")

    def _check(self, data: bytes, promised: str, what: str) -> None:
        try:
            digest = Digest(promised)
        except ImageError as e:
            raise LayerError(f"a {what} of layer {self._descriptor.digest} has no usable digest") from e
        hasher = digest.hasher()
        hasher.update(data)
        if Digest.from_hasher(hasher) != digest:
            raise DigestMismatch(f"a {what} of layer {self._descriptor.digest} has the wrong bytes")


class ImageFile(NamedTuple):
    """A regular file of an image: its path after all links, the layer that has it, and its data, once."""

    path: str
    layer: Digest
    size_bytes: int
    data: Iterator[bytes]


class FileFinder:
    """Looks for files in one image. Close it; `moved_bytes` tells what it read of layers."""

    def __init__(self, source: ImageSource, manifest: Manifest, scratch_dir: Path) -> None:
        self._name = source.name
        self.moved_bytes = 0
        layers = [d for d in manifest.layers if layer_compression(d) is not None]
        self._layers = [_Layer(source, descriptor, scratch_dir, self._count) for descriptor in layers]
        self._digests = [descriptor.digest for descriptor in layers]

    def _count(self, size: int) -> None:
        self.moved_bytes += size

    def find(self, path: str) -> ImageFile:
        """The file that `path` leads to. Raises: ImageError; DigestMismatch, LayerError, RegistryError."""
        name = normal_name(path.encode("utf-8", "surrogateescape"))
        for _ in range(_MAX_LINKS):
            found = self._look(name, path, len(self._layers))
            if isinstance(found, bytes):
                name = found
                continue
            number, stored, entry = found
            if entry.kind == DIRECTORY:
                raise ImageError(f"{self._name}: {path} is a directory", hint="`pybuild unpack` writes directories")
            if entry.kind != REGULAR:
                raise ImageError(f"{self._name}: {path} is not a regular file")
            layer = self._layers[number]
            shown = "/" + name.decode("utf-8", "backslashreplace")
            return ImageFile(shown, self._digests[number], entry.size_bytes, layer.open(stored))
        raise ImageError(f"{self._name}: {path} goes through more than {_MAX_LINKS} links")

    def _look(self, name: bytes, path: str, below: int) -> tuple[int, bytes, Entry] | bytes:
        """Of the layers below that number the one that has `name`, the name that it has it under, its entry.

        Or the name that a symbolic link on the way means.
        """
        if len(name) > _MAX_PATH_BYTES:
            raise ImageError(f"{self._name}: {path[:100]} is, or leads to, a path of more than {_MAX_PATH_BYTES} bytes")
        prefixes = [name[:at] for at, byte in enumerate(name) if byte == 0x2F] + [name]
        directories: set[bytes] = {b""}
        for number in reversed(range(below)):
            layer = self._layers[number]
            layer.read(name)
            for prefix in prefixes:
                entry = layer.entries.get(prefix)
                if entry is None:
                    continue
                if entry.kind == DIRECTORY:
                    directories.add(prefix)
                    continue
                if prefix in directories:
                    # A directory above has replaced it, and what was beneath it was never there.
                    prefixes = prefixes[: prefixes.index(prefix)]
                    break
                if entry.kind == SYMLINK:
                    rest = name[len(prefix) + 1 :]
                    base = b"" if entry.link.startswith(b"/") else prefix.rpartition(b"/")[0]
                    return normal_name(b"/".join((base, entry.link, rest)))
                if prefix != name:
                    raise ImageError(f"{self._name}: {path} leads through a file")
                return self._linked(number, name, entry, path)
            if name in directories:
                return number, name, Entry(DIRECTORY)
            gone = next((p for p in prefixes if p in layer.hidden or p.rpartition(b"/")[0] in layer.opaque), None)
            if gone is not None:
                prefixes = prefixes[: prefixes.index(gone)]
            if name not in prefixes:
                break
        raise ImageError(f"{self._name} has no file {path}")

    def _linked(self, number: int, name: bytes, entry: Entry, path: str) -> tuple[int, bytes, Entry]:
        """What a hard link is: another name of the same layer, or one that the layers beneath have."""
        for _ in range(_MAX_LINKS):
            if entry.kind != HARDLINK:
                return number, name, entry
            name = entry.link
            there = self._layers[number].entries.get(name)
            if there is None:
                found = self._look(name, path, number)
                if isinstance(found, bytes):
                    break
                return found
            entry = there
        raise ImageError(f"{self._name}: {path} is a link to nothing")

    def close(self) -> None:
        for layer in self._layers:
            layer.close()


def _exactly(stream: Any, size: int) -> bytes:
    parts, left = [], size
    while left:
        data = stream.read(min(left, CHUNK_BYTES))
        if not data:
            raise LayerError("a layer ends too early")
        parts.append(data)
        left -= len(data)
    return b"".join(parts)


def _whole(value: object) -> int:
    return value if type(value) is int and 0 <= value < 1 << 62 else 0
