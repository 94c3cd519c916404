"""The live region, seen through a small terminal emulator: what stands on the screen is what counts."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading

from builder.cli.progress_tty import TtyProgress, fit, text_width
from layers.events import Vertex, VertexLog, VertexStatus, VertexWarning

S = 1_000_000_000
T0 = 1_700_000_000 * S
DIGEST = "sha256:" + "cd" * 32


class Screen:
    """Rows of a terminal that knows newlines, carriage returns, cursor-up, erase-below and colours; no more."""

    def __init__(self) -> None:
        self.rows = [""]
        self.at = 0

    def feed(self, text: str) -> None:
        for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\x1b|[^\x1b]", text):
            if token == "\n":
                self.at += 1
                if self.at == len(self.rows):
                    self.rows.append("")
            elif token == "\r":
                pass  # rows are always written whole
            elif token.endswith("A") and len(token) > 1:
                self.at -= int(token[2:-1])
                assert self.at >= 0, "the cursor left the region"
            elif token == "\x1b[J":
                self.rows[self.at :] = [""]
            elif token.endswith("m") and len(token) > 1:
                pass
            else:
                assert token.isprintable(), f"{token!r} reached the terminal"
                self.rows[self.at] += token


class Clock:
    def __init__(self) -> None:
        self.now_ns = T0

    def __call__(self) -> int:
        return self.now_ns


class Utf8(io.StringIO):
    encoding = "utf-8"


def terminal(environ: dict[str, str] | None = None, out: io.StringIO | None = None) -> tuple[TtyProgress, io.StringIO]:
    out = Utf8() if out is None else out
    progress = TtyProgress(out, environ or {}, Clock())
    # Frames are drawn by hand: a test does not wait for a thread.
    progress._begin = lambda: None  # type: ignore[method-assign]
    return progress, out


def screen(progress: TtyProgress, out: io.StringIO) -> list[str]:
    progress._frame()
    shown = Screen()
    shown.feed(out.getvalue())
    return [row.rstrip() for row in shown.rows if row.strip()]


def test_running_steps_stand_beneath_the_finished_ones() -> None:
    progress, out = terminal()
    progress.emit(Vertex("a", "[1/2] FROM base", started_ns=T0))
    screen(progress, out)
    progress.emit(Vertex("a", "[1/2] FROM base", started_ns=T0, completed_ns=T0 + 2 * S))
    progress.emit(Vertex("b", "[2/2] RUN make", started_ns=T0))
    progress.emit(VertexLog("b", 1, b"one\ntwo\n", T0))
    rows = screen(progress, out)
    assert [re.sub(r"\s+", " ", row) for row in rows] == [
        " ✔ [1/2] FROM base 2.0s",
        "[+] 1/2 0.0s",
        " ▸ [2/2] RUN make 0.0s",
        " │ one",
        " │ two",
    ]
    progress.emit(Vertex("b", "[2/2] RUN make", started_ns=T0, completed_ns=T0, error="exit status 2"))
    progress.close()
    rows = screen(progress, out)
    assert "✘ ERROR [2/2] RUN make" in rows[1]
    assert "FAILED" in rows[2]
    assert rows[3:] == ["------", " > [2/2] RUN make:", "one", "two", "------"]


def test_hostile_output_cannot_move_the_cursor() -> None:
    progress, out = terminal()
    progress.emit(Vertex("a", "name\x1b[5A\r\n\x1b]0;t\x07", started_ns=T0))
    hostile = b"\x1b[10A\x1b[2J\x1b[Hgone\x1b[1\n\x1bc\x9b5A\xc2\x9b5A\x0b\x0c\x08\x7f up\n\x1b\n\rback\r\n"
    progress.emit(VertexLog("a", 2, hostile, T0))
    progress.emit(VertexWarning("a", "warn\x1b[3A", "detail\x1b[3A"))
    progress.emit(VertexStatus("a", "s\x1b[2A", "s\x1b[2A", 1, 2, T0))
    rows = screen(progress, out)  # Screen refuses what is not printable
    assert any("gone" in row for row in rows)
    progress.emit(Vertex("a", "name", started_ns=T0, completed_ns=T0, error="bad\x1b[9A"))
    progress.close()
    rows = screen(progress, out)
    assert rows[-1] == "------"
    assert sum("FAILED" in row for row in rows) == 1


def test_what_was_cancelled_is_told_without_its_output() -> None:
    progress, out = terminal()
    for name in "ab":
        progress.emit(Vertex(name, f"RUN {name}", started_ns=T0))
        progress.emit(VertexLog(name, 1, b"half a word\n", T0))
        progress.emit(Vertex(name, f"RUN {name}", started_ns=T0, completed_ns=T0 + S, error="cancelled"))
    progress.close()
    rows = screen(progress, out)
    assert [row.split()[:2] for row in rows] == [["✘", "CANCELED"], ["✘", "CANCELED"], ["[+]", "2/2"]]
    assert "CANCELED" in rows[2]


def test_rows_never_wrap_and_the_region_is_bounded() -> None:
    progress, out = terminal()
    for number in range(100):
        progress.emit(Vertex(str(number), f"[{number}/100] RUN " + "長い" * 100, started_ns=T0))
        progress.emit(VertexLog(str(number), 1, ("x" * 500 + "\n").encode() * 50, T0))
    for number in range(50):
        progress.emit(VertexStatus("0", str(number), f"blob {number}", number, 100, T0))
    rows = screen(progress, out)
    assert len(rows) <= 22  # of the 24 that are assumed where the size is not known
    assert all(text_width(row) <= 79 for row in rows)
    assert rows[-1].strip().startswith("and ")


def test_bars_are_tqdms_and_a_finished_transfer_becomes_a_line() -> None:
    progress, out = terminal()
    progress.emit(Vertex("a", "pull", started_ns=T0))
    progress.emit(VertexStatus("a", DIGEST, DIGEST, 20_000_000, 40_000_000, T0))
    progress.emit(VertexStatus("a", "u", "unknown", 5_000, 0, T0))
    rows = screen(progress, out)
    assert re.search(r"sha256:cdcdcdcdcdcd +50%\|█+\S? +\| +20\.0M/ *40\.0M", rows[2])
    assert re.search(r"unknown +5\.00k", rows[3])
    progress.emit(VertexStatus("a", DIGEST, DIGEST, 40_000_000, 40_000_000, T0, T0 + 3 * S))
    rows = screen(progress, out)
    assert re.fullmatch(r"   sha256:cdcdcdcdcdcd 40\.0MB +3\.0s", rows[0])
    assert not any("%" in row for row in rows)
    # Neither tqdm's monitor nor any other thread of its has been started.
    assert not any("tqdm" in type(thread).__module__ for thread in threading.enumerate())


def test_where_there_is_no_room_for_a_bar_figures_are_shown() -> None:
    progress, out = terminal()
    progress._size = lambda: (40, 24)  # type: ignore[method-assign]
    progress.emit(Vertex("a", "pull", started_ns=T0))
    progress.emit(VertexStatus("a", DIGEST, DIGEST, 10_000_000, 40_000_000, T0))
    progress.emit(VertexStatus("a", "u", "unknown", 5_000, 0, T0))
    rows = screen(progress, out)
    assert re.fullmatch(r"   sha256:cdcdcdcdcdcd +25%", rows[2])
    assert re.fullmatch(r"   unknown +5kB", rows[3])


def test_more_than_the_total_does_not_break_a_bar() -> None:
    progress, out = terminal()
    progress.emit(Vertex("a", "pull", started_ns=T0))
    progress.emit(VertexStatus("a", "x", "blob", 50, 40, T0))
    assert "100%|" in screen(progress, out)[2]


def test_no_color_and_ascii_terminals_are_honoured() -> None:
    progress, out = terminal({"NO_COLOR": "1"})
    progress.emit(Vertex("a", "step", started_ns=T0, completed_ns=T0))
    progress.close()
    assert "\x1b[" not in out.getvalue()

    class Ascii(io.StringIO):
        encoding = "ascii"

    progress, out = terminal(out=Ascii())
    progress.emit(Vertex("a", "step", started_ns=T0))
    progress.emit(VertexStatus("a", "x", "blob", 20, 40, T0))
    progress._frame()
    out.getvalue().encode("ascii")


def test_wide_and_combining_characters_are_measured() -> None:
    assert text_width("漢字") == 4
    assert text_width("e\u0301") == 1
    assert fit("漢字漢字", 5, "…") == "漢字…"
    assert fit("short", 10, "…") == "short"


def test_a_narrower_terminal_erases_what_it_wrapped() -> None:
    progress, out = terminal({"NO_COLOR": "1"})
    progress.emit(Vertex("a", "x" * 100, started_ns=T0))
    progress._frame()
    progress._size = lambda: (40, 24)  # type: ignore[method-assign]
    out.truncate(0)
    progress._frame()
    # Two rows of 79 columns take two rows each at 40.
    assert out.getvalue().lstrip("\0").startswith("\r\x1b[4A\x1b[J")


def test_the_thread_starts_with_the_first_event_and_ends_with_close() -> None:
    before = set(threading.enumerate())
    out = Utf8()
    with TtyProgress(out, {}, Clock()) as progress:
        assert set(threading.enumerate()) <= before
        progress.emit(Vertex("a", "step", started_ns=T0))
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) <= before
    progress.emit(Vertex("b", "late", started_ns=T0))
    progress.close()
    assert set(threading.enumerate()) <= before


def test_the_region_comes_up_on_a_real_terminal() -> None:
    script = """
import os, pty, sys, time
wait, go = os.pipe()
pid, fd = pty.fork()
if pid == 0:
    from builder.cli.progress import make_progress
    from layers.events import Vertex
    with make_progress("auto", sys.stderr, {"TERM": "xterm"}) as progress:
        progress.emit(Vertex("a", "step one", started_ns=time.time_ns()))
        os.read(wait, 1)
        progress.emit(Vertex("a", "step one", started_ns=time.time_ns(), completed_ns=time.time_ns()))
    os._exit(0)
data = b""
while True:
    try:
        chunk = os.read(fd, 65536)
    except OSError:
        break
    if not chunk:
        break
    data += chunk
    if data.count(b"\\x1b[2A") == 2:
        os.write(go, b"x")
os.waitpid(pid, 0)
sys.stdout.buffer.write(data)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=120)
    text = done.stdout.decode().replace("\r\n", "\n")
    shown = Screen()
    shown.feed(text)
    assert text.count("\x1b[2A") >= 2, "the region was drawn again and again"
    rows = [row.split() for row in shown.rows if row.strip()]
    assert rows[0][1:3] == ["step", "one"]
    assert rows[1][:3] == ["[+]", "1/1", "FINISHED"]
    assert len(rows) == 2
