"""What the user sees of a running build or transfer: the one place that draws events.

`make_progress` gives an `EventSink` (layers.events) for one of the `--progress` modes:

    plain     BuildKit-like lines: `#5 [2/4] RUN make`, `#5 0.123 output`, `#5 DONE 0.4s`
    tty       a live region with the running steps and transfer bars (builder.cli.progress_tty)
    quiet     nothing, unless a step fails
    rawjson   one JSON object a line, in the shape of BuildKit's status stream (see `_RawJson`)
    auto      tty on a capable terminal outside CI, plain elsewhere

Every mode keeps the last output lines of each running step, and all but rawjson show at their end
what a failed one said last, quiet included. Output of steps is hostile: escape sequences and control characters never
reach the terminal, lines and memory are bounded. Nothing here imports tqdm; importing this module
costs next to nothing, since a cached build pays for it.
"""

from __future__ import annotations

import time
from _thread import allocate_lock
from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType

from layers.events import Event, Vertex, VertexLog, VertexStatus, VertexWarning

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, TextIO

MODES: Final = ("auto", "tty", "plain", "quiet", "rawjson")
TAIL_LINES: Final = 40
"""How many of a step's last output lines a failure shows."""
MAX_LINE_CHARS: Final = 8192
"""A longer output line is shown in pieces of this size."""
MAX_NAME_CHARS: Final = 400
CANCELLED: Final = "cancelled"
"""The error of a vertex that was stopped: by another's failure, or by the user."""
STATUS_INTERVAL_NS: Final = 2_000_000_000
"""At most one plain line per transfer in this time, and one at its end."""

_CONTROLS: Final = dict.fromkeys(
    (
        *(c for c in range(0x20) if c != 0x09),
        *range(0x7F, 0xA0),
        0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A),  # bidi, line separators
        *range(0xD800, 0xE000),
    )
)  # fmt: skip


def sanitise(text: str) -> str:
    """`text` without escape sequences, control characters (tab excepted), bidi overrides and surrogates.

    What a carriage return overwrote on a terminal is dropped, too.
    """
    if text.isprintable():
        return text
    text = text.rstrip("\r")
    if "\r" in text:
        text = text[text.rindex("\r") + 1 :]
    if "\x1b" in text or "\x9b" in text:
        text = _strip_escapes(text)
    return text.translate(_CONTROLS)


def _strip_escapes(text: str) -> str:
    import re  # only output with colours pays for it

    csi = r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    strings = r"\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"
    return re.sub(rf"{csi}|{strings}|\x1b[ -/]*[0-~]?", "", text)


def short_name(text: str) -> str:
    """A vertex's or status' name on one line, bounded, with digests at their first 12 digits."""
    text = " ".join(sanitise(line).strip() for line in text[: 4 * MAX_NAME_CHARS].splitlines()).replace("\t", " ")
    at = text.find("sha256:")
    if at >= 0 and len(text) >= at + 71 and not text[at + 7 : at + 71].strip("0123456789abcdef"):
        text = text[: at + 19] + text[at + 71 :]
    return text if len(text) <= MAX_NAME_CHARS else text[: MAX_NAME_CHARS - 1] + "…"


