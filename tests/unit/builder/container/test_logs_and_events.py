"""What containers say and what happens to them, kept in files of bounded size."""

from __future__ import annotations

import os
from pathlib import Path

from builder.container import events, logs
from builder.container.logs import LogWriter


def said(path: Path, **options: object) -> list[tuple[int, bytes]]:
    return [(piece.stream, piece.data) for piece in logs.read(path, **options)]  # type: ignore[arg-type]


def test_pieces_keep_their_order_and_their_bytes(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log")
    writer.write(1, b"one\ntwo", 1)
    writer.write(2, b"\xff\0\n", 2)
    writer.write(1, b"\r\n", 3)
    writer.close()
    pieces = [(1, b"one\n"), (1, b"two"), (2, b"\xff\0\n"), (1, b"\r\n")]
    assert said(tmp_path / "log") == pieces
    assert said(tmp_path / "log", since_ns=2, until_ns=2) == pieces[2:3]
    assert said(tmp_path / "log", tail=1) == pieces[3:]
    assert said(tmp_path / "log", tail=0) == []
    assert said(tmp_path / "absent") == []


def test_a_log_is_bounded(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log", max_bytes=4096)
    for number in range(1000):
        writer.write(1, b"line %d\n" % number, number)
    writer.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4096
    found = said(tmp_path / "log")
    assert found[-1] == (1, b"line 999\n")
    assert [data for _, data in found] == [b"line %d\n" % n for n in range(1000 - len(found), 1000)]
    silent = LogWriter(tmp_path / "none", max_bytes=0)
    silent.write(1, b"unheard\n")
    assert not (tmp_path / "none").exists()


def test_what_a_killed_writer_left_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"t": 1, "s": "o", "d": "good\\n"}\n{"t": 2, "s"')
    writer = LogWriter(path)
    writer.write(1, b"next\n", 3)
    writer.close()
    with path.open("ab") as stream:
        stream.write(b'null\n[]\n{"t": "x"}\n{"d": 5, "t": 1, "s": "o"}\n')
    assert said(path) == [(1, b"good\n"), (1, b"next\n")]


def test_a_follower_sees_the_change_of_files(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = LogWriter(path, max_bytes=2000)
    rounds = iter(range(60))
    seen: list[bytes] = []

    def going() -> bool:
        number = next(rounds, None)
        if number is not None:
            writer.write(1, b"line %d\n" % number)
        return number is not None

    seen += [piece.data for piece in logs.read(path, follow=going)]
    assert seen == [b"line %d\n" % number for number in range(60)]
    assert (tmp_path / "log.1").exists()


def test_a_writer_that_finds_no_room_goes_on(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    writer = LogWriter(tmp_path / "log")
    writer.write(1, b"lost\n")
    assert writer.lost_bytes == 5


def test_events_are_kept_in_order_and_bounded(tmp_path: Path) -> None:
    for number in range(50):
        events.tell(tmp_path, "container", "start", f"id{number}", {"name": f"n{number}"})
    found = list(events.read(tmp_path))
    assert [event.id for event in found] == [f"id{number}" for number in range(50)]
    assert found[0].attributes == {"name": "n0"}
    middle = found[20].time_ns
    assert next(events.read(tmp_path, since_ns=middle)).id == "id20"
    assert [event.id for event in events.read(tmp_path, until_ns=middle)][-1] == "id20"
    for _ in range(80):
        events.tell(tmp_path, "container", "big", "x", {"name": "y" * 30_000})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * events.MAX_BYTES
    events.tell(tmp_path, "container", "huge", "x", {"name": "short", "label": "y" * 100_000})
    assert list(events.read(tmp_path))[-1].attributes == {"name": "short"}


def test_an_event_never_keeps_its_cause_from_happening(tmp_path: Path) -> None:
    events.tell(tmp_path / "absent", "container", "start", "id", {})
    (tmp_path / "events").mkdir()
    events.tell(tmp_path, "container", "start", "id", {})
    os.rmdir(tmp_path / "events")
    (tmp_path / "events").write_bytes(b'{}\nnull\n{"t": 1, "type": "a", "do": "b", "id": "c", "with": {}}\nhalf')
    assert [event.id for event in events.read(tmp_path)] == ["c"]
