"""HEALTHCHECK: the command that a container's image names, run inside from time to time by the monitor.

States as docker has them: `starting` until the first success, `healthy`, and `unhealthy` after so many
failures in a row; failures within the start period do not count. https://docs.docker.com/reference/dockerfile/#healthcheck
"""

from __future__ import annotations

import contextlib
import os
import time

from builder.container.records import Record
from layers.errors import PybuildError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_KEPT = 5
_MAX_OUTPUT_BYTES = 4096
_LOOK_S = 0.02
_DEFAULTS = {"Interval": 30e9, "Timeout": 30e9, "StartPeriod": 0, "StartInterval": 5e9, "Retries": 3}


class Health:
    """One container's health. `due_at` (monotonic) tells when `step` is to be called next."""

    def __init__(self, test: list[str], config: dict[str, Any]) -> None:
        values = {key: float(config.get(key) or default) for key, default in _DEFAULTS.items()}
        self._test = test
        self._interval_s = max(0.01, values["Interval"] / 1e9)
        self._timeout_s = max(0.01, values["Timeout"] / 1e9)
        self._start_interval_s = max(0.01, min(values["StartInterval"] / 1e9, self._interval_s))
        self._retries = int(values["Retries"])
        now = time.monotonic()
        self._start_until = now + values["StartPeriod"] / 1e9
        self.due_at = now + self._gap(now)
        self._status = "starting"
        self._streak = 0
        self._log: list[dict[str, Any]] = []
        self._entered: Any = None
        self._output = -1
        self._text = b""
        self._began = 0.0

    def _gap(self, now: float) -> float:
        return self._start_interval_s if now < self._start_until else self._interval_s

    def document(self) -> dict[str, Any]:
        """As `inspect` shows it."""
        return {"Status": self._status, "FailingStreak": self._streak, "Log": list(self._log)}

    def step(self, record: Record) -> None:
        """Start a check that is due, or look after the one that runs."""
        now = time.monotonic()
        if self._entered is None:
            self._begin(record, now)
            return
        self._listen()
        import select

        poller = select.poll()
        poller.register(self._entered, select.POLLIN | select.POLLHUP)
        if poller.poll(0):
            self._judge(self._entered.wait())
        elif now - self._began > self._timeout_s:
            self._entered.signal(9)
            self._entered.wait()
            self._text = f"Health check exceeded timeout ({self._timeout_s:g}s)".encode()
            self._judge(-1)
        else:
            self.due_at = now + _LOOK_S

    def _begin(self, record: Record, now: float) -> None:
        from builder.container import inside
        from builder.sandbox import enter

        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write, True)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._text, self._began = b"", now
        try:
            with inside.first_process(record) as (pid, pidfd):
                args = ("/bin/sh", "-c", self._test[1]) if self._test[0] == "CMD-SHELL" else tuple(self._test[1:])
                self._entered = enter.spawn(pid, pidfd, inside.command(record, args), null, write, write)
            self._output = read
            self.due_at = now + _LOOK_S
        except PybuildError as e:
            os.close(read)
            self._text = str(e).encode()
            self._judge(-1)
        finally:
            os.close(write)
            os.close(null)

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._output, 4096):
                self._text = (self._text + data)[:_MAX_OUTPUT_BYTES]

    def _judge(self, status: int) -> None:
        if self._output >= 0:
            self._listen()
            os.close(self._output)
            self._output = -1
        self._entered = None
        now = time.monotonic()
        entry = {"ExitCode": status, "Output": self._text.decode(errors="replace"), "End": time.time_ns()}
        self._log = [*self._log, entry][-_KEPT:]
        if status == 0:
            self._status, self._streak = "healthy", 0
            self._start_until = now
        elif now >= self._start_until:
            self._streak += 1
            if self._streak >= self._retries:
                self._status = "unhealthy"
        self.due_at = now + self._gap(now)

    def close(self) -> None:
        """End a check that runs: the container has ended."""
        if self._entered is not None:
            self._entered.signal(9)
            self._entered.wait()
            self._entered = None
        if self._output >= 0:
            os.close(self._output)
            self._output = -1


def health_of(settings: dict[str, Any]) -> Health | None:
    """The health check of a container, if it has one."""
    config = settings["config"].get("Healthcheck")
    test = config.get("Test") if isinstance(config, dict) else None
    if not isinstance(test, list) or len(test) < 2 or test[0] not in {"CMD", "CMD-SHELL"}:
        return None
    return Health([str(word) for word in test], config)
