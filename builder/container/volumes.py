"""Named and anonymous volumes: directories of the store that outlive containers.

    ROOT/volumes/NAME/{volume.json, _data/}

A volume appears whole (made beside, then renamed) and is removed only while no container names it.
Callers have entered the user namespace, if they need one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from builder.container import events
from builder.container.records import ContainerError, check_name, every, write_document
from layers import ownership
from layers.snapshot import Mount
from layers.values import NamedTuple


class Volume(NamedTuple):
    """A volume. `path` is the host's directory that is mounted."""

    name: str
    path: Path
    created_ns: int
    labels: Mapping[str, str]
    anonymous: bool


class NoSuchVolume(ContainerError):
    """No volume of that name is in the store."""


def _top(root: Path) -> Path:
    return root / "volumes"


def create(
    root: Path, name: str | None = None, labels: Mapping[str, str] | None = None, *, anonymous: bool | None = None
) -> Volume:
    """Make a volume; one that exists is returned as it is. Without a name it gets a random one.

    Raises: ContainerError.
    """
    if anonymous is None:
        anonymous = name is None
    name = check_name(name) if name is not None else os.urandom(32).hex()
    with contextlib.suppress(NoSuchVolume):
        return get(root, name)
    fresh = _top(root) / f".{name}.{os.urandom(4).hex()}"
    try:
        # What a container's root has there, set-id programs too, is not for other users of this machine.
        _top(root).mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh.mkdir(mode=0o700)
        (fresh / "_data").mkdir()
        (fresh / "_data").chmod(0o755)
        document = {"name": name, "created_ns": time.time_ns(), "labels": dict(labels or {}), "anonymous": anonymous}
        write_document(fresh / "volume.json", document)
        with contextlib.suppress(OSError):  # another process was first
            fresh.rename(_top(root) / name)
    except OSError as e:
        raise ContainerError(f"cannot make volume {name}: {e.filename}: {e.strerror}") from e
    finally:
        _remove(fresh)
    events.tell(root, "volume", "create", name, {"driver": "local"})
    return get(root, name)


def get(root: Path, name: str) -> Volume:
    """Raises: NoSuchVolume."""
    import json

    directory = _top(root) / check_name(name)
    try:
        document = json.loads((directory / "volume.json").read_bytes())
        return Volume(
            name,
            directory / "_data",
            int(document["created_ns"]),
            {str(key): str(value) for key, value in dict(document["labels"]).items()},
            bool(document["anonymous"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise NoSuchVolume(f"no volume {name!r}", hint="`pybuild volume ls` lists what there is") from e


def list_volumes(root: Path) -> list[Volume]:
    """All volumes, by name."""
    try:
        names = sorted(os.listdir(_top(root)))
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        with contextlib.suppress(ContainerError):
            found.append(get(root, name))
    return found


def users(root: Path) -> dict[str, list[str]]:
    """Which containers name which volumes."""
    found: dict[str, list[str]] = {}
    for record in every(root):
        for volume in record.settings.get("volumes", []):
            found.setdefault(str(volume["name"]), []).append(record.id)
    return found


def remove(root: Path, name: str, *, in_use: Mapping[str, list[str]] | None = None) -> None:
    """Remove a volume and what it holds. Raises: NoSuchVolume; ContainerError while a container names it."""
    volume = get(root, name)
    holders = (users(root) if in_use is None else in_use).get(name)
    if holders:
        shown = ", ".join(id[:12] for id in holders)
        raise ContainerError(f"volume {name!r} is in use by {shown}", hint="remove the containers first")
    _remove(volume.path.parent)
    events.tell(root, "volume", "destroy", name, {"driver": "local"})


def prune(root: Path, *, all: bool = False, matches: Callable[[Volume], bool] = lambda _volume: True) -> list[str]:
    """Remove the anonymous volumes (with `all`, also named ones) that no container names; which."""
    in_use = users(root)
    gone = []
    for volume in list_volumes(root):
        if volume.name not in in_use and (all or volume.anonymous) and matches(volume):
            remove(root, volume.name, in_use=in_use)
            gone.append(volume.name)
    return gone


def _remove(directory: Path) -> None:
    from layers.trees import remove_tree

    with contextlib.suppress(FileNotFoundError):
        remove_tree(str(directory))


def fill(volume: Volume, tree: Mount, target: str) -> None:
    """Give an empty volume what a tree has at `target`, with its owner and mode. Raises: ContextError, OSError."""
    from builder.rootfs import opened
    from builder.solve import fileops
    from layers import linux

    with os.scandir(volume.path) as entries:
        if next(entries, None) is not None:
            return
    with opened(tree) as source:
        try:
            fd = linux.openat2(source, target.lstrip("/") or ".", os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return  # the image has nothing there
        owners = ownership.here()
        status = owners.seen(f"/proc/self/fd/{fd}/.", os.fstat(fd))
        os.close(fd)
        dest = os.open(volume.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fileops.copy(source, target, dest, "/", fileops.CopyOptions(allow_wildcard=False))
            owners.fchown(dest, status.st_uid, status.st_gid)
            os.fchmod(dest, status.st_mode & 0o7777)
        finally:
            os.close(dest)
