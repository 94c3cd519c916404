"""The record of a build: what was asked for, every event, and how it ended; `pybuild builds` reads it.

One file of JSON lines in the store's `builds`: a header, the events as `--progress=rawjson` has them, a
result. A record without a result is of a build that runs, or was killed. Nothing of a build fails for
want of its record; arguments and values of secrets are not in it, what steps print is.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from builder.cli.progress import make_progress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

    from builder.building import BuildResult
    from builder.plan.request import BuildRequest
    from layers.events import Event, EventSink

KEPT = 50
"""Records of a store; the oldest go first."""
_MAX_BYTES = 16 << 20
"""Of one record; what comes later is left out, but for the result."""


class Recorder:
    """An event sink that hands on and writes down. Thread-safe as far as the sink that it wraps is."""

    def __init__(self, root: Path, request: BuildRequest, inner: EventSink) -> None:
        self._inner = inner
        self._directory = root / "builds"
        self._request = request
        self._started_ns = time.time_ns()
        self._stream: TextIO | None = None
        self._written = 0
        self._raw = make_progress("rawjson", self, {})  # type: ignore[arg-type]  # write and flush are all it needs

    def emit(self, event: Event) -> None:
        self._inner.emit(event)
        self._raw.emit(event)

    def write(self, text: str) -> int:
        """A line of events. The file is made for the first, when there is a store to hold it."""
        if self._written < _MAX_BYTES:
            self._written += len(text)
            self._put(text)
        return len(text)

    def flush(self) -> None:
        return

    def _put(self, text: str) -> None:
        try:
            if self._stream is None:
                self._stream = self._open()
            self._stream.write(text)
        except (OSError, ValueError):
            self._written = _MAX_BYTES  # a full disk: the record ends here

    def _open(self) -> TextIO:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        path = self._directory / f"{self._started_ns:016x}-{os.getpid()}.jsonl"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        stream = open(fd, "w", encoding="utf-8", errors="surrogateescape", buffering=1)  # noqa: SIM115
        request = self._request
        header = {
            "started_ns": self._started_ns,
            "file": request.containerfile.name,
            "context": None if request.context is None else os.path.abspath(request.context),
            "target": request.target,
            "tags": list(request.tags),
            "platforms": [str(p) for p in request.platforms],
        }
        stream.write(json.dumps({"build": header}) + "\n")
        return stream

    def finish(self, result: BuildResult | None, error: BaseException | None = None) -> None:
        """Write down how it ended, close, and let go of the oldest records. Idempotent."""
        end: dict[str, object] = {"ended_ns": time.time_ns()}
        if result is not None:
            end |= {"status": 0, "image": result.image_id, "executed": result.executed, "cached": result.cached}
        elif error is not None:
            end |= {"status": int(getattr(error, "exit_code", 130)), "error": str(error)}
        if self._stream is None:
            return
        self._put(json.dumps({"result": end}) + "\n")
        stream, self._stream = self._stream, None
        try:
            stream.close()
            for name in sorted(os.listdir(self._directory))[:-KEPT]:
                os.unlink(self._directory / name)
        except OSError:
            pass
        self._written = _MAX_BYTES
