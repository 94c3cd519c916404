"""`dir:DIR`: an image as plain files, as skopeo's `dir:` has it.

    DIR/version              "Directory Transport Version: 1.1"
    DIR/manifest.json        the manifest or index
    DIR/HEX.manifest.json    the instances of an index
    DIR/HEX                  blobs, by the hex of their sha256; others as ALG-HEX

One image per directory: a commit removes the blobs of the one that was there before. Nothing is
followed through a symlink.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from layers.errors import BlobNotFound, ImageError, SizeMismatch, StoreError
from layers.oci import MAX_MANIFEST_BYTES, Descriptor, Digest, Manifest, parse_manifest
from layers.values import NamedTuple
from registry.errors import InvalidReference
from registry.transport import (
    CHUNK_BYTES,
    BlobInput,
    RawManifest,
    TransportContext,
    check_manifest,
    is_whole,
    path_scopes,
)
from registry.transports.local import LocalDestination, LocalSource, open_plain

VERSION_TEXT = b"Directory Transport Version: 1.1\n"
_OURS = re.compile(r"(?:sha(?:384|512)-)?[0-9a-f]{64,128}(?:\.manifest\.json)?\Z")
_TEMPORARY = ".pybuild-"


class DirLocation(NamedTuple):
    """A directory."""

    path: Path
    transport: str = "dir"

    def __str__(self) -> str:
        return f"dir:{self.path}"

    def source(self, context: TransportContext) -> DirSource:
        context.check_policy(self.transport, path_scopes(self.path))
        return DirSource(self)

    def destination(self, context: TransportContext) -> DirDestination:
        return DirDestination(self)


def parse(transport: str, rest: str) -> DirLocation:
    """Raises: InvalidReference."""
    if "\0" in rest:
        raise InvalidReference(f"invalid image name {transport}:{rest!r}")
    return DirLocation(Path(rest))


def _file_name(digest: Digest) -> str:
    return digest.encoded if digest.algorithm == "sha256" else f"{digest.algorithm}-{digest.encoded}"


class _Dir:
    """The directory held open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise StoreError(f"cannot open directory {path}: {e.strerror}") from e

    def open(self, name: str) -> BinaryIO:
        """Raises: FileNotFoundError; StoreError for what is no plain file."""
        try:
            return open_plain(name, self.fd)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise StoreError(f"cannot read {self.path}/{name}: {e.strerror}") from e

    def read(self, name: str) -> bytes:
        with self.open(name) as f:
            data = f.read(MAX_MANIFEST_BYTES + 1)
        if len(data) > MAX_MANIFEST_BYTES:
            raise ImageError(f"{self.path}/{name} is larger than the {MAX_MANIFEST_BYTES} bytes allowed")
        return data

    def write(self, name: str, data: bytes) -> None:
        temporary = _TEMPORARY + name
        try:
            fd = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=self.fd
            )
            with open(fd, "wb") as f:
                f.write(data)
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as e:
            raise StoreError(f"cannot write {self.path}/{name}: {e.strerror}") from e

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class DirSource(LocalSource):
    """The image in a directory."""

    def __init__(self, location: DirLocation) -> None:
        self.name = str(location)
        self._dir = _Dir(location.path)

    def get_manifest(self, digest: Digest | None = None) -> RawManifest:
        name = "manifest.json" if digest is None else f"{_file_name(digest)}.manifest.json"
        try:
            raw = self._dir.read(name)
        except FileNotFoundError as e:
            raise ImageError(f"{self.name} holds no image: it has no {name}") from e
        media_type = parse_manifest(raw).media_type
        return check_manifest(RawManifest(raw, media_type, digest or Digest.of(raw)), digest)

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> BinaryIO:
        try:
            stream = self._dir.open(_file_name(descriptor.digest))
        except FileNotFoundError as e:
            raise BlobNotFound(f"{self.name} has no blob {descriptor.digest}") from e
        size = os.fstat(stream.fileno()).st_size
        if size != descriptor.size_bytes:
            stream.close()
            raise SizeMismatch(f"blob {descriptor.digest} in {self.name} has {size} bytes, not {descriptor.size_bytes}")
        stream.seek(offset)
        return stream

    def close(self) -> None:
        self._dir.close()


