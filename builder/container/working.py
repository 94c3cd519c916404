"""Working containers: images in the making, one step after the other, by calls in place of a Containerfile.

A working container is a base, a config that is still open, and the snapshots of the steps made so far. A
step is done on a snapshot of its own, which becomes part of the container once it has succeeded: whatever
dies in the middle of one leaves the container as it was before.

    ROOT/containers/ID/settings.json
      document, cmd_set        the config so far
      history                  a line each: created_by, created_ns, and the snapshot of those that made a layer
      parent                   the base's snapshot
      pending                  while a step's snapshots are committed: their names, and the settings to come

One process at a time changes a container: it holds the record's lock. The pin `ID` keeps the topmost snapshot
from gc. `builder.container.byhand` makes the steps, `mounting` shows the tree, `assemble` makes the image.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.container import records
from builder.container.records import ContainerError, NoSuchContainer, Record
from layers import faults
from layers.errors import StoreError
from layers.gc import WORK
from layers.leases import release
from layers.oci import Platform
from layers.values import NamedTuple

if TYPE_CHECKING:
    from layers.image import Image
    from layers.snapshot import ActiveSnapshot, Mount
    from layers.store import Store

Tell = Callable[[str], None]
_WAIT_TOLD_AFTER_S = 1.0
_BUSY_GRACE_S = 20.0
_HALF_MADE_S = 60.0
_REMOVED = "removed.json"
"""What `settings.json` is called from the moment on in which its container is no more."""


class Work(NamedTuple):
    """What one new snapshot of a step is made by; `active` is one that is there already."""

    make: Callable[[ActiveSnapshot], None] = lambda _active: None
    active: ActiveSnapshot | None = None


class Line(NamedTuple):
    """A new line of the history; `layer` counts the step's works, None for a line about the config alone."""

    created_by: str
    layer: int | None = None


class WorkingContainer:
    """A working container whose lock is held: see `open_working`."""

    def __init__(self, store: Store, record: Record) -> None:
        self.store = store
        self.record = record

    @property
    def settings(self) -> dict[str, Any]:
        return self.record.settings

    @property
    def layers(self) -> list[str]:
        """The snapshots of the steps, oldest first."""
        return layer_snapshots(self.settings)

    @property
    def base(self) -> str | None:
        """The base's snapshot."""
        parent = self.settings["parent"]
        return None if parent is None else str(parent)

    @property
    def top(self) -> str | None:
        """The snapshot that the next step builds on; None while there is nothing."""
        return self.layers[-1] if self.layers else self.base

    @property
    def platform(self) -> Platform:
        return Platform.from_json(self.settings["document"])

    @property
    def hostname(self) -> str | None:
        """What `config --hostname` said."""
        name = self.settings["extra"].get("hostname")
        return None if name is None else str(name)

    def view(self) -> Mount:
        """The tree as it is now, read-only."""
        return self.store.snapshots.view(self.top)

    def update(self, **fields: Any) -> None:
        """Change settings that need no step. Raises: ContainerError."""
        self.record.settings = {**self.settings, **fields}
        self.record.save_settings()

    def advance(self, works: Sequence[Work], lines: Sequence[Line], **fields: Any) -> None:
        """Do `works`, each on the one before; then they, `lines` and `fields` are the container's, all or none.

        Raises: what a work raises; StoreError, ContainerError.
        """
        snapshots = self.store.snapshots
        names = [f"{WORK}{self.record.id[:16]}:{os.urandom(6).hex()}" for _ in works]
        before, top, made = self.settings, self.top, list[str]()
        if not works:
            self._settle(_next(before, names, lines, fields))
            return
        try:
            for name, work in zip(names, works, strict=True):
                active = work.active if work.active is not None else snapshots.prepare(top)
                try:
                    work.make(active)
                    if self.settings is before:
                        self.update(pending={"snapshots": names, "next": _next(before, names, lines, fields)})
                except BaseException:
                    if work.active is None:
                        snapshots.discard(active)
                    raise
                _reach("byhand.before-commit")
                made.append(snapshots.commit(active, id=name).id)
                top = made[-1]
        except BaseException:
            noted = self.settings is not before
            self.record.settings = before
            self._forget(made)
            if noted:
                self.record.save_settings()
            raise
        _reach("byhand.after-commit")
        self._settle(self.settings["pending"]["next"])

    def _settle(self, settings: Mapping[str, Any]) -> None:
        """Let these settings be those that hold."""
        layers = layer_snapshots(settings)
        if layers:
            self.store.snapshots.pin(self.record.id, layers[-1])
        _reach("byhand.before-settings")
        self.record.settings = dict(settings)
        self.record.save_settings()

    def recover(self) -> None:
        """Finish, or undo, what a process that died had begun. Raises: ContainerError if the files are gone."""
        pending = self.settings.get("pending")
        if pending is not None:
            names = [str(name) for name in pending["snapshots"]]
            if all(self.store.snapshots.get(name) is not None for name in names):
                self._settle(pending["next"])
            else:
                self._forget(names)
                self.record.settings = {key: value for key, value in self.settings.items() if key != "pending"}
                self.record.save_settings()
        self._find_base()
        if self.top is not None and self.store.snapshots.get(self.top) is None:
            raise ContainerError(
                f"the files of working container {self.record.name} are not in the store: another kind of"
                " snapshots is used now, or they were removed",
                hint=f"remove it: pybuild rm {self.record.name}",
            )

    def _find_base(self) -> None:
        """After a restart of the machine the base's snapshot may have another name (`layers.gc`)."""
        snapshots = self.store.snapshots
        if self.base is None or snapshots.get(self.base) is not None:
            return
        above = snapshots.get(self.layers[0]) if self.layers else snapshots.kept(self.record.id)
        if above is not None and above.parent is not None:
            self.update(parent=above.parent)

    def _forget(self, snapshots: Sequence[str]) -> None:
        for name in reversed(snapshots):
            with contextlib.suppress(StoreError):
                if self.store.snapshots.get(name) is not None:
                    self.store.snapshots.remove(name)