def format_bytes(size: float) -> str:
    """`12.3MB`: decimal units, as BuildKit and docker print them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:.0f}{unit}" if unit == "B" else f"{size:.3g}{unit}" if size < 10 else f"{size:.1f}{unit}"
        size /= 1000
    raise AssertionError


def format_seconds(duration_ns: int) -> str:
    """`0.4s`; never negative, whatever two clocks say."""
    return f"{max(0, duration_ns) / 1e9:.1f}s"


class _Lines:
    """Turns chunks of bytes into clean lines; holds at most one unfinished line of bounded length."""

    __slots__ = ("_decoder", "_pending")

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._pending = ""

    def feed(self, data: bytes, *, final: bool = False) -> list[str]:
        parts = (self._pending + self._decoder.decode(data, final)).split("\n")
        rest = parts.pop()
        if final and rest:
            parts.append(rest)
            rest = ""
        # A bar drawn with carriage returns alone must not grow for ever: its last state is enough.
        if "\r" in rest:
            body = rest.rstrip("\r")
            rest = body[body.rfind("\r") + 1 :] + ("\r" if len(body) < len(rest) else "")
        while len(rest) > MAX_LINE_CHARS:
            parts.append(rest[:MAX_LINE_CHARS])
            rest = rest[MAX_LINE_CHARS:]
        self._pending = rest
        lines: list[str] = []
        for part in parts:
            line = sanitise(part)
            lines.extend(line[i : i + MAX_LINE_CHARS] for i in range(0, max(1, len(line)), MAX_LINE_CHARS))
        return lines


class Node:
    """What is known of one vertex: its number on the screen, its last state, its last lines."""

    __slots__ = ("_streams", "name", "number", "shown", "statuses", "tail", "vertex")

    def __init__(self, vertex: Vertex) -> None:
        self.number = 0
        self.vertex = vertex
        self.name = short_name(vertex.name or vertex.id)
        self.shown = False
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.statuses: dict[str, tuple[VertexStatus, int]] = {}
        self._streams: dict[int, _Lines] = {}

    def feed(self, log: VertexLog) -> list[str]:
        stream = self._streams.get(log.stream)
        if stream is None:
            stream = self._streams[log.stream] = _Lines()
        return self._keep(stream.feed(log.data))

    def drain(self) -> list[str]:
        """The unfinished lines of a step that has ended."""
        lines = [line for _, stream in sorted(self._streams.items()) for line in stream.feed(b"", final=True)]
        self._streams.clear()
        return self._keep(lines)

    def _keep(self, lines: list[str]) -> list[str]:
        self.tail.extend(lines)
        return lines

    @property
    def running(self) -> bool:
        return self.vertex.started_ns is not None and self.vertex.completed_ns is None

    def duration_ns(self, now_ns: int) -> int:
        started = self.vertex.started_ns
        return 0 if started is None else (self.vertex.completed_ns or now_ns) - started


class Progress:
    """An `EventSink` and a context manager; this class itself draws nothing but failures (mode quiet).

    `emit` is thread-safe and never raises: a stream that has gone away is written to no more.
    A failing write is the only way to lose output; a slow reader slows the writer, as for any
    program. Subclasses override the `_on_…` hooks, which run under the lock.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], int] = time.time_ns) -> None:
        self._stream = stream
        self._clock = clock
        self._lock = allocate_lock()
        self._nodes: dict[str, Node] = {}
        self._numbered = 0
        self._broken = False
        self._closed = False
        self._failed: list[Node] = []

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def emit(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, VertexLog):
                node = self._node(event.vertex)
                lines = node.feed(event)
                if lines:
                    self._on_lines(node, lines, event.timestamp_ns)
                self._on_log(event)
            elif isinstance(event, Vertex):
                self._vertex(event)
            elif isinstance(event, VertexStatus):
                self._on_status(self._node(event.vertex), event)
            else:
                self._on_warning(self._nodes.get(event.vertex), event)

    def close(self) -> None:
        """Draw what is left to draw, and what failed steps said last. Idempotent."""
        with self._lock:
            closed, self._closed = self._closed, True
            if not closed:
                self._on_close()

    def _report(self) -> str:
        """What the failed steps said last, as BuildKit prints it; empty where none failed or none spoke."""
        return "".join(
            f"------\n > {node.name}:\n" + "".join(f"{line}\n" for line in node.tail) + "------\n"
            for node in self._failed
            if node.tail
        )

    def _node(self, vertex_id: str) -> Node:
        """The node of that id; output may come before its vertex does."""
        node = self._nodes.get(vertex_id)
        if node is None:
            node = self._nodes[vertex_id] = Node(Vertex(vertex_id, vertex_id, started_ns=self._clock()))
        return node

    def _vertex(self, vertex: Vertex) -> None:
        node = self._nodes.get(vertex.id)
        if node is None:
            node = self._nodes[vertex.id] = Node(vertex)
            ended = False
        else:
            ended = node.vertex.completed_ns is not None
            if vertex.name != node.vertex.name:
                node.name = short_name(vertex.name or vertex.id)
            node.vertex = vertex
        if vertex.completed_ns is None or ended:
            if vertex.started_ns is not None and not ended:
                self._on_started(node)
        else:
            lines = node.drain()
            if lines:
                self._on_lines(node, lines, vertex.completed_ns)
            self._on_completed(node)
            if vertex.error is not None and vertex.error != CANCELLED:
                self._failed.append(node)
            else:
                node.tail.clear()
                node.statuses.clear()
        self._on_vertex(vertex)

    def _number(self, node: Node) -> int:
        """Steps are numbered in the order in which they first appear."""
        if not node.number:
            self._numbered += 1
            node.number = self._numbered
        return node.number

    def _write(self, text: str) -> None:
        if self._broken or not text:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the reader has gone, or the stream is closed
            self._broken = True

    def _on_close(self) -> None:
        self._write(self._report())

    def _on_vertex(self, vertex: Vertex) -> None: ...
    def _on_started(self, node: Node) -> None: ...
    def _on_completed(self, node: Node) -> None: ...
    def _on_lines(self, node: Node, lines: list[str], timestamp_ns: int) -> None: ...
    def _on_log(self, log: VertexLog) -> None: ...
    def _on_status(self, node: Node, status: VertexStatus) -> None: ...
    def _on_warning(self, node: Node | None, warning: VertexWarning) -> None: ...


