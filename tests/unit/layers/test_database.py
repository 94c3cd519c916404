"""The store's database by itself: transactions, errors in the user's words, several users at once."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from layers import database as database_module
from layers.database import Database, boot_id
from layers.errors import ForeignStore, StoreError
from tests.support.machine import CHECKOUT


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "store.db")
    yield opened
    opened.close()


def put(database: Database, key: str) -> None:
    with database.write() as c:
        c.execute("INSERT INTO meta VALUES(?, 1)", (key,))


def test_a_transaction_is_all_or_nothing(database: Database) -> None:
    with pytest.raises(ValueError, match="stop"), database.write() as c:
        c.execute("INSERT INTO meta VALUES('half', 1)")
        raise ValueError("stop")
    assert "half" not in database.meta()
    put(database, "whole")
    assert database.meta()["whole"] == 1


def test_a_synced_commit_is_followed_by_unsynced_ones(database: Database) -> None:
    for sync in (True, False):
        with database.write(sync=sync) as c:
            assert c.execute("PRAGMA synchronous").fetchone()[0] == (2 if sync else 1)
    assert database.row("PRAGMA synchronous") == (1,)
    assert database.row("PRAGMA journal_mode") == ("wal",)


def test_threads_take_turns(database: Database) -> None:
    def work(number: int) -> None:
        for i in range(50):
            put(database, f"{number}-{i}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("-" in key for key in database.meta()) == 200


def test_a_writer_that_never_ends(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_BUSY_TIMEOUT_S", 0.1)
    other = Database(tmp_path / "store.db")
    try:
        with database.write(), pytest.raises(StoreError, match="locked"):
            put(other, "late")
        put(other, "now")
    finally:
        other.close()


def test_mistakes_in_sql_are_store_errors_that_name_the_file(database: Database, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=str(tmp_path)) as e:
        database.rows("SELECT nonsense FROM nowhere")
    assert isinstance(e.value.__cause__, sqlite3.Error)


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "store.db").mkdir()
    with pytest.raises(StoreError, match="cannot write to the store") as e:
        Database(tmp_path / "store.db")
    assert e.value.hint is not None and str(os.geteuid()) in e.value.hint


def test_integrity(database: Database, tmp_path: Path) -> None:
    for i in range(500):
        put(database, f"key{i}")
    assert database.check() == []
    database.close()
    with (tmp_path / "store.db").open("r+b") as f:
        f.seek(4096 * 3)
        f.write(b"\xee" * 4096 * 4)
    damaged = Database(tmp_path / "store.db")
    try:
        assert damaged.check()
    finally:
        damaged.close()


def test_the_boot_has_a_name() -> None:
    assert boot_id() == boot_id() != ""


def test_a_changed_schema_has_a_version_of_its_own() -> None:
    """Whoever changes the tables, or what is in them, counts SCHEMA_VERSION up and puts the new digest here."""
    digests = {1: "e8ebd67f8c7aa56b312dc608ba8d780a118ca3ffdd7a1ad00d2f3a6cab482ab5"}
    words = " ".join(database_module._SCHEMA.split())
    assert hashlib.sha256(words.encode()).hexdigest() == digests[database_module.SCHEMA_VERSION]


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "store.db")
    connection.execute("CREATE TABLE cats(name)")
    connection.execute("PRAGMA user_version=1")
    connection.close()
    with pytest.raises(ForeignStore, match="something else"):
        Database(tmp_path / "store.db")


def _make_many(directory: Path, together: Barrier) -> None:
    for n in range(150):
        together.wait(30)
        Database(directory / f"{n}.db").close()


def test_several_may_make_the_store_at_once(tmp_path: Path) -> None:
    """Changing the journal's mode is the one lock that SQLite does not wait for."""
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)
    makers = [context.Process(target=_make_many, args=(tmp_path, together)) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    assert [maker.exitcode for maker in makers] == [0, 0]


def test_a_connection_that_was_left_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    script = (
        "import os, sys; from pathlib import Path; from layers.database import Database\n"
        "database = Database(Path(sys.argv[1]))\n"
        "with database.write() as c:\n"
        "    c.execute(\"INSERT INTO meta VALUES('left', ?)\", (sys.argv[2] * int(sys.argv[3]),))\n"
        "database.let_go(); database.close(); os._exit(0)"
    )

    def leave(times: int) -> None:
        subprocess.run([sys.executable, "-c", script, str(path), "x", str(times)], check=True, cwd=CHECKOUT)

    log = tmp_path / "store.db-wal"
    leave(1)
    assert log.stat().st_size > 0
    with closing(Database(path)) as database:
        assert database.meta()["left"] == "x"
        with database.write() as c:
            c.execute("DELETE FROM meta WHERE key='left'")
    assert not log.exists()
    leave(1 << 19)  # a log that long is nobody else's to read
    assert not log.exists()
    with closing(Database(path)) as database:
        assert database.meta()["left"] == "x" * (1 << 19)
