"""What `ps` shows and chooses, and how paths of `cp` are read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from builder.cli import containers, upkeep, watch
from builder.cli.images import print_table
from builder.container.events import Event
from builder.container.records import Record
from builder.errors import UsageError


def ago_ns(seconds: int) -> int:
    return time.time_ns() - seconds * 10**9


def record(tmp_path: Path, **state: Any) -> Record:
    found = Record(tmp_path / ("a" * 64))
    found.settings = {
        "name": "web", "image": "app:1", "image_id": "sha256:abc", "created_ns": ago_ns(7200),
        "config": {"Labels": {"tier": "front"}}, "volumes": [{"name": "data", "target": "/data"}],
        "sandbox": {"args": ["sh", "-c", "a long command of many words"], "network": "private"},
    }  # fmt: skip
    found.state = {"status": "exited", "exit_code": 3, "finished_ns": ago_ns(65), **state}
    return found


def test_a_row_has_dockers_words(tmp_path: Path) -> None:
    row = containers._fields(record(tmp_path), False)
    assert row["ID"] == "a" * 12
    assert row["Command"] == '"sh -c a long comman…"'
    assert row["RunningFor"] == "2 hours ago"
    assert row["Status"] == "Exited (3) 1 minute ago"
    running = record(tmp_path, status="running", pid=1, started_ns=ago_ns(3 * 86400),
                     ports=[["0.0.0.0", 80, 8080, "tcp"]], health={"Status": "healthy"})  # fmt: skip
    row = containers._fields(running, True)
    assert row["Status"] == "Up 3 days (healthy)"
    assert row["Ports"] == "0.0.0.0:80->8080/tcp"
    assert containers.status_line(record(tmp_path, status="created")) == "Created"
    assert containers.status_line(record(tmp_path, status="restarting")) == "Restarting (3)"


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("id=aaa", True), ("id=b", False), ("name=we", True), ("name=db", False), ("label=tier", True),
        ("label=tier=front", True), ("label=tier=back", False), ("status=exited", True), ("status=running", False),
        ("exited=3", True), ("exited=0", False), ("ancestor=app", True), ("ancestor=app:1", True),
        ("ancestor=abc", True), ("ancestor=other", False), ("volume=data", True), ("volume=/data", True),
        ("volume=x", False), ("health=none", True), ("health=healthy", False),
    ],
)  # fmt: skip
def test_filters(tmp_path: Path, text: str, fits: bool) -> None:
    assert containers._test(tmp_path, text)(record(tmp_path)) is fits


def test_unknown_filters_are_refused(tmp_path: Path) -> None:
    for text in ("colour=red", "running"):
        with pytest.raises(UsageError, match="filter"):
            containers._test(tmp_path, text)
    with pytest.raises(UsageError, match="filter"):
        watch._event_tests(["colour=red"])


def test_filters_of_events() -> None:
    event = Event(5, "container", "health_status: healthy", "abc", {"name": "web", "image": "app:1", "tier": "front"})
    fitting = ("event=health_status", "image=app", "container=web", "container=ab", "label=tier", "type=container")
    for text in (*fitting, "event=die", "volume=web", "label=tier=back"):
        (tests,) = watch._event_tests([text]).values()
        assert tests[0](event) is (text in fitting), text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("web:/etc", ("web", "/etc")), ("web:", ("web", "")), ("./web:/etc", (None, "./web:/etc")),
        ("/a:b", (None, "/a:b")), ("a/b:c", (None, "a/b:c")), ("file", (None, "file")), ("-", (None, "-")),
        (":x", (None, ":x")),
    ],
)  # fmt: skip
def test_paths_of_cp(text: str, parts: tuple[str | None, str]) -> None:
    assert upkeep._split(text) == parts


def test_what_a_process_calls_itself_does_not_steer_a_terminal() -> None:
    assert watch._printable("sh\x1b[2J\n\u202e") == "sh?[2J??"


def test_what_an_image_says_of_itself_sends_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([["COMMAND", "NAME"], ["sh\x1b]0;title\x07\x1b[2J -c\nnext\u202e\x9b31m", "\udcff\r\x08web"]])
    assert capsys.readouterr().out == "COMMAND      NAME\nsh -c next   web\n"
