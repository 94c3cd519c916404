"""Attaching to a container that runs under its own monitor: seeing what it says, typing into it, leaving it again.

After the request and its answer the connection (`control`) carries one frame a datagram, a letter first:

    monitor to client   1 or 2  what was said on stdout or stderr      !  words: why it ends
    client to monitor   i  what was typed      w  "ROWS COLUMNS" of the window

The end of the connection is the end of the container, or of the visit. Who does not keep up is sent
away before it costs more than `_MAX_BACKLOG_BYTES`: no visitor may stop a container.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections import deque

from builder.container import control
from builder.container.records import ContainerError, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from builder.container.front import DetachKeys, Front

_MAX_VISITORS = 16
_MAX_BACKLOG_BYTES = 8 << 20
_FRAME_BYTES = (1 << 16) + 1


class Visitor:
    """The monitor's end of one attached client."""

    def __init__(self, client: socket.socket) -> None:
        self.socket = client
        self.waiting: deque[bytes] = deque()
        self.waiting_bytes = 0

    def send(self, frame: bytes) -> bool:
        """Send, or keep it until there is room; False if this one is to be given up."""
        self.waiting.append(frame)
        self.waiting_bytes += len(frame)
        if not self.flush():
            return False
        if self.waiting_bytes > _MAX_BACKLOG_BYTES:
            with contextlib.suppress(OSError):
                self.socket.send(b"!it fell behind by more than 8 MiB; `pybuild logs` has what was said")
            return False
        return True

    def flush(self) -> bool:
        """Send what waits, as far as there is room; False if nobody is there any more."""
        try:
            while self.waiting:
                self.socket.send(self.waiting[0])
                self.waiting_bytes -= len(self.waiting.popleft())
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


class Audience:
    """All that are attached to one container, in its monitor."""

    def __init__(self) -> None:
        self.visitors: dict[int, Visitor] = {}

    def admit(self, client: socket.socket) -> None:
        """Keep a client from now on. Raises: ContainerError if there are too many."""
        if len(self.visitors) >= _MAX_VISITORS:
            raise ContainerError(f"{_MAX_VISITORS} are attached already")
        client.setblocking(False)
        self.visitors[client.fileno()] = Visitor(client)

    def show(self, stream: int, data: bytes) -> list[int]:
        """Hand on what was said; the descriptors of those that had to go."""
        frame = b"%d" % stream + data
        return [fd for fd, visitor in list(self.visitors.items()) if not visitor.send(frame) and self.dismiss(fd)]

    def flush(self, fd: int) -> bool:
        """There is room for more; whether the client is still there."""
        return self.visitors[fd].flush()

    def hear(self, fd: int) -> bytes | None:
        """A frame that came; None once the client is gone."""
        try:
            return self.visitors[fd].socket.recv(_FRAME_BYTES) or None
        except BlockingIOError:
            return b""
        except OSError:
            return None

    def dismiss(self, fd: int) -> bool:
        """Close a client's connection; True."""
        self.visitors.pop(fd).socket.close()
        return True

    def close(self) -> None:
        """The container has ended. What clients have not taken yet is given a moment."""
        for visitor in self.visitors.values():
            if visitor.waiting:
                visitor.socket.settimeout(1)
                visitor.flush()
            visitor.socket.close()
        self.visitors.clear()


def attach(record: Record, front: Front, *, keys: DetachKeys | None = None, pass_signals: bool = True) -> int | None:
    """Show what a running container says from now on, and hand on what is typed; its status, or None if it was left.

    Raises: ContainerError if it does not run under a monitor of its own, or sends us away.
    """
    with control.connect(record) as client:
        control.exchange(record, client, {"do": "attach"})
        client.settimeout(None)
        client.setblocking(False)
        left = _Visit(record, client, front, keys, pass_signals).run()
    if left:
        return None
    record.refresh()
    return int(record.state.get("exit_code") or 0)


class _Visit:
    def __init__(
        self, record: Record, client: socket.socket, front: Front, keys: DetachKeys | None, pass_signals: bool
    ) -> None:
        self._record = record
        self._client = client
        self._front = front
        self._keys = keys
        self._pass_signals = pass_signals
        self._left = False

    def run(self) -> bool:
        """Until the end; whether it is ours alone."""
        poller = select.poll()
        poller.register(self._client, select.POLLIN)
        with self._front.engaged(self._caught) as signals:
            poller.register(signals, select.POLLIN)
            if self._front.stdin:
                poller.register(self._front.input_fd, select.POLLIN)
            if self._front.tty:
                self._tell_window()
            while not self._left:
                for fd, _event in poller.poll():
                    if fd == signals:
                        self._front.take_signals(fd)
                    elif fd == self._client.fileno():
                        if not self._show():
                            return False
                    elif not self._type():
                        poller.unregister(fd)
        return True

    def _show(self) -> bool:
        try:
            frame = self._client.recv(_FRAME_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            frame = b""
        if frame[:1] == b"!":
            raise ContainerError(f"detached from container {self._record.name}: {frame[1:].decode(errors='replace')}")
        if frame[:1] in {b"1", b"2"}:
            self._front.show(int(frame[:1]), frame[1:])
        return bool(frame)

    def _type(self) -> bool:
        """Hand on what was typed; False at its end."""
        data = os.read(self._front.input_fd, 4096)
        if not data:
            return False
        if self._keys is not None:
            data, self._left = self._keys.feed(data)
        self._send(b"i" + data)
        return True

    def _send(self, frame: bytes) -> None:
        self._client.setblocking(True)  # the monitor takes no more than the container does
        try:
            self._client.send(frame)
        except OSError:
            pass  # its end is seen by the loop
        finally:
            self._client.setblocking(False)

    def _tell_window(self) -> None:
        self._send(b"w%d %d" % self._front.window())

    def _caught(self, number: int) -> None:
        if number == signal.SIGWINCH:
            if self._front.tty:
                self._tell_window()
        elif self._pass_signals:
            with contextlib.suppress(ContainerError):
                control.ask(self._record, do="signal", number=number)
        else:
            self._left = True
