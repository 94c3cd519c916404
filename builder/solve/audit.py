"""Whether the cache tells the truth: cached steps run again, and their changes compared with what is kept.

Times are not compared, nor the order of files: what counts is which files a step leaves with which
content, mode, owner, attributes and link. A step that differs is not hermetic (it asked the clock, the
network or a random number), or the cache is wrong.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.layerdiff import Change
    from layers.store import Store

_SHOWN = 20


class AuditResult(NamedTuple):
    """One step that was run again. `differences` is empty if it came out the same."""

    name: str
    differences: tuple[str, ...]


def compare(store: Store, kept: str, again: str) -> tuple[str, ...]:
    """How two snapshots on the same parent differ, a line for each path. Raises: LayerError, OSError."""
    old, new = dict(_entries(store, kept)), dict(_entries(store, again))
    lines: list[str] = []
    for path in sorted({*old, *new}):
        was, now = old.get(path), new.get(path)
        if was == now:
            continue
        shown = "/" + os.fsdecode(path)
        if was is None or now is None:
            lines.append(f"{shown}: {'only now' if was is None else 'only in the cache'}")
        else:
            what = [name for name, a, b in zip(_FIELDS, was, now, strict=True) if a != b]
            lines.append(f"{shown}: {', '.join(what)} differ")
    return (*lines[:_SHOWN], *([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []))


_FIELDS = ("kind", "mode", "owner", "content", "attributes")
_Entry = tuple[str, int, tuple[int, int], str, tuple[tuple[str, str], ...]]


def _entries(store: Store, snapshot: str) -> Iterator[tuple[bytes, _Entry]]:
    from builder.solve.layering import snapshot_changes

    changes, root = snapshot_changes(store, snapshot)
    for change in changes:
        yield change.path, _entry(change, root)


def _entry(change: Change, root: Path) -> _Entry:
    if change.st is None:
        return change.kind, 0, (0, 0), "", ()
    path = os.path.join(os.fsencode(root), change.path)
    mode = change.st.st_mode
    content = ""
    if stat.S_ISREG(mode):
        with open(path, "rb") as f:
            content = hashlib.file_digest(f, "sha256").hexdigest()
    elif stat.S_ISLNK(mode):
        content = os.fsdecode(os.readlink(path))
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        content = str(change.st.st_rdev)
    attributes = tuple(
        (name, os.getxattr(path, name, follow_symlinks=False).hex())
        for name in sorted(os.listxattr(path, follow_symlinks=False))
        if ".overlay." not in name
    )
    return change.kind, mode, (change.st.st_uid, change.st.st_gid), content, attributes


def sample(numbers: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` of the numbers, chosen by `seed`, in order; all of them for a count of 0."""
    if not count or count >= len(numbers):
        return list(numbers)
    import random

    return sorted(random.Random(seed).sample(list(numbers), count))  # noqa: S311 - a choice, not a secret
