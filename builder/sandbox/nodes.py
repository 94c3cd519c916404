"""Answers mknod(2) of devices where there are ids enough: an empty file with a record stands for each.

The kernel makes no device in a user namespace. A sandbox with subordinate ids hands over the listener of a
filter (`seccomp.nodes_program`) that asks about nothing but devices; who answers is forked when the first
is wanted, so that nobody else has anything to wait for. Whoever may not make one is left to the kernel,
which refuses; so is what cannot be looked up. The file is made as by the caller itself, from its root and
working directory and with its ids, umask and capabilities: whose it is, what a directory's set-group-ID
bit or default ACL does to it and whether it may be there are the kernel's to say. What the record says
is `layers.ownership`'s. Nobody in the sandbox is shown a device in its place.

seccomp_unotify(2). Imported before there is an image in sight; imports nothing later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from builder.sandbox import channel
from builder.sandbox.channel import Socket
from builder.sandbox.notified import CONTINUE, Call, Listener, enter, settle
from layers import linux, ownership
from layers.values import NamedTuple

_MKNOD = linux.CAPABILITIES.index("MKNOD")
_PARENT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def serve(listener: int, pid: int) -> NoReturn:
    """The whole life of the process just forked, for the sandbox whose first is `pid`. Never returns."""
    status = 1
    try:
        settle(listener)
        NodeMaker(listener, enter(pid)).loop()
        status = 0
    finally:
        os._exit(status)


def serve_from(handover: Socket, pid: int) -> NoReturn:
    """`serve` for a listener that is still to come, once somebody asks. Never returns."""
    try:
        settle(handover.fileno())
        listener = receive(handover)
        if listener >= 0:
            poll = select.poll()
            poll.register(listener, select.POLLIN)
            if poll.poll()[0][1] & select.POLLIN:
                serve(listener, pid)
    finally:
        os._exit(0)


def receive(handover: Socket) -> int:
    """The listener that was handed over; -1 where none was to be had. Raises: OSError."""
    fds = channel.receive(handover, 16, 1)[1]
    return fds[0] if fds else -1


class _Caller(NamedTuple):
    """As whom a file is to be made. `capabilities` are those that count in our user namespace."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    umask: int
    capabilities: int
    may: bool

    @classmethod
    def of(cls, call: Call) -> _Caller:
        """Who made a call. Raises: OSError."""
        with open(call.of_process(b"status"), "rb") as stream:
            rows = dict(line.split(b":", 1) for line in stream)
        held = int(rows[b"CapEff"], 16)
        ours, theirs = os.stat(b"self/ns/user"), os.stat(call.of_process(b"ns/user"))
        return cls(
            int(rows[b"Uid"].split()[3]),
            int(rows[b"Gid"].split()[3]),
            tuple(int(number) for number in rows[b"Groups"].split()),
            int(rows[b"Umask"], 8),
            # A namespace within ours lends none over what is ours.
            held if os.path.samestat(ours, theirs) else 0,
            bool(held >> _MKNOD & 1),
        )

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Be this caller for the block, as far as the file system asks. Raises: OSError."""
        permitted = linux.capget()[1]
        try:
            with contextlib.suppress(PermissionError):  # setgroups is denied: nobody has other groups than ours
                os.setgroups(self.groups)
            os.setegid(self.gid)
            os.seteuid(self.uid)
            linux.capset(self.capabilities & permitted, permitted, 0)
            os.umask(self.umask)
            yield
        finally:
            os.umask(0)
            linux.capset(permitted, permitted, 0)
            os.seteuid(0)
            os.setegid(0)


class NodeMaker(Listener):
    """Answers for one sandbox."""

    def __init__(self, listener: int, shown: Callable[[int], bytes]) -> None:
        super().__init__(listener, shown)
        self._root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._proc = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def do_mknod(self, call: Call) -> Any:
        return self._make(call, None, 0, call.word(1), call.word(2))

    def do_mknodat(self, call: Call) -> Any:
        return self._make(call, 0, 1, call.word(2), call.word(3))

    def _make(self, call: Call, directory: int | None, index: int, mode: int, device: int) -> Any:
        path = call.string(index)
        head, slash, name = path.rpartition(b"/")
        # Of such names none can be made, and the kernel says best why.
        if not ownership.is_node(mode, device) or name in {b"", b".", b".."}:
            return CONTINUE
        with contextlib.ExitStack() as stack:
            try:
                caller = _Caller.of(call)
                if not caller.may:
                    return CONTINUE
                root = _opened(stack, call.of_process(b"root"))
                start = root if path[:1] == b"/" else _opened(stack, call.base(directory))
                self._check(call)
                with self._from(root, start), caller.acting():
                    # Never by a link of /proc: where the caller's is shown, we are in it, and what we hold.
                    parent = linux.openat2(
                        linux.AT_FDCWD, head + slash or b".", _PARENT, resolve=linux.RESOLVE_NO_MAGICLINKS
                    )
            except OSError:
                return CONTINUE
            stack.callback(os.close, parent)
            with caller.acting():
                fd = os.open(name, _CREATE, stat.S_IMODE(mode), dir_fd=parent)
            stack.callback(os.close, fd)
            try:
                ownership.keep_device(fd, stat.S_IFMT(mode), device)
            except OSError as e:
                os.unlink(name, dir_fd=parent)
                # Where nothing can be recorded it is as if nobody had been asked.
                raise OSError(errno.EPERM if e.errno == errno.ENOTSUP else e.errno, "mknod") from e
        return 0

    @contextlib.contextmanager
    def _from(self, root: int, start: int) -> Iterator[None]:
        """Look paths up where the caller does, for the block. Raises: OSError."""
        try:
            os.fchdir(root)
            os.chroot(".")
            os.fchdir(start)
            yield
        finally:
            os.fchdir(self._root)
            os.chroot(".")
            os.fchdir(self._proc)


def _opened(stack: contextlib.ExitStack, path: bytes) -> int:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
