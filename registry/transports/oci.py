"""`oci:DIR[:TAG|@DIGEST]`: OCI image layouts in a directory, read and written.

    DIR/oci-layout             {"imageLayoutVersion": "1.0.0"}
    DIR/index.json             the names: descriptors with org.opencontainers.image.ref.name
    DIR/blobs/ALG/HEX          content
    DIR/.pybuild-ingest/…      blobs being written, flocked while live; a dead process's is continued

Layouts are hostile: nothing is followed through a symlink, sizes are bounded, bytes are hashed by
whoever reads them. Writers are many: blobs appear by rename, index.json is replaced under a lock on
DIR. Bytes are not synced to the disk: a layout is an export that can be made again, and a blob of
the wrong size, as a power cut leaves it, is written anew.

Spec: https://github.com/opencontainers/image-spec/blob/main/image-layout.md
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from layers.errors import BlobNotFound, DigestMismatch, ImageError, SizeMismatch, StoreError
from layers.oci import (
    INDEX_MEDIA_TYPES,
    MANIFEST_MEDIA_TYPES,
    MAX_MANIFEST_BYTES,
    MEDIA_OCI_INDEX,
    MEDIA_OCI_MANIFEST,
    Descriptor,
    Digest,
    Index,
    encode_json,
    parse_manifest,
)
from layers.values import NamedTuple
from registry.errors import InvalidReference
from registry.transport import (
    CHUNK_BYTES,
    BlobInput,
    ImageSource,
    RawManifest,
    TransportContext,
    check_manifest,
    is_whole,
    path_scopes,
)
from registry.transports.local import LocalDestination, LocalSource, open_plain, write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from registry.transport import Reuse

REF_NAME = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"
"""BuildKit's exports keep the whole reference here and the tag alone in REF_NAME."""
LAYOUT_FILE = b'{"imageLayoutVersion":"1.0.0"}'
_INGEST = ".pybuild-ingest"
_counter = itertools.count()


class OciLocation(NamedTuple):
    """A layout's directory and, if any, the name or digest within."""

    path: Path
    ref: str | None = None
    digest: Digest | None = None
    transport: str = "oci"

    def __str__(self) -> str:
        return format_location(self.transport, str(self.path), self.ref, self.digest)

    def source(self, context: TransportContext) -> OciSource:
        """Raises: StoreError if there is no layout."""
        context.check_policy(self.transport, path_scopes(self.path, self.ref))
        return OciSource(self)

    def destination(self, context: TransportContext) -> OciDestination:
        """Raises: InvalidReference for a location with a digest; StoreError."""
        if self.digest is not None:
            raise InvalidReference(f"cannot write to {self}: a digest names what is there already, not a tag")
        return OciDestination(self)


def parse(transport: str, rest: str) -> OciLocation:
    """Raises: InvalidReference."""
    path, ref, digest = split_path(transport, rest)
    return OciLocation(Path(path), ref, digest, transport)


def split_path(transport: str, rest: str) -> tuple[str, str | None, Digest | None]:
    """`PATH[:TAG|:@DIGEST|@DIGEST]` as its parts; paths cannot contain a colon.

    Raises: InvalidReference.
    """
    path, colon, ref = rest.partition(":")
    if path.endswith(("@sha256", "@sha384", "@sha512")):
        path, _, algorithm = path.rpartition("@")
        ref = f"@{algorithm}:{ref}"
    if not path or (colon and not ref) or "\0" in rest:
        raise InvalidReference(f"invalid image name {transport}:{rest}: expected {transport}:PATH[:TAG]")
    if not ref.startswith("@"):
        return path, ref or None, None
    try:
        return path, None, Digest(ref[1:])
    except ImageError as e:
        raise InvalidReference(f"invalid image name {transport}:{rest}: {ref[1:]!r} is not a digest") from e


def format_location(transport: str, path: str, ref: str | None, digest: Digest | None) -> str:
    return f"{transport}:{path}" + (f":{ref}" if ref else "") + (f"@{digest}" if digest else "")