class DirDestination(LocalDestination):
    """A directory that will hold the image alone."""

    compresses = False

    def __init__(self, location: DirLocation) -> None:
        self.name = self.room = str(location)
        try:
            os.makedirs(location.path, exist_ok=True)
        except OSError as e:
            raise StoreError(f"cannot make {location.path}: {e.strerror}") from e
        self._dir = _Dir(location.path)
        self._top: RawManifest | None = None
        try:
            existing = [n for n in os.listdir(self._dir.fd) if not n.startswith(_TEMPORARY)]
            if existing and "version" not in existing:
                raise StoreError(
                    f"{location.path} is neither empty nor an image directory: not touched",
                    hint="name a directory that does not exist yet",
                )
            if not existing:
                # First of all, so that a copy that failed or was killed can be begun again here.
                self._dir.write("version", VERSION_TEXT)
        except BaseException:
            self._dir.close()
            raise

    def head_manifest(self, digest: Digest | None = None) -> Digest | None:
        raw = self._read(digest)
        if raw is None:
            return None
        return (
            raw.digest
            if is_whole(raw.digest, lambda d: raw if d == raw.digest else self._read(d), self.has_blob)
            else None
        )

    def _read(self, digest: Digest | None) -> RawManifest | None:
        try:
            raw = self._dir.read(f"{_file_name(digest)}.manifest.json" if digest is not None else "manifest.json")
        except FileNotFoundError:
            return None
        return RawManifest(raw, "", digest or Digest.of(raw))

    def has_blob(self, descriptor: Descriptor) -> bool:
        try:
            with self._dir.open(_file_name(descriptor.digest)) as f:
                return os.fstat(f.fileno()).st_size == descriptor.size_bytes
        except FileNotFoundError:
            return False

    def put_blob(self, blob: BlobInput) -> None:
        name = _file_name(blob.descriptor.digest)
        temporary = _TEMPORARY + name
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with (
                blob.open_verified() as stream,
                open(os.open(temporary, flags, 0o644, dir_fd=self._dir.fd), "wb", buffering=0) as f,
            ):
                while data := stream.read(CHUNK_BYTES):
                    view = memoryview(data)
                    while view:
                        view = view[f.write(view) :]
            os.rename(temporary, name, src_dir_fd=self._dir.fd, dst_dir_fd=self._dir.fd)
        except OSError as e:
            raise StoreError(f"cannot write {self._dir.path}/{name}: {e.strerror}") from e

    def put_manifest(self, manifest: RawManifest, *, top: bool) -> None:
        check_manifest(manifest, manifest.digest)
        if top:
            self._top = manifest
            return
        self._dir.write(f"{_file_name(manifest.digest)}.manifest.json", manifest.raw)

    def commit(self) -> None:
        """Write the manifest, then drop the blobs of the image that was here before."""
        if self._top is None:
            raise StoreError(f"nothing was written to {self.name}")
        self._dir.write("version", VERSION_TEXT)
        self._dir.write("manifest.json", self._top.raw)
        keep = {"version", "manifest.json", *self._names(self._top)}
        for name in os.listdir(self._dir.fd):
            if name not in keep and (_OURS.match(name) or name.startswith((_TEMPORARY, "signature-"))):
                try:
                    os.unlink(name, dir_fd=self._dir.fd)
                except OSError as e:
                    raise StoreError(f"cannot remove {self._dir.path}/{name}: {e.strerror}") from e

    def _names(self, manifest: RawManifest) -> Iterator[str]:
        """The files of everything beneath the manifest."""
        document = parse_manifest(manifest.raw, manifest.media_type)
        if isinstance(document, Manifest):
            yield from (_file_name(d.digest) for d in (document.config, *document.layers))
            return
        for entry in document.manifests:
            yield f"{_file_name(entry.digest)}.manifest.json"
            inner = self._read(entry.digest)
            if inner is not None:
                yield from self._names(inner)

    def close(self) -> None:
        self._dir.close()
