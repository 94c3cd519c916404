"""Talking to a container's monitor: one JSON object each way over a SOCK_SEQPACKET socket in its directory.

    {"do": "signal", "number": 15}      to the container's first process
    {"do": "stop", "number": 15, "timeout_s": 10}   and kill it if it has not ended by then; no restart
    {"do": "pause"} {"do": "resume"}
    {"do": "window", "rows": 24, "columns": 80}
    {"do": "limits", "limits": {...}}   `builder.container.codec`'s resources
    {"do": "figures"}                   answered with `builder.container.figures`' values
    {"do": "processes"}                 answered with {"pids": [...]}, the host's
    {"do": "attach"}                    the connection stays, and becomes what `attach` tells

The answer is {"ok": true, ...} or {"error": words, "hint": words}. Where no monitor answers there is no
running container. Paths are given by descriptor, as a socket's has room for 107 bytes alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from builder.container.records import ContainerError, Record
from builder.sandbox.channel import AF_UNIX, SOCK_SEQPACKET, Socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

_MAX_BYTES = 1 << 16


def listen(directory: Path) -> Socket:
    """The monitor's end. Raises: OSError."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink("control", dir_fd=fd)
        server = Socket(AF_UNIX, SOCK_SEQPACKET)
        server.bind(f"/proc/self/fd/{fd}/control")
        os.chmod(directory / "control", 0o600)
        server.listen(16)
        server.setblocking(False)
        return server
    finally:
        os.close(fd)


def ask(record: Record, **request: Any) -> dict[str, Any]:
    """Have the monitor do something, and wait until it has; its answer. Raises: ContainerError."""
    with connect(record) as client:
        return exchange(record, client, request)


def connect(record: Record) -> socket.socket:
    """A connection to the monitor. Raises: ContainerError where there is none."""
    import socket

    client = socket.socket(AF_UNIX, SOCK_SEQPACKET)
    try:
        fd = os.open(record.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            client.settimeout(30)
            client.connect(f"/proc/self/fd/{fd}/control")
        finally:
            os.close(fd)
    except OSError as e:
        client.close()
        raise ContainerError(f"container {record.name} is not running") from e
    return client


def exchange(record: Record, client: socket.socket, request: dict[str, Any]) -> dict[str, Any]:
    """Send a request, and take its answer. Raises: ContainerError."""
    try:
        client.send(json.dumps(request).encode())
        data = client.recv(_MAX_BYTES)
    except OSError as e:
        raise ContainerError(f"container {record.name} is not running") from e
    if not data:
        raise ContainerError(f"container {record.name} has just ended")
    found: dict[str, Any] = json.loads(data)
    if "error" in found:
        raise ContainerError(f"container {record.name}: {found['error']}", hint=found.get("hint"))
    return found


def accept(server: Socket) -> socket.socket:
    """Who wants something of the monitor. Raises: OSError."""
    import socket

    listening = socket.socket(fileno=server.fileno())
    try:
        return listening.accept()[0]
    finally:
        listening.detach()


def receive(client: socket.socket) -> dict[str, Any] | None:
    """A request, in the monitor; None if there is none that makes sense."""
    try:
        document = json.loads(client.recv(_MAX_BYTES))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def answer(client: socket.socket, error: Exception | None, **found: Any) -> None:
    """Tell the outcome; the other end may be gone."""
    words: dict[str, Any] = {"ok": True, **found}
    if error is not None:
        words = {"error": str(error), "hint": getattr(error, "hint", None)}
    with contextlib.suppress(OSError):
        client.send(json.dumps(words).encode())
