"""The sockets between the processes of a sandbox: datagrams with descriptors, without the stdlib's `socket`.

That module makes enumerations of some hundred constants and imports `selectors`: 2.5 ms, a twentieth of
`run --rm IMAGE true`. What it wraps, `_socket`, has all that is needed here; its sockets lack a
context manager, `accept` and timeouts by default. `socket.socket` is one of them, and may be given wherever
one is asked for. Only the stdlib is imported: the zygote lives on this. unix(7), cmsg(3).
"""

from __future__ import annotations

import struct
from _socket import AF_UNIX, CMSG_LEN, MSG_DONTWAIT, SCM_RIGHTS, SOCK_SEQPACKET, SOL_SOCKET, socket, socketpair
from collections.abc import Sequence

Socket = socket
__all__ = ["AF_UNIX", "MSG_DONTWAIT", "SOCK_SEQPACKET", "Socket", "pair", "receive", "send"]
_MSG_CMSG_CLOEXEC = 0x40000000
_FD_BYTES = struct.calcsize("i")


def pair() -> tuple[Socket, Socket]:
    """Two ends of a connection that keeps datagrams apart. Raises: OSError."""
    return socketpair(AF_UNIX, SOCK_SEQPACKET)


def send(end: Socket, data: bytes, fds: Sequence[int]) -> None:
    """Send a datagram with descriptors. Raises: OSError."""
    end.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))])


def receive(end: Socket, limit_bytes: int, limit_fds: int) -> tuple[bytes, list[int]]:
    """The next datagram and its descriptors, which no program inherits; nothing at the end. Raises: OSError."""
    room = CMSG_LEN(limit_fds * _FD_BYTES)
    try:
        data, ancillary, _flags, _address = end.recvmsg(limit_bytes, room, _MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # The other end was closed with something unread. That is told first, and once; then comes what it had sent.
        data, ancillary, _flags, _address = end.recvmsg(limit_bytes, room, _MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, packed in ancillary:
        if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
            count = len(packed) // _FD_BYTES
            fds += struct.unpack(f"{count}i", packed[: count * _FD_BYTES])
    return data, fds
