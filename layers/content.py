"""What a content store is: blobs by digest, and writers that check before they commit.

Protocols only; `layers.store.Store` is the store on disk, and a transport may bring its own.
Everything that reads or writes blobs takes one of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from layers.oci import Descriptor, Digest
from layers.values import NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO


class BlobInfo(NamedTuple):
    """A blob that a store holds."""

    digest: Digest
    size_bytes: int


class Ingest(Protocol):
    """A blob being written. It becomes visible at `commit` or never.

    `offset` is how many bytes are there already: more than 0 when the ingest of an earlier, dead
    process is continued. Used as a context manager, it keeps an uncommitted ingest's bytes (for a
    later resumption) if it has a `ref`, and drops them otherwise.
    """

    @property
    def offset(self) -> int: ...

    def write(self, data: bytes | memoryview) -> int:
        """Append. Raises: StoreError when the disk is full; SizeMismatch beyond the expected size."""

    def restart(self) -> None:
        """Drop what is there and begin at offset 0."""

    def commit(self) -> Descriptor:
        """Check digest and size, then publish atomically; idempotent if the blob exists.

        Raises: DigestMismatch, SizeMismatch (the ingest's bytes are dropped).
        """

    def abort(self) -> None:
        """Drop what was written."""

    def __enter__(self) -> Ingest: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ContentStore(Protocol):
    """Blobs by digest. Thread-safe; several processes may share one on disk."""

    def open(self, digest: Digest) -> BinaryIO:
        """The blob's bytes, seekable. Raises: BlobNotFound."""

    def read(self, digest: Digest, limit_bytes: int) -> bytes:
        """A small blob whole, verified. Raises: BlobNotFound, DigestMismatch, SizeMismatch beyond the limit."""

    def stat(self, digest: Digest) -> BlobInfo | None:
        """What is known of a blob without reading it; None if it is not here."""

    def ingest(
        self,
        *,
        expected: Descriptor | None = None,
        media_type: str = "application/octet-stream",
        ref: str | None = None,
    ) -> Ingest:
        """Begin a blob. With `expected`, digest and size are checked at commit. `ref` names a resumable ingest.

        Raises: StoreError if another live process holds the ingest of that ref.
        """

    def delete(self, digest: Digest) -> bool:
        """Remove a blob; whether it was there."""

    def walk(self) -> Iterator[BlobInfo]:
        """Every blob, in no particular order."""

    def path(self, digest: Digest) -> Path | None:
        """Where the blob lies as a plain file, for zero-copy readers; None where it does not."""
