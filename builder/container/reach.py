"""Reaching a container over the network: published ports.

A published port is a listening socket of the host's and a small process that hands connections on to
the container: it holds both ends, the listener made before and the connection made after it joined the
container's network namespace. It needs no rule of a firewall, works for ordinary users, and ends with
the container. TCP is copied by the kernel's sockets as streams, UDP datagram by datagram.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from typing import NoReturn

from builder.container.options import Port
from builder.container.records import ContainerError
from layers import linux

_CHUNK_BYTES = 1 << 16
_MAX_FLOWS = 4096
_UDP_IDLE_S = 60.0


class Publisher:
    """Listens on the host's ports, and hands on what comes. `ports` tells the real ones."""

    def __init__(self, wanted: Sequence[Port]) -> None:
        """Bind them all. Raises: ContainerError naming the port that is taken."""
        self._listeners: list[tuple[socket.socket, Port]] = []
        self._pid = 0
        try:
            for port in wanted:
                self._listeners += [(listener, port) for listener in _listen(port)]
        except BaseException:
            self.close()
            raise
        self.ports = [
            Port(port.host_ip or "0.0.0.0", listener.getsockname()[1], port.port, port.protocol)  # noqa: S104
            for listener, port in self._listeners
            if listener.family == socket.AF_INET or port.host_ip
        ]

    def start(self, pid: int) -> None:
        """Begin to hand on to the container whose first process is `pid`; the caller has one thread."""
        if not self._listeners:
            return
        read, write = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        if self._pid == 0:
            os.close(write)
            _serve(self._listeners, pid, read)
        os.close(read)
        self._alive = write  # its end tells the process that we are gone

    def close(self) -> None:
        """End it. Idempotent."""
        for listener, _port in self._listeners:
            listener.close()
        self._listeners = []
        if self._pid:
            os.close(self._alive)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # of the process that we went on from
                os.waitpid(self._pid, 0)
            self._pid = 0


def _listen(port: Port) -> list[socket.socket]:
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    hosts = [port.host_ip] if port.host_ip else ["0.0.0.0", "::"]  # noqa: S104 - what -p means
    made: list[socket.socket] = []
    for host in hosts:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.socket(family, kind)
        except OSError as e:
            if made and e.errno in {errno.EAFNOSUPPORT, errno.EPERM}:
                continue  # a host without IPv6
            raise ContainerError(f"cannot publish port {port.port}: {e.strerror}") from e
        try:
            if kind == socket.SOCK_STREAM:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((host, made[0].getsockname()[1] if made else port.host_port))
            if kind == socket.SOCK_STREAM:
                listener.listen(128)
            listener.setblocking(False)
        except OSError as e:
            listener.close()
            if made and e.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                continue
            for other in made:
                other.close()
            raise ContainerError(
                f"cannot publish port {port.host_port}: {e.strerror}",
                hint="ports below 1024 are root's" if e.errno == errno.EACCES else "choose another port of the host",
            ) from e
        made.append(listener)
    return made


def _serve(listeners: list[tuple[socket.socket, Port]], pid: int, alive: int) -> NoReturn:
    """The process that hands on. Never returns."""
    try:
        keep = {alive, *(listener.fileno() for listener, _ in listeners)}
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            if fd not in keep and fd != namespace:
                with contextlib.suppress(OSError):
                    os.close(fd)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        linux.setns(namespace, linux.CLONE_NEWNET)
        _Switch(listeners, alive).run()
    finally:
        os._exit(0)


