"""Loopback ports for servers that must be told a number, and for connections that must be refused.

A port that the kernel gave to a socket which is closed again may be anybody's by the time that a server
binds it: every connection of every process takes one of the same range. So the numbers here are below
that range, and each process has a block of them to itself.
"""

from __future__ import annotations

import os
import socket
from functools import cache
from itertools import count
from pathlib import Path

BLOCK = 64
FIRST = 10_000


def _usable(port: int) -> bool:
    """Nobody listens there, nor sends datagrams from there; what only lingers after its end does not count."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True


@cache
def _block() -> tuple[int, count[int]]:
    """The first port of this process's block, and a counter.

    An abstract socket marks the block as taken: the kernel lets go of it with the process.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    blocks = max(1, (lowest - FIRST) // BLOCK)
    for attempt in range(blocks):
        number = (os.getpid() + attempt) % blocks
        mark = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            mark.bind(f"\0pybuild-tests-ports-{number}")
        except OSError:
            mark.close()
            continue
        mark.detach()  # open to the end of this process
        return FIRST + number * BLOCK, count()
    raise RuntimeError(f"all {blocks} blocks of ports below {lowest} are taken")


def free_port() -> int:
    """A port of the loopback's that nobody listens on, and that nobody else will take; each call gives the next one."""
    first, calls = _block()
    for _ in range(BLOCK):
        port = first + next(calls) % BLOCK
        if _usable(port):
            return port
    raise RuntimeError(f"something listens on every port from {first} to {first + BLOCK - 1}")
