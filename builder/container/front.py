"""The caller's end of a container in the foreground: descriptors, the terminal in raw mode, signals passed on.

Used by `run` and `exec` through the monitor's loop and through `pump`. Raw mode is taken back whatever
happens: by the context manager, and by the handlers of the signals that end the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def write_all(fd: int, data: bytes) -> bool:
    """Write everything, waiting where a descriptor does not block; False once nobody reads."""
    import select

    left = memoryview(data)
    while left:
        try:
            left = left[os.write(fd, left) :]
        except BlockingIOError:
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll()
        except OSError:
            return False
    return True


class Front:
    """Where a foreground container's streams go. `tty`: its terminal is shown on ours."""

    def __init__(
        self,
        *,
        tty: bool,
        stdin: bool,
        output: tuple[int, int] = (1, 2),
        input_fd: int = 0,
        keys: DetachKeys | None = None,
        leaving: Callable[[], None] = lambda: None,
    ) -> None:
        self.keys = keys
        """What is to be typed to leave the container running; None: it cannot be left."""
        self.leaving = leaving
        """Called before a process that is left goes on as another: what survives no fork is to be closed."""
        self.left = False
        self.tty = tty
        self.stdin = stdin
        self.input_fd = input_fd
        self.output = output
        self.is_terminal = os.isatty(input_fd)
        self._open = {1: True, 2: True}

    def window(self) -> tuple[int, int]:
        """(rows, columns) of our terminal."""
        from builder.sandbox import terminal

        for fd in (self.input_fd, *self.output):
            if os.isatty(fd):
                return terminal.size(fd)
        return 24, 80

    def show(self, stream: int, data: bytes) -> None:
        """Hand on what the container said; once nobody reads it goes to the log alone."""
        if self._open[stream]:
            self._open[stream] = write_all(self.output[stream - 1], data)

    @contextlib.contextmanager
    def engaged(self, on_signal: Callable[[int], None]) -> Iterator[int]:
        """For the block: raw mode if there is a terminal at both ends, and signals told to `on_signal`.

        Gives a descriptor that becomes readable when a signal came; `take_signals` then calls.
        """
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        numbers = [*PASSED_ON, signal.SIGWINCH]
        before: dict[int, Any] = {}
        saved = None
        old_wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        try:
            for number in map(int, numbers):
                before[number] = signal.signal(number, lambda _number, _frame: None)
            if self.tty and self.is_terminal:
                import termios

                saved = termios.tcgetattr(self.input_fd)
                set_raw(self.input_fd, saved)
            self._on_signal = on_signal
            yield read
        finally:
            if saved is not None:
                import termios

                with contextlib.suppress(termios.error):
                    termios.tcsetattr(self.input_fd, termios.TCSADRAIN, saved)
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            signal.set_wakeup_fd(old_wakeup)
            os.close(read)
            os.close(write)

    def take_signals(self, fd: int) -> None:
        """Tell the signals that came."""
        with contextlib.suppress(BlockingIOError):
            for number in os.read(fd, 64):
                self._on_signal(number)


class DetachKeys:
    """Watches what is typed for the keys that leave a container without ending it: docker's `ctrl-p,ctrl-q`."""

    def __init__(self, text: str = "ctrl-p,ctrl-q") -> None:
        """Raises: ContainerError for keys that are none."""
        self._keys = b"".join(_key(word) for word in text.split(",")) if text else b""
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """(what to hand on, whether the keys were typed). The beginning of the keys is held back until it is clear."""
        if not self._keys:
            return data, False
        out = bytearray()
        for byte in data:
            self._held += bytes([byte])
            while self._held and not self._keys.startswith(self._held):
                out.append(self._held[0])
                self._held = self._held[1:]
            if self._held == self._keys:
                self._held = b""
                return bytes(out), True
        return bytes(out), False


def _key(word: str) -> bytes:
    from builder.container.records import ContainerError

    if len(word) == 1 and word.isascii():
        return word.encode()
    letter = word.lower().removeprefix("ctrl-")
    if letter != word.lower() and len(letter) == 1 and letter in "@abcdefghijklmnopqrstuvwxyz[\\]^_":
        return bytes([ord(letter.upper()) - 64])
    raise ContainerError(f"detach keys: {word!r} is no key", hint="such as ctrl-p,ctrl-q or ctrl-a,d")


def set_raw(fd: int, attributes: list[Any]) -> None:
    """cfmakeraw(3) on a terminal whose attributes are these. Raises: termios.error."""
    import termios

    iflag, oflag, cflag, lflag, ispeed, ospeed, cc = attributes
    iflag &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
        | termios.ICRNL | termios.IXON
    )  # fmt: skip
    oflag &= ~termios.OPOST
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    cflag = (cflag & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
    cc = list(cc)
    cc[termios.VMIN], cc[termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSADRAIN, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc])
