"""How every command that touches snapshots begins: in the namespaces that it needs, with the store open.

`builder.api` offers both to Python programs. Apart, so that `run` need not load what builds are made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from layers.store import Driver, Store

_ANY_ROOT = ("auto", "pivot")
"""The kinds of isolation for which CAP_SYS_ADMIN is all that is asked for."""


def prepare_namespaces(isolation: str = "auto") -> None:
    """Enter the user namespace that an ordinary user's snapshots need; as root, nothing.

    `isolation` forces a tier (`RunOptions.isolation`). To be called while the process has one thread,
    before the store is opened. Idempotent. Raises: SandboxError naming what is missing.
    """
    if isolation in _ANY_ROOT and _may_mount():
        return
    from builder.sandbox.tiers import prepare

    prepare(isolation)


def may_stay(isolation: str) -> bool:
    """Whether this process can build as it is."""
    if isolation in _ANY_ROOT and _may_mount():
        return True
    from builder.sandbox.tiers import may_stay

    return may_stay(isolation)


def _may_mount() -> bool:
    """Whether this process has CAP_SYS_ADMIN, as its status in /proc says: without loading ctypes."""
    try:
        with open("/proc/self/status", "rb") as f:
            capabilities = next((line for line in f if line.startswith(b"CapEff:")), b"CapEff: 0")
    except OSError:
        return False
    return bool(int(capabilities.split()[1], 16) >> 21 & 1)


@contextmanager
def open_store(root: Path, *, isolation: str = "auto", driver: Driver = "auto") -> Iterator[Store]:
    """The local store, for as long as the block lasts. Raises: StoreError."""
    from layers.store import Store

    store = Store.open(root, driver="native" if isolation == "chroot" else driver)
    try:
        yield store
    finally:
        store.close()
