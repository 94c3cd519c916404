"""Tar streams of layers made by hand, for the tests of unpacking."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from layers.tarstream import DIRECTORY, HARDLINK, REGULAR, SYMLINK, TarWriter


class Item(NamedTuple):
    """An entry and its data."""

    name: bytes
    kind: bytes
    data: bytes
    fields: dict[str, Any]


def file(name: bytes, data: bytes = b"", **fields: Any) -> Item:
    return Item(name, REGULAR, data, fields)


def folder(name: bytes, **fields: Any) -> Item:
    return Item(name, DIRECTORY, b"", {"mode": 0o755} | fields)


def symlink(name: bytes, target: bytes, **fields: Any) -> Item:
    return Item(name, SYMLINK, b"", {"linkname": target} | fields)


def hardlink(name: bytes, target: bytes, **fields: Any) -> Item:
    return Item(name, HARDLINK, b"", {"linkname": target} | fields)


def special(name: bytes, kind: bytes, **fields: Any) -> Item:
    return Item(name, kind, b"", fields)


def layer(*items: Item) -> bytes:
    """The tar of these entries; they belong to whoever runs the test unless they say otherwise."""
    blocks: list[bytes] = []
    writer = TarWriter(lambda block: blocks.append(bytes(block)))
    for item in items:
        defaults = {"mode": 0o644, "uid": os.geteuid(), "gid": os.getegid(), "mtime_ns": 1_000_000_000 * 10**9}
        writer.add(item.name, item.kind, **(defaults | {"size": len(item.data)} | item.fields))
        writer.write(item.data)
        writer.pad()
    writer.finish()
    return b"".join(blocks)
