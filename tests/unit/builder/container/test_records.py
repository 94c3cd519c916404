"""What is known of a container on disk: names, locks, damage, and the end that a full disk kept from the state."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from builder.container import records
from builder.container.records import EXIT_ROOM_BYTES, ContainerError, NoSuchContainer, Record


def made(root: Path, id: str, name: str, **state: object) -> Record:
    record = records.create(root, id, name)
    record.settings = {"name": name, "created_ns": int(id[0], 16), "kind": "run"}
    record.save_settings()
    record.save_state(status="created", **state)
    return record


def test_a_container_is_found_by_name_id_and_beginning(tmp_path: Path) -> None:
    one = made(tmp_path, "a" * 64, "web")
    made(tmp_path, "ab" + "c" * 62, "db")
    assert records.find(tmp_path, "web").id == one.id
    assert records.find(tmp_path, "a" * 64).name == "web"
    assert records.find(tmp_path, "ab").name == "db"
    with pytest.raises(ContainerError, match="beginning of 2"):
        records.find(tmp_path, "a")
    for word in ("nosuch", "../web", "", "-x", "we b"):
        with pytest.raises(NoSuchContainer):
            records.find(tmp_path, word)
    assert {record.name for record in records.every(tmp_path)} == {"web", "db"}


def test_a_name_belongs_to_one(tmp_path: Path) -> None:
    made(tmp_path, "1" * 64, "web")
    with pytest.raises(ContainerError, match="in use"):
        records.create(tmp_path, "2" * 64, "web")
    assert not (tmp_path / "containers" / ("2" * 64)).exists()
    for name in ("", "a/b", ".hidden", "-flag", "x" * 200, "new\nline"):
        with pytest.raises(ContainerError, match="no name"):
            records.check_name(name)
    records.drop_name(tmp_path, "web", "3" * 64)  # another's
    with pytest.raises(ContainerError, match="in use"):
        records.take_name(tmp_path, "web", "2" * 64)
    records.drop_name(tmp_path, "web", "1" * 64)
    records.take_name(tmp_path, "web", "2" * 64)


def test_who_looks_at_a_lock_keeps_nobody_from_it(tmp_path: Path) -> None:
    record = made(tmp_path, "1" * 64, "web")
    lock = record.lock()
    assert lock is not None
    assert record.locked()
    assert record.lock() is None
    os.close(lock)
    look = os.open(record.path("lock"), os.O_RDWR)
    fcntl.flock(look, fcntl.LOCK_SH)  # `ps`, in the middle of its look
    threading.Timer(0.05, os.close, [look]).start()
    taken = record.lock()
    assert taken is not None
    os.close(taken)


def test_an_abandoned_name_can_be_taken(tmp_path: Path) -> None:
    records.create(tmp_path, "1" * 64, "web")  # killed before it had settings
    with pytest.raises(ContainerError, match="in use"):
        records.take_name(tmp_path, "web", "2" * 64)
    os.utime(tmp_path / "containers" / ("1" * 64), (0, 0))
    records.take_name(tmp_path, "web", "2" * 64)


def test_a_state_without_a_monitor_is_that_of_a_dead_one(tmp_path: Path) -> None:
    record = made(tmp_path, "1" * 64, "web")
    lock = record.lock()
    assert lock is not None
    assert record.lock() is None
    record.save_state(status="running", pid=4, started_ns=7)
    assert records.find(tmp_path, "web").status == "running"
    assert record.locked()
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)
    found = records.find(tmp_path, "web")
    assert (found.status, found.state["exit_code"], found.running) == ("exited", 137, False)
    assert "killed" in found.state["error"]


def test_the_end_is_told_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = made(tmp_path, "1" * 64, "web")
    record.path("exit").write_bytes(b" " * EXIT_ROOM_BYTES)
    record.save_state(status="running", pid=4, started_ns=7)

    def full(path: Path, document: object) -> None:
        raise ContainerError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(records, "write_document", full)
    record.save_end(status="exited", exit_code=3, pid=0)
    monkeypatch.undo()
    found = records.find(tmp_path, "web")
    assert (found.status, found.state["exit_code"]) == ("exited", 3)
    assert record.path("exit").stat().st_size == EXIT_ROOM_BYTES


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\xff"])
def test_a_damaged_container_is_named_and_left_out(tmp_path: Path, text: str) -> None:
    made(tmp_path, "1" * 64, "good")
    record = made(tmp_path, "2" * 64, "bad")
    record.path("settings.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ContainerError, match=r"settings\.json"):
        records.find(tmp_path, "bad")
    assert [found.name for found in records.every(tmp_path)] == ["good"]


def test_a_document_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    records.write_document(path, {"a": 1})
    records.write_document(path, {"b": 2})
    assert json.loads(path.read_bytes()) == {"b": 2}
    assert os.listdir(tmp_path) == ["state.json"]
    with pytest.raises(NoSuchContainer):
        records.write_document(tmp_path / "gone" / "state.json", {})
