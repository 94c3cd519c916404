"""What a running build or transfer tells its observers.

Four records, named and shaped after BuildKit's status stream, so that `--progress=rawjson` is
familiar. Producers are handed an `EventSink`; only `builder.cli.progress` draws. Times are
nanoseconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping

from layers.values import NamedTuple, Protocol


class Vertex(NamedTuple):
    """One node of work, emitted at each change of its state; the last one wins."""

    id: str
    name: str
    inputs: tuple[str, ...] = ()
    started_ns: int | None = None
    completed_ns: int | None = None
    cached: bool = False
    error: str | None = None
    usage: Mapping[str, float] | None = None
    """Of a command that has run: user_s, system_s, max_rss_bytes, read_bytes, written_bytes."""


class VertexStatus(NamedTuple):
    """Progress of one part of a vertex, such as one blob; `total` and `current` in bytes, `total` 0 if unknown."""

    vertex: str
    id: str
    name: str
    current: int = 0
    total: int = 0
    started_ns: int | None = None
    completed_ns: int | None = None


class VertexLog(NamedTuple):
    """Output of a vertex: raw bytes, not necessarily whole lines. `stream` is 1 (stdout) or 2 (stderr)."""

    vertex: str
    stream: int
    data: bytes
    timestamp_ns: int


class VertexWarning(NamedTuple):
    """Something that the user should know but that stops nothing."""

    vertex: str
    message: str
    detail: str = ""


Event = Vertex | VertexStatus | VertexLog | VertexWarning


class EventSink(Protocol):
    """Receives events. `emit` must not block and must be thread-safe; it never raises."""

    def emit(self, event: Event) -> None: ...


class NullSink:
    """Drops every event."""

    def emit(self, event: Event) -> None:
        return