def layer_snapshots(settings: Mapping[str, Any]) -> list[str]:
    """The snapshots of the steps that settings tell of, oldest first."""
    return [str(line["snapshot"]) for line in settings["history"] if line.get("snapshot") is not None]


def _next(
    settings: Mapping[str, Any], names: Sequence[str], lines: Sequence[Line], fields: Mapping[str, Any]
) -> dict[str, Any]:
    now = time.time_ns()
    added = [
        {
            "created_by": line.created_by,
            "created_ns": now,
            "snapshot": None if line.layer is None else names[line.layer],
        }
        for line in lines
    ]
    kept = {key: value for key, value in settings.items() if key != "pending"}
    return {**kept, **fields, "history": [*settings["history"], *added]}


def _reach(point: str) -> None:
    if faults.ARMED:
        faults.reach(point)


# Making, opening, listing


def create_working(
    store: Store, image: Image | None, shown: str, *, name: str | None = None, platform: Platform | None = None
) -> Record:
    """A working container on an image of the store, or on nothing; `shown` is what the image is called.

    Without a name it is called after the image, as in `debian-working-container`.
    Raises: ContainerError (name taken), LayerError, StoreError.
    """
    from layers.image import unpack_image

    top = None if image is None else unpack_image(store, image)
    record, lock = _make_directory(store.root)
    try:
        _reach("byhand.directory")
        settings = _first_settings(image, shown, platform, top)
        if image is not None:
            base = record.path("base")
            base.mkdir(mode=0o700)
            (base / "manifest.json").write_bytes(image.manifest.raw)
            (base / "config.json").write_bytes(image.config.raw)
        if top is not None:
            store.snapshots.pin(record.id, top)
        taken = _take_name(store.root, record.id, name, shown)
        _reach("byhand.named")
        record.settings = {"id": record.id, "name": taken, **settings}
        record.save_state(status="created", pid=0, exit_code=0)
        record.save_settings()
    except BaseException:
        _discard(store, record)
        raise
    finally:
        release(lock)
    return record


def _make_directory(root: Path) -> tuple[Record, int]:
    """A container's directory and its lock, which tells one that is being made from one that was abandoned."""
    top = records.containers_dir(root)
    while True:
        record = Record(top / os.urandom(32).hex())
        try:
            for directory in (top, top / "names"):
                directory.mkdir(mode=0o700, exist_ok=True)
            record.directory.mkdir(mode=0o700)
        except OSError as e:
            raise ContainerError(f"{e.filename}: {e.strerror}") from e
        with contextlib.suppress(NoSuchContainer):
            lock = record.lock()
            if lock is not None and os.path.lexists(record.path("lock")):
                return record, lock
        # A `sweep` came between the directory and its lock.


def _first_settings(image: Image | None, shown: str, platform: Platform | None, top: str | None) -> dict[str, Any]:
    if image is None:
        document: dict[str, Any] = {**(platform or Platform.host()).to_json(), "config": {}}
    else:
        document = {key: value for key, value in image.config.document.items() if key in {"author"}}
        document |= image.config.platform.to_json()
        document["config"] = {k: v for k, v in image.config.config.items() if k != "OnBuild"}
    return {
        "kind": "working",
        "created_ns": time.time_ns(),
        "image": shown,
        "image_id": "" if image is None else str(image.image_id),
        "parent": top,
        "document": document,
        "cmd_set": False,
        "history": [],
        "annotations": {},
        "extra": {},
    }


