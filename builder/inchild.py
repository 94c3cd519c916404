"""A build in a process of its own, for callers who may not enter a user namespace themselves.

An ordinary user's snapshots belong to subordinate ids, which takes a user namespace; a process with
threads (a notebook, a server) cannot enter one, and no library should turn its caller into another
user. So the request goes to a child, whose events, result or error come back over a pipe.

    parent -> child   one pickle: (verb, request, root, registry); later a closed pipe: stop
    child -> parent   frames, each a length and a pickle: (kind, value); result or error is the last
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.errors import SandboxError
from layers.errors import PybuildError

if TYPE_CHECKING:
    from builder.plan.request import BuildRequest
    from layers.events import EventSink
    from registry.hosts import RegistryOptions

_LENGTH = struct.Struct("!Q")
_POLL_S = 0.1


def call(
    verb: str,
    request: BuildRequest,
    *,
    root: Path,
    registry: RegistryOptions | None,
    events: EventSink,
    cancelled: Callable[[], bool],
    tick: Callable[[], None] = lambda: None,
    on_plan: Callable[[Any], None] | None = None,
) -> Any:
    """Run `builder.api`'s function `verb` in a child; its result. Thread-safe.

    Raises: what the function raised; SandboxError if the child died.
    """
    down_r, down_w = os.pipe2(os.O_CLOEXEC)
    up_r, up_w = os.pipe2(os.O_CLOEXEC)
    package_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join(filter(None, [package_root, *sys.path]))
    child = subprocess.Popen(
        [sys.executable, "-m", "builder.inchild", str(down_r), str(up_w)],
        pass_fds=(down_r, up_w),
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )
    os.close(down_r)
    os.close(up_w)
    sender = os.fdopen(down_w, "wb")
    try:
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((verb, request, root, registry, on_plan is not None), sender)
            sender.flush()
        with os.fdopen(up_r, "rb", buffering=0) as stream:
            return _receive(stream.fileno(), sender.close, events, cancelled, tick, on_plan)
    finally:
        with contextlib.suppress(OSError):
            sender.close()
        child.wait()


def _receive(
    fd: int,
    stop: Callable[[], None],
    events: EventSink,
    cancelled: Callable[[], bool],
    tick: Callable[[], None],
    on_plan: Callable[[Any], None] | None,
) -> Any:
    """Hand on what the child tells until its result; it is stopped when `cancelled` says so."""
    stopping = False
    try:
        while True:
            ready, _, _ = select.select([fd], [], [], _POLL_S)
            tick()
            if not stopping and cancelled():
                stopping = True
                stop()
            if not ready:
                continue
            frame = _frame(fd)
            if frame is None:
                raise SandboxError("the process of the build has died", operation="build")
            kind, value = frame
            if kind == "event":
                events.emit(value)
            elif kind == "plan" and on_plan is not None:
                on_plan(value)
            elif kind == "error":
                raise _restored(value)
            elif kind == "result":
                return value
    except BaseException:
        stop()
        raise


def _frame(fd: int) -> tuple[str, Any] | None:
    head = _exactly(fd, _LENGTH.size)
    if head is None:
        return None
    data = _exactly(fd, _LENGTH.unpack(head)[0])
    if data is None:
        return None
    frame: tuple[str, Any] = pickle.loads(data)  # noqa: S301 - of our own child
    return frame


def _exactly(fd: int, count: int) -> bytes | None:
    parts: list[bytes] = []
    while count:
        data = os.read(fd, min(count, 1 << 20))
        if not data:
            return None
        parts.append(data)
        count -= len(data)
    return b"".join(parts)


def _described(error: BaseException) -> dict[str, Any]:
    """An exception as what survives a pickle: those of this program take keyword arguments."""
    state: dict[str, Any] = {}
    for name, value in list(error.__dict__.items()):
        try:
            pickle.dumps(value)
        except Exception:  # noqa: BLE001 - an unknown object's own pickling
            value = None
        state[name] = value
    kind = type(error)
    known = isinstance(error, (PybuildError, OSError))
    return {"class": kind if known else None, "args": error.args, "state": state, "text": f"{kind.__name__}: {error}"}


def _restored(doc: dict[str, Any]) -> BaseException:
    kind = doc["class"]
    if kind is None:
        return SandboxError(f"internal error in the process of the build: {doc['text']}", operation="build")
    if issubclass(kind, OSError):
        return kind(*doc["args"])  # type: ignore[no-any-return]
    error: BaseException = kind.__new__(kind, *doc["args"])
    error.args = doc["args"]
    error.__dict__.update(doc["state"])
    return error


# The child


class _Reporter:
    """Sends frames; an event sink. Thread-safe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()

    def send(self, kind: str, value: object) -> None:
        data = pickle.dumps((kind, value))
        with self._lock, contextlib.suppress(BrokenPipeError):
            left = memoryview(_LENGTH.pack(len(data)) + data)
            while left:
                left = left[os.write(self._fd, left) :]

    def emit(self, event: object) -> None:
        self.send("event", event)


def main(down: int, up: int) -> None:
    """What the child does."""
    from builder import api

    reporter = _Reporter(up)
    stream = os.fdopen(down, "rb", buffering=0)

    def stopped() -> bool:
        # Nothing more is ever written: a readable pipe is a closed one.
        return bool(select.select([stream], [], [], 0)[0])

    try:
        verb, request, root, registry, explain = pickle.load(stream)  # noqa: S301 - of our own parent
        api.prepare_namespaces(request.run.isolation)
        if verb == "plan":
            result: object = api.plan_build(request, root=root, registry=registry, events=reporter)
        else:
            result = api.build(
                request,
                root=root,
                registry=registry,
                events=reporter,
                cancelled=stopped,
                on_plan=(lambda plan: reporter.send("plan", plan)) if explain else None,
            )
        reporter.send("result", result)
    except BaseException as e:  # noqa: BLE001 - the process boundary
        reporter.send("error", _described(e))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