class _Plain(Progress):
    """Lines that a CI log can keep: each names its step, none is ever redrawn."""

    def _head(self, node: Node) -> str:
        number = self._number(node)
        if node.shown:
            return ""
        node.shown = True
        return f"#{number} {node.name}\n"

    def _on_started(self, node: Node) -> None:
        self._write(self._head(node))

    def _on_completed(self, node: Node) -> None:
        vertex = node.vertex
        if vertex.error is not None:
            end = "CANCELED" if vertex.error == CANCELLED else f"ERROR: {short_name(vertex.error)}"
        elif vertex.cached:
            end = "CACHED"
        else:
            end = f"DONE {format_seconds(node.duration_ns(self._clock()))}"
        self._write(f"{self._head(node)}#{node.number} {end}\n\n")

    def _on_lines(self, node: Node, lines: list[str], timestamp_ns: int) -> None:
        head = self._head(node)
        after = max(0, timestamp_ns - (node.vertex.started_ns or timestamp_ns)) / 1e9
        self._write(head + "".join(f"#{node.number} {after:.3f} {line}\n" for line in lines))

    def _on_status(self, node: Node, status: VertexStatus) -> None:
        now = self._clock()
        known = node.statuses.get(status.id)
        ended = status.completed_ns is not None
        if known is not None:
            last, printed_ns = known
            if last.completed_ns is not None or (not ended and now - printed_ns < STATUS_INTERVAL_NS):
                return
        node.statuses[status.id] = (status, now)
        if known is None and not ended:
            return  # most transfers end before the first line would be due
        head = self._head(node)
        size = format_bytes(status.current)
        if status.total:
            size += f" / {format_bytes(status.total)}"
        started = status.started_ns or node.vertex.started_ns or now
        spent = format_seconds((status.completed_ns or now) - started)
        line = f"#{node.number} {short_name(status.name or status.id)}"
        if status.current or status.total:
            line += f" {size}"
        self._write(f"{head}{line} {spent}{' done' if ended else ''}\n")

    def _on_warning(self, node: Node | None, warning: VertexWarning) -> None:
        head = self._head(node) if node else ""
        prefix = f"#{node.number} " if node else ""
        text = f"{head}{prefix}WARN: {short_name(warning.message)}\n"
        for line in warning.detail.splitlines()[:10]:
            text += f"{prefix}  {short_name(line)}\n"
        self._write(text)


