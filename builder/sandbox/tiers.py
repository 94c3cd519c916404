"""The ladder of isolation: which tier a process takes, by itself or because it was told to.

    auto      root: namespaces; root without CAP_SYS_ADMIN: chroot; others: rootless
    pivot     as auto, but never a chroot within the namespaces
    chroot    root: no namespaces, no mounts (`builder.sandbox.bare`)
    oci       root: an OCI runtime (`builder.sandbox.oci`)
    rootless  a user namespace with subordinate ids, or nothing
    single    a user namespace with the user's own id alone, owners recorded (`builder.sandbox.supervisor`)

`probe` tells which of them work.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from builder.errors import SandboxError
from builder.sandbox import userns

if TYPE_CHECKING:
    from builder.sandbox.launcher import Launcher

_TIERS = {"rootless": "subordinate", "single": "single"}


def prepare(isolation: str) -> None:
    """Become what the isolation needs; only in a process of one thread. Raises: SandboxError."""
    if may_stay(isolation):
        return
    if isolation == "chroot":
        raise SandboxError(
            "isolation chroot needs root (of a container will do)",
            operation="chroot",
            hint="leave --isolation away to build in a user namespace",
        )
    identity = userns.enter(subordinate=isolation != "single")
    if isolation == "single" and identity.tier != "single":
        raise SandboxError(
            "isolation single is not to be had: this process has more ids than one",
            operation="single",
            hint="it is for ordinary users; leave --isolation away",
        )
    if isolation == "rootless" and identity.tier != "subordinate":
        words = "pybuild runs as root" if identity.tier == "root" else identity.note or "no subordinate ids"
        raise SandboxError(f"isolation rootless is not to be had: {words}", operation="rootless")


def may_stay(isolation: str) -> bool:
    """Whether this process needs no other namespaces for that than it has."""
    if isolation == "chroot":
        return os.geteuid() == 0
    if isolation in _TIERS:
        return userns.has_powers() and userns.current().tier == _TIERS[isolation]
    return userns.has_powers() or (isolation == "auto" and userns.chroot_only())


def start_launcher(isolation: str, runtime: str | None = None, *, own_pids: bool = True) -> Launcher:
    """The launcher of the tier; `runtime` names that of "oci", `own_pids` is as in `Launcher.start`.

    Raises: SandboxError.
    """
    if isolation == "oci":
        from builder.sandbox import oci

        return oci.start(runtime)
    if isolation == "chroot" or (isolation == "auto" and userns.chroot_only()):
        from builder.sandbox.bare import BareLauncher

        return BareLauncher.start()
    from builder.sandbox.launcher import Launcher

    return Launcher.start(own_pids=own_pids)