def _take_name(root: Path, id: str, name: str | None, shown: str) -> str:
    if name is not None:
        records.take_name(root, name, id)
        return name
    stem = shown.partition("@")[0].rpartition("/")[2].partition(":")[0].lower()
    stem = re.sub(r"[^a-z0-9_.-]+", "-", stem).strip("-._")[:80]
    stem = f"{stem}-working-container" if stem and shown != "scratch" else "working-container"
    for number in range(100_000):
        chosen = f"{stem}-{number}" if number else stem
        if os.path.lexists(records.containers_dir(root) / "names" / chosen):
            continue
        with contextlib.suppress(ContainerError):  # another process was first
            records.take_name(root, chosen, id)
            return chosen
    raise ContainerError(f"every name from {stem} on is taken", hint="give one with --name")


@contextlib.contextmanager
def open_working(
    store: Store, word: str, *, tell: Tell = lambda _words: None, limit_s: float | None = None
) -> Iterator[WorkingContainer]:
    """A working container, for the block no other process's. One that is in use is waited for, which is told.

    Raises: NoSuchContainer; ContainerError if it is no working container, or its files are gone.
    """
    from builder.container import mounting

    record = find(store.root, word)
    lock = _lock(record, tell, limit_s)
    try:
        container = WorkingContainer(store, record.load())
        container.recover()
        mounting.settle(container)
        yield container
    finally:
        release(lock)


def find(root: Path, word: str) -> Record:
    """Raises: NoSuchContainer; ContainerError if the word names a container of another kind."""
    try:
        record = records.find(root, word, working=True)
    except NoSuchContainer as e:
        raise NoSuchContainer(f"no working container {word!r}", hint="`pybuild containers` lists them") from e
    if not record.working:
        raise ContainerError(
            f"{word} is no working container: it was made by `run` or `create`, not by `from`",
            hint="`pybuild containers` lists the working ones",
        )
    return record


def _lock(record: Record, tell: Tell, limit_s: float | None = None) -> int:
    started = time.monotonic()
    told = False
    while True:
        lock = record.lock()
        if lock is not None:
            return lock
        waited = time.monotonic() - started
        if limit_s is not None and waited > limit_s:
            raise ContainerError(f"working container {record.name} is in use by another pybuild")
        if not told and waited > _WAIT_TOLD_AFTER_S:
            tell(f"waiting for another pybuild that works on {record.name}")
            told = True
        time.sleep(min(0.1, 0.002 + waited / 20))


# Renaming and removing


def rename(record: Record, name: str) -> None:
    """Give it another name. Raises: NoSuchContainer; ContainerError if that is taken."""
    lock = _lock(record, lambda _words: None)
    try:
        record.load()
        old = record.name
        if old == name:
            return
        records.take_name(record.root, name, record.id)
        record.settings["name"] = name
        if "pending" in record.settings:
            record.settings["pending"]["next"]["name"] = name
        record.save_settings()
        records.drop_name(record.root, old, record.id)
    finally:
        release(lock)


def remove(store: Store, record: Record, *, force: bool = False) -> None:
    """Remove a working container and its snapshots; what was committed stays.

    One that is in use, or mounted elsewhere, is refused; with `force`, use is waited for, a mount elsewhere is not
    minded. Raises: NoSuchContainer, ContainerError.
    """
    from builder.container import mounting

    lock = _lock(record, lambda _words: None, _BUSY_GRACE_S if force else 0.0)
    try:
        record.load()
        if not force:
            mounting.refuse_elsewhere(record)
        _discard(store, record)
    finally:
        release(lock)
    sweep(store)


def _discard(store: Store, record: Record) -> None:
    """Names first, files last: what a crash leaves in between, `sweep` takes away."""
    from builder.container import mounting
    from layers.trees import remove_tree

    mounting.drop(store, record)
    settings = record.settings
    with contextlib.suppress(FileNotFoundError):
        os.rename(record.path("settings.json"), record.path(_REMOVED))
    _reach("byhand.removed")
    records.drop_name(store.root, str(settings.get("name", "")) or "-", record.id)
    store.snapshots.unpin(record.id)
    if settings:
        names = [*layer_snapshots(settings), *(settings.get("pending") or {}).get("snapshots", [])]
        WorkingContainer(store, record)._forget(names)
    with contextlib.suppress(FileNotFoundError):
        remove_tree(str(record.directory))


def sweep(store: Store) -> None:
    """Remove what processes that died while they made or removed a working container have left."""
    top = records.containers_dir(store.root)
    for id in records.ids(store.root):
        record = Record(top / id)
        try:
            if os.path.lexists(record.path("settings.json")):
                continue
            if not os.path.lexists(record.path("lock")):
                # So are other containers while they are made; a directory that has nothing in it is nobody's.
                if time.time() - record.directory.stat().st_mtime > _HALF_MADE_S:
                    record.directory.rmdir()
                continue
            lock = record.lock()
        except (OSError, ContainerError):
            continue
        if lock is None:
            continue
        try:
            with contextlib.suppress(OSError, ValueError):
                record.settings = json.loads(record.path(_REMOVED).read_bytes())
            records.drop_names(store.root, id)
            _discard(store, record)
        finally:
            release(lock)
