"""Layers of an existing image written anew, entry by entry: times brought down, files taken out.

An `Editor` of `registry.edit`. A layer in which there is nothing to change keeps its bytes; others are
compressed as they were. Nothing is unpacked, memory is flat.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from layers.compression import Compressor, compressor, decompressor
from layers.errors import ImageError
from layers.oci import Descriptor, Digest
from layers.tarstream import CHARACTER_DEVICE, HARDLINK, REGULAR, TarEntry, TarReader, TarWriter
from layers.values import NamedTuple
from registry.convert import is_foreign, layer_compression, layer_format, layer_media_type
from registry.newlayer import NewLayer
from registry.recompress import Spool, SpooledBlob
from registry.transport import CHUNK_BYTES, BlobInput

if TYPE_CHECKING:
    from registry.edit import EditedImage, Editor
    from registry.transport import ImageSource

_PIECE_BYTES = 256 << 10
_TABLE_FILES = frozenset({b"stargz.index.json", b".prefetch.landmark", b".no.prefetch.landmark"})
"""What an eStargz layer's table of contents consists of: no changed layer has one."""


class LayerChanges(NamedTuple):
    """What to change: nothing newer than `latest_s` (seconds since 1970); nothing that a pattern of `strip` matches.

    A pattern is a path in the image; its components may have wildcards. What lies in a matching directory
    goes with it.
    """

    latest_s: int | None = None
    strip: Sequence[str] = ()


def rewriting(changes: LayerChanges, scratch_dir: Path) -> Editor:
    """An editor that applies the changes to every layer, and to the times of the config."""
    patterns = [[os.fsencode(part) for part in text.split("/") if part] for text in changes.strip]
    if [] in patterns:
        raise ImageError("what is to be stripped must not be the whole root file system")

    def editor(image: EditedImage) -> None:
        rootfs = dict(image.document["rootfs"])
        diff_ids = list(rootfs["diff_ids"])
        gone: set[bytes] = set()
        for number, descriptor in enumerate(image.layers):
            if is_foreign(descriptor):
                continue
            new = _rewritten(image.source, descriptor, patterns, changes.latest_s, gone, scratch_dir)
            if new is not None:
                image.layers[number] = image.parts.add_spool(new.blob)
                diff_ids[number] = str(new.diff_id)
        rootfs["diff_ids"] = diff_ids
        image.document["rootfs"] = rootfs
        if changes.latest_s is not None:
            _bring_down(image.document, changes.latest_s)
            history = image.document.get("history") or []
            image.document["history"] = [_bring_down(dict(entry), changes.latest_s) for entry in history]

    return editor


def _bring_down(document: dict[str, object], latest_s: int) -> dict[str, object]:
    """Make `created` no newer than that."""
    from datetime import datetime

    latest = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(latest_s))
    created = document.get("created")
    if isinstance(created, str):
        try:
            if datetime.fromisoformat(created).timestamp() <= latest_s:
                return document
        except (ValueError, OverflowError):
            pass  # what cannot be read is not known to be older
        document["created"] = latest
    return document


def _rewritten(
    source: ImageSource,
    descriptor: Descriptor,
    patterns: list[list[bytes]],
    latest_s: int | None,
    gone: set[bytes],
    scratch_dir: Path,
) -> NewLayer | None:
    """The changed layer; None if there is nothing to change in it. Adds the files taken out to `gone`."""
    kind = layer_compression(descriptor)
    if kind is None:
        raise ImageError(f"{source.name}: {descriptor.media_type!r} is not a layer that can be changed")
    engine = compressor(kind, None, os.cpu_count() or 1, reproducible=True)
    spool = Spool(scratch_dir)
    try:
        with BlobInput(descriptor, source).open_verified() as stream:
            plain = decompressor(cast(BinaryIO, stream), kind=kind)
            lazy = layer_format(descriptor) == "estargz"
            work = _Rewriter(patterns, latest_s, gone, spool, engine, lazy)
            work.run(TarReader(plain))
            while plain.read(CHUNK_BYTES):
                pass
            while stream.read(CHUNK_BYTES):
                pass
        if not work.changed:
            spool.file.close()
            return None
        spool.write(engine.finish())
    except BaseException:
        spool.file.close()
        raise
    finally:
        engine.close()
    media_type = layer_media_type(descriptor.media_type, kind)
    return NewLayer(SpooledBlob(spool.file, spool.descriptor(media_type)), work.diff_id())


class _Rewriter:
    """Reads one tar and writes another."""

    def __init__(
        self,
        patterns: list[list[bytes]],
        latest_s: int | None,
        gone: set[bytes],
        spool: Spool,
        engine: Compressor,
        lazy: bool,
    ) -> None:
        self._patterns = patterns
        self._latest_s = latest_s
        self._gone = gone
        self._lazy = lazy
        self._spool = spool
        self._engine = engine
        self._hash = hashlib.sha256()
        self._tar = TarWriter(self._take, clamp_mtime_s=latest_s, nanoseconds=True)
        self.changed = False

    def run(self, reader: TarReader) -> None:
        """Write every entry that stays. Raises: LayerError, ImageError, StoreError."""
        buffer = bytearray(_PIECE_BYTES)
        for entry in reader:
            parts = _parts(entry.name)
            if self._lazy and len(parts) == 1 and parts[0] in _TABLE_FILES:
                continue
            if self._stripped(parts):
                self._gone.add(b"/".join(parts))
                self.changed = True
                continue
            if self._latest_s is not None and entry.mtime_ns > self._latest_s * 10**9:
                self.changed = True
            self._header(entry)
            if entry.type == REGULAR and entry.size:
                while size := reader.readinto(buffer):
                    self._tar.write(memoryview(buffer)[:size])
                self._tar.pad()
        self._tar.finish()

    def diff_id(self) -> Digest:
        return Digest.from_hasher(self._hash)

    def _take(self, block: bytearray) -> None:
        self._hash.update(block)
        self._spool.write(self._engine.write_block(block))

    def _stripped(self, parts: list[bytes]) -> bool:
        return any(len(parts) >= len(pattern) and all(map(fnmatchcase, parts, pattern)) for pattern in self._patterns)

    def _header(self, entry: TarEntry) -> None:
        if entry.type == HARDLINK and b"/".join(_parts(entry.linkname)) in self._gone:
            raise ImageError(
                f"{os.fsdecode(entry.name)!r} is a hard link to {os.fsdecode(entry.linkname)!r}, which is stripped",
                hint="strip both, or neither",
            )
        if entry.type not in b"0123456" or len(entry.type) != 1:
            raise ImageError(f"{os.fsdecode(entry.name)!r} is of a type that layers do not have")
        self._tar.add(
            entry.name.rstrip(b"/") or b".",
            entry.type,
            mode=entry.mode,
            uid=entry.uid,
            gid=entry.gid,
            size=entry.size if entry.type == REGULAR else 0,
            mtime_ns=entry.mtime_ns,
            linkname=entry.linkname,
            device=(entry.devmajor, entry.devminor) if entry.type in (CHARACTER_DEVICE, b"4") else None,
            xattrs=entry.xattrs,
        )


def _parts(name: bytes) -> list[bytes]:
    return [part for part in name.split(b"/") if part not in (b"", b".")]
