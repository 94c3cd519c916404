"""Unpacking archives that a test made itself, on every Python that we run on."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any


def extract_all(archive: tarfile.TarFile, target: Path) -> None:
    """`extractall` with the `data` filter where there is one: 3.11.2 has none yet, 3.12 warns without."""
    options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    archive.extractall(target, **options)
