"""rtnetlink, as far as a sandbox's network needs it: veth pairs, addresses, links, a default route.

A message and its answer take some 50 µs, where each run of ip(8) takes milliseconds. One `Routes` speaks
for the network namespace in which it was made. Only the stdlib: the zygote's helper calls this.
rtnetlink(7), https://docs.kernel.org/userspace-api/netlink/intro.html
"""

from __future__ import annotations

import _socket as socket  # all of `socket` that is needed: see `channel`
import os
import struct
from types import TracebackType

_NEWLINK, _DELLINK, _NEWADDR, _NEWROUTE = 16, 17, 20, 24
_REQUEST, _ACK, _EXCL, _CREATE = 0x1, 0x4, 0x200, 0x400
_ERROR = 2
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 3, 18, 28
_INFO_KIND, _INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _RTA_GATEWAY = 4, 5
_NESTED = 0x8000
_UP = 1
_TABLE_MAIN, _PROTOCOL_BOOT, _SCOPE_UNIVERSE, _UNICAST = 254, 3, 0, 1


class Routes:
    """A socket to the kernel's routing part. Methods raise OSError with the kernel's errno."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._number = 0

    def __enter__(self) -> Routes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def add_veth(self, name: str, peer: str, peer_namespace: int) -> None:
        """Make a pair of interfaces, the peer in another network namespace (a descriptor)."""
        inside = _link() + _attribute(_IFLA_IFNAME, _text(peer)) + _number(_IFLA_NET_NS_FD, peer_namespace)
        data = _nested(_INFO_DATA, _nested(_VETH_INFO_PEER, inside))
        info = _nested(_IFLA_LINKINFO, _attribute(_INFO_KIND, _text("veth")) + data)
        self._do(_NEWLINK, _CREATE | _EXCL, _link() + _attribute(_IFLA_IFNAME, _text(name)) + info, name)

    def set_up(self, name: str) -> None:
        """Take an interface into operation."""
        self._do(_NEWLINK, 0, _link(socket.if_nametoindex(name), _UP), name)

    def add_address(self, name: str, address: str, prefix: int) -> None:
        """Give an interface an IPv4 address."""
        head = struct.pack("BBBBi", socket.AF_INET, prefix, 0, _SCOPE_UNIVERSE, socket.if_nametoindex(name))
        packed = socket.inet_aton(address)
        both = _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
        self._do(_NEWADDR, _CREATE | _EXCL, head + both, f"{address}/{prefix}")

    def add_default_route(self, name: str, gateway: str) -> None:
        """Send everything that has no other route through an interface to a gateway."""
        head = struct.pack(
            "BBBBBBBBI", socket.AF_INET, 0, 0, 0, _TABLE_MAIN, _PROTOCOL_BOOT, _SCOPE_UNIVERSE, _UNICAST, 0
        )
        rest = _number(_RTA_OIF, socket.if_nametoindex(name)) + _attribute(_RTA_GATEWAY, socket.inet_aton(gateway))
        self._do(_NEWROUTE, _CREATE | _EXCL, head + rest, f"default via {gateway}")

    def delete_link(self, name: str) -> bool:
        """Remove an interface, its peer with it; whether it was there."""
        try:
            self._do(_DELLINK, 0, _link(socket.if_nametoindex(name)), name)
        except OSError:
            return False
        return True

    def _do(self, kind: int, flags: int, body: bytes, what: str) -> None:
        self._number += 1
        head = struct.pack("=IHHII", 16 + len(body), kind, flags | _REQUEST | _ACK, self._number, 0)
        self._socket.send(head + body)
        answer = self._socket.recv(1 << 16)
        _length, answered, _flags, number, _pid, code = struct.unpack_from("=IHHIIi", answer)
        if answered != _ERROR or number != self._number:
            raise OSError(71, "netlink: an answer out of turn", what)
        if code:
            raise OSError(-code, os.strerror(-code), what)


def _link(index: int = 0, flags: int = 0) -> bytes:
    """struct ifinfomsg."""
    return struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, flags)


def _attribute(kind: int, data: bytes) -> bytes:
    padded = data + bytes(-len(data) % 4)
    return struct.pack("=HH", 4 + len(data), kind) + padded


def _nested(kind: int, data: bytes) -> bytes:
    return _attribute(kind | _NESTED, data)


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _text(text: str) -> bytes:
    return text.encode() + b"\0"
