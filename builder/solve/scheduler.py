"""Threads for the solver: `run_graph` runs jobs that wait on each other, `Workers` runs tasks in the background.

Hand-made, since `concurrent.futures` costs 7 ms at the first build of a process, for its logging. The job
with the longest way still before it goes first. When one fails nothing new starts, those under way
are told to stop (`Stop`), and the first failure is raised once all have ended.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from heapq import heappop, heappush

from layers.errors import Cancelled
from layers.values import Generic, TypeVar

T = TypeVar("T")

_POLL_S = 0.1
"""How often the waiting thread looks up, for signals, cancellation and drawing."""


class Stop:
    """Tells the jobs under way to end. `fd` becomes readable then, for those that poll descriptors."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled
        self._set = False
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        self._set = True
        os.eventfd_write(self.fd, 1)

    def asked(self) -> bool:
        """Whether the caller wants an end, whatever became of the jobs."""
        return self._cancelled()

    def __call__(self) -> bool:
        return self._set or self._cancelled()

    def close(self) -> None:
        os.close(self.fd)


def run_graph(
    inputs: Mapping[int, Collection[int]],
    work: Callable[[int], None],
    *,
    jobs: int,
    stop: Stop,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Call `work` for every key, once the keys that it waits for are done, on up to `jobs` threads.

    `inputs` that are not keys themselves count as done. The calling thread only waits; `tick` is called from
    it some times a second. Raises: what `work` raised first; Cancelled when `stop` says so.
    """
    _Run(inputs, work, stop).run(min(jobs, len(inputs)), tick)


class _Run:
    def __init__(self, inputs: Mapping[int, Collection[int]], work: Callable[[int], None], stop: Stop) -> None:
        self._work = work
        self._stop = stop
        self._changed = threading.Condition()
        self._left = len(inputs)
        self._running = 0
        self._failures: list[BaseException] = []
        self._blocked: dict[int, int] = {}
        self._users: dict[int, list[int]] = {key: [] for key in inputs}
        for key, wanted in inputs.items():
            waits = {i for i in wanted if i in inputs}
            self._blocked[key] = len(waits)
            for i in waits:
                self._users[i].append(key)
        self._height = self._heights()
        self._ready: list[tuple[int, int]] = []
        for key, count in self._blocked.items():
            if not count:
                heappush(self._ready, (-self._height[key], key))

    def _heights(self) -> dict[int, int]:
        """How many jobs lie on the longest way from each to an end. Linear: Kahn's order, then backwards."""
        counts = dict(self._blocked)
        order = [key for key, count in counts.items() if not count]
        for key in order:
            for user in self._users[key]:
                counts[user] -= 1
                if not counts[user]:
                    order.append(user)
        if len(order) != len(self._blocked):
            raise ValueError("the jobs wait for each other in a circle")
        heights: dict[int, int] = {}
        for key in reversed(order):
            heights[key] = 1 + max((heights[user] for user in self._users[key]), default=0)
        return heights

    def run(self, count: int, tick: Callable[[], None]) -> None:
        threads = [threading.Thread(target=self._thread, name=f"step-{n}") for n in range(count)]
        try:
            for thread in threads:
                thread.start()
            with self._changed:
                while self._left and not self._failures:
                    self._changed.wait(_POLL_S)
                    tick()
                    if self._stop.asked():
                        raise Cancelled
        except BaseException as e:  # noqa: BLE001 - an interrupt, too, waits for the threads; raised below
            self._fail(e)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        if self._failures:
            raise self._failures[0]

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failures.append(error)
            self._stop.set()
            self._changed.notify_all()

    def _thread(self) -> None:
        while True:
            with self._changed:
                while not self._ready and self._left and not self._failures:
                    self._changed.wait()
                if not self._ready or self._failures:
                    return
                key = heappop(self._ready)[1]
            try:
                self._work(key)
            except BaseException as e:  # noqa: BLE001 - the thread's boundary: raised again by `run`
                self._fail(e)
                return
            with self._changed:
                self._left -= 1
                for user in self._users[key]:
                    self._blocked[user] -= 1
                    if not self._blocked[user]:
                        heappush(self._ready, (-self._height[user], user))
                self._changed.notify_all()


class Task(Generic[T]):
    """Work that a thread of `Workers` does, and what came of it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._done = threading.Event()
        self._value: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._value.append(self._work())
        except BaseException as e:  # noqa: BLE001 - the thread's boundary: raised again by `result`
            self._error = e
        self._done.set()

    def drop(self) -> None:
        self._error = Cancelled()
        self._done.set()

    def done(self) -> bool:
        return self._done.is_set()

    def result(self) -> T:
        """Wait for the end. Raises: what the work raised; Cancelled if it was dropped."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value[0]


class Workers:
    """Up to `count` threads, each started when there is something to do. Thread-safe; to be closed."""

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[Task[object]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def submit(self, work: Callable[[], T]) -> Task[T]:
        """Begin `work` as soon as a thread is free."""
        task = Task(work)
        with self._changed:
            self._waiting.append(task)  # type: ignore[arg-type]  # nobody puts another result into it
            if not self._idle and len(self._threads) < self._count:
                thread = threading.Thread(target=self._thread, name=f"{self._name}-{len(self._threads)}")
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
        return task

    def _thread(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._waiting and not self._closed:
                    self._changed.wait()
                self._idle -= 1
                if not self._waiting:
                    return
                task = self._waiting.popleft()
            task.run()

    def finish(self) -> None:
        """Do all that was submitted, and close. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Drop what has not begun, wait for what has. Idempotent."""
        with self._changed:
            self._closed = True
            dropped = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for task in dropped:
            task.drop()
        for thread in self._threads:
            thread.join()
