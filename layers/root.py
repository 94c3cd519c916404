"""Where the store of a user lies; by itself, so that asking loads no database.

Callers: `builder.cli`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from layers.errors import StoreError


def default_root(environ: Mapping[str, str], euid: int) -> Path:
    """Where the store lies: PYBUILD_ROOT, else the system's for root, else the user's data directory."""
    explicit = environ.get("PYBUILD_ROOT")
    if explicit:
        return Path(explicit)
    if euid == 0:
        return Path("/var/lib/pybuild")
    data = environ.get("XDG_DATA_HOME")
    # The XDG base directory specification has relative paths ignored.
    if data and data.startswith("/"):
        return Path(data) / "pybuild"
    home = environ.get("HOME")
    if not home:
        raise StoreError("cannot tell where the store is: neither PYBUILD_ROOT nor HOME is set", hint="use --root DIR")
    return Path(home) / ".local/share/pybuild"