class _Flow:
    """One direction of a connection: what was read from `source` and `sink` has not taken yet."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.data = b""
        self.ended = False


class _Switch:
    """Copies between sockets, all of them non-blocking, in one thread."""

    def __init__(self, listeners: list[tuple[socket.socket, Port]], alive: int) -> None:
        self._poll = select.poll()
        self._alive = alive
        self._poll.register(alive, select.POLLIN)
        self._listeners = {listener.fileno(): (listener, port) for listener, port in listeners}
        for fd in self._listeners:
            self._poll.register(fd, select.POLLIN)
        self._flows: dict[int, tuple[_Flow, _Flow]] = {}
        """By descriptor: the flow from it, the flow to it."""
        self._udp: dict[tuple[int, tuple[str, int]], tuple[socket.socket, float]] = {}
        self._replies: dict[int, tuple[int, tuple[str, int]]] = {}

    def run(self) -> None:
        while True:
            for fd, event in self._poll.poll(5000):
                if fd == self._alive:
                    return
                if fd in self._listeners:
                    listener, port = self._listeners[fd]
                    if port.protocol == "tcp":
                        self._accept(listener, port)
                    else:
                        self._datagram(listener, port)
                elif fd in self._replies:
                    self._reply(fd)
                elif fd in self._flows:
                    self._move(fd, event)
            self._expire()

    def _accept(self, listener: socket.socket, port: Port) -> None:
        try:
            outside, _address = listener.accept()
        except OSError:
            return
        if len(self._flows) >= _MAX_FLOWS:
            outside.close()
            return
        outside.setblocking(False)
        inside = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        inside.setblocking(False)
        with contextlib.suppress(OSError):
            for end in (outside, inside):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        result = inside.connect_ex(("127.0.0.1", port.port))
        if result not in {0, errno.EINPROGRESS}:
            outside.close()
            inside.close()
            return
        there, back = _Flow(outside, inside), _Flow(inside, outside)
        self._flows[outside.fileno()] = (there, back)
        self._flows[inside.fileno()] = (back, there)
        self._watch(there, back)

    def _watch(self, one: _Flow, other: _Flow) -> None:
        for out, into in ((one, other), (other, one)):
            events = 0
            if not out.ended and not out.data:
                events |= select.POLLIN
            if into.data:
                events |= select.POLLOUT
            self._poll.register(out.source, events)

    def _move(self, fd: int, event: int) -> None:
        out, into = self._flows[fd]
        try:
            if event & (select.POLLERR | select.POLLNVAL):
                raise OSError(errno.EPIPE, "gone")
            if into.data and event & (select.POLLOUT | select.POLLHUP):
                into.data = into.data[into.sink.send(into.data) :]
                if not into.data and into.ended:
                    into.sink.shutdown(socket.SHUT_WR)
            if not out.ended and not out.data and event & (select.POLLIN | select.POLLHUP):
                out.data = out.source.recv(_CHUNK_BYTES)
                if not out.data:
                    out.ended = True
                    out.sink.shutdown(socket.SHUT_WR)
                else:
                    with contextlib.suppress(BlockingIOError):
                        out.data = out.data[out.sink.send(out.data) :]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(out)
            return
        hung_up = event & select.POLLHUP and out.ended and not into.data
        if hung_up or (out.ended and into.ended and not out.data and not into.data):
            self._drop(out)
        else:
            self._watch(out, into)

    def _drop(self, flow: _Flow) -> None:
        for end in (flow.source, flow.sink):
            if self._flows.pop(end.fileno(), None) is not None:
                self._poll.unregister(end)
            end.close()

    def _datagram(self, listener: socket.socket, port: Port) -> None:
        try:
            data, address = listener.recvfrom(_CHUNK_BYTES)
        except OSError:
            return
        key = (listener.fileno(), address)
        known = self._udp.get(key)
        if known is None:
            if len(self._udp) >= _MAX_FLOWS:
                return
            inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            inside.setblocking(False)
            inside.connect(("127.0.0.1", port.port))
            self._replies[inside.fileno()] = key
            self._poll.register(inside, select.POLLIN)
        else:
            inside = known[0]
        self._udp[key] = (inside, time.monotonic())
        with contextlib.suppress(OSError):
            inside.send(data)

    def _reply(self, fd: int) -> None:
        key = self._replies[fd]
        inside, _used = self._udp[key]
        with contextlib.suppress(OSError):
            self._listeners[key[0]][0].sendto(inside.recv(_CHUNK_BYTES), key[1])
        self._udp[key] = (inside, time.monotonic())

    def _expire(self) -> None:
        old = time.monotonic() - _UDP_IDLE_S
        for key, (inside, used) in list(self._udp.items()):
            if used < old:
                self._poll.unregister(inside)
                del self._udp[key], self._replies[inside.fileno()]
                inside.close()
