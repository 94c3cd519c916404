"""Run a command as root of a container with Docker's defaults: `python unprivileged.py COMMAND…`.

No CAP_SYS_ADMIN, Docker's fourteen capabilities, and its seccomp filter, which refuses unshare, setns,
mount, umount2, pivot_root, the new mount interface and clone with namespace flags. The files are the
machine's own.
"""

from __future__ import annotations

import os
import sys

from builder.sandbox import seccomp
from builder.sandbox.operations import capability_mask
from builder.sandbox.spec import DEFAULT_CAPABILITIES
from layers import linux


def main(command: list[str]) -> None:
    mask = capability_mask(DEFAULT_CAPABILITIES)
    linux.seccomp_filter(seccomp.default_program(DEFAULT_CAPABILITIES, linux.machine()))
    for number in range(len(linux.CAPABILITIES)):
        if not mask >> number & 1:
            linux.prctl(linux.PR_CAPBSET_DROP, number)
    linux.capset(mask, mask, 0)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
