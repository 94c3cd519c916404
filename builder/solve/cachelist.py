"""The step cache as people look at it: its records with their steps' names, sizes and places in the tree."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from builder.solve.explain import INPUTS, SLOT, decode
from layers.trees import disk_usage
from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.store import Store


class CachedStep(NamedTuple):
    """One result: the snapshot, what made it, when it was made and last used. `bytes` are allocated blocks."""

    snapshot: str
    parent: str | None
    name: str
    keys: tuple[str, ...]
    created_ns: int
    used_ns: int
    bytes: int


class CacheMount(NamedTuple):
    """A cache mount's directory. `bytes` are allocated blocks."""

    directory: str
    bytes: int
    used_ns: int


def list_steps(store: Store) -> list[CachedStep]:
    """All results, oldest first. Measures each snapshot's directory."""
    names: dict[str, str] = {}
    found: dict[str, list[tuple[str, int, int]]] = {}
    for record in store.cache.list():
        if record.key.startswith(INPUTS):
            document = decode(record.record)
            names[record.key.removeprefix(INPUTS)] = str(document.get("step", "")) if document else ""
        elif record.snapshot_id is not None and not record.key.startswith(SLOT):
            found.setdefault(record.snapshot_id, []).append((record.key, record.created_ns, record.used_ns))
    steps: list[CachedStep] = []
    for id, rows in found.items():
        snapshot = store.snapshots.get(id)
        if snapshot is None:
            continue
        keys = tuple(key for key, _, _ in rows)
        steps.append(
            CachedStep(
                id,
                snapshot.parent,
                next((names[key] for key in keys if names.get(key)), ""),
                keys,
                min(created for _, created, _ in rows),
                max(used for _, _, used in rows),
                disk_usage(os.fspath(snapshot.path)),
            )
        )
    return sorted(steps, key=lambda step: (step.created_ns, step.snapshot))


def list_mounts(store: Store) -> list[CacheMount]:
    """The cache mounts, by directory."""
    from builder.solve.remotecache import last_used_ns

    top = store.root / "cachemounts"
    try:
        places = sorted(p for p in top.iterdir() if p.is_dir())
    except FileNotFoundError:
        return []
    return [CacheMount(p.name, disk_usage(os.fspath(p)), last_used_ns(p)) for p in places]


def draw_tree(steps: list[CachedStep]) -> list[str]:
    """The steps under what they build on, indented; roots are bases or nothing."""
    children: dict[str | None, list[CachedStep]] = {}
    known = {step.snapshot for step in steps}
    for step in steps:
        children.setdefault(step.parent if step.parent in known else None, []).append(step)
    lines: list[str] = []
    waiting = [(step, 0) for step in reversed(children.get(None, []))]
    while waiting:
        step, depth = waiting.pop()
        if depth == 0:
            lines.append(f"{step.parent or 'scratch'}")
        lines.append(f"{'  ' * (depth + 1)}{step.name or step.keys[0][:12]}  {step.bytes} bytes")
        waiting += [(child, depth + 1) for child in reversed(children.get(step.snapshot, []))]
    return lines
