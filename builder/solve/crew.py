"""A few threads for tasks that spend their time in the kernel, with the submitter working along.

The kernel makes files in different directories on several processors at once, and hashing lets the
GIL go; Python in between costs little. Tasks are queued up to a bound, beyond which the submitter
runs one itself, so that descriptors held by waiting tasks stay few. Without enough to do, no
thread is started.
"""

from __future__ import annotations

import os
import threading
from collections import deque

from layers.values import Protocol

_WAITING_MAX = 16


class Task(Protocol):
    """Something to do; `drop` is called instead of `run` when another task has failed."""

    def run(self) -> None: ...

    def drop(self) -> None: ...


class Crew:
    """Runs tasks, in any order. A context manager: leaving it waits for all of them.

    The first failure is raised to the submitter, by `submit` or at the end; what has not begun then
    is dropped. `eager` tasks wait before the first thread is started.
    """

    def __init__(self, *, eager: int = 2, threads_max: int | None = None) -> None:
        self._threads_max = min(4, os.cpu_count() or 1) - 1 if threads_max is None else threads_max
        self._eager = eager
        self._waiting: deque[Task] = deque()
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None

    def submit(self, task: Task) -> None:
        """Have `task` run, at once or later. Raises: what an earlier task raised."""
        with self._changed:
            if self._failure is None and len(self._waiting) < _WAITING_MAX and self._threads_max > 0:
                self._waiting.append(task)
                if len(self._threads) < self._threads_max and len(self._waiting) > self._eager:
                    thread = threading.Thread(target=self._work, name=f"crew-{len(self._threads)}", daemon=True)
                    self._threads.append(thread)
                    thread.start()
                self._changed.notify()
                return
        self._run(task)
        self._raise()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self, task: Task) -> None:
        if self._failure is not None:
            task.drop()
            return
        try:
            task.run()
        except BaseException as e:  # noqa: BLE001  a thread's boundary: raised again by the submitter
            with self._changed:
                self._failure = self._failure or e

    def _next(self, *, wait: bool) -> Task | None:
        with self._changed:
            while not self._waiting:
                if not wait or self._closing:
                    return None
                self._changed.wait()
            return self._waiting.popleft()

    def _work(self) -> None:
        while (task := self._next(wait=True)) is not None:
            self._run(task)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            with self._changed:
                self._failure = self._failure or error
        while (task := self._next(wait=False)) is not None:
            self._run(task)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        if error is None:
            self._raise()
