"""Layers from files: a tar archive, or a directory's content, as a spooled blob with its DiffID.

Used by `registry.edit` to append to images that are not unpacked here.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, cast

from layers.changeset import write_layer
from layers.compression import Compression, compressor, decompressor, detect, media_type
from layers.errors import LayerError
from layers.layerdiff import diff_trees
from layers.oci import Digest
from layers.values import NamedTuple
from registry.recompress import Spool, SpooledBlob
from registry.transport import CHUNK_BYTES

_TAR_BLOCK = 512


class NewLayer(NamedTuple):
    """A layer that lies in an anonymous file, which whoever has this closes."""

    blob: SpooledBlob
    diff_id: Digest


def _layer(spool: Spool, kind: Compression, diff_id: Digest) -> NewLayer:
    return NewLayer(SpooledBlob(spool.file, spool.descriptor(media_type(kind))), diff_id)


class _Tee:
    """A stream that is kept while it is read."""

    def __init__(self, stream: BinaryIO, spool: Spool) -> None:
        self._stream = stream
        self._spool = spool

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self._spool.write(data)
        return data


def layer_of_file(path: Path, scratch_dir: Path, *, compression: Compression = "gzip") -> NewLayer:
    """The layer that a tar archive is; in gzip and zstd byte for byte, in any other form compressed.

    Raises: LayerError if it is no tar archive or damaged; StoreError.
    """
    try:
        with open(path, "rb") as stream:
            return layer_of_stream(stream, scratch_dir, str(path), compression=compression)
    except OSError as e:
        raise LayerError(f"cannot read {path}: {e.strerror}") from e


def layer_of_stream(stream: BinaryIO, scratch_dir: Path, name: str, *, compression: Compression = "gzip") -> NewLayer:
    """As `layer_of_file`, from a buffered stream that `name` stands for in errors."""
    head = cast("bytes", stream.peek(8)[:8])  # type: ignore[attr-defined]  # BufferedReader has it
    kind = detect(head)
    spool = Spool(scratch_dir)
    try:
        if kind in {"gzip", "zstd"}:
            tee = _Tee(stream, spool)
            diff_id = _read_tar(decompressor(cast(BinaryIO, tee), kind=kind), name, None)
            while tee.read(CHUNK_BYTES):
                pass
            return _layer(spool, cast(Compression, kind), diff_id)
        engine = compressor(compression, None, os.cpu_count() or 1)
        try:
            diff_id = _read_tar(
                decompressor(stream, kind=kind or "none"), name, lambda data: spool.write(engine.write(data))
            )
            spool.write(engine.finish())
        finally:
            engine.close()
        return _layer(spool, compression, diff_id)
    except BaseException:
        spool.file.close()
        raise


def _read_tar(plain: BinaryIO, name: str, keep: object) -> Digest:
    """Read a tar stream to its end; its digest. Only its beginning is looked at."""
    hasher = hashlib.sha256()
    first = b""
    while data := plain.read(CHUNK_BYTES):
        if len(first) < _TAR_BLOCK:
            first += data[: _TAR_BLOCK - len(first)]
        hasher.update(data)
        if callable(keep):
            keep(data)
    if len(first) < _TAR_BLOCK or (any(first) and not _is_header(first)):
        raise LayerError(f"{name} is not a tar archive")
    return Digest.from_hasher(hasher)


def _is_header(block: bytes) -> bool:
    """Whether the block's checksum is right: that of an old tar, too, which has no magic."""
    try:
        said = int(block[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    return said == sum(block[:148]) + 8 * ord(" ") + sum(block[156:])


def layer_of_directory(
    path: Path, scratch_dir: Path, *, compression: Compression = "gzip", epoch_s: int | None = None
) -> NewLayer:
    """The layer that makes the directory's content out of nothing; times are clamped to `epoch_s`.

    Raises: LayerError, StoreError.
    """
    spool = Spool(scratch_dir)
    try:
        result = write_layer(diff_trees(None, path), path, spool, compression=compression, clamp_mtime=epoch_s)
        return _layer(spool, compression, result.diff_id)
    except OSError as e:
        spool.file.close()
        raise LayerError(f"cannot read {path}: {e.strerror}") from e
    except BaseException:
        spool.file.close()
        raise
