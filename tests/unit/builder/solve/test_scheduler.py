"""The scheduler's threads: order, parallelism, the first failure, stopping, cancelling."""

from __future__ import annotations

import select
import threading
import time

import pytest

from builder.solve.scheduler import Stop, Workers, run_graph
from layers.errors import Cancelled


def never() -> bool:
    return False


def test_a_job_runs_after_those_that_it_waits_for() -> None:
    done: list[int] = []
    run_graph({3: [1, 2], 1: [0], 2: [0, 99], 0: []}, done.append, jobs=3, stop=Stop(never))
    assert done[0] == 0
    assert done[-1] == 3
    assert sorted(done) == [0, 1, 2, 3]


def test_independent_jobs_run_at_once() -> None:
    meeting = threading.Barrier(2, timeout=120)

    def meet(_: int) -> None:
        meeting.wait()

    run_graph({0: [], 1: []}, meet, jobs=2, stop=Stop(never))


def test_no_more_jobs_at_once_than_asked_for() -> None:
    now, most, lock = 0, 0, threading.Lock()

    def work(_: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1

    run_graph({n: [] for n in range(8)}, work, jobs=2, stop=Stop(never))
    assert most <= 2


def test_the_longest_way_goes_first() -> None:
    done: list[int] = []
    run_graph({0: [], 1: [], 2: [1], 3: [2]}, done.append, jobs=1, stop=Stop(never))
    assert done[0] == 1


def test_a_failure_stops_the_others_and_is_raised() -> None:
    stop = Stop(never)
    started = threading.Event()
    told: list[bool] = []

    def work(number: int) -> None:
        if number == 0:
            started.wait(120)
            raise ValueError("first")
        if number == 1:
            started.set()
            # As a RUN does: it sleeps on a descriptor, not in a loop.
            told.append(bool(select.select([stop.fd], [], [], 120)[0]))
            raise Cancelled
        raise AssertionError("a job started after the failure")

    with pytest.raises(ValueError, match="first"):
        run_graph({0: [], 1: [], 2: [0], 3: [1]}, work, jobs=2, stop=stop)
    assert told == [True]


def test_cancelling_ends_the_jobs() -> None:
    asked = threading.Event()
    stop = Stop(asked.is_set)

    def work(_: int) -> None:
        asked.set()
        while not stop():
            time.sleep(0.005)
        raise Cancelled

    with pytest.raises(Cancelled):
        run_graph({0: [], 1: []}, work, jobs=2, stop=stop)


def test_the_calling_thread_ticks() -> None:
    ticked = threading.Event()
    waited: list[bool] = []
    run_graph({0: []}, lambda _: waited.append(ticked.wait(120)), jobs=1, stop=Stop(never), tick=ticked.set)
    assert waited == [True]


def test_a_circle_is_refused() -> None:
    with pytest.raises(ValueError, match="circle"):
        run_graph({0: [1], 1: [0]}, lambda _: None, jobs=1, stop=Stop(never))


def test_two_thousand_steps_are_scheduled_in_no_time() -> None:
    graph = {n: [n - 1] if n % 10 else [] for n in range(2000)}
    done: list[int] = []
    run_graph(graph, done.append, jobs=4, stop=Stop(never))
    assert len(done) == 2000


def test_workers_give_results_and_errors() -> None:
    workers = Workers(2, "test")
    task = workers.submit(lambda: 42)
    bad = workers.submit(lambda: 1 // 0)
    assert task.result() == 42
    with pytest.raises(ZeroDivisionError):
        bad.result()
    workers.close()
    workers.close()


def test_closed_workers_drop_what_has_not_begun() -> None:
    workers = Workers(1, "test")
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        go_on.wait(20)
        return "done"

    first = workers.submit(slow)
    second = workers.submit(lambda: "never")
    begun.wait(20)
    closer = threading.Thread(target=workers.close)
    closer.start()
    with pytest.raises(Cancelled):
        second.result()
    go_on.set()
    closer.join()
    assert first.result() == "done"
