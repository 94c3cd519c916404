"""A base image for a store that any user can read."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.support.cli import Pybuild


def stock_base(pybuild: Pybuild, busybox_layout: Path) -> None:
    """Put the busybox image into the store as `base:1`."""
    layout = busybox_layout
    if pybuild.account is not None:
        # The session's own directories are for root alone.
        layout = pybuild.account.home / f"busybox-{os.getpid()}"
        if not layout.exists():
            shutil.copytree(busybox_layout, layout)
            subprocess.run(["chmod", "-R", "a+rX", layout], check=True)
    pybuild.run("copy", f"oci:{layout}:busybox", "storage:base:1")


def readable_context(pybuild: Pybuild, context: Path) -> Path:
    """The same context where the store's user can read it."""
    if pybuild.account is None:
        return context
    place = pybuild.account.home / f"context-{os.getpid()}-{context.parent.name}-{context.name}"
    if not place.exists():
        shutil.copytree(context, place)
        subprocess.run(["chmod", "-R", "a+rX", place], check=True)
    return place
