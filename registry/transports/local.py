"""What places on this machine have in common, as sources and as destinations of images."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from layers.oci import Descriptor, Digest
from registry.transport import ImageSource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from registry.transport import Reuse


class LocalSource:
    """A source without a host, whose blobs nobody has verified yet."""

    host = ""
    synthetic = False

    def blob_path(self, digest: Digest) -> Path | None:
        return None

    def mount_candidates(self, digest: Digest, host: str) -> Sequence[str]:
        return ()


class LocalDestination:
    """A destination without a host, which begins empty and takes what it is given as it is."""

    host = ""
    single_platform = False
    holds_indexes = True
    manifest_types: frozenset[str] | None = None
    compresses = True

    def head_manifest(self, digest: Digest | None = None) -> Digest | None:
        return None

    def reuse_blob(self, descriptor: Descriptor, source: ImageSource) -> Reuse | None:
        return None


def open_plain(name: str, directory: int) -> BinaryIO:
    """A file of an open directory, through no symbolic link, waiting for no pipe.

    Raises: OSError, for what is no regular file, too.
    """
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", name)
    return open(fd, "rb", buffering=0)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`. Raises: OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
