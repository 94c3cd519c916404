"""What a container says, kept: one JSON line a piece, both streams in the order in which they came.

    {"t": nanoseconds, "s": "o" | "e", "d": text}

The text is UTF-8 with stray bytes as lone surrogates; a piece ends with a line's end unless the
line went on later. When the file has grown to its bound it becomes `log.1`, and the one before is
dropped. What cannot be written, on a full disk, is lost and counted; the container goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from layers.values import NamedTuple

MAX_BYTES = 10 << 20
_POLL_S = 0.05
_MAX_LINE_BYTES = 1 << 16


class Piece(NamedTuple):
    """Something said. `stream` is 1 or 2."""

    time_ns: int
    stream: int
    data: bytes


class LogWriter:
    """Appends to a container's log. For one thread."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes // 2
        self._fd = -1
        self._size = 0
        self.lost_bytes = 0

    def write(self, stream: int, data: bytes, time_ns: int | None = None) -> None:
        """Never raises OSError. With no room at all (`max_bytes` 0) nothing is kept."""
        if not self._max_bytes:
            return
        now = time.time_ns() if time_ns is None else time_ns
        lines = _lines(data)
        text = "".join(
            json.dumps({"t": now, "s": "o" if stream == 1 else "e", "d": line.decode("utf-8", "surrogateescape")})
            + "\n"
            for line in lines
        ).encode()
        try:
            self._append(text)
        except OSError:
            self.lost_bytes += len(data)

    def _append(self, text: bytes) -> None:
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._fd).st_size
            self._mend()
        if self._size and self._size + len(text) > self._max_bytes:
            os.rename(self._path, f"{self._path}.1")
            os.close(self._fd)
            self._fd, self._size = -1, 0
            self._append(text)
            return
        left = memoryview(text)
        try:
            while left:
                count = os.write(self._fd, left)
                self._size += count
                left = left[count:]
        except OSError:
            # Half a line would spoil the next one.
            with contextlib.suppress(OSError):
                self._size -= len(text) - len(left)
                os.ftruncate(self._fd, self._size)
            raise

    def _mend(self) -> None:
        """End a line that a killed writer left unfinished."""
        if self._size:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.pread(fd, 1, self._size - 1) != b"\n":
                    self._size += os.write(self._fd, b"\n")
            finally:
                os.close(fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _lines(data: bytes) -> list[bytes]:
    """Split after each newline, and nowhere else (a terminal's returns stay where they are)."""
    parts = data.split(b"\n")
    lines = [part + b"\n" for part in parts[:-1]]
    return [*lines, parts[-1]] if parts[-1] else lines


def read(
    path: Path,
    *,
    tail: int | None = None,
    since_ns: int = 0,
    until_ns: int | None = None,
    follow: Callable[[], bool] | None = None,
) -> Iterator[Piece]:
    """The pieces, oldest first: of the last `tail` lines only, between two times, and, with `follow`, until
    it says that no more will come. Damaged lines are passed over."""
    reader = LineReader(path)
    try:
        pieces: Iterator[Piece] = (p for p in _parsed(reader.old()) if p.time_ns >= since_ns)
        if tail is not None:
            pieces = iter(_last(pieces, tail))
        for piece in pieces:
            if until_ns is not None and piece.time_ns > until_ns:
                return
            yield piece
        while follow is not None:
            goes_on = follow()  # asked first: what was said before the end must still be read
            for piece in _parsed(reader.fresh()):
                if until_ns is not None and piece.time_ns > until_ns:
                    return
                if piece.time_ns >= since_ns:
                    yield piece
            if not goes_on or (until_ns is not None and time.time_ns() > until_ns):
                return
            time.sleep(_POLL_S)
    finally:
        reader.close()


def _last(pieces: Iterator[Piece], count: int) -> list[Piece]:
    """The last `count` lines; a line may be several pieces."""
    kept: deque[Piece] = deque()
    lines = 0
    for piece in pieces:
        if not kept or kept[-1].data.endswith(b"\n"):
            lines += 1
        kept.append(piece)
        while lines > count:
            first = kept.popleft()
            if not kept or first.data.endswith(b"\n"):
                lines -= 1
    return list(kept) if count else []


class LineReader:
    """Reads a file of lines and the one before it (`.1`) as one, and then what is added, across a change of files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._rest = b""

    def old(self) -> Iterator[bytes]:
        """All lines that there are so far, without their ends."""
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(f"{self._path}.1", os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield from self._lines(fd)
            finally:
                os.close(fd)
        self._rest = b""
        yield from self.fresh()

    def fresh(self) -> Iterator[bytes]:
        """What was added since."""
        if self._fd < 0 and not self._open():
            return
        yield from self._lines(self._fd)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self._path).st_ino != os.fstat(self._fd).st_ino:
                yield from self._lines(self._fd)
                self.close()
                self._rest = b""
                if self._open():
                    yield from self._lines(self._fd)

    def _open(self) -> bool:
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        return True

    def _lines(self, fd: int) -> Iterator[bytes]:
        while data := os.read(fd, 1 << 16):
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from lines
            if len(self._rest) > 16 * _MAX_LINE_BYTES:
                self._rest = b""  # no writer of ours makes such a line

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _parsed(lines: Iterator[bytes]) -> Iterator[Piece]:
    return filter(None, map(_parse, lines))


def _parse(line: bytes) -> Piece | None:
    try:
        document = json.loads(line)
        data = document["d"].encode("utf-8", "surrogateescape")
        return Piece(int(document["t"]), 2 if document["s"] == "e" else 1, data)
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeError):
        return None
