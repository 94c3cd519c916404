"""A person at a terminal: a pseudo-terminal with pybuild at its other end."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from types import TracebackType

from tests.support.cli import Pybuild


class Terminal:
    """Runs a command with a controlling terminal of its own; `screen` is all that it showed so far."""

    def __init__(self, box: Pybuild, *words: str, size: tuple[int, int] = (33, 99)) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(*size, tell=False)
        self.before = termios.tcgetattr(self.slave)
        self.screen = ""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *box.argv(*words)],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, env=box.environ(),
            cwd=box.account.home if box.account else None,
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def resize(self, rows: int, columns: int, *, tell: bool = True) -> None:
        """Make the window another size; the kernel tells the foreground process."""
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if tell:
            time.sleep(0.3)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, words: str, timeout_s: float = 20.0) -> str:
        """Wait until the words are shown, and take what was shown up to there."""
        deadline = time.monotonic() + timeout_s
        while words not in self.screen:
            left = deadline - time.monotonic()
            assert left > 0, f"{words!r} was not shown, but {self.screen!r}"
            if select.select([self.master], [], [], left)[0]:
                self.screen += os.read(self.master, 4096).decode(errors="replace")
        seen, _, self.screen = self.screen.partition(words)
        return seen

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def ended(self, timeout_s: float = 20.0) -> int:
        """The command's status; what it still shows is read meanwhile."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.05)[0]:
                self.screen += os.read(self.master, 4096).decode(errors="replace")
        return self.process.wait(1)
