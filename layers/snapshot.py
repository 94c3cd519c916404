"""What a snapshotter is: stacks of file-system changes that can be mounted, after containerd's verbs.

A *snapshot* is committed and read-only; its `changes` directory holds one layer's difference from
its parent (overlay driver) or the whole tree (native driver). An *active* snapshot is being
written. Drivers live in `layers.snapshotters`; metadata lives in the store's database.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layers.values import NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Dialect = Literal["trusted", "user"]
    """Which xattr namespace overlayfs uses: `trusted.overlay.*`, or `user.overlay.*` under a user namespace."""


class Mount(NamedTuple):
    """What has to be mounted to see a snapshot's tree, as data: the sandbox executes it.

    `type` is "overlay" or "bind". For overlay, `lower` runs from the topmost layer to the base, and
    `upper`/`work` are None for a read-only view. For bind, `lower` has one entry, the tree itself.
    """

    type: Literal["overlay", "bind"]
    lower: tuple[Path, ...]
    upper: Path | None = None
    work: Path | None = None
    readonly: bool = False
    dialect: Dialect = "trusted"
    program: str | None = None
    """The path of fuse-overlayfs, which mounts overlays where the kernel does not; see `layers.fusemount`."""


class Snapshot(NamedTuple):
    """A committed snapshot."""

    id: str
    parent: str | None
    path: Path
    driver: str


class ActiveSnapshot(NamedTuple):
    """A snapshot being written; `path` is where its changes (overlay) or its tree (native) go."""

    id: str
    parent: str | None
    path: Path
    mount: Mount


class Snapshotter(Protocol):
    """Thread-safe. Active snapshots of dead processes are swept when the store is next opened."""

    @property
    def driver(self) -> str: ...

    @property
    def dialect(self) -> Dialect: ...

    def prepare(self, parent: str | None) -> ActiveSnapshot:
        """Begin a writable snapshot on `parent`. Raises: StoreError (parent unknown, disk full)."""

    def view(self, snapshot: str | None) -> Mount:
        """A read-only mount of a committed snapshot's whole tree (None: an empty directory)."""

    def commit(self, active: ActiveSnapshot, *, id: str | None = None) -> Snapshot:
        """Make it read-only and durable-on-barrier; `id` names it (content-derived), else it keeps its own.

        If a snapshot `id` exists already, the active one is dropped and that one returned.
        """

    def rebase(self, snapshot: str, parent: str | None) -> Snapshot:
        """The same changes stacked on another parent, sharing the bytes where the driver can (`COPY --link`)."""

    def get(self, id: str) -> Snapshot | None: ...

    def chain(self, id: str) -> Sequence[Snapshot]:
        """From the base to `id`. Raises: StoreError if a parent is missing."""

    def discard(self, active: ActiveSnapshot) -> None:
        """Drop an active snapshot and its files."""

    def remove(self, id: str) -> None:
        """Remove a committed snapshot. Raises: StoreError if another one builds on it."""
