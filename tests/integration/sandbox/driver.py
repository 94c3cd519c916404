"""Runs sandboxes for a test: in the test's process as root, or in one of its own as an ordinary user.

As a program it reads pickled requests from stdin and writes pickled `Outcome`s to stdout. It must
not import anything of the tests: an ordinary user cannot read the checkout.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple


class Outcome(NamedTuple):
    """How a run ended: `status` is the `ExitStatus` as a tuple, `error` what `SandboxError` said."""

    status: tuple[Any, ...] | None
    out: str
    err: str
    error: tuple[str, str, int | None, str | None] | None = None

    @property
    def code(self) -> int:
        assert self.status is not None, self.error
        code: int = self.status[0]
        return code


def run(launcher: Any, request: dict[str, Any]) -> Outcome:
    """One sandbox to its end, its output taken through pipes."""
    from builder.errors import SandboxError
    from builder.sandbox.spec import SandboxSpec

    spec = SandboxSpec(**request)
    output: dict[str, bytes] = {}
    ends = {}
    threads = []
    for name in ("out", "err"):
        read, write = os.pipe()
        ends[name] = write

        def drain(name: str = name, read: int = read) -> None:
            with os.fdopen(read, "rb") as stream:
                output[name] = stream.read()

        threads.append(threading.Thread(target=drain))
    status = None
    error = None
    for thread in threads:
        thread.start()
    running = None
    try:
        running = launcher.run(spec, stdout_fd=ends["out"], stderr_fd=ends["err"])
    except SandboxError as e:
        error = (str(e), e.operation, e.errno, e.path)
    for end in ends.values():
        os.close(end)
    try:
        if running is not None:
            status = tuple(running.wait())
    except SandboxError as e:
        error = (str(e), e.operation, e.errno, e.path)
    for thread in threads:
        thread.join()
    if running is not None:
        running.close()
    return Outcome(status, output["out"].decode(errors="replace"), output["err"].decode(errors="replace"), error)


def send(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("=I", len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    size = stream.read(4)
    return pickle.loads(stream.read(struct.unpack("=I", size)[0])) if size else None


def main(subordinate: bool) -> None:
    from builder.sandbox import userns
    from builder.sandbox.launcher import Launcher

    identity = userns.enter(subordinate=subordinate)
    with Launcher.start() as launcher:
        send(sys.stdout.buffer, tuple(identity))
        while (request := receive(sys.stdin.buffer)) is not None:
            if "mkdir" in request:
                for path in request["mkdir"]:
                    Path(path).mkdir(parents=True)
                send(sys.stdout.buffer, None)
            else:
                send(sys.stdout.buffer, tuple(run(launcher, request)))


if __name__ == "__main__":
    main(sys.argv[1] == "subordinate")
