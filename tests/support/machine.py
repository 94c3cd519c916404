"""What the machine can do: each need of a test in one place, with the reason for a skip.

A test names its needs by fixtures and `need_…` calls; nothing skips silently.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
"""The source tree under test."""

PACKAGES = {
    "busybox": "busybox-static",
    "buildah": "buildah",
    "docker-registry": "docker-registry",
    "getfattr": "attr",
    "git": "git",
    "htpasswd": "apache2-utils",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "runc": "runc",
    "setcap": "libcap2-bin",
    "skopeo": "skopeo",
    "umoci": "umoci",
    "zstd": "zstd",
}
"""The Debian package that brings each tool."""


def which(tool: str) -> str | None:
    """Where `tool` is; sbin is searched although an ordinary user's PATH lacks it."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin")


def need_tool(*tools: str) -> None:
    """Skip unless all of these are installed."""
    missing = [tool for tool in tools if which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(PACKAGES.get(t, t) for t in missing)} (not installed)")


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@cache
def can_mount() -> bool:
    """Whether this process may make a mount namespace and mount in it."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def need_mounts() -> None:
    """Skip unless namespaces and mounts are to be had, as root or through a user namespace."""
    if os.geteuid() == 0 and not can_mount():
        pytest.skip("needs CAP_SYS_ADMIN: this root may not mount")
