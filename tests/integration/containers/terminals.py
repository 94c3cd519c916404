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
from tests.support.waiting import PATIENCE_S


class Terminal:
    """Runs a command with a controlling terminal of its own; `screen` is all that it showed so far."""

    def __init__(self, box: Pybuild, *words: str, size: tuple[int, int] = (33, 99)) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(*size)
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

    def resize(self, rows: int, columns: int) -> None:
        """Make the window another size; the kernel tells the foreground process."""
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def type_until(self, text: str, words: str, pause_s: float = 0.5) -> None:
        """Type a line again and again until the words are shown: what they tell of may take its time to arrive."""
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.screen:
            assert time.monotonic() < deadline, f"{words!r} was not shown, but {self.screen!r}"
            self.type(text)
            self.read(pause_s)
        self.expect(words)

    def read(self, within_s: float) -> None:
        """Take what is shown, if anything is within the time."""
        if select.select([self.master], [], [], max(0, within_s))[0]:
            self.screen += os.read(self.master, 4096).decode(errors="replace")

    def expect(self, words: str, timeout_s: float = PATIENCE_S) -> str:
        """Wait until the words are shown, and take what was shown up to there."""
        deadline = time.monotonic() + timeout_s
        while words not in self.screen:
            left = deadline - time.monotonic()
            assert left > 0, f"{words!r} was not shown, but {self.screen!r}"
            self.read(left)
        seen, _, self.screen = self.screen.partition(words)
        return seen

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & termios.ICANON

    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def ended(self, timeout_s: float = PATIENCE_S) -> int:
        """The command's status; what it still shows is read meanwhile."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read(0.05)
        assert self.process.poll() is not None, f"it did not end, but showed {self.screen!r}"
        return self.process.returncode
