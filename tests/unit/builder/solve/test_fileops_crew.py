"""The threads of a copy: every task once, the first failure to the submitter, nothing left behind."""

from __future__ import annotations

import os
import threading
import time

import pytest

from builder.errors import ContextError
from builder.solve.crew import Crew
from tests.unit.builder.solve.conftest import Trees


class Task:
    def __init__(self, log: list[str], name: str, *, fails: bool = False, slow: bool = False) -> None:
        self.log = log
        self.name = name
        self.fails = fails
        self.slow = slow

    def run(self) -> None:
        if self.slow:
            time.sleep(0.01)
        if self.fails:
            raise ValueError(self.name)
        self.log.append(f"run {self.name}")

    def drop(self) -> None:
        self.log.append(f"drop {self.name}")


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_every_task_is_run_once(threads: int, count: int) -> None:
    log: list[str] = []
    before = set(threading.enumerate())
    with Crew(threads_max=threads) as crew:
        for number in range(count):
            crew.submit(Task(log, str(number), slow=number % 10 == 0))
    assert sorted(log) == sorted(f"run {number}" for number in range(count))
    assert set(threading.enumerate()) <= before


MANY = 1_000_000
"""More than can be handed over while the first few are done, however busy the machine is."""


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_failure_reaches_the_submitter_and_the_rest_is_dropped(threads: int) -> None:
    log: list[str] = []
    submitted = 0
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="bad"), Crew(threads_max=threads) as crew:
        crew.submit(Task(log, "first"))
        crew.submit(Task(log, "bad", fails=True))
        for number in range(MANY):
            submitted += 1
            crew.submit(Task(log, str(number)))
            time.sleep(0.0001)
    assert set(threading.enumerate()) <= before
    # All that was handed over was either run or dropped; `bad` did neither.
    assert len(log) == submitted + 1
    assert submitted < MANY


def test_a_failure_of_the_submitter_drops_what_waits() -> None:
    log: list[str] = []
    with pytest.raises(KeyError), Crew(threads_max=1, eager=100) as crew:
        crew.submit(Task(log, "waiting"))
        raise KeyError
    assert log == ["drop waiting"]


def test_a_tree_of_many_files_copied_by_several_threads(trees: Trees, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    files = {f"d{n % 23}/e{n % 5}/f{n}": str(n) for n in range(3000)}
    trees.given(files)
    for number in range(0, 3000, 100):
        os.utime(trees.source / f"d{number % 23}/e{number % 5}", (number, number))
    stats = trees.copy("/", "/x")
    result = trees.result
    assert {path.removeprefix("x/"): text for path, text in result.items() if text is not None} == files
    assert stats == (len(result) - 1, sum(map(len, files.values())))
    for path, text in result.items():
        if text is None and path != "x":
            source = trees.source / path.removeprefix("x/")
            assert (trees.dest / path).stat().st_mtime_ns == source.stat().st_mtime_ns, path


def test_a_failure_amid_many_threads_leaves_no_descriptor_open(trees: Trees, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    trees.given({f"d{n % 23}/e{n % 5}/f{n}": str(n) for n in range(2000)}, {"x/d7/e2/f1387": None})
    with pytest.raises(ContextError, match="cannot replace to directory /x/d7/e2/f1387 with file"):
        trees.copy("/", "/x")
