"""The root of pybuild's exceptions, and those of content, layers and images.

    PybuildError
    ├── Cancelled                 the caller or a signal asked to stop
    ├── ContentError              a blob is not what its descriptor says
    │   ├── BlobNotFound
    │   ├── DigestMismatch
    │   └── SizeMismatch
    ├── LayerError                a tar stream is malformed or hostile, or a tree cannot be expressed
    ├── ImageError                a manifest, index or config is malformed or unsupported
    └── StoreError                the local store is damaged, busy, full or of another version
        ├── ForeignStore
        └── NameNotFound

`registry.errors` and `builder.errors` hang their own trees under `PybuildError`. Errors are raised
with their cause and logged nowhere else; `builder.cli.main` alone maps them to text and exit codes.
"""

from __future__ import annotations


class PybuildError(Exception):
    """An error that a user can act on.

    `message` says what failed and where; `hint`, if any, what to do about it. `exit_code` is the
    documented status of the command that fails with it; an instance may carry its own (a failed RUN does).
    """

    exit_code: int = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class Cancelled(PybuildError):
    """The work was stopped before its end, at the caller's wish."""

    exit_code = 130

    def __init__(self, message: str = "cancelled", *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)


class ContentError(PybuildError):
    """A blob is missing or is not what its descriptor says."""


class BlobNotFound(ContentError):
    """No blob of that digest is here."""


class DigestMismatch(ContentError):
    """The bytes do not hash to the digest that was promised."""

    exit_code = 8


class SizeMismatch(ContentError):
    """There are more or fewer bytes than were promised."""

    exit_code = 8


class LayerError(PybuildError):
    """A layer's tar stream is malformed or hostile, or a tree cannot be expressed as one."""


class ImageError(PybuildError):
    """A manifest, index or image config is malformed or of an unsupported kind."""


class StoreError(PybuildError):
    """The local store cannot do what was asked: damaged, full, locked or of another version."""


class ForeignStore(StoreError):
    """What is there is no store, or one in a format that this pybuild does not read; it is not to be repaired."""


class NameNotFound(StoreError):
    """No image of that name is in the store."""
