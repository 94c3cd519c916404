"""`--fold`: which layers of a build store data that a layer below them, of the same build, stores already.

A `chown -R` or `chmod -R` in a step of its own copies up every file that it touches: the same bytes are in
two layers. Those layers, and what lies between them, are better made as one (`layers.squash`).
Caller: `builder.solve.layering`.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence

from layers.errors import LayerError
from layers.layerdiff import Change
from layers.values import NamedTuple

_READ_BYTES = 1 << 18


class Folding(NamedTuple):
    """Layers by number, in order, those in a group to become one; and the bytes of files that are then stored once."""

    groups: tuple[tuple[int, ...], ...]
    saved_bytes: int


def fold_groups(layers: Sequence[tuple[Iterable[Change], str]]) -> Folding:
    """Group a build's new layers, oldest first, each given as its changes and the directory of its files.

    Files of the same path and size are read and compared. Raises: LayerError, OSError.
    """
    holder: dict[bytes, tuple[int, int]] = {}
    first = list(range(len(layers)))
    saved = 0
    for number, (changes, root) in enumerate(layers):
        for change in changes:
            status = change.st
            if status is None or not stat.S_ISREG(status.st_mode):
                if change.kind == "delete":
                    holder.pop(change.path, None)
                continue
            before = holder.get(change.path)
            holder[change.path] = (number, status.st_size)
            if before is None or not status.st_size or before[1] != status.st_size:
                continue
            below = layers[before[0]][1]
            if _same(below, root, change.path):
                saved += status.st_size
                first[number] = min(first[number], before[0])
    return Folding(_merged(first), saved)


def _merged(first: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Groups of neighbours: whatever lies between two layers that become one becomes part of it."""
    groups: list[list[int]] = []
    for number, lowest in enumerate(first):
        group = [number]
        while groups and groups[-1][-1] >= lowest:
            group = groups.pop() + group
        groups.append(group)
    return tuple(map(tuple, groups))


def _same(one: str, other: str, path: bytes) -> bool:
    try:
        with open(one.encode() + b"/" + path, "rb", 0) as a, open(other.encode() + b"/" + path, "rb", 0) as b:
            while True:
                left, right = a.read(_READ_BYTES), b.read(_READ_BYTES)
                if left != right:
                    return False
                if not left:
                    return True
    except OSError as e:
        raise LayerError(f"{path!r}: cannot compare it with what a lower layer has: {e.strerror}") from e
