"""Datagrams with descriptors between the processes of a sandbox."""

from __future__ import annotations

import os

from builder.sandbox import channel


def test_datagrams_stay_apart_and_bring_descriptors() -> None:
    ours, theirs = channel.pair()
    read, write = os.pipe()
    channel.send(ours, b"one", [write, read])
    ours.send(b"two")
    data, fds = channel.receive(theirs, 100, 4)
    assert data == b"one"
    assert len(fds) == 2
    os.write(fds[0], b"x")
    assert os.read(read, 1) == b"x"
    assert not any(os.get_inheritable(fd) for fd in fds)
    assert channel.receive(theirs, 100, 4) == (b"two", [])
    ours.close()
    assert channel.receive(theirs, 100, 4) == (b"", [])
    theirs.close()
    for fd in (read, write, *fds):
        os.close(fd)


def test_last_words_are_heard_though_something_was_left_unread() -> None:
    ours, theirs = channel.pair()
    ours.send(b"thaw")
    theirs.send(b"exit")
    theirs.close()
    assert channel.receive(ours, 100, 1) == (b"exit", [])
    assert channel.receive(ours, 100, 1) == (b"", [])
    ours.close()
