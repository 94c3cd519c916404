"""`--on-error=shell`: a shell in the failed step's sandbox, with its files, mounts, environment and user."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from builder.errors import StepError
    from builder.sandbox.launcher import Running
    from builder.solve.steps import StartAgain

_SHELL = ("/bin/sh", "-i")


def shell(error: StepError, start: StartAgain) -> None:
    """Open the shell and come back when it ends; the build fails all the same."""
    print(f"{error}\n\nA shell in the sandbox of the failed step; the build ends with it.", file=sys.stderr, flush=True)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        running = start(_SHELL[:1], None)
        try:
            running.wait()
        finally:
            running.close()
        return
    rows, columns = termios.tcgetwinsize(0)
    running = start(_SHELL, (rows, columns))
    try:
        _bridge(running)
    finally:
        running.close()


def _bridge(running: Running) -> None:
    """Join our terminal with the sandbox's until the shell has ended."""
    master = running.take_terminal()
    before = termios.tcgetattr(0)

    def resized(_number: int, _frame: object) -> None:
        termios.tcsetwinsize(master, termios.tcgetwinsize(0))

    # Signal handlers are the main thread's; a step runs on another, and then keeps the first size.
    watched = None
    try:
        watched = signal.signal(signal.SIGWINCH, resized)
    except ValueError:
        pass
    try:
        tty.setraw(0)
        while running.poll(0) is None:
            ready, _, _ = select.select([0, master], [], [], 0.2)
            if 0 in ready:
                os.write(master, os.read(0, 4096))
            if master in ready and not _copy(master):
                break
        while select.select([master], [], [], 0)[0] and _copy(master):
            pass
        running.wait()
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        if watched is not None:
            signal.signal(signal.SIGWINCH, watched)
        os.close(master)


def _copy(master: int) -> bool:
    """What the sandbox wrote; False at its end, which a terminal tells as EIO."""
    try:
        data = os.read(master, 1 << 16)
    except OSError:
        return False
    os.write(1, data)
    return bool(data)
