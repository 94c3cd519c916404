"""The plain, quiet and rawjson drawings, and what all of them share."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from builder.cli.progress import (
    MAX_LINE_CHARS,
    TAIL_LINES,
    Progress,
    _Lines,
    format_bytes,
    make_progress,
    resolve_mode,
    sanitise,
    short_name,
)
from builder.errors import UsageError
from layers.events import Vertex, VertexLog, VertexStatus, VertexWarning

S = 1_000_000_000
T0 = 1_700_000_000 * S
DIGEST = "sha256:" + "ab" * 32


class Clock:
    def __init__(self) -> None:
        self.now_ns = T0

    def __call__(self) -> int:
        return self.now_ns


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain() -> tuple[Progress, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return make_progress("plain", out, {}, clock=clock), out, clock


def started(name: str = "[2/4] RUN make", vertex: str = "v") -> Vertex:
    return Vertex(vertex, name, started_ns=T0)


def ended(error: str | None = None, *, cached: bool = False, vertex: str = "v") -> Vertex:
    return Vertex(vertex, "[2/4] RUN make", started_ns=T0, completed_ns=T0 + S, cached=cached, error=error)


def log(data: bytes, *, stream: int = 1, at: int = T0 + S // 8, vertex: str = "v") -> VertexLog:
    return VertexLog(vertex, stream, data, at)


def test_a_step_from_start_to_end() -> None:
    progress, out, _ = plain()
    for event in (started(), log(b"compiling\nlinking\n"), ended()):
        progress.emit(event)
    assert out.getvalue() == "#1 [2/4] RUN make\n#1 0.125 compiling\n#1 0.125 linking\n#1 DONE 1.0s\n\n"


def test_steps_are_numbered_as_they_appear_and_a_cached_one_says_so() -> None:
    progress, out, _ = plain()
    progress.emit(Vertex("b", "[1/2] FROM base", started_ns=T0, completed_ns=T0, cached=True))
    progress.emit(Vertex("a", "[2/2] COPY . /", started_ns=T0))
    assert out.getvalue() == "#1 [1/2] FROM base\n#1 CACHED\n\n#2 [2/2] COPY . /\n"


def test_a_planned_vertex_is_not_shown_before_it_starts() -> None:
    progress, out, _ = plain()
    progress.emit(Vertex("v", "[2/4] RUN make"))
    assert out.getvalue() == ""
    progress.emit(started())
    assert out.getvalue() == "#1 [2/4] RUN make\n"


def test_a_state_told_twice_is_shown_once() -> None:
    progress, out, _ = plain()
    for event in (started(), ended(), ended()):
        progress.emit(event)
    assert out.getvalue().count("DONE") == 1


def test_an_error_is_shown_and_its_last_lines_are_kept() -> None:
    progress, out, _ = plain()
    progress.emit(started())
    progress.emit(log(b"".join(b"line %d\n" % n for n in range(100))))
    progress.emit(log(b"no newline", stream=2))
    progress.emit(ended("exit status 3"))
    assert "#1 0.125 line 99\n" in out.getvalue()
    assert out.getvalue().endswith("no newline\n#1 ERROR: exit status 3\n\n")
    report = progress._report().splitlines()
    assert report[:2] == ["------", " > [2/4] RUN make:"]
    assert report[-2:] == ["no newline", "------"]
    assert len(report) == TAIL_LINES + 3


def test_nothing_is_reported_of_steps_that_succeed_or_are_cancelled_silently() -> None:
    progress, out, _ = plain()
    for event in (started(), log(b"fine\n"), ended()):
        progress.emit(event)
    progress.emit(Vertex("w", "other", started_ns=T0, completed_ns=T0, error="cancelled"))
    assert "#2 CANCELED" in out.getvalue()
    assert progress._report() == ""


def test_output_of_two_streams_is_not_mixed_within_a_line() -> None:
    progress, out, _ = plain()
    progress.emit(started())
    progress.emit(log(b"one ", stream=1))
    progress.emit(log(b"two\n", stream=2))
    progress.emit(log(b"one\n", stream=1))
    assert [line.split(" ", 2)[2] for line in out.getvalue().splitlines()[1:]] == ["two", "one one"]


def test_characters_split_between_chunks_are_put_together() -> None:
    progress, out, _ = plain()
    progress.emit(started())
    for byte in "größe €\n".encode():
        progress.emit(log(bytes([byte])))
    assert out.getvalue().endswith("#1 0.125 größe €\n")


def test_invalid_utf8_is_replaced() -> None:
    progress, out, _ = plain()
    progress.emit(started())
    progress.emit(log(b"a\xff\xfeb\n"))
    assert out.getvalue().endswith("a\ufffd\ufffdb\n")


def test_output_before_its_vertex_is_shown_under_its_id() -> None:
    progress, out, _ = plain()
    progress.emit(log(b"early\n"))
    assert out.getvalue().splitlines()[0] == "#1 v"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("plain", "plain"),
        ("tab\tkept", "tab\tkept"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[H\x1b[5;5Hgone", "gone"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bPdevice\x1b\\after", "after"),
        ("\x1b(Bset", "set"),
        ("\x9b31mC1", "C1"),
        ("bell\x07back\x08space", "bellbackspace"),
        ("10%\r50%\r100%", "100%"),
        ("dos\r", "dos"),
        ("evil\u202etxt.exe", "eviltxt.exe"),
        ("cut \x1b[3", "cut "),
        ("\ud800lone", "lone"),
    ],
)
def test_sanitise(raw: str, clean: str) -> None:
    assert sanitise(raw) == clean


@given(st.text())
def test_what_is_sanitised_cannot_move_a_cursor(text: str) -> None:
    clean = sanitise(text)
    assert not any(ord(c) < 0x20 and c != "\t" for c in clean)
    assert not any(0x7F <= ord(c) < 0xA0 for c in clean)
    clean.encode()


@given(st.lists(st.one_of(st.binary(max_size=30), st.text("a\r\n\x1b[0mé").map(str.encode))))
@example([b"a\r\r", b"\n"])
def test_lines_do_not_depend_on_the_chunks(chunks: list[bytes]) -> None:
    split, whole = _Lines(), _Lines()
    one = [line for chunk in chunks for line in split.feed(chunk)] + split.feed(b"", final=True)
    assert one == whole.feed(b"".join(chunks)) + whole.feed(b"", final=True)


def test_a_line_without_end_is_shown_in_pieces_and_memory_is_bounded() -> None:
    lines = _Lines()
    shown = [line for _ in range(100) for line in lines.feed(b"x" * 1000)]
    assert {len(line) for line in shown} == {MAX_LINE_CHARS}
    assert sum(map(len, shown + lines.feed(b"", final=True))) == 100_000


def test_a_bar_of_carriage_returns_does_not_grow() -> None:
    lines = _Lines()
    for percent in range(100_000):
        assert lines.feed(b"\r%d%%" % percent) == []
    assert len(lines._pending) < 20
    assert lines.feed(b"\n") == ["99999%"]


def test_names_are_one_bounded_line_with_short_digests() -> None:
    assert short_name(f"pulling {DIGEST} now") == "pulling sha256:abababababab now"
    assert short_name("RUN <<EOF\n  echo\x1b[2J hi\nEOF") == "RUN <<EOF echo hi EOF"
    assert len(short_name("x" * 100_000)) == 400
    assert short_name("sha256:zz") == "sha256:zz"


def test_transfers_are_told_at_intervals_and_at_their_end() -> None:
    progress, out, clock = plain()
    progress.emit(Vertex("v", "pull", started_ns=T0))
    for second in range(5):
        clock.now_ns = T0 + second * S
        progress.emit(VertexStatus("v", DIGEST, DIGEST, second * 10_000_000, 40_100_000, T0))
    progress.emit(VertexStatus("v", DIGEST, DIGEST, 40_100_000, 40_100_000, T0, T0 + 4 * S))
    progress.emit(VertexStatus("v", DIGEST, DIGEST, 40_100_000, 40_100_000, T0, T0 + 4 * S))
    assert out.getvalue().splitlines() == [
        "#1 pull",
        "#1 sha256:abababababab 20.0MB / 40.1MB 2.0s",
        "#1 sha256:abababababab 40.0MB / 40.1MB 4.0s",
        "#1 sha256:abababababab 40.1MB / 40.1MB 4.0s done",
    ]


def test_a_status_without_sizes_has_none() -> None:
    progress, out, _ = plain()
    progress.emit(Vertex("v", "export", started_ns=T0))
    progress.emit(VertexStatus("v", "w", "writing manifest", started_ns=T0, completed_ns=T0 + S // 2))
    assert out.getvalue().splitlines()[1] == "#1 writing manifest 0.5s done"


def test_warnings_carry_their_detail() -> None:
    progress, out, _ = plain()
    progress.emit(started())
    progress.emit(VertexWarning("v", "no newline at the end", "Containerfile:3\nsecond"))
    progress.emit(VertexWarning("elsewhere", "general"))
    assert out.getvalue().splitlines()[1:] == [
        "#1 WARN: no newline at the end",
        "#1   Containerfile:3",
        "#1   second",
        "WARN: general",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1000, "1kB"),
        (1536, "1.54kB"),
        (12_345_678, "12.3MB"),
        (5e9, "5GB"),
        (3e15, "3000.0TB"),
    ],
)
def test_format_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text


def test_quiet_writes_nothing_unless_a_step_fails() -> None:
    out = io.StringIO()
    with make_progress("quiet", out, {}) as progress:
        for event in (started(), log(b"fine\n"), VertexWarning("v", "w"), ended()):
            progress.emit(event)
    assert out.getvalue() == ""
    with make_progress("quiet", out, {}) as progress:
        for event in (started(), log(b"oops\n"), ended("exit status 1")):
            progress.emit(event)
    progress.close()
    assert out.getvalue() == "------\n > [2/4] RUN make:\noops\n------\n"


@pytest.mark.parametrize("mode", ["plain", "tty"])
def test_the_last_output_of_a_failed_step_comes_at_the_end(mode: str) -> None:
    out = io.StringIO()
    with make_progress(mode, out, {"NO_COLOR": "1"}) as progress:
        for event in (started(), log(b"oops\n"), ended("exit status 1")):
            progress.emit(event)
    assert out.getvalue().endswith("------\n > [2/4] RUN make:\noops\n------\n")


def test_rawjson_stays_json_when_a_step_fails() -> None:
    out = io.StringIO()
    with make_progress("rawjson", out, {}) as progress:
        for event in (started(), log(b"oops\n"), ended("exit status 1")):
            progress.emit(event)
    assert len([json.loads(line) for line in out.getvalue().splitlines()]) == 3


def test_rawjson_is_one_object_a_line() -> None:
    out = io.StringIO()
    progress = make_progress("rawjson", out, {}, clock=Clock())
    progress.emit(Vertex("v", "RUN\nx", ("u",), started_ns=T0 + 5))
    progress.emit(log(b"\xff\n"))
    progress.emit(VertexStatus("v", DIGEST, "layer", 1, 2, T0))
    progress.emit(VertexWarning("v", "careful", "a\nb"))
    progress.emit(ended("exit status 1"))
    records = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [next(iter(r)) for r in records] == ["vertexes", "logs", "statuses", "warnings", "vertexes"]
    first, said, status, warning, last = (next(iter(r.values()))[0] for r in records)
    assert first == {"digest": "v", "name": "RUN\nx", "inputs": ["u"], "started": "2023-11-14T22:13:20.000000005Z"}
    assert base64.b64decode(said["data"]) == b"\xff\n"
    assert (said["vertex"], said["stream"]) == ("v", 1)
    assert (status["id"], status["current"], status["total"]) == (DIGEST, 1, 2)
    assert [base64.b64decode(d) for d in warning["detail"]] == [b"a", b"b"]
    assert last["error"] == "exit status 1"
    assert last["completed"].startswith("2023-11-14T22:13:21")


class Broken(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.tries = 0

    def write(self, text: str) -> int:
        self.tries += 1
        raise BrokenPipeError


@pytest.mark.parametrize("mode", ["plain", "rawjson", "tty"])
def test_a_reader_that_has_gone_is_left_alone(mode: str) -> None:
    out = Broken()
    progress = make_progress(mode, out, {})
    with progress:
        for event in (started(), log(b"x\n"), ended("exit status 1")):
            progress.emit(event)
    assert out.tries == 1
    assert "x\n" in progress._report()


def test_a_closed_stream_does_not_raise() -> None:
    progress, out, _ = plain()
    out.close()
    progress.emit(started())
    assert resolve_mode("auto", out, {"TERM": "xterm"}) == "plain"


def test_many_threads_may_emit() -> None:
    progress, out, _ = plain()

    def work(number: int) -> None:
        name = str(number)
        progress.emit(Vertex(name, name, started_ns=T0))
        for n in range(200):
            progress.emit(log(b"%d\n" % n, vertex=name))
        progress.emit(Vertex(name, name, started_ns=T0, completed_ns=T0 + S))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = out.getvalue().splitlines()
    assert len([line for line in lines if line]) == 8 * 202
    for number in range(1, 9):
        mine = [line.split(" ", 2)[2] for line in lines if line.startswith(f"#{number} 0.125")]
        assert mine == [str(n) for n in range(200)]


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({"TERM": "xterm"}, "tty"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "tty"),
        ({"TERM": "xterm", "CI": "true"}, "plain"),
        ({"TERM": "dumb"}, "plain"),
        ({}, "plain"),
    ],
)
def test_auto_on_a_terminal(environ: dict[str, str], mode: str) -> None:
    assert resolve_mode("auto", Terminal(), environ) == mode


def test_auto_elsewhere_is_plain_and_a_wish_is_granted() -> None:
    assert resolve_mode("auto", io.StringIO(), {"TERM": "xterm"}) == "plain"
    assert resolve_mode("rawjson", Terminal(), {"TERM": "xterm"}) == "rawjson"


def test_an_unknown_mode_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'fancy': expected one of auto, tty, plain, quiet, rawjson"):
        make_progress("fancy", io.StringIO(), {})


def test_plain_mode_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from builder.cli.progress import make_progress\n"
        "make_progress('plain', sys.stderr, {})\n"
        "print(sorted({'tqdm', 'threading', 'json', 'unicodedata'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
