"""What happened to containers and volumes, kept: one JSON object a line in the store's `events`.

    {"t": nanoseconds, "type": "container", "do": "start", "id": …, "with": {"name": …, "image": …}}

Whoever does something tells it here, in one append, which needs no daemon and no lock. When the file has
grown to its bound it becomes `events.1`, and the one before is dropped. What cannot be written, on a
full disk, is lost: an event never keeps its cause from happening. Names are docker's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from layers.values import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from builder.container.records import Record

MAX_BYTES = 1 << 20
_POLL_S = 0.05
_MAX_LINE_BYTES = 1 << 16


class Event(NamedTuple):
    """Something that happened. `action` is create, start, die, … of a `type` container or volume."""

    time_ns: int
    type: str
    action: str
    id: str
    attributes: dict[str, str]


def of_container(record: Record, action: str, **attributes: object) -> None:
    """Tell what happened to a container, which its labels describe, too. Never raises OSError."""
    settings = record.settings
    labels = settings.get("config", {}).get("Labels") or {}
    about = {str(key): str(value) for key, value in labels.items()}
    about |= {"image": str(settings.get("image", "")), "name": record.name}
    tell(record.root, "container", action, record.id, {**about, **{k: str(v) for k, v in attributes.items()}})


def tell(root: Path, type: str, action: str, id: str, attributes: dict[str, str]) -> None:
    """Tell what happened. Never raises OSError."""
    line = json.dumps({"t": time.time_ns(), "type": type, "do": action, "id": id, "with": attributes}) + "\n"
    data = line.encode()
    if len(data) > _MAX_LINE_BYTES:  # an image's labels have no bound
        short = {key: attributes[key] for key in ("name", "image", "exitCode") if key in attributes}
        data = (json.dumps({"t": time.time_ns(), "type": type, "do": action, "id": id, "with": short}) + "\n").encode()
    with contextlib.suppress(OSError):
        _append(root / "events", data)


def _append(path: Path, data: bytes) -> None:
    while True:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            status = os.fstat(fd)
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(path)
                if (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino):
                    if status.st_size + len(data) <= MAX_BYTES or not status.st_size:
                        os.write(fd, data)
                        return
                    os.rename(path, f"{path}.1")
            # Another has renamed it meanwhile, or we have: there is a new one to be made.
        finally:
            os.close(fd)


def read(
    root: Path, *, since_ns: int = 0, until_ns: int | None = None, follow: Callable[[], bool] | None = None
) -> Iterator[Event]:
    """What happened from `since_ns` on, oldest first; with `follow`, what will, until it says no, or `until_ns`.

    Damaged lines are passed over.
    """
    from builder.container.logs import LineReader

    reader = LineReader(root / "events")
    try:
        found = reader.old()
        while True:
            for event in filter(None, map(_parse, found)):
                if until_ns is not None and event.time_ns > until_ns:
                    return
                if event.time_ns >= since_ns:
                    yield event
            if follow is None or not follow() or (until_ns is not None and time.time_ns() > until_ns):
                return
            time.sleep(_POLL_S)
            found = reader.fresh()
    finally:
        reader.close()


def _parse(line: bytes) -> Event | None:
    try:
        document = json.loads(line)
        about = {str(key): str(value) for key, value in document["with"].items()}
        return Event(int(document["t"]), str(document["type"]), str(document["do"]), str(document["id"]), about)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def docker_document(event: Event) -> dict[str, object]:
    """An event as docker's `events --format json` prints it."""
    return {
        "Type": event.type,
        "Action": event.action,
        "Actor": {"ID": event.id, "Attributes": event.attributes},
        "scope": "local",
        "time": event.time_ns // 10**9,
        "timeNano": event.time_ns,
    }
