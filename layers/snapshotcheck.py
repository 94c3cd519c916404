"""Whether unpacked trees still are what their layers say: `fsck --snapshots`.

A snapshot's tree is put together in memory from the blobs of its chain, and held against what the disk
shows: kinds, modes, owners, sizes, content, links, devices, attributes. Times are not compared: a build's
tree has the real ones, its layers may have others. Called by `layers.fsck`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from layers.compare import FileChange, Node, Tree, compare, read_directory
from layers.compression import decompressor
from layers.errors import LayerError
from layers.records import decode_descriptor
from layers.snapshotters.catalog import PACKED
from layers.snapshotters.overlay import open_tree
from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.oci import Descriptor
    from layers.store import Store

_TABLE_FILES = frozenset({b"stargz.index.json", b".no.prefetch.landmark"})
"""Parts of eStargz layers that no snapshot has."""


class Altered(NamedTuple):
    """A snapshot whose tree is not that of its layers, and the first thing in which it differs."""

    id: str
    what: str


def altered_snapshots(store: Store) -> Iterator[Altered]:
    """Check all finished snapshots of this store's driver whose layers are here. Reads every file of them.

    Raises: LayerError, StoreError (not allowed to mount).
    """
    stacks = _Stacks(store)
    checked: set[str] = set()
    for top in stacks.tops():
        chain = [id for id in stacks.chain(top) if stacks.stack(id) is not None]
        if not chain or chain[-1] in checked:
            continue
        checked.add(chain[-1])
        if _difference(store, stacks, chain[-1]) is None:
            continue
        # The lowest one that is wrong: all above it are made of it.
        for id in chain:
            found = _difference(store, stacks, id)
            if found is not None:
                yield Altered(id, _words(found))
                break


class _Stacks:
    """Which blobs make the tree of each snapshot, as far as they are in the store."""

    def __init__(self, store: Store) -> None:
        rows = store.database.rows(
            "SELECT id, parent FROM snapshots WHERE driver=? AND owner IS NULL AND substr(dir, 1, ?) <> ?",
            (store.snapshots.label, len(PACKED), PACKED),
        )
        self._parents = {str(id): None if parent is None else str(parent) for id, parent in rows}
        self._own: dict[str, Descriptor] = {}
        self._squashed: dict[str, tuple[str, Descriptor]] = {}
        self._known: dict[str, list[Descriptor] | None] = {}
        layers = store.database.rows(
            "SELECT l.snapshot, l.compression, l.descriptor FROM layers l JOIN blobs b ON b.digest=l.digest"
        )
        for snapshot, compression, descriptor in layers:
            _, squashed, base = str(compression).partition(";squash=")
            if squashed:
                self._squashed[str(snapshot)] = base, decode_descriptor(str(descriptor))
            else:
                self._own[str(snapshot)] = decode_descriptor(str(descriptor))

    def tops(self) -> list[str]:
        """Snapshots that none is built upon."""
        return sorted(set(self._parents) - set(self._parents.values()))

    def chain(self, id: str) -> list[str]:
        """A snapshot and what lies beneath it, base first."""
        found: list[str] = []
        current: str | None = id
        while current is not None:
            found.append(current)
            current = self._parents.get(current)
        return found[::-1]

    def stack(self, id: str) -> list[Descriptor] | None:
        """The layers of a snapshot's tree, base first; None if one is not here."""
        for each in self.chain(id):
            if each not in self._known:
                self._known[each] = self._find(each)
        return self._known[id]

    def _find(self, id: str) -> list[Descriptor] | None:
        parent = self._parents.get(id)
        own = self._own.get(id)
        below = [] if parent is None else self._known[parent]
        if own is not None and below is not None:
            return [*below, own]
        if id in self._squashed:
            base, layer = self._squashed[id]
            under = [] if not base else self._known.get(base)
            return None if under is None else [*under, layer]
        return None


def _difference(store: Store, stacks: _Stacks, id: str) -> FileChange | None:
    """The first thing in which the tree of a snapshot differs from that of its layers."""
    tree = Tree()
    for layer in stacks.stack(id) or ():
        with store.blobs.open(layer.digest) as stream:
            tree.apply(decompressor(stream))
    wanted = _comparable(tree.flat())
    fd = open_tree(store.snapshots.view(id))
    try:
        # Content is read while comparing: the tree must be open until then.
        found = _comparable(read_directory(Path(f"/proc/self/fd/{fd}/."), warn=_unreadable))
        return next(compare(wanted, found), None)
    finally:
        os.close(fd)


def _comparable(tree: dict[bytes, Node]) -> dict[bytes, Node]:
    return {path: node for path, node in tree.items() if path and path not in _TABLE_FILES and node.kind != "socket"}


def _unreadable(words: str) -> None:
    raise LayerError(f"cannot read a snapshot: {words}")


def _words(change: FileChange) -> str:
    name = os.fsdecode(change.path)
    if change.change == "added":
        return f"/{name} is in none of its layers"
    if change.change == "removed":
        return f"/{name} of its layers is missing"
    field = change.fields[0]
    return f"/{name} has another {field.field} than in its layers: {field.old} became {field.new}"
