"""The live region of `--progress=tty`: running steps, their last output, transfer bars.

Finished steps are printed once and scroll away with the terminal; beneath them a region of bounded
height is erased and drawn anew ten times a second by one thread, in one write per frame. Bars are
tqdm's (`format_meter`): it is imported at the first transfer, and since no tqdm object is ever made,
neither its monitor thread nor its own cursor movements exist. Only `builder.cli.progress` imports
this module.
"""

from __future__ import annotations

import os
import threading
import unicodedata
from collections.abc import Callable, Mapping
from typing import Final, TextIO

from builder.cli.progress import CANCELLED, Node, Progress, format_bytes, format_seconds, short_name
from layers.events import VertexStatus, VertexWarning

FRAME_S: Final = 0.1
MAX_BARS: Final = 8
MAX_REGION_ROWS: Final = 24
_LABEL: Final = 28
"""Columns of a transfer's name."""
_MIN_BAR_COLUMNS: Final = 72
MAX_LOG_ROWS: Final = 5
"""Output lines shown under one running step."""


class TtyProgress(Progress):
    """Draws on a terminal. The thread starts with the first event and ends with `close`."""

    def __init__(self, stream: TextIO, environ: Mapping[str, str], clock: Callable[[], int]) -> None:
        super().__init__(stream, clock)
        self._colour = not environ.get("NO_COLOR")
        self._ascii = not _can_encode(stream, "✔█…")
        self._began_ns = clock()
        self._permanent: list[str] = []
        self._drawn_widths: list[int] = []
        self._done = 0
        self._cancelled = 0
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()
        super().close()

    def _on_close(self) -> None:
        self._frame(final=True)
        super()._on_close()

    def _loop(self) -> None:
        while not self._stop.wait(FRAME_S):
            with self._lock:
                self._frame()

    def _begin(self) -> None:
        if self._thread is None and not self._stop.is_set():
            self._thread = threading.Thread(target=self._loop, name="progress", daemon=True)
            self._thread.start()

    def _on_started(self, node: Node) -> None:
        self._number(node)
        self._begin()

    def _on_completed(self, node: Node) -> None:
        self._number(node)
        self._begin()
        self._done += 1
        vertex = node.vertex
        spent = format_seconds(node.duration_ns(self._clock()))
        if vertex.error is not None:
            cancelled = vertex.error == CANCELLED
            self._cancelled += cancelled
            mark, word, colour = self._mark("✘", "x"), "CANCELED " if cancelled else "ERROR ", "31"
        elif vertex.cached:
            mark, word, colour = self._mark("✔", "="), "CACHED ", "36"
        else:
            mark, word, colour = self._mark("✔", "+"), "", "32"
        self._permanent.append(self._row(f" {mark} {word}{node.name}", spent, colour))

    def _on_status(self, node: Node, status: VertexStatus) -> None:
        self._begin()
        known = node.statuses.get(status.id)
        if known is not None and known[0].completed_ns is not None:
            return
        node.statuses[status.id] = (status, self._clock())
        if status.completed_ns is not None:
            size = format_bytes(status.current or status.total)
            spent = format_seconds(status.completed_ns - (status.started_ns or status.completed_ns))
            self._permanent.append(self._row(f"   {short_name(status.name or status.id)} {size}", spent, "2"))

    def _on_warning(self, node: Node | None, warning: VertexWarning) -> None:
        self._begin()
        mark = self._mark("⚠", "!")
        for line in (warning.message, *warning.detail.splitlines()[:10]):
            self._permanent.append(self._row(f" {mark} {short_name(line)}", "", "33"))
            mark = " "

    def _mark(self, sign: str, plain: str) -> str:
        return plain if self._ascii else sign

    def _size(self) -> tuple[int, int]:
        """Columns and rows of the terminal; a fallback where it does not tell."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            columns, rows = 0, 0
        # A pseudo-terminal whose maker gave it no size says 0.
        return max(columns or 80, 20), max(rows or 24, 5)

    def _row(self, left: str, right: str, colour: str) -> str:
        """One row: `left` cut to fit, `right` at the right edge. The last column stays free."""
        columns, _ = self._size()
        room = columns - 1 - (len(right) + 1 if right else 0)
        left = fit(left.expandtabs(4), room, "..." if self._ascii else "…")
        text = left + " " * (room + 1 - text_width(left)) + right if right else left
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour and colour else text

    def _frame(self, *, final: bool = False) -> None:
        """Erase the region, print what is finished, draw the region again; runs under the lock."""
        columns, rows = self._size()
        out: list[str] = []
        if self._drawn_widths:
            # A terminal that has become narrower has wrapped what stands there.
            up = sum(max(1, -(-width // columns)) for width in self._drawn_widths)
            out.append(f"\r\x1b[{up}A\x1b[J")
        out.extend(f"{row}\n" for row in self._permanent)
        self._permanent.clear()
        region = [] if final else self._region(min(rows - 2, MAX_REGION_ROWS))
        if final and self._numbered:
            out.append(self._headline(finished=True) + "\n")
        out.extend(f"{row}\n" for row in region)
        self._drawn_widths = [text_width(_plain(row)) for row in region]
        self._write("".join(out))

    def _headline(self, *, finished: bool = False) -> str:
        spent = format_seconds(self._clock() - self._began_ns)
        word = " FAILED" if self._failed else " CANCELED" if self._cancelled else " FINISHED"
        return self._row(f"[+] {self._done}/{len(self._nodes)}{word if finished else ''}", spent, "1")

    def _region(self, room: int) -> list[str]:
        running = [node for node in self._nodes.values() if node.running]
        if not running:
            return []
        now = self._clock()
        shown = running[: max(1, room - 2)]
        region = [self._headline()]
        room -= len(shown) < len(running)  # the row that counts those left out
        bars = min(MAX_BARS, max(0, room - 1 - len(shown)))
        spare = max(0, room - 1 - len(shown) - min(bars, sum(_active(n) for n in shown)))
        log_rows = min(MAX_LOG_ROWS, spare // len(shown))
        for node in shown:
            region.append(self._row(f" {self._mark('▸', '>')} {node.name}", format_seconds(node.duration_ns(now)), ""))
            for status, _ in node.statuses.values():
                if status.completed_ns is None and bars > 0:
                    bars -= 1
                    region.append(self._bar(status, now))
            tail = list(node.tail)[-log_rows:] if log_rows else []
            region.extend(self._row(f"   {self._mark('│', '|')} {line}", "", "2") for line in tail)
        region = region[:room]
        if len(shown) < len(running):
            region.append(self._row(f"   and {len(running) - len(shown)} more", "", "2"))
        return region

    def _bar(self, status: VertexStatus, now: int) -> str:
        columns, _ = self._size()
        total = status.total or None
        done = min(status.current, total) if total else status.current
        label = "   " + fit(short_name(status.name or status.id), _LABEL, "").ljust(_LABEL)
        if columns < _MIN_BAR_COLUMNS:
            # Where there is no room for a bar that says anything, figures do.
            share = f"{done * 100 // total}%" if total else format_bytes(done)
            return self._row(label.rstrip(), share, "")
        from tqdm.std import tqdm  # 69 ms, paid by the first transfer on a terminal alone

        sizes = "{n_fmt:>6}/{total_fmt:>6} {rate_fmt:>9}" if total else "{n_fmt:>6} {rate_fmt:>9}"
        bar = tqdm.format_meter(
            done,
            total or 0,
            max(0.001, (now - (status.started_ns or now)) / 1e9),
            ncols=columns - 1,
            prefix=label,
            ascii=self._ascii,
            unit="B",
            unit_scale=True,
            unit_divisor=1000,
            bar_format="{desc} {percentage:3.0f}%|{bar}| " + sizes if total else "{desc} " + sizes,
        )
        return fit(bar, columns - 1, "")


def _active(node: Node) -> int:
    return sum(status.completed_ns is None for status, _ in node.statuses.values())


def _can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _char_width(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in {"Cf", "Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def text_width(text: str) -> int:
    """Columns that `text` takes on a terminal."""
    return len(text) if text.isascii() else sum(map(_char_width, text))


def fit(text: str, columns: int, ellipsis: str) -> str:
    """`text` cut to `columns`, ending in `ellipsis` if it was cut."""
    if text_width(text) <= columns:
        return text
    room = columns - len(ellipsis)
    used = 0
    for at, char in enumerate(text):
        used += _char_width(char)
        if used > room:
            return text[:at] + ellipsis
    return text


def _plain(row: str) -> str:
    """A row without the colours that `_row` gave it; rows hold no other escape sequence."""
    if not row.startswith("\x1b["):
        return row
    return row[row.index("m") + 1 :].removesuffix("\x1b[0m")
