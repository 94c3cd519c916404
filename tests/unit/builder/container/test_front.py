"""The keys that leave a container, and clients that do not keep up."""

from __future__ import annotations

import socket

import pytest

from builder.container.attach import Audience, Visitor
from builder.container.front import DetachKeys
from builder.container.records import ContainerError


def test_keys_are_seen_however_they_come() -> None:
    keys = DetachKeys()
    assert keys.feed(b"ls\x10") == (b"ls", False)
    assert keys.feed(b"\x11") == (b"", True)
    assert keys.feed(b"a\x10\x11b") == (b"a", True)
    assert keys.feed(b"\x10x") == (b"\x10x", False)
    assert keys.feed(b"\x10\x10\x11") == (b"\x10", True)
    other = DetachKeys("ctrl-a,d")
    assert other.feed(b"\x01") == (b"", False)
    assert other.feed(b"\x01d") == (b"\x01", True)
    assert DetachKeys("").feed(b"\x10\x11") == (b"\x10\x11", False)


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-1", "escape", ",", "ctrl-p,,q"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ContainerError, match="no key"):
        DetachKeys(text)


def test_a_client_that_does_not_read_is_sent_away() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    visitor = Visitor(ours)
    frame = b"1" + bytes(1 << 16)
    count = 0
    while visitor.send(frame):
        count += 1
        assert count < 1000, "it was never given up"
    assert visitor.waiting_bytes > 8 << 20
    ours.close()
    theirs.close()


def test_an_audience_is_bounded_and_hears() -> None:
    audience = Audience()
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(17)]
    for ours, _theirs in pairs[:16]:
        audience.admit(ours)
    with pytest.raises(ContainerError, match="attached already"):
        audience.admit(pairs[16][0])
    assert audience.show(2, b"words") == []
    assert all(theirs.recv(100) == b"2words" for _ours, theirs in pairs[:16])
    fd = pairs[0][0].fileno()
    assert audience.hear(fd) == b""
    pairs[0][1].send(b"ityped")
    assert audience.hear(fd) == b"ityped"
    pairs[0][1].close()
    assert audience.hear(fd) is None
    assert audience.show(1, b"more") == [fd]
    audience.close()
    for ours, theirs in pairs[1:]:
        ours.close()
        theirs.close()
