"""Compiled seccomp filters, kept in the store: compiling Docker's profile takes longer than starting a container.

ROOT/filters/KEY    a program; KEY is made of what went into it, the compiler's own files included
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from layers import linux
from layers.sha import sha256

_COMPILER = ("seccomp.py", "syscalls.py")


def program(root: Path, capabilities: Iterable[str], make: Callable[[], bytes | None]) -> bytes | None:
    """The default filter with these capabilities: as kept in the store at `root`, else what `make` compiles."""
    kept = root / "filters" / _key(capabilities)
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    made = make()
    if made is not None:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(mode=0o700, exist_ok=True)
            fresh = kept.with_name(f".{kept.name}.{os.urandom(4).hex()}")
            fresh.write_bytes(made)
            fresh.rename(kept)
    return made


def _key(capabilities: Iterable[str]) -> str:
    from builder import sandbox
    from builder.version import VERSION

    parts = [VERSION, linux.machine(), *sorted(capabilities)]
    for name in _COMPILER:
        status = os.stat(os.path.join(sandbox.__path__[0], name))
        parts.append(f"{status.st_size}-{status.st_mtime_ns}")
    return sha256("\n".join(parts).encode()).hexdigest()
