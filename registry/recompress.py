"""Layers compressed anew on their way from source to destination.

The new bytes are spooled to an anonymous file, because a registry wants the digest before it takes
a blob, and a destination may want to read twice. Called by `registry.copy` alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from layers.compression import compressor, decompressor
from layers.errors import BlobNotFound, StoreError
from layers.oci import Descriptor, Digest
from layers.values import replace
from registry.convert import Compression, LayerFormat, layer_compression, layer_media_type
from registry.transport import CHUNK_BYTES, BlobInput, RawManifest

if TYPE_CHECKING:
    from registry.transport import ByteStream


def open_scratch(directory: Path) -> BinaryIO:
    """A new file in `directory` that has no name and goes away with its last descriptor.

    Raises: StoreError.
    """
    import tempfile

    try:
        return cast(BinaryIO, tempfile.TemporaryFile(dir=directory, buffering=0))
    except OSError as e:
        raise StoreError(f"cannot make a temporary file in {directory}: {e.strerror}") from e


class FileSpan:
    """A part of an open file as a stream of its own; independent of the file's position, so thread-safe."""

    __slots__ = ("_end", "_fd", "_position")

    def __init__(self, fd: int, offset: int, size_bytes: int) -> None:
        self._fd = fd
        self._position = offset
        self._end = offset + size_bytes

    def read(self, size: int = -1, /) -> bytes:
        left = self._end - self._position
        wanted = left if size < 0 else min(size, left)
        if wanted <= 0:
            return b""
        try:
            data = os.pread(self._fd, wanted, self._position)
        except OSError as e:
            raise StoreError(f"cannot read a blob: {e.strerror}") from e
        self._position += len(data)
        return data

    def close(self) -> None:
        return


class SpooledBlob:
    """The image source of one blob that lies in an anonymous file."""

    name = "a recompressed layer"
    host = ""
    synthetic = True

    def __init__(self, file: BinaryIO, descriptor: Descriptor, diff_id: Digest | None = None) -> None:
        self._file = file
        self.descriptor = descriptor
        self.diff_id = diff_id
        """Of a layer whose tar became another."""

    def get_manifest(self, digest: Digest | None = None) -> RawManifest:
        raise BlobNotFound(f"{self.name} is no image")

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> ByteStream:
        return FileSpan(self._file.fileno(), offset, self.descriptor.size_bytes - offset)

    def blob_path(self, digest: Digest) -> Path | None:
        return None

    def mount_candidates(self, digest: Digest, host: str) -> Sequence[str]:
        return ()

    def close(self) -> None:
        self._file.close()


def spool_bytes(data: bytes, media_type: str, scratch_dir: Path) -> SpooledBlob:
    """A blob of which all bytes are at hand. The caller closes it. Raises: StoreError."""
    spool = Spool(scratch_dir)
    spool.write(data)
    return SpooledBlob(spool.file, spool.descriptor(media_type))


def recompress(blob: BlobInput, wanted: LayerFormat, level: int | None, scratch_dir: Path) -> SpooledBlob:
    """The layer in the wanted format; its own digest is checked on the way. The caller closes it.

    Raises: DigestMismatch, SizeMismatch, LayerError for damaged data, a level out of range or what the
    format cannot express, StoreError.
    """
    have = layer_compression(blob.descriptor) or "none"
    spool = Spool(scratch_dir)
    try:
        with blob.open_verified() as stream:
            plain = decompressor(cast(BinaryIO, stream), kind=have)
            if wanted == "estargz" or wanted == "zstd:chunked":
                from layers.lazylayer import CODECS, convert_to_lazy

                made = convert_to_lazy(wanted, plain, spool, level=level)
                codec, annotations = CODECS[wanted], made.annotations
                # The table of contents is part of an eStargz layer's tar.
                diff_id = made.diff_id if wanted == "estargz" else None
            else:
                codec, annotations, diff_id = wanted, {}, None
                _compress(plain, spool, wanted, level)
            # What the decompressor had no need of must be right, too.
            while stream.read(CHUNK_BYTES):
                pass
    except BaseException:
        spool.file.close()
        raise
    descriptor = spool.descriptor(layer_media_type(blob.descriptor.media_type, codec))
    return SpooledBlob(spool.file, replace(descriptor, annotations=annotations), diff_id)


def _compress(plain: BinaryIO, spool: Spool, wanted: Compression, level: int | None) -> None:
    engine = compressor(wanted, level, os.cpu_count() or 1)
    try:
        while data := plain.read(CHUNK_BYTES):
            spool.write(engine.write(data))
        spool.write(engine.finish())
    finally:
        engine.close()


class Spool:
    """An anonymous file that is hashed while it is written."""

    def __init__(self, directory: Path) -> None:
        self.file = open_scratch(directory)
        self._directory = directory
        self._hasher = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> int:
        """All of `data`. Raises: StoreError."""
        self._hasher.update(data)
        view = memoryview(data)
        try:
            while view:
                view = view[self.file.write(view) :]
        except OSError as e:
            raise StoreError(f"cannot write a temporary file in {self._directory}: {e.strerror}") from e
        self._size += len(data)
        return len(data)

    def descriptor(self, media_type: str) -> Descriptor:
        """Of what was written."""
        return Descriptor(media_type=media_type, digest=Digest.from_hasher(self._hasher), size_bytes=self._size)
