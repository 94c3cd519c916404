"""Terminals: a pseudo-terminal of the sandbox's own devpts, its master sent out, its slave made the command's.

`give` runs in the sandbox, last of all before the command; the rest is for whoever holds the master.
Only the stdlib is imported: the zygote's children call this. pty(7), ioctl_tty(2).
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios

from builder.sandbox import channel
from builder.sandbox.channel import Socket

_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441
MESSAGE = b'{"terminal": true}'
"""Goes with the master's descriptor over the control socket."""


def give(control: Socket, rows: int, columns: int, ptmx: str = "/dev/pts/ptmx") -> None:
    """Open a terminal here, send its master over `control`, and make its slave 0, 1, 2 and the controlling one.

    The process must lead a session that has no terminal. Raises: OSError.
    """
    master = os.open(ptmx, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
    # By descriptor: a path in /dev could be the image's, or another terminal's.
    slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
    resize(master, rows, columns)
    channel.send(control, MESSAGE, [master])
    os.close(master)
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2):
        os.dup2(slave, fd)
    if slave > 2:
        os.close(slave)


def resize(fd: int, rows: int, columns: int) -> None:
    """Set the window's size; the kernel tells the foreground processes. Raises: OSError."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows & 0xFFFF, columns & 0xFFFF, 0, 0))


def size(fd: int) -> tuple[int, int]:
    """(rows, columns) of a terminal; (24, 80) for what is none."""
    try:
        rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, b"\0" * 8))
    except OSError:
        return 24, 80
    return (rows, columns) if rows and columns else (24, 80)