class LayoutDir:
    """A layout's directory held open; every access goes by this descriptor, and through no symlink.

    Raises: StoreError, naming the path, for whatever the file system refuses.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        if create:
            _create(path)
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise StoreError(f"no OCI layout at {path}: {e.strerror}") from e
        try:
            self._check_version()
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _check_version(self) -> None:
        try:
            doc = json.loads(self._read_file("oci-layout", 4096))
            version = doc["imageLayoutVersion"]
        except FileNotFoundError as e:
            raise StoreError(f"{self.path} is not an OCI layout: it has no oci-layout file") from e
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise StoreError(f"{self.path}/oci-layout is malformed") from e
        if not isinstance(version, str) or version.partition(".")[0] != "1":
            raise StoreError(f"{self.path} is an OCI layout of version {version!r}; only 1.x is understood")

    def _read_file(self, name: str, limit_bytes: int) -> bytes:
        with open_plain(name, self.fd) as f:
            data = f.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise ImageError(f"{self.path}/{name} is larger than the {limit_bytes} bytes allowed")
        return data

    def read_index(self) -> Index:
        """The layout's index.json. Raises: StoreError, ImageError."""
        try:
            return Index.parse(self._read_file("index.json", MAX_MANIFEST_BYTES), MEDIA_OCI_INDEX)
        except OSError as e:
            raise StoreError(f"cannot read {self.path}/index.json: {e.strerror}") from e

    def open_blob(self, digest: Digest, size_bytes: int | None = None) -> BinaryIO:
        """The blob's file. Raises: BlobNotFound, SizeMismatch; StoreError if it is no plain file."""
        try:
            directory = self._blob_dir(digest)
            try:
                stream = open_plain(digest.encoded, directory)
            finally:
                os.close(directory)
        except FileNotFoundError as e:
            raise BlobNotFound(f"{self.path} has no blob {digest}") from e
        except OSError as e:
            raise StoreError(f"cannot read blob {digest} in {self.path}: {e.strerror}") from e
        size = os.fstat(stream.fileno()).st_size
        if size_bytes is not None and size != size_bytes:
            stream.close()
            raise SizeMismatch(f"blob {digest} in {self.path} has {size} bytes, not {size_bytes}")
        return stream

    def has_blob(self, descriptor: Descriptor) -> bool:
        try:
            self.open_blob(descriptor.digest, descriptor.size_bytes).close()
        except (BlobNotFound, SizeMismatch):
            return False
        return True

    def read_manifest(self, descriptor: Descriptor) -> RawManifest:
        """Raises: BlobNotFound, ImageError."""
        with self.open_blob(descriptor.digest) as f:
            raw = f.read(MAX_MANIFEST_BYTES + 1)
        return RawManifest(raw, descriptor.media_type or parse_manifest(raw).media_type, descriptor.digest)

    def _blob_dir(self, digest: Digest, *, create: bool = False) -> int:
        blobs = _open_dir("blobs", self.fd, create=create)
        try:
            return _open_dir(digest.algorithm, blobs, create=create)
        finally:
            os.close(blobs)

    def write_blob(self, blob: BlobInput) -> None:
        """Stream the blob in, continuing what a dead writer left; see `ImageDestination.put_blob`."""
        try:
            with _LayoutIngest(self, blob.descriptor) as ingest:
                ingest.fill(blob)
                self._publish(ingest.name, ingest.directory, blob.descriptor.digest)
        except OSError as e:
            raise StoreError(f"cannot write blob {blob.descriptor.digest} to {self.path}: {e.strerror}") from e

    def write_bytes(self, raw: bytes, digest: Digest) -> None:
        """A manifest, as a blob; its digest was checked by the caller."""
        name = _temporary(digest.encoded)
        try:
            directory = self._blob_dir(digest, create=True)
            try:
                _write_new(name, raw, directory)
                os.rename(name, digest.encoded, src_dir_fd=directory, dst_dir_fd=directory)
            finally:
                os.close(directory)
        except OSError as e:
            raise StoreError(f"cannot write {digest} to {self.path}: {e.strerror}") from e

    def link_blob(self, path: Path, descriptor: Descriptor) -> bool:
        """Make the blob a hard link of the verified file `path`, if the file system allows."""
        name = _temporary(descriptor.digest.encoded)
        try:
            directory = self._blob_dir(descriptor.digest, create=True)
        except OSError as e:
            raise StoreError(f"cannot write blob {descriptor.digest} to {self.path}: {e.strerror}") from e
        try:
            os.link(path, name, dst_dir_fd=directory, follow_symlinks=False)
            info = os.stat(name, dir_fd=directory, follow_symlinks=False)
            # A private store's file would be unreadable to the layout's other readers: copy that.
            if not stat.S_ISREG(info.st_mode) or info.st_size != descriptor.size_bytes or info.st_mode & 0o444 != 0o444:
                os.unlink(name, dir_fd=directory)
                return False
            os.rename(name, descriptor.digest.encoded, src_dir_fd=directory, dst_dir_fd=directory)
            # rename() of two links to one file does nothing and leaves the first.
            try:
                os.unlink(name, dir_fd=directory)
            except FileNotFoundError:
                pass
        except OSError:
            return False
        finally:
            os.close(directory)
        return True

    def _publish(self, name: str, source_dir: int, digest: Digest) -> None:
        directory = self._blob_dir(digest, create=True)
        try:
            os.rename(name, digest.encoded, src_dir_fd=source_dir, dst_dir_fd=directory)
        finally:
            os.close(directory)

    def update_index(self, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        """Replace index.json's list of manifests by `change` of it, alone among all writers."""
        lock = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            doc = json.loads(self.read_index().raw)
            doc["manifests"] = change(doc["manifests"])
            name = _temporary("index.json")
            _write_new(name, encode_json(doc), self.fd)
            os.rename(name, "index.json", src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as e:
            raise StoreError(f"cannot write {self.path}/index.json: {e.strerror}") from e
        finally:
            os.close(lock)

    def sweep(self) -> None:
        """Drop what dead writers left and nobody continued."""
        try:
            directory = _open_dir(_INGEST, self.fd, create=False)
        except OSError:
            return
        try:
            for name in os.listdir(directory):
                try:
                    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
                except OSError:
                    continue
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=directory)
                except OSError:
                    pass
                finally:
                    os.close(fd)
            os.rmdir(_INGEST, dir_fd=self.fd)
        except OSError:
            pass
        finally:
            os.close(directory)


class _LayoutIngest:
    """A blob of a layout being written, in a file that only we have locked."""

    def __init__(self, layout: LayoutDir, descriptor: Descriptor) -> None:
        self._layout = layout
        self._descriptor = descriptor
        self.name = f"{descriptor.digest.algorithm}-{descriptor.digest.encoded}"
        while True:
            try:
                self.directory = _open_dir(_INGEST, layout.fd, create=True)
                try:
                    self.fd = self._open_locked()
                    return
                except BaseException:
                    os.close(self.directory)
                    raise
            except FileNotFoundError:
                continue  # another writer's sweep removed the directory under us

    def _open_locked(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        while True:
            fd = os.open(self.name, flags, 0o644, dir_fd=self.directory)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                here, there = os.fstat(fd), os.stat(self.name, dir_fd=self.directory, follow_symlinks=False)
            except BlockingIOError:
                # Another live writer has it: make our own, which nobody will continue.
                os.close(fd)
                self.name += f".{os.getpid()}.{id(self):x}"
                continue
            except FileNotFoundError:
                os.close(fd)
                continue
            if not stat.S_ISREG(here.st_mode) or here.st_nlink != 1:
                os.close(fd)
                raise StoreError(f"{self._layout.path}/{_INGEST}/{self.name} is not a plain file of its own")
            if here.st_ino == there.st_ino:
                return fd
            os.close(fd)

    def fill(self, blob: BlobInput) -> None:
        """Write what is missing and check the whole. Raises: DigestMismatch, SizeMismatch."""
        size = self._descriptor.size_bytes
        hasher = self._descriptor.digest.hasher()
        offset = os.fstat(self.fd).st_size
        if offset > size:
            os.ftruncate(self.fd, 0)
            offset = 0
        position = 0
        while position < offset and (data := os.pread(self.fd, min(CHUNK_BYTES, offset - position), position)):
            hasher.update(data)
            position += len(data)
        if position < size or size == 0:
            with blob.open(position) as stream:
                while data := stream.read(min(CHUNK_BYTES, size - position + 1)):
                    hasher.update(data)
                    position += len(data)
                    if position > size:
                        break
                    write_all(self.fd, data, position - len(data))
        if position < size:
            # Kept: the next try goes on from here.
            raise SizeMismatch(f"blob {self._descriptor.digest} ends after {position} of {size} bytes")
        found = Digest.from_hasher(hasher)
        if position > size or found != self._descriptor.digest:
            os.ftruncate(self.fd, 0)
            if position > size:
                raise SizeMismatch(f"blob {self._descriptor.digest} has more than its {size} bytes")
            raise DigestMismatch(f"blob {self._descriptor.digest} has the wrong bytes: they hash to {found}")

    def __enter__(self) -> _LayoutIngest:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        os.close(self.directory)


class OciSource(LocalSource):
    """An image in a layout. The layout's `index.json` is read once."""

    def __init__(self, location: OciLocation) -> None:
        self.name = str(location)
        self._layout = LayoutDir(location.path)
        try:
            self._entry = find_entry(self._layout.read_index().manifests, location.ref, location.digest, self.name)
        except BaseException:
            self._layout.close()
            raise

    def get_manifest(self, digest: Digest | None = None) -> RawManifest:
        if digest is None or digest == self._entry.digest:
            return check_manifest(self._layout.read_manifest(self._entry), self._entry.digest)
        return check_manifest(
            self._layout.read_manifest(Descriptor(media_type="", digest=digest, size_bytes=0)), digest
        )

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> BinaryIO:
        stream = self._layout.open_blob(descriptor.digest, descriptor.size_bytes)
        if offset:
            stream.seek(offset)
        return stream

    def close(self) -> None:
        self._layout.close()


class OciDestination(LocalDestination):
    """A name in a layout, which is made if there is none."""

    manifest_types: frozenset[str] | None = frozenset({MEDIA_OCI_MANIFEST, MEDIA_OCI_INDEX})

    def __init__(self, location: OciLocation) -> None:
        self.name = str(location)
        self.room = f"oci:{os.path.realpath(location.path)}"
        self._ref = location.ref
        if os.path.lexists(location.path / "store.db"):
            # Its index.json is written from the database, and its blobs are known there.
            raise StoreError(f"{location.path} is pybuild's own store", hint="write to storage:NAME instead")
        self._layout = LayoutDir(location.path, create=True)
        self._top: RawManifest | None = None

    def head_manifest(self, digest: Digest | None = None) -> Digest | None:
        wanted = digest
        if wanted is None and self._ref is not None:
            found = {d.digest for d in self._layout.read_index().manifests if d.annotations.get(REF_NAME) == self._ref}
            wanted = found.pop() if len(found) == 1 else None
        # A layout may have a manifest without its blobs.
        return wanted if wanted is not None and is_whole(wanted, self._read, self.has_blob) else None

    def _read(self, digest: Digest) -> RawManifest:
        return self._layout.read_manifest(Descriptor(media_type="", digest=digest, size_bytes=0))

    def has_blob(self, descriptor: Descriptor) -> bool:
        return self._layout.has_blob(descriptor)

    def reuse_blob(self, descriptor: Descriptor, source: ImageSource) -> Reuse | None:
        path = source.blob_path(descriptor.digest)
        return "linked" if path is not None and self._layout.link_blob(path, descriptor) else None

    def put_blob(self, blob: BlobInput) -> None:
        self._layout.write_blob(blob)

    def put_manifest(self, manifest: RawManifest, *, top: bool) -> None:
        check_manifest(manifest, manifest.digest)
        self._layout.write_bytes(manifest.raw, manifest.digest)
        if top:
            self._top = manifest

    def commit(self) -> None:
        if self._top is None:
            raise StoreError(f"nothing was written to {self.name}")
        top, ref = self._top, self._ref
        self._layout.update_index(lambda entries: renamed(entries, top.descriptor, ref))
        self._layout.sweep()

    def close(self) -> None:
        self._layout.close()


def find_entry(entries: Sequence[Descriptor], ref: str | None, digest: Digest | None, name: str) -> Descriptor:
    """The one of a layout's `entries` that `ref` or `digest` names, or the only one.

    Raises: ImageError listing what there is.
    """
    usable = [d for d in entries if d.media_type in INDEX_MEDIA_TYPES | MANIFEST_MEDIA_TYPES or not d.media_type]
    if digest is not None:
        found = [d for d in entries if d.digest == digest][:1]
        # A digest may also be that of an index's instance, which index.json need not list.
        return found[0] if found else Descriptor(media_type="", digest=digest, size_bytes=0)
    if ref is None:
        found = usable
    else:
        found = [d for d in usable if d.annotations.get(REF_NAME) == ref]
        found = found or [d for d in usable if d.annotations.get(_FULL_NAME) == ref]
    if len({d.digest for d in found}) == 1:
        return found[0]
    names = ", ".join(sorted({d.annotations.get(REF_NAME, "@" + d.digest) for d in usable})[:20])
    if not usable:
        raise ImageError(f"{name} holds no image")
    if not found:
        raise ImageError(f"{name}: no image of that name", hint=f"there is: {names}")
    raise ImageError(f"{name} is ambiguous: {len(found)} images fit", hint=f"there is: {names}")


def renamed(entries: list[dict[str, Any]], top: Descriptor, ref: str | None) -> list[dict[str, Any]]:
    """`entries` with `top` under the name `ref`, which is taken from whatever had it; without, `top` is just there."""

    def name_of(entry: dict[str, Any]) -> Any:
        return (entry.get("annotations") or {}).get(REF_NAME)

    kept = [e for e in entries if (name_of(e) != ref if ref else e.get("digest") != top.digest or name_of(e))]
    doc = top.to_json()
    if ref:
        doc["annotations"] = {REF_NAME: ref}
    return [*kept, doc]


def _create(path: Path) -> None:
    """Make `path` an empty layout unless it is one already."""
    try:
        os.makedirs(path, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            existing = set(os.listdir(fd))
            if "oci-layout" in existing:
                return
            if "index.json" in existing:
                raise StoreError(f"{path} has an index.json but is no OCI layout: not touched")
            os.close(_open_dir("blobs", fd, create=True))
            index = {"schemaVersion": 2, "mediaType": MEDIA_OCI_INDEX, "manifests": []}
            _write_new(".index.json.new", encode_json(index), fd)
            os.rename(".index.json.new", "index.json", src_dir_fd=fd, dst_dir_fd=fd)
            # Last: a directory is a layout only once it has this.
            _write_new(".oci-layout.new", LAYOUT_FILE, fd)
            os.rename(".oci-layout.new", "oci-layout", src_dir_fd=fd, dst_dir_fd=fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise StoreError(f"cannot make an OCI layout at {path}: {e.strerror}") from e


def _temporary(name: str) -> str:
    return f".{name[:16]}.{os.getpid()}.{next(_counter)}"


def _open_dir(name: str, dir_fd: int, *, create: bool) -> int:
    if create:
        try:
            os.mkdir(name, 0o755, dir_fd=dir_fd)
        except FileExistsError:
            pass
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)


def _write_new(name: str, data: bytes, dir_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        pass
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=dir_fd)
    try:
        write_all(fd, data, 0)
    finally:
        os.close(fd)
