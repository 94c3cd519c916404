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
from registry.convert import Compression, layer_compression, layer_media_type
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

    def __init__(self, file: BinaryIO, descriptor: Descriptor) -> None:
        self._file = file
        self.descriptor = descriptor

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


def recompress(blob: BlobInput, wanted: Compression, level: int | None, scratch_dir: Path) -> SpooledBlob:
    """The layer in the wanted compression; its own digest is checked on the way. The caller closes it.

    Raises: DigestMismatch, SizeMismatch, LayerError for damaged data or a level out of range, StoreError.
    """
    have = layer_compression(blob.descriptor) or "none"
    engine = compressor(wanted, level, os.cpu_count() or 1)
    hasher = hashlib.sha256()
    size = 0
    file = open_scratch(scratch_dir)
    try:
        with blob.open_verified() as stream:
            plain = decompressor(cast(BinaryIO, stream), kind=have)
            while data := plain.read(CHUNK_BYTES):
                size += _write(file, hasher, engine.write(data))
            # What the decompressor had no need of must be right, too.
            while stream.read(CHUNK_BYTES):
                pass
        size += _write(file, hasher, engine.finish())
    except OSError as e:
        file.close()
        raise StoreError(f"cannot write a temporary file in {scratch_dir}: {e.strerror}") from e
    except BaseException:
        file.close()
        raise
    finally:
        engine.close()
    media_type = layer_media_type(blob.descriptor.media_type, wanted)
    digest = Digest.from_hasher(hasher)
    return SpooledBlob(file, Descriptor(media_type=media_type, digest=digest, size_bytes=size))


def _write(file: BinaryIO, hasher: hashlib._Hash, data: bytes) -> int:
    if data:
        hasher.update(data)
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
    return len(data)
