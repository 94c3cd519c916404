"""Whether a RUN for another CPU can run here: natively, or by an emulator that the kernel knows (binfmt_misc).

Kernel documentation: admin-guide/binfmt-misc.rst. The emulator must be registered with the flag F,
which opens it when it is registered: its path does not exist in the image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from builder.errors import SandboxError
from builder.plan.graph import RunOp, Step
from layers.oci import Platform

_BINFMT = "/proc/sys/fs/binfmt_misc"
_QEMU_NAMES = {
    "amd64": "x86_64",
    "386": "i386",
    "arm64": "aarch64",
    "loong64": "loongarch64",
    "mips64le": "mips64el",
    "mipsle": "mipsel",
}
_NATIVE = {"amd64": {"386"}, "arm64": {"arm"}}
"""What else a CPU's kernel usually runs."""


def require_runnable(steps: Iterable[Step], *, directory: str = _BINFMT) -> None:
    """Refuse before anything runs what nothing here can run.

    Raises: SandboxError naming the steps and what would help.
    """
    missing: dict[str, list[str]] = {}
    for step in steps:
        if isinstance(step.op, RunOp) and not can_run(step.platform, directory=directory):
            missing.setdefault(str(step.platform), []).append(step.name)
    if missing:
        platforms = ", ".join(missing)
        names = [name for found in missing.values() for name in found]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise SandboxError(
            f"{names[0]}{more} cannot run here: this machine has no emulator for {platforms}",
            operation="exec",
            hint="register one with binfmt_misc (Debian: apt install qemu-user-static binfmt-support)",
        )


def can_run(platform: Platform, *, directory: str = _BINFMT) -> bool:
    """Whether programs for `platform` run on this machine."""
    host = Platform.host()
    if platform.os != host.os:
        return False
    if platform.architecture == host.architecture or platform.architecture in _NATIVE.get(host.architecture, ()):
        return True
    return emulator(platform, directory=directory) is not None


def emulator(platform: Platform, *, directory: str = _BINFMT) -> str | None:
    """The path of the registered emulator for `platform`; None if there is none that works in a sandbox."""
    name = _QEMU_NAMES.get(platform.architecture, platform.architecture)
    try:
        with open(os.path.join(directory, f"qemu-{name}"), encoding="ascii", errors="replace") as f:
            lines = f.read(4096).splitlines()
    except OSError:
        return None
    fields = dict(line.partition(" ")[::2] for line in lines)
    flags = fields.get("flags:", "")
    return fields.get("interpreter") if lines[:1] == ["enabled"] and "F" in flags else None