class _RawJson(Progress):
    """One JSON object a line, each with one of BuildKit's four lists, each list with one record.

        {"vertexes": [{"digest", "name", "inputs"?, "started"?, "completed"?, "cached"?, "error"?, "usage"?}]}
        {"statuses": [{"id", "vertex", "name", "current", "total"?, "timestamp", "started"?, "completed"?}]}
        {"logs":     [{"vertex", "stream", "data", "timestamp"}]}        data in base64
        {"warnings": [{"vertex", "level", "short", "detail"?}]}          short and detail's items in base64

    Times are RFC 3339 in UTC with nanoseconds. A vertex is written at each change of its state.
    """

    def _line(self, key: str, record: dict[str, object]) -> None:
        from json import dumps

        kept = {name: value for name, value in record.items() if value is not None}
        self._write(dumps({key: [kept]}, separators=(",", ":")) + "\n")

    def _on_close(self) -> None: ...

    def _on_vertex(self, vertex: Vertex) -> None:
        self._line(
            "vertexes",
            {
                "digest": vertex.id,
                "name": vertex.name,
                "inputs": list(vertex.inputs) or None,
                "started": _rfc3339(vertex.started_ns),
                "completed": _rfc3339(vertex.completed_ns),
                "cached": vertex.cached or None,
                "error": vertex.error,
                "usage": vertex.usage,
            },
        )

    def _on_log(self, log: VertexLog) -> None:
        record = {
            "vertex": log.vertex,
            "stream": log.stream,
            "data": _base64(log.data),
            "timestamp": _rfc3339(log.timestamp_ns),
        }
        self._line("logs", record)

    def _on_status(self, node: Node, status: VertexStatus) -> None:
        record = {
            "id": status.id,
            "vertex": status.vertex,
            "name": status.name,
            "current": status.current,
            "total": status.total or None,
            "timestamp": _rfc3339(self._clock()),
            "started": _rfc3339(status.started_ns),
            "completed": _rfc3339(status.completed_ns),
        }
        self._line("statuses", record)

    def _on_warning(self, node: Node | None, warning: VertexWarning) -> None:
        detail = [_base64(line.encode("utf-8", "replace")) for line in warning.detail.splitlines()] or None
        short = _base64(warning.message.encode("utf-8", "replace"))
        self._line("warnings", {"vertex": warning.vertex, "level": 1, "short": short, "detail": detail})


def _base64(data: bytes) -> str:
    from binascii import b2a_base64

    return b2a_base64(data, newline=False).decode("ascii")


def _rfc3339(time_ns: int | None) -> str | None:
    if time_ns is None:
        return None
    seconds, nanos = divmod(time_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanos:09d}Z"


def resolve_mode(mode: str, stream: TextIO, environ: Mapping[str, str]) -> str:
    """What `auto` means here: tty on a terminal that can move its cursor and that no CI reads."""
    if mode != "auto":
        return mode
    if environ.get("CI") or environ.get("TERM", "dumb") in {"", "dumb"}:
        return "plain"
    try:
        return "tty" if stream.isatty() else "plain"
    except ValueError:  # a closed stream
        return "plain"


def make_progress(
    mode: str,
    stream: TextIO,
    environ: Mapping[str, str],
    *,
    clock: Callable[[], int] = time.time_ns,
) -> Progress:
    """The sink of that `--progress` mode, to be used as a context manager.

    `clock` gives nanoseconds since the epoch. Mode tty starts its drawing thread at the first
    event, so that nothing threaded exists before the caller has entered its namespaces.
    Raises: UsageError for a mode that is not in `MODES`: the environment may say any.
    """
    if mode not in MODES:
        from builder.errors import UsageError

        raise UsageError(f"unknown progress mode {mode[:40]!r}: expected one of {', '.join(MODES)}")
    kind = resolve_mode(mode, stream, environ)
    if kind == "tty":
        from builder.cli.progress_tty import TtyProgress

        return TtyProgress(stream, environ, clock)
    if kind == "plain":
        return _Plain(stream, clock)
    if kind == "rawjson":
        return _RawJson(stream, clock)
    return Progress(stream, clock)
